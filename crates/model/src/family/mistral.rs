//! Mistral 7B: a Llama whose blocks all slide, where there is a window.
//!
//! Sources: transformers' `MistralConfig`, arXiv 2310.06825.

use super::decoder::{self, Defaults};
use super::{Family, Fields, Table};
use crate::{Config, Result};

pub(super) const TABLE: Table =
    Table { model_type: "mistral", architecture: "MistralForCausalLM", names: decoder::NAMES, read };

const DEFAULTS: Defaults =
    Defaults { num_key_value_heads: Some(8), max_position_embeddings: 131_072, ..Defaults::LLAMA };

fn read(fields: &Fields) -> Result<Config> {
    let mut config = decoder::read_rotated(fields, Family::Mistral, &DEFAULTS)?;
    // Version 0.1 slides; from 0.2 on the file says null.
    let mask = decoder::mask(decoder::window(fields, Some(4096))?);
    config.blocks.iter_mut().for_each(|block| block.mask = mask);
    Ok(config)
}
