//! A model's parts: linear layers, norms, tensors.

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
    /// D to (H+2G)*E: query, key and value in one weight, in this order.
    QueryKeyValue,
    /// H*E to D.
    Output,
    /// D to F, before the activation.
    Gate,
    /// D to F: multiplied by the activated gate, or activated itself where there is no gate.
    Up,
    /// D to 2F: gate and up in one weight, in this order.
    GateUp,
    /// F to D.
    Down,
}

impl Projection {
    /// All of them, in the order of the forward pass; a model has [some](crate::Config::projections).
    pub const ALL: [Projection; 9] = [
        Projection::Query,
        Projection::Key,
        Projection::Value,
        Projection::QueryKeyValue,
        Projection::Output,
        Projection::Gate,
        Projection::Up,
        Projection::GateUp,
        Projection::Down,
    ];

    /// Whether it is a part of the attention, and not of the feed-forward layer.
    pub fn of_attention(self) -> bool {
        self <= Projection::Output
    }

    /// This projection of a block.
    pub fn of(self, layer: usize) -> Site {
        Site { layer, projection: self }
    }
}

/// One norm of a model. The numbers count the blocks from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Norm {
    /// Of the embedded tokens, before the first block; `[D]`.
    Embedding,
    /// Before the attention, or behind it and its residual where norms stand behind; `[D]`.
    Attention(usize),
    /// Of what the attention adds to the residual stream; `[D]`.
    AttentionOutput(usize),
    /// Of each head's query; `[E]`.
    Query(usize),
    /// Of each head's key; `[E]`.
    Key(usize),
    /// Before the feed-forward layer, or behind it and its residual where norms stand behind; `[D]`.
    FeedForward(usize),
    /// Of what the feed-forward layer adds to the residual stream; `[D]`.
    FeedForwardOutput(usize),
    /// Before the head; `[D]`.
    Final,
}

/// One tensor of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Parameter {
    /// The token table, `[V, D]`.
    Embedding,
    /// The table of learned positions, `[P, D]`.
    PositionEmbedding,
    /// The table of token types, `[2, D]` or what the configuration says.
    TokenTypeEmbedding,
    /// A norm's gain.
    Gain(Norm),
    /// What a layer norm adds behind its gain.
    Shift(Norm),
    /// Weight of a linear layer, `[N, K]`.
    Weight(Site),
    /// Bias of a linear layer, `[N]`.
    Bias(Site),
    /// The vocabulary projection, `[V, D]`; absent where the embedding is used in its place.
    Head,
    /// The classification head's first layer, `[D, D]`.
    Pooler,
    /// Its bias, `[D]`.
    PoolerBias,
    /// The classification head's last layer, `[C, D]` for C labels.
    Classifier,
    /// Its bias, `[C]`.
    ClassifierBias,
}

impl Parameter {
    /// Whether it belongs to a classification head, which is trained beside an adapter.
    pub fn of_classification(self) -> bool {
        self >= Parameter::Pooler
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} of layer {}", self.projection, self.layer)
    }
}
