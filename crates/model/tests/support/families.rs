//! Every family as a small random model of unkind sizes: each axis of the architecture at least once.

use lora_sb_model::{Model, Norm, NormKind, Parameter};
use serde_json::{Value, json};

use super::{model, normal};

/// What is laid over the Llama of [`config_json`](super::config_json).
fn decoders() -> Vec<(&'static str, Value)> {
    let gemma = json!({
        "model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 7,
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "sliding_window": 3, "pad_token_id": null
    });
    let mut gemma3 = gemma.clone();
    gemma3.as_object_mut().unwrap().extend(
        json!({
            "model_type": "gemma3_text", "attn_logit_softcapping": null, "final_logit_softcapping": null,
            "sliding_window_pattern": 2, "rope_theta": 1e3, "rope_local_base_freq": 50.0
        })
        .as_object()
        .unwrap()
        .clone(),
    );
    vec![
        ("llama", json!({})),
        (
            "llama, tied and biased",
            json!({ "tie_word_embeddings": true, "attention_bias": true, "mlp_bias": true }),
        ),
        ("mistral", json!({ "model_type": "mistral", "sliding_window": 3 })),
        (
            "qwen2",
            json!({
                "model_type": "qwen2", "use_sliding_window": true, "sliding_window": 4, "max_window_layers": 1,
                "num_attention_heads": 4, "num_key_value_heads": 2
            }),
        ),
        ("qwen3", json!({ "model_type": "qwen3", "attention_bias": true, "num_key_value_heads": 3 })),
        ("gemma2", gemma),
        ("gemma3_text", gemma3),
        (
            "phi3",
            json!({
                "model_type": "phi3", "partial_rotary_factor": 0.7, "sliding_window": 4, "pad_token_id": null,
                "head_dim": null, "hidden_size": 18
            }),
        ),
    ]
}

fn encoders() -> Vec<(&'static str, Value)> {
    let sizes = |own: Value| {
        let mut all = json!({
            "hidden_size": 15, "head_dim": null, "num_key_value_heads": null, "hidden_act": "gelu",
            "architectures": null, "layer_norm_eps": 1e-5, "pad_token_id": 27
        });
        all.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
        all
    };
    vec![
        ("bert", sizes(json!({ "model_type": "bert", "num_labels": 3 }))),
        ("roberta", sizes(json!({ "model_type": "roberta", "num_labels": 2, "type_vocab_size": 1 }))),
        (
            "roberta, regression",
            sizes(json!({ "model_type": "roberta", "num_labels": 1, "type_vocab_size": 1 })),
        ),
    ]
}

pub(crate) struct Small {
    pub(crate) name: &'static str,
    changes: Value,
}

impl Small {
    /// With `changes` on top.
    pub(crate) fn with(&self, changes: Value) -> Model {
        let mut all = self.changes.clone();
        all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        let mut model = model(all);
        shake(&mut model);
        model
    }

    pub(crate) fn model(&self) -> Model {
        self.with(json!({}))
    }
}

pub(crate) fn all() -> Vec<Small> {
    decoders().into_iter().chain(encoders()).map(|(name, changes)| Small { name, changes }).collect()
}

pub(crate) fn all_decoders() -> Vec<Small> {
    decoders().into_iter().map(|(name, changes)| Small { name, changes }).collect()
}

pub(crate) fn all_encoders() -> Vec<Small> {
    encoders().into_iter().map(|(name, changes)| Small { name, changes }).collect()
}

/// Moves every gain, shift and bias from where it begins, so that none is neutral.
fn shake(model: &mut Model) {
    for (index, parameter) in model.parameters().into_iter().enumerate() {
        let shape = model.config().parameter_shape(parameter);
        if shape.len() == 1 {
            let kernels = model.kernels().clone();
            let weight = model.weight_mut(parameter).unwrap();
            let before = kernels.to_f32(weight).unwrap();
            let moved = before.iter().zip(normal(index as u64, shape[0])).map(|(b, m)| b + 0.3 * m);
            kernels.write_f32(weight, &moved.collect::<Vec<_>>()).unwrap();
        }
    }
}

/// Whether the loss does not depend on it: a key's bias adds the same to all scores of a query, which the softmax
/// takes out again, where neither a norm nor a rotation follows.
pub(crate) fn without_effect(model: &Model, parameter: Parameter) -> bool {
    let key = matches!(parameter, Parameter::Bias(site) if site.projection == lora_sb_model::Projection::Key);
    key && model.config().norm == NormKind::Layer
}

/// Every norm of a model.
pub(crate) fn norms(model: &Model) -> Vec<Norm> {
    let gains = model.parameters().into_iter();
    gains
        .filter_map(|parameter| if let Parameter::Gain(norm) = parameter { Some(norm) } else { None })
        .collect()
}
