//! What a model is, read from `config.json`: sizes, and which of the known variants each part is.

use lora_sb_kernels::{Activation, AttentionShape, Mask, RmsGain, RopeScaling};
use serde_json::{Map, Value};

use crate::family::{self, Family, Fields};
use crate::{Error, Norm, Parameter, Projection, Result, Site};

/// The architecture of one model. Made by a [`Family`]'s table out of a `config.json`; the fields carry the
/// names of that file.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Config {
    /// Whose weight names and defaults hold.
    pub family: Family,
    /// V.
    pub vocab_size: usize,
    /// D.
    pub hidden_size: usize,
    /// F.
    pub intermediate_size: usize,
    /// The number of blocks.
    pub num_hidden_layers: usize,
    /// H.
    pub num_attention_heads: usize,
    /// G.
    pub num_key_value_heads: usize,
    /// E.
    pub head_dim: usize,
    /// The longest sequence of the pre-training, in tokens.
    pub max_position_embeddings: usize,
    /// How every norm of the residual stream is computed.
    pub norm: NormKind,
    /// Added to the mean square or the variance in every norm.
    pub norm_eps: f64,
    /// Where a block's norms stand.
    pub norm_placement: NormPlacement,
    /// Whether each head's query and key are normed before they are rotated.
    pub query_key_norm: bool,
    /// The feed-forward layer.
    pub feed_forward: FeedForward,
    /// How a token's place in its sequence enters.
    pub positions: Positions,
    /// What the dot products of queries and keys are multiplied by, usually 1/sqrt(E).
    pub attention_scale: f64,
    /// The cap c of attention scores, `c tanh(s / c)`.
    pub attention_soft_cap: Option<f64>,
    /// The cap c of logits, `c tanh(z / c)`.
    pub logit_soft_cap: Option<f64>,
    /// What the looked-up embeddings are multiplied by.
    pub embedding_scale: f64,
    /// One entry for each block.
    pub blocks: Vec<BlockKind>,
    /// The linear layers of a block, in the order of the forward pass.
    pub projections: Vec<Projection>,
    /// The linear layers that have a bias.
    pub biased: Vec<Projection>,
    /// The number of token types; 0 where the model knows none.
    pub type_vocab_size: usize,
    /// What the head computes.
    pub task: Task,
    /// Whether the head uses the embedding's tensor.
    pub tie_word_embeddings: bool,
    /// Standard deviation of random weights.
    pub initializer_range: f64,
    /// The first token of a text, where the model has one.
    pub bos_token_id: Option<u32>,
    /// The tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// The token of padding. transformers gives its row of the embedding no gradient from being looked up,
    /// and so does this model.
    pub pad_token_id: Option<u32>,
    /// The whole file, for writing it again.
    pub(crate) json: Map<String, Value>,
}

/// How a norm is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// Root mean square with a gain.
    Rms(RmsGain),
    /// Mean and variance with a gain and a shift.
    Layer,
}

/// Where a block's norms stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlacement {
    /// `x + f(norm(x))`: Llama and most decoders.
    Before,
    /// `x + norm(f(norm(x)))`: Gemma 2 and 3.
    Around,
    /// `norm(x + f(x))`: BERT.
    Behind,
}

/// The feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeedForward {
    /// `down(act(gate(x)) * up(x))`.
    Gated(Activation),
    /// `down(act(up(x)))`.
    Plain(Activation),
}

/// How a token's place enters.
#[derive(Clone, Debug, PartialEq)]
pub enum Positions {
    /// Queries and keys are rotated.
    Rotary {
        /// How many elements of a head turn, from its first on.
        rotary_size: usize,
        /// The rotations that blocks choose from by [`BlockKind::rotation`].
        rotations: Vec<Rotation>,
    },
    /// A learned vector is added to each token's embedding.
    Learned {
        /// The row of the first position.
        offset: usize,
    },
}

/// One course of rotation frequencies.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotation {
    /// Base of the frequencies.
    pub theta: f64,
    /// Their stretching.
    pub scaling: RopeScaling,
}

/// What distinguishes one block from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockKind {
    /// Which keys a query sees.
    pub mask: Mask,
    /// Which of the rotations turns its queries and keys.
    pub rotation: usize,
}

