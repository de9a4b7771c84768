//! The text models of Gemma 3: Gemma 2 with norms of each head's query and key in place of the soft caps,
//! and another rotation in the blocks that slide.
//!
//! Sources: transformers' `Gemma3TextConfig`, arXiv 2503.19786.

use super::decoder::{self, Defaults};
use super::{Family, Fields, Names, Table, gemma2, rope};
use crate::config::Positions;
use crate::{Config, Result};

pub(super) const TABLE: Table = Table {
    model_type: "gemma3_text",
    architecture: "Gemma3ForCausalLM",
    names: Names { query_norm: "self_attn.q_norm", key_norm: "self_attn.k_norm", ..gemma2::NAMES },
    read,
};

const DEFAULTS: Defaults = Defaults { max_position_embeddings: 131_072, ..gemma2::DEFAULTS };

fn read(fields: &Fields) -> Result<Config> {
    let mut config = decoder::read(fields, Family::Gemma3Text, &DEFAULTS)?;
    gemma2::change(fields, &mut config, [None, None])?;
    config.query_key_norm = true;
    // Every sixth block sees all.
    let pattern = match fields.size("sliding_window_pattern")? {
        Some(0) => return Err(fields.mismatch("sliding_window_pattern", "a positive number")),
        pattern => pattern.unwrap_or(6),
    };
    let slides = decoder::sliding_layers(fields, config.num_hidden_layers, |layer| {
        !(layer + 1).is_multiple_of(pattern)
    })?;
    config.blocks = decoder::blocks(fields, decoder::window(fields, Some(4096))?, &slides)?;
    for (block, slides) in config.blocks.iter_mut().zip(slides) {
        block.rotation = usize::from(slides);
    }
    let rotations = rope::read_by_layer_type(fields, [1e6, 1e4])?;
    config.positions = Positions::Rotary { rotary_size: config.head_dim, rotations };
    Ok(config)
}
