//! What BERT and RoBERTa have in common.
//!
//! Dropout rates are not read: a frozen encoder runs without dropout, and an adapter brings its own.

use lora_sb_kernels::{Activation, Mask};

use super::{Family, Fields, Names, decoder};
use crate::config::{BlockKind, FeedForward, NormKind, NormPlacement, Positions};
use crate::{Config, Projection, Result, task};

/// The linear layers of a block; all have biases.
const PROJECTIONS: [Projection; 6] = [
    Projection::Query,
    Projection::Key,
    Projection::Value,
    Projection::Output,
    Projection::Up,
    Projection::Down,
];

/// BERT's names within the base model.
pub(super) const NAMES: Names = Names {
    embedding: "embeddings.word_embeddings",
    position_embedding: "embeddings.position_embeddings",
    token_type_embedding: "embeddings.token_type_embeddings",
    embedding_norm: "embeddings.LayerNorm",
    layers: "encoder.layer",
    attention_norm: "attention.output.LayerNorm",
    feed_forward_norm: "output.LayerNorm",
    projections: [
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "",
        "attention.output.dense",
        "",
        "intermediate.dense",
        "",
        "output.dense",
    ],
    ..Names::NONE
};

/// All keys; `pad` is the default of `pad_token_id`. Positions begin at row 0.
pub(super) fn read(fields: &Fields, family: Family, pad: u32) -> Result<Config> {
    super::refuse_other_heads(fields, &["ForTokenClassification", "ForMultipleChoice"])?;
    if fields.text("position_embedding_type")?.is_some_and(|name| name != "absolute") {
        return Err(fields.mismatch("position_embedding_type", "\"absolute\""));
    }
    for key in ["is_decoder", "add_cross_attention"] {
        if fields.truth(key)?.unwrap_or(false) {
            return Err(fields.mismatch(key, "false: only encoders are read"));
        }
    }
    let hidden_size = fields.required_size("hidden_size")?;
    let num_hidden_layers = fields.required_size("num_hidden_layers")?;
    let num_attention_heads = fields.required_size("num_attention_heads")?;
    let head_dim = decoder::head_size(fields, hidden_size, num_attention_heads)?;
    let type_vocab_size = fields.size("type_vocab_size")?.unwrap_or(2);
    if type_vocab_size == 0 {
        return Err(fields.mismatch("type_vocab_size", "a positive number"));
    }
    Ok(Config {
        family,
        vocab_size: fields.required_size("vocab_size")?,
        hidden_size,
        intermediate_size: fields.required_size("intermediate_size")?,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads: num_attention_heads,
        head_dim,
        max_position_embeddings: fields.size("max_position_embeddings")?.unwrap_or(512),
        norm: NormKind::Layer,
        norm_eps: fields.positive("layer_norm_eps")?.unwrap_or(1e-12),
        norm_placement: NormPlacement::Behind,
        query_key_norm: false,
        feed_forward: FeedForward::Plain(super::activation(fields, "hidden_act", Activation::Gelu)?),
        positions: Positions::Learned { offset: 0 },
        attention_scale: (head_dim as f64).sqrt().recip(),
        attention_soft_cap: None,
        logit_soft_cap: None,
        embedding_scale: 1.0,
        blocks: vec![BlockKind { mask: Mask::Full, rotation: 0 }; num_hidden_layers],
        projections: PROJECTIONS.to_vec(),
        biased: PROJECTIONS.to_vec(),
        type_vocab_size,
        task: task::read(fields)?,
        // Of the pre-training's own head, which is not read.
        tie_word_embeddings: false,
        initializer_range: fields.positive("initializer_range")?.unwrap_or(0.02),
        bos_token_id: fields.token("bos_token_id", None),
        eos_token_ids: fields.tokens("eos_token_id", None),
        pad_token_id: fields.token("pad_token_id", Some(pad)),
        json: fields.object().clone(),
    })
}