/// What the head computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// The next token.
    LanguageModel,
    /// One of `labels` classes for a sequence, from its first token.
    Classification {
        /// C, at least 2.
        labels: usize,
    },
    /// One number for a sequence, from its first token.
    Regression,
}

impl Config {
    /// Reads the bytes of a `config.json`; no weights are needed.
    ///
    /// # Errors
    /// Where a key is missing, or asks for something that is not computed here; the key is named.
    pub fn from_json(json: &[u8]) -> Result<Config> {
        Config::from_named(json, "config.json")
    }

    /// Reads the `config.json` of a model directory.
    ///
    /// # Errors
    /// As [`Config::from_json`]; where the file cannot be read.
    pub fn from_dir(dir: &std::path::Path) -> Result<Config> {
        crate::load::config(dir)
    }

    /// The same, with the file's name for messages.
    pub(crate) fn from_named(json: &[u8], file: &str) -> Result<Config> {
        let config = family::read(&Fields::parse(json, file)?)?;
        config.check(file)?;
        Ok(config)
    }

    /// The model's configuration as a `config.json`, unknown keys included.
    pub fn to_json(&self) -> Value {
        Value::Object(self.json.clone())
    }

    /// Every tensor, in the order of the forward pass.
    pub fn parameters(&self) -> Vec<Parameter> {
        let mut parameters = vec![Parameter::Embedding];
        if matches!(self.positions, Positions::Learned { .. }) {
            parameters.push(Parameter::PositionEmbedding);
        }
        if self.type_vocab_size > 0 {
            parameters.push(Parameter::TokenTypeEmbedding);
        }
        if self.norm_placement == NormPlacement::Behind {
            self.push_norm(&mut parameters, Norm::Embedding);
        }
        for layer in 0..self.num_hidden_layers {
            self.push_block(&mut parameters, layer);
        }
        if self.norm_placement != NormPlacement::Behind {
            self.push_norm(&mut parameters, Norm::Final);
        }
        match self.task {
            Task::LanguageModel if self.tie_word_embeddings => {}
            Task::LanguageModel => parameters.push(Parameter::Head),
            Task::Classification { .. } | Task::Regression => parameters.extend([
                Parameter::Pooler,
                Parameter::PoolerBias,
                Parameter::Classifier,
                Parameter::ClassifierBias,
            ]),
        }
        parameters
    }

    fn push_norm(&self, parameters: &mut Vec<Parameter>, norm: Norm) {
        parameters.push(Parameter::Gain(norm));
        if self.norm == NormKind::Layer && !matches!(norm, Norm::Query(_) | Norm::Key(_)) {
            parameters.push(Parameter::Shift(norm));
        }
    }

    fn push_block(&self, parameters: &mut Vec<Parameter>, layer: usize) {
        let (before, around) =
            (self.norm_placement != NormPlacement::Behind, self.norm_placement == NormPlacement::Around);
        let (attention, feed_forward): (Vec<Projection>, Vec<Projection>) =
            self.projections.iter().partition(|projection| projection.of_attention());
        if before {
            self.push_norm(parameters, Norm::Attention(layer));
        }
        for projection in attention {
            if projection == Projection::Output && self.query_key_norm {
                self.push_norm(parameters, Norm::Query(layer));
                self.push_norm(parameters, Norm::Key(layer));
            }
            self.push_linear(parameters, projection.of(layer));
        }
        if around {
            self.push_norm(parameters, Norm::AttentionOutput(layer));
        }
        self.push_norm(parameters, if before { Norm::FeedForward(layer) } else { Norm::Attention(layer) });
        for projection in feed_forward {
            self.push_linear(parameters, projection.of(layer));
        }
        match self.norm_placement {
            NormPlacement::Before => {}
            NormPlacement::Around => self.push_norm(parameters, Norm::FeedForwardOutput(layer)),
            NormPlacement::Behind => self.push_norm(parameters, Norm::FeedForward(layer)),
        }
    }

