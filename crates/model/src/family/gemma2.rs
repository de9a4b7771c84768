//! Gemma 2: gains beside a 1, norms around each part, scaled embeddings, soft caps, alternating windows.
//!
//! Sources: transformers' `Gemma2Config`, arXiv 2408.00118.

use lora_sb_kernels::{Activation, RmsGain};

use super::decoder::{self, ATTENTION, Defaults};
use super::{Family, Fields, Names, Table};
use crate::config::{NormKind, NormPlacement};
use crate::{Config, Result};

pub(super) const TABLE: Table =
    Table { model_type: "gemma2", architecture: "Gemma2ForCausalLM", names: NAMES, read };

pub(super) const NAMES: Names = Names {
    attention_output_norm: "post_attention_layernorm",
    feed_forward_norm: "pre_feedforward_layernorm",
    feed_forward_output_norm: "post_feedforward_layernorm",
    ..decoder::NAMES
};

pub(super) const DEFAULTS: Defaults = Defaults {
    head_dim: Some(256),
    num_key_value_heads: Some(4),
    max_position_embeddings: 8192,
    activation: ("hidden_activation", Activation::GeluTanh),
    tie_word_embeddings: true,
    bos_token_id: Some(2),
    eos_token_id: Some(1),
    pad_token_id: Some(0),
    ..Defaults::LLAMA
};

fn read(fields: &Fields) -> Result<Config> {
    let mut config = decoder::read_rotated(fields, Family::Gemma2, &DEFAULTS)?;
    change(fields, &mut config, [Some(50.0), Some(30.0)])?;
    // Every second block slides, the first included.
    let slides = decoder::sliding_layers(fields, config.num_hidden_layers, |layer| layer.is_multiple_of(2))?;
    config.blocks = decoder::blocks(fields, decoder::window(fields, Some(4096))?, &slides)?;
    Ok(config)
}

/// What sets Gemma apart from Llama; `caps` are the defaults of the attention's and the logits' soft cap.
pub(super) fn change(fields: &Fields, config: &mut Config, caps: [Option<f64>; 2]) -> Result<()> {
    if fields.truth("use_bidirectional_attention")?.unwrap_or(false) {
        return Err(fields.mismatch("use_bidirectional_attention", "false: decoders see only what is before"));
    }
    config.norm = NormKind::Rms(RmsGain::OnePlusWeight);
    config.norm_placement = NormPlacement::Around;
    config.embedding_scale = (config.hidden_size as f64).sqrt();
    let scalar = fields.positive("query_pre_attn_scalar")?.unwrap_or(256.0);
    config.attention_scale = scalar.sqrt().recip();
    let [attention_cap, logit_cap] = caps;
    config.attention_soft_cap =
        fields.or_default("attn_logit_softcapping", attention_cap, Fields::positive)?;
    config.logit_soft_cap = fields.or_default("final_logit_softcapping", logit_cap, Fields::positive)?;
    if fields.truth("attention_bias")?.unwrap_or(false) {
        config.biased.extend(ATTENTION);
    }
    Ok(())
}
