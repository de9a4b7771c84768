//! The names of a model's parts.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One linear layer of one block: where an adapter can be attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Site {
    /// The block, from 0.
    pub layer: usize,
    /// Which of its linear layers.
    pub projection: Projection,
}

/// The linear layers of a block, in the order of the forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Projection {
    /// D to H*E.
    Query,
    /// D to G*E.
    Key,
    /// D to G*E.
    Value,
    /// H*E to D.
    Output,
    /// D to F, before the activation.
    Gate,
    /// D to F, multiplied by the activated gate.
    Up,
    /// F to D.
    Down,
}

impl Projection {
    /// All of them, in the order of the forward pass.
    pub const ALL: [Projection; 7] = [
        Projection::Query,
        Projection::Key,
        Projection::Value,
        Projection::Output,
        Projection::Gate,
        Projection::Up,
        Projection::Down,
    ];

    /// This projection of a block.
    pub fn of(self, layer: usize) -> Site {
        Site { layer, projection: self }
    }
}

/// One tensor of a model. The numbers count the blocks from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Parameter {
    /// The token table, `[V, D]`.
    Embedding,
    /// Gain of the norm before the attention, `[D]`.
    AttentionNorm(usize),
    /// Gain of the norm before the feed-forward layer, `[D]`.
    FeedForwardNorm(usize),
    /// Weight of a linear layer, `[N, K]`.
    Weight(Site),
    /// Bias of a linear layer, `[N]`.
    Bias(Site),
    /// Gain of the norm before the head, `[D]`.
    FinalNorm,
    /// The vocabulary projection, `[V, D]`; absent where the embedding is used in its place.
    Head,
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} of layer {}", self.projection, self.layer)
    }
}
