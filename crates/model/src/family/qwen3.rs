//! Qwen 3: a Llama with norms of each head's query and key.
//!
//! Sources: transformers' `Qwen3Config`, arXiv 2505.09388.

use super::decoder::{self, ATTENTION, Defaults};
use super::{Family, Fields, Names, Table, qwen2};
use crate::{Config, Result};

pub(super) const TABLE: Table = Table {
    model_type: "qwen3",
    architecture: "Qwen3ForCausalLM",
    names: Names { query_norm: "self_attn.q_norm", key_norm: "self_attn.k_norm", ..decoder::NAMES },
    read,
};

const DEFAULTS: Defaults = Defaults { head_dim: Some(128), ..qwen2::DEFAULTS };

fn read(fields: &Fields) -> Result<Config> {
    let mut config = decoder::read_rotated(fields, Family::Qwen3, &DEFAULTS)?;
    qwen2::slide(fields, &mut config)?;
    config.query_key_norm = true;
    if fields.truth("attention_bias")?.unwrap_or(false) {
        config.biased.extend(ATTENTION);
    }
    Ok(config)
}