    fn push_linear(&self, parameters: &mut Vec<Parameter>, site: Site) {
        parameters.push(Parameter::Weight(site));
        if self.biased.contains(&site.projection) {
            parameters.push(Parameter::Bias(site));
        }
    }

    /// Every linear layer of the blocks, in the order of the forward pass.
    pub fn sites(&self) -> Vec<Site> {
        (0..self.num_hidden_layers)
            .flat_map(|layer| self.projections.iter().map(move |projection| projection.of(layer)))
            .collect()
    }

    /// The (out N, in K) sizes of a linear layer.
    pub fn site_shape(&self, site: Site) -> (usize, usize) {
        let (d, f) = (self.hidden_size, self.intermediate_size);
        let (queries, keys) =
            (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        match site.projection {
            Projection::Query => (queries, d),
            Projection::Key | Projection::Value => (keys, d),
            Projection::QueryKeyValue => (queries + 2 * keys, d),
            Projection::Output => (d, queries),
            Projection::Gate | Projection::Up => (f, d),
            Projection::GateUp => (2 * f, d),
            Projection::Down => (d, f),
        }
    }

    /// The shape of a tensor.
    pub fn parameter_shape(&self, parameter: Parameter) -> Vec<usize> {
        let d = self.hidden_size;
        match parameter {
            Parameter::Embedding | Parameter::Head => vec![self.vocab_size, d],
            Parameter::PositionEmbedding => vec![self.max_position_embeddings, d],
            Parameter::TokenTypeEmbedding => vec![self.type_vocab_size, d],
            Parameter::Gain(Norm::Query(_) | Norm::Key(_)) => vec![self.head_dim],
            Parameter::Gain(_) | Parameter::Shift(_) | Parameter::PoolerBias => vec![d],
            Parameter::Weight(site) => {
                let (n, k) = self.site_shape(site);
                vec![n, k]
            }
            Parameter::Bias(site) => vec![self.site_shape(site).0],
            Parameter::Pooler => vec![d, d],
            Parameter::Classifier => vec![self.labels(), d],
            Parameter::ClassifierBias => vec![self.labels()],
        }
    }

    /// C, the outputs of the classification head: 1 for a regression, 0 for a language model.
    pub fn labels(&self) -> usize {
        match self.task {
            Task::LanguageModel => 0,
            Task::Classification { labels } => labels,
            Task::Regression => 1,
        }
    }

    /// The number of elements of all tensors; a tied head counts once.
    pub fn parameter_count(&self) -> usize {
        let shapes = self.parameters().into_iter().map(|parameter| self.parameter_shape(parameter));
        shapes.map(|shape| shape.iter().product::<usize>()).sum()
    }

    /// A tensor's name in the weight files, as `model.layers.0.self_attn.q_proj.weight`.
    pub fn name(&self, parameter: Parameter) -> String {
        self.family.names().parameter(parameter)
    }

    /// A linear layer's name, as `model.layers.0.self_attn.q_proj`.
    pub fn module(&self, site: Site) -> String {
        self.family.names().module(site)
    }

    /// Heads and mask of one block's attention.
    pub(crate) fn attention_shape(&self, layer: usize) -> AttentionShape {
        AttentionShape {
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads,
            head_size: self.head_dim,
            scale: self.attention_scale as f32,
            mask: self.blocks[layer].mask,
            soft_cap: self.attention_soft_cap.map(|cap| cap as f32),
        }
    }

    fn check(&self, file: &str) -> Result<()> {
        let failed = |key: &str, expected: String, found: usize| {
            Err(Error::Config { file: file.into(), key: key.into(), expected, found: found.to_string() })
        };
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        for (key, size) in sizes {
            if size == 0 {
                return failed(key, "a positive number".into(), 0);
            }
        }
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if !heads.is_multiple_of(kv_heads) {
            return failed(
                "num_key_value_heads",
                format!("a divisor of num_attention_heads = {heads}"),
                kv_heads,
            );
        }
        if self.head_dim == 0
            || matches!(self.positions, Positions::Rotary { .. }) && !self.head_dim.is_multiple_of(2)
        {
            return failed(
                "head_dim",
                "a positive even number (halves of a head are rotated)".into(),
                self.head_dim,
            );
        }
        Ok(())
    }
}
