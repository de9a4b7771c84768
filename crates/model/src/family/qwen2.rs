//! Qwen 2 and 2.5: a Llama with biases at query, key and value.
//!
//! Sources: transformers' `Qwen2Config`, arXiv 2407.10671, 2412.15115.

use super::decoder::{self, Defaults};
use super::{Family, Fields, Table};
use crate::{Config, Projection, Result};

pub(super) const TABLE: Table =
    Table { model_type: "qwen2", architecture: "Qwen2ForCausalLM", names: decoder::NAMES, read };

pub(super) const DEFAULTS: Defaults = Defaults {
    num_key_value_heads: Some(32),
    max_position_embeddings: 32_768,
    bos_token_id: None,
    eos_token_id: None,
    ..Defaults::LLAMA
};

fn read(fields: &Fields) -> Result<Config> {
    let mut config = decoder::read_rotated(fields, Family::Qwen2, &DEFAULTS)?;
    slide(fields, &mut config)?;
    config.biased = vec![Projection::Query, Projection::Key, Projection::Value];
    Ok(config)
}

/// The window counts only with `use_sliding_window`; without `layer_types` the blocks from
/// `max_window_layers` on slide.
pub(super) fn slide(fields: &Fields, config: &mut Config) -> Result<()> {
    let uses = fields.truth("use_sliding_window")?.unwrap_or(false);
    let window = if uses { decoder::window(fields, Some(4096))? } else { None };
    let first = fields.size("max_window_layers")?.unwrap_or(28);
    let slides = decoder::sliding_layers(fields, config.num_hidden_layers, |layer| {
        window.is_some() && layer >= first
    })?;
    if !uses && slides.contains(&true) {
        return Err(fields.mismatch("use_sliding_window", "true, as some of `layer_types` slide"));
    }
    config.blocks = decoder::blocks(fields, window, &slides)?;
    Ok(())
}
