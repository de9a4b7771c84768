//! Llama 2, 3, 3.1 and 3.2.
//!
//! Sources: transformers' `LlamaConfig`, arXiv 2302.13971, 2307.09288, 2407.21783.

use super::decoder::{self, ATTENTION, Defaults};
use super::{Family, Fields, Table};
use crate::{Config, Projection, Result};

pub(super) const TABLE: Table =
    Table { model_type: "llama", architecture: "LlamaForCausalLM", names: decoder::NAMES, read };

fn read(fields: &Fields) -> Result<Config> {
    let mut config = decoder::read_rotated(fields, Family::Llama, &Defaults::LLAMA)?;
    if fields.truth("attention_bias")?.unwrap_or(false) {
        config.biased.extend(ATTENTION);
    }
    if fields.truth("mlp_bias")?.unwrap_or(false) {
        config.biased.extend([Projection::Gate, Projection::Up, Projection::Down]);
    }
    Ok(config)
}
