//! Phi-3 and Phi-4: query, key and value in one weight, gate and up in another.
//!
//! The long-context releases (`longrope`) are refused: their frequencies depend on the sequence's length.
//! Sources: transformers' `Phi3Config`, arXiv 2404.14219.

use super::decoder::{self, Defaults};
use super::{Family, Fields, Names, Table, rope};
use crate::config::Positions;
use crate::{Config, Projection, Result};

pub(super) const TABLE: Table = Table {
    model_type: "phi3",
    architecture: "Phi3ForCausalLM",
    names: Names {
        projections: [
            "",
            "",
            "",
            "self_attn.qkv_proj",
            "self_attn.o_proj",
            "",
            "",
            "mlp.gate_up_proj",
            "mlp.down_proj",
        ],
        ..decoder::NAMES
    },
    read,
};

const DEFAULTS: Defaults = Defaults {
    max_position_embeddings: 4096,
    rms_norm_eps: 1e-5,
    eos_token_id: Some(32_000),
    pad_token_id: Some(32_000),
    ..Defaults::LLAMA
};

fn read(fields: &Fields) -> Result<Config> {
    let mut config = decoder::read(fields, Family::Phi3, &DEFAULTS)?;
    let (rotation, rotary_size) = rope::read_partial(fields, config.head_dim)?;
    config.positions = Positions::Rotary { rotary_size, rotations: vec![rotation] };
    config.projections =
        vec![Projection::QueryKeyValue, Projection::Output, Projection::GateUp, Projection::Down];
    let mask = decoder::mask(decoder::window(fields, None)?);
    config.blocks.iter_mut().for_each(|block| block.mask = mask);
    Ok(config)
}
