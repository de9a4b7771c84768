//! What a model is, read from `config.json`: sizes, and which of the known variants each part is.

use lora_sb_kernels::{Activation, AttentionShape, Mask, RopeScaling};
use serde_json::{Map, Value};

use crate::family::{self, Family, Fields};
use crate::{Error, Parameter, Projection, Result, Site};

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
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// The gate's nonlinearity.
    pub activation: Activation,
    /// Base of the rotation frequencies.
    pub rope_theta: f64,
    /// Their stretching.
    pub rope_scaling: RopeScaling,
    /// Which keys a query sees.
    pub mask: Mask,
    /// The linear layers that have a bias.
    pub biased: Vec<Projection>,
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
        for layer in 0..self.num_hidden_layers {
            parameters.push(Parameter::AttentionNorm(layer));
            for projection in Projection::ALL {
                if projection == Projection::Gate {
                    parameters.push(Parameter::FeedForwardNorm(layer));
                }
                parameters.push(Parameter::Weight(projection.of(layer)));
                if self.biased.contains(&projection) {
                    parameters.push(Parameter::Bias(projection.of(layer)));
                }
            }
        }
        parameters.push(Parameter::FinalNorm);
        if !self.tie_word_embeddings {
            parameters.push(Parameter::Head);
        }
        parameters
    }

    /// Every linear layer, in the order of the forward pass.
    pub fn sites(&self) -> Vec<Site> {
        (0..self.num_hidden_layers)
            .flat_map(|layer| Projection::ALL.map(|projection| projection.of(layer)))
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
            Projection::Output => (d, queries),
            Projection::Gate | Projection::Up => (f, d),
            Projection::Down => (d, f),
        }
    }

    /// The shape of a tensor.
    pub fn parameter_shape(&self, parameter: Parameter) -> Vec<usize> {
        match parameter {
            Parameter::Embedding | Parameter::Head => vec![self.vocab_size, self.hidden_size],
            Parameter::AttentionNorm(_) | Parameter::FeedForwardNorm(_) | Parameter::FinalNorm => {
                vec![self.hidden_size]
            }
            Parameter::Weight(site) => {
                let (n, k) = self.site_shape(site);
                vec![n, k]
            }
            Parameter::Bias(site) => vec![self.site_shape(site).0],
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

    /// Heads and mask of the attention.
    pub(crate) fn attention_shape(&self) -> AttentionShape {
        AttentionShape {
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads,
            head_size: self.head_dim,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            mask: self.mask,
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
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            return failed(
                "head_dim",
                "a positive even number (halves of a head are rotated)".into(),
                self.head_dim,
            );
        }
        Ok(())
    }
}
