//! Small models and packed sequences of unkind sizes.
#![allow(dead_code, reason = "every test file uses its own part")]

pub(crate) mod device;
pub(crate) mod families;
pub(crate) mod golden;
pub(crate) mod padded;
pub(crate) mod published;

use std::collections::BTreeMap;
use std::sync::Arc;

use lora_sb_kernels::{Generator, Kernels, Stream, Tensor};
use lora_sb_model::{Batch, Config, Model, Parameter, Sequence, Storage, Target, Task};
use serde_json::{Map, Value, json};

pub(crate) use self::device::device;

/// A Llama of sizes that divide nothing, whose heads together are wider than its residual stream; `changes`
/// are laid over it.
pub(crate) fn config_json(changes: Value) -> Map<String, Value> {
    let base = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 29, "hidden_size": 13,
        "intermediate_size": 11, "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 1,
        "head_dim": 6, "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "unknown_key": {"kept": [1, 2.5]}
    });
    let mut map = base.as_object().unwrap().clone();
    map.extend(changes.as_object().unwrap().clone());
    map
}

pub(crate) fn config(changes: Value) -> Config {
    Config::from_json(Value::Object(config_json(changes)).to_string().as_bytes()).unwrap()
}

pub(crate) fn model(changes: Value) -> Model {
    Model::random(config(changes), device(), 11, Storage::Trainable).unwrap()
}

/// The message of the error that reading this configuration gives.
pub(crate) fn config_error(changes: Value) -> String {
    Config::from_json(Value::Object(config_json(changes)).to_string().as_bytes()).unwrap_err().to_string()
}

/// Three sequences of 7, 1 and 5 tokens; two thirds of the tokens are labelled.
pub(crate) struct Texts {
    ids: Vec<Vec<u32>>,
    trained: Vec<Vec<bool>>,
}

impl Texts {
    pub(crate) fn new() -> Self {
        let ids = vec![vec![1, 17, 3, 28, 5, 5, 2], vec![4], vec![1, 22, 0, 9, 2]];
        let trained = ids.iter().map(|ids: &Vec<u32>| (0..ids.len()).map(|i| i % 3 != 1).collect()).collect();
        Texts { ids, trained }
    }

    pub(crate) fn sequences(&self) -> Vec<Sequence<'_>> {
        let pairs = self.ids.iter().zip(&self.trained);
        pairs.map(|(ids, trained)| Sequence::text(ids, trained, 0.125)).collect()
    }

    /// The same sequences with what the model is to predict of them; where it knows two types of tokens, the last
    /// one has two texts.
    pub(crate) fn sequences_for(&self, model: &Model) -> Vec<Sequence<'_>> {
        let mut sequences = self.sequences();
        for (index, sequence) in sequences.iter_mut().enumerate() {
            match model.config().task {
                Task::LanguageModel => {}
                Task::Classification { labels } => {
                    sequence.target = Target::Class((2 * index % labels) as u32)
                }
                Task::Regression => sequence.target = Target::Value(index as f32 - 0.7),
            }
        }
        if model.config().type_vocab_size > 1 {
            sequences[2].second = Some(3);
        }
        sequences
    }

    pub(crate) fn batch(&self, model: &Model) -> Batch {
        Batch::pack(&**model.kernels(), &self.sequences_for(model)).unwrap()
    }
}

/// Zeros for the gradient of every parameter.
pub(crate) fn zeros(model: &Model) -> BTreeMap<Parameter, Tensor> {
    let zeros = |p| model.kernels().zeros(&model.config().parameter_shape(p)).unwrap();
    model.parameters().into_iter().map(|p| (p, zeros(p))).collect()
}

pub(crate) fn values(kernels: &Arc<dyn Kernels>, tensor: &Tensor) -> Vec<f32> {
    kernels.to_f32(tensor).unwrap()
}

/// All gradients on the host.
pub(crate) fn host(model: &Model, gradients: &BTreeMap<Parameter, Tensor>) -> BTreeMap<Parameter, Vec<f32>> {
    gradients.iter().map(|(&p, tensor)| (p, values(model.kernels(), tensor))).collect()
}

pub(crate) fn normal(seed: u64, count: usize) -> Vec<f32> {
    let mut out = vec![0.0; count];
    Generator::new(seed, Stream::Adapter, 0).normal(1.0, &mut out);
    out
}

pub(crate) fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |largest, value| value.abs().max(largest))
}

pub(crate) fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |largest, d| if d > largest || d.is_nan() { d } else { largest })
}
