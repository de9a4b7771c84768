//! Llama 2, 3, 3.1 and 3.2.
//!
//! Defaults are those of transformers' `LlamaConfig`. Sources: arXiv 2302.13971, 2307.09288, 2407.21783.

use lora_sb_kernels::{Activation, Mask, RopeScaling};

use super::{Family, Fields, Names, Table};
use crate::{Config, Projection, Result};

pub(crate) const TABLE: Table = Table {
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    names: Names {
        embedding: "model.embed_tokens",
        layers: "model.layers",
        attention_norm: "input_layernorm",
        feed_forward_norm: "post_attention_layernorm",
        projections: [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ],
        final_norm: "model.norm",
        head: "lm_head",
        ignored: &["rotary_emb.inv_freq"],
    },
    read,
};

fn read(fields: &Fields) -> Result<Config> {
    let hidden_size = fields.required_size("hidden_size")?;
    let num_attention_heads = fields.required_size("num_attention_heads")?;
    let head_dim = match fields.size("head_dim")? {
        Some(head_dim) => head_dim,
        None if num_attention_heads > 0 && hidden_size.is_multiple_of(num_attention_heads) => {
            hidden_size / num_attention_heads
        }
        None => {
            let expected = format!("a divisor of hidden_size = {hidden_size}, as there is no `head_dim`");
            return Err(fields.mismatch("num_attention_heads", &expected));
        }
    };
    fields.absent("quantization_config", "nothing: only f32, bf16 and f16 weights are read")?;
    let (rope_theta, rope_scaling) = rope(fields)?;
    Ok(Config {
        family: Family::Llama,
        vocab_size: fields.required_size("vocab_size")?,
        hidden_size,
        intermediate_size: fields.required_size("intermediate_size")?,
        num_hidden_layers: fields.required_size("num_hidden_layers")?,
        num_attention_heads,
        num_key_value_heads: fields.size("num_key_value_heads")?.unwrap_or(num_attention_heads),
        head_dim,
        max_position_embeddings: fields.size("max_position_embeddings")?.unwrap_or(2048),
        rms_norm_eps: fields.positive("rms_norm_eps")?.unwrap_or(1e-6),
        activation: activation(fields)?,
        rope_theta,
        rope_scaling,
        mask: Mask::Causal,
        biased: biased(fields)?,
        tie_word_embeddings: fields.truth("tie_word_embeddings")?.unwrap_or(false),
        initializer_range: fields.positive("initializer_range")?.unwrap_or(0.02),
        bos_token_id: fields.token("bos_token_id"),
        eos_token_ids: fields.tokens("eos_token_id"),
        pad_token_id: fields.token("pad_token_id"),
        json: fields.object().clone(),
    })
}

fn activation(fields: &Fields) -> Result<Activation> {
    match fields.text("hidden_act")?.unwrap_or("silu") {
        "silu" | "swish" => Ok(Activation::Silu),
        _ => Err(fields.mismatch("hidden_act", "\"silu\"")),
    }
}

fn biased(fields: &Fields) -> Result<Vec<Projection>> {
    let (attention, feed_forward) = Projection::ALL.split_at(4);
    let mut biased = Vec::new();
    if fields.truth("attention_bias")?.unwrap_or(false) {
        biased.extend(attention);
    }
    if fields.truth("mlp_bias")?.unwrap_or(false) {
        biased.extend(feed_forward);
    }
    Ok(biased)
}

/// Theta and scaling: `rope_theta` and `rope_scaling` up to transformers 4, `rope_parameters` from 5 on.
fn rope(fields: &Fields) -> Result<(f64, RopeScaling)> {
    let parameters = fields.inner("rope_parameters")?;
    let theta = match &parameters {
        Some(parameters) => parameters.positive("rope_theta")?,
        None => None,
    };
    let theta = match theta {
        Some(theta) => theta,
        None => fields.positive("rope_theta")?.unwrap_or(10_000.0),
    };
    let scaling = match parameters {
        Some(parameters) => Some(parameters),
        None => fields.inner("rope_scaling")?,
    };
    match scaling {
        Some(scaling) => Ok((theta, rope_scaling(&scaling)?)),
        None => Ok((theta, RopeScaling::Default)),
    }
}

fn rope_scaling(scaling: &Fields) -> Result<RopeScaling> {
    // `type` is the older name of `rope_type`.
    let key = if scaling.text("rope_type")?.is_some() { "rope_type" } else { "type" };
    match scaling.text(key)? {
        None | Some("default") => Ok(RopeScaling::Default),
        Some("linear") => Ok(RopeScaling::Linear { factor: scaling.required_positive("factor")? }),
        Some("llama3") => Ok(RopeScaling::Llama3 {
            factor: scaling.required_positive("factor")?,
            low_frequency_factor: scaling.required_positive("low_freq_factor")?,
            high_frequency_factor: scaling.required_positive("high_freq_factor")?,
            original_context: scaling.required_positive("original_max_position_embeddings")?,
        }),
        Some(_) => Err(scaling.mismatch(key, "\"default\", \"linear\" or \"llama3\"")),
    }
}
