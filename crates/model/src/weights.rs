//! The tensors of a model, by parameter.

use std::collections::BTreeMap;

use lora_sb_kernels::{Generator, Kernels, Stream, Tensor};

use crate::{Config, Error, Parameter, Result};

/// How a model's tensors are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// Frozen: read where they lie, in their file's type.
    Mapped,
    /// Copied into `f32` that an optimizer can change.
    Trainable,
}

/// All tensors of a model; complete for its configuration by construction.
#[derive(Debug)]
pub(crate) struct Weights {
    tensors: BTreeMap<Parameter, Tensor>,
    tied: bool,
}

impl Weights {
    pub(crate) fn new(config: &Config, tensors: BTreeMap<Parameter, Tensor>) -> Self {
        debug_assert!(config.parameters().iter().all(|parameter| tensors.contains_key(parameter)));
        Weights { tensors, tied: config.tie_word_embeddings }
    }

    /// Weights from N(0, initializer_range^2), biases 0, gains 1, as transformers begins a model.
    pub(crate) fn random(config: &Config, kernels: &dyn Kernels, seed: u64) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        for (index, parameter) in config.parameters().into_iter().enumerate() {
            let shape = config.parameter_shape(parameter);
            let mut values = vec![0.0; shape.iter().product()];
            match parameter {
                Parameter::AttentionNorm(_) | Parameter::FeedForwardNorm(_) | Parameter::FinalNorm => {
                    values.fill(1.0)
                }
                Parameter::Bias(_) => {}
                Parameter::Embedding | Parameter::Head | Parameter::Weight(_) => {
                    let mut generator = Generator::new(seed, Stream::Weights, index as u64);
                    generator.normal(config.initializer_range as f32, &mut values);
                }
            }
            tensors.insert(parameter, kernels.from_f32(&values, &shape)?);
        }
        Ok(Weights::new(config, tensors))
    }

    fn key(&self, parameter: Parameter) -> Parameter {
        if self.tied && parameter == Parameter::Head { Parameter::Embedding } else { parameter }
    }

    pub(crate) fn get(&self, parameter: Parameter) -> Option<&Tensor> {
        self.tensors.get(&self.key(parameter))
    }

    pub(crate) fn get_mut(&mut self, parameter: Parameter) -> Option<&mut Tensor> {
        let key = self.key(parameter);
        self.tensors.get_mut(&key)
    }

    /// A tensor that every model has, if it has the layer.
    pub(crate) fn required(&self, parameter: Parameter) -> Result<&Tensor> {
        self.get(parameter).ok_or_else(|| Error::NoParameter { parameter: format!("{parameter:?}") })
    }
}
