//! What the decoders have in common: Llama's keys and names, and the rules of sliding windows.

use lora_sb_kernels::{Activation, Mask, RmsGain};

use super::{Family, Fields, Names, rope};
use crate::config::{BlockKind, FeedForward, NormKind, NormPlacement, Positions, Task};
use crate::{Config, Projection, Result};

/// What transformers takes where a `config.json` lacks a key.
pub(super) struct Defaults {
    /// `None`: `hidden_size / num_attention_heads`.
    pub(super) head_dim: Option<usize>,
    /// `None`: `num_attention_heads`.
    pub(super) num_key_value_heads: Option<usize>,
    pub(super) max_position_embeddings: usize,
    pub(super) rms_norm_eps: f64,
    /// The key that names the activation, and its default.
    pub(super) activation: (&'static str, Activation),
    pub(super) tie_word_embeddings: bool,
    pub(super) bos_token_id: Option<u32>,
    pub(super) eos_token_id: Option<u32>,
    pub(super) pad_token_id: Option<u32>,
}

impl Defaults {
    /// Those of transformers' `LlamaConfig`.
    pub(super) const LLAMA: Defaults = Defaults {
        head_dim: None,
        num_key_value_heads: None,
        max_position_embeddings: 2048,
        rms_norm_eps: 1e-6,
        activation: ("hidden_act", Activation::Silu),
        tie_word_embeddings: false,
        bos_token_id: Some(1),
        eos_token_id: Some(2),
        pad_token_id: None,
    };
}

/// The linear layers of a block.
const PROJECTIONS: [Projection; 7] = [
    Projection::Query,
    Projection::Key,
    Projection::Value,
    Projection::Output,
    Projection::Gate,
    Projection::Up,
    Projection::Down,
];

/// The linear layers of the attention.
pub(super) const ATTENTION: [Projection; 4] =
    [Projection::Query, Projection::Key, Projection::Value, Projection::Output];

/// Llama's names.
pub(super) const NAMES: Names = Names {
    base: "model.",
    embedding: "embed_tokens",
    layers: "layers",
    attention_norm: "input_layernorm",
    feed_forward_norm: "post_attention_layernorm",
    projections: [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "",
        "mlp.down_proj",
    ],
    final_norm: "norm",
    head: "lm_head",
    ignored: &["*rotary_emb.inv_freq"],
    ..Names::NONE
};

/// The keys that all decoders have, as a Llama without biases; a family changes what differs.
pub(super) fn read(fields: &Fields, family: Family, defaults: &Defaults) -> Result<Config> {
    super::refuse_other_heads(
        fields,
        &["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"],
    )?;
    let hidden_size = fields.required_size("hidden_size")?;
    let num_hidden_layers = fields.required_size("num_hidden_layers")?;
    let num_attention_heads = fields.required_size("num_attention_heads")?;
    let head_dim = match fields.size("head_dim")?.or(defaults.head_dim) {
        Some(head_dim) => head_dim,
        None => head_size(fields, hidden_size, num_attention_heads)?,
    };
    let num_key_value_heads =
        fields.or_default("num_key_value_heads", defaults.num_key_value_heads, Fields::size)?;
    let (activation, default_activation) = defaults.activation;
    let positions = fields.size("max_position_embeddings")?;
    Ok(Config {
        family,
        vocab_size: fields.required_size("vocab_size")?,
        hidden_size,
        intermediate_size: fields.required_size("intermediate_size")?,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads: num_key_value_heads.unwrap_or(num_attention_heads),
        head_dim,
        max_position_embeddings: positions.unwrap_or(defaults.max_position_embeddings),
        norm: NormKind::Rms(RmsGain::Weight),
        norm_eps: fields.positive("rms_norm_eps")?.unwrap_or(defaults.rms_norm_eps),
        norm_placement: NormPlacement::Before,
        query_key_norm: false,
        feed_forward: FeedForward::Gated(super::activation(fields, activation, default_activation)?),
        positions: Positions::Rotary { rotary_size: head_dim, rotations: Vec::new() },
        attention_scale: (head_dim as f64).sqrt().recip(),
        attention_soft_cap: None,
        logit_soft_cap: None,
        embedding_scale: 1.0,
        blocks: vec![BlockKind { mask: Mask::Causal, rotation: 0 }; num_hidden_layers],
        projections: PROJECTIONS.to_vec(),
        biased: Vec::new(),
        type_vocab_size: 0,
        task: Task::LanguageModel,
        tie_word_embeddings: fields.truth("tie_word_embeddings")?.unwrap_or(defaults.tie_word_embeddings),
        initializer_range: fields.positive("initializer_range")?.unwrap_or(0.02),
        bos_token_id: fields.token("bos_token_id", defaults.bos_token_id),
        eos_token_ids: fields.tokens("eos_token_id", defaults.eos_token_id),
        pad_token_id: fields.token("pad_token_id", defaults.pad_token_id),
        json: fields.object().clone(),
    })
}

/// The same with one rotation for all blocks and all of a head, where most decoders agree.
pub(super) fn read_rotated(fields: &Fields, family: Family, defaults: &Defaults) -> Result<Config> {
    let mut config = read(fields, family, defaults)?;
    let rotations = vec![rope::read(fields)?];
    config.positions = Positions::Rotary { rotary_size: config.head_dim, rotations };
    Ok(config)
}

/// E where the file does not say it.
pub(super) fn head_size(fields: &Fields, hidden_size: usize, heads: usize) -> Result<usize> {
    if heads > 0 && hidden_size.is_multiple_of(heads) {
        return Ok(hidden_size / heads);
    }
    let expected = format!("a divisor of hidden_size = {hidden_size}, as there is no `head_dim`");
    Err(fields.mismatch("num_attention_heads", &expected))
}

/// `sliding_window`, w: a query sees w keys, its own included. None where the file says null.
pub(super) fn window(fields: &Fields, default: Option<usize>) -> Result<Option<usize>> {
    match fields.or_default("sliding_window", default, Fields::size)? {
        Some(0) => Err(fields.mismatch("sliding_window", "null or a positive number")),
        window => Ok(window),
    }
}

/// The mask of blocks that all have the same.
pub(super) fn mask(window: Option<usize>) -> Mask {
    window.map_or(Mask::Causal, |window| Mask::Sliding { window })
}

/// Which blocks slide: by `layer_types`, or by `default` where the file has no such list.
pub(super) fn sliding_layers(
    fields: &Fields,
    layers: usize,
    default: impl Fn(usize) -> bool,
) -> Result<Vec<bool>> {
    let types = fields.texts("layer_types")?;
    if types.is_empty() {
        return Ok((0..layers).map(default).collect());
    }
    if types.len() != layers {
        let expected = format!("one entry for each of the num_hidden_layers = {layers} layers");
        return Err(fields.mismatch("layer_types", &expected));
    }
    let slides = |name: &str| match name {
        "sliding_attention" => Ok(true),
        "full_attention" => Ok(false),
        _ => Err(fields.mismatch("layer_types", "entries \"full_attention\" or \"sliding_attention\" alone")),
    };
    types.into_iter().map(slides).collect()
}

/// The blocks of a model some of whose layers slide.
pub(super) fn blocks(fields: &Fields, window: Option<usize>, slides: &[bool]) -> Result<Vec<BlockKind>> {
    if slides.contains(&true) && window.is_none() {
        return Err(fields.mismatch("sliding_window", "a positive number, as some layers slide"));
    }
    let kind = |&slides: &bool| BlockKind { mask: mask(window.filter(|_| slides)), rotation: 0 };
    Ok(slides.iter().map(kind).collect())
}
