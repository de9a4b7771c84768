//! The tensors of a model, by parameter.

use std::collections::BTreeMap;
use std::sync::Arc;

use half::bf16;
use lora_sb_kernels::{DType, Generator, Kernels, RmsGain, SharedBytes, Stream, Tensor};
use rayon::prelude::*;

use crate::config::NormKind;
use crate::memory::rounded;
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
    storage: Storage,
}

impl Weights {
    pub(crate) fn new(config: &Config, tensors: BTreeMap<Parameter, Tensor>, storage: Storage) -> Self {
        debug_assert!(config.parameters().iter().all(|parameter| tensors.contains_key(parameter)));
        Weights { tensors, tied: config.tie_word_embeddings, storage }
    }

    /// The frozen parameters that a model which computes in `bf16` holds rounded, as long as they are not of that
    /// type.
    pub(crate) fn to_be_rounded(&self, config: &Config) -> Vec<Parameter> {
        let frozen = self.storage == Storage::Mapped;
        let of_another_type = |(&parameter, tensor): (&Parameter, &Tensor)| {
            (frozen && rounded(config, parameter) && tensor.dtype() != DType::Bf16).then_some(parameter)
        };
        self.tensors.iter().filter_map(of_another_type).collect()
    }

    /// Puts a parameter's `bf16` copy in its place.
    pub(crate) fn round(&mut self, kernels: &dyn Kernels, parameter: Parameter) -> Result<()> {
        let Some(tensor) = self.tensors.get_mut(&parameter) else { return Ok(()) };
        *tensor = in_bf16(kernels, tensor)?;
        Ok(())
    }

    /// Every tensor as [`fresh`] makes it; a classification head can always be trained.
    pub(crate) fn random(
        config: &Config,
        kernels: &dyn Kernels,
        seed: u64,
        storage: Storage,
    ) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        for (index, parameter) in config.parameters().into_iter().enumerate() {
            let held = if parameter.of_classification() { Storage::Trainable } else { storage };
            tensors.insert(parameter, fresh(config, kernels, parameter, (seed, index as u64), held)?);
        }
        Ok(Weights::new(config, tensors, storage))
    }

    pub(crate) fn storage(&self) -> Storage {
        self.storage
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

/// A copy, rounded to `bf16`.
pub(crate) fn in_bf16(kernels: &dyn Kernels, tensor: &Tensor) -> Result<Tensor> {
    let mut rounded = kernels.empty_of(DType::Bf16, tensor.shape())?;
    kernels.cast(tensor, &mut rounded)?;
    Ok(rounded)
}

/// A tensor as transformers begins it: weights from N(0, initializer_range^2), biases 0, gains 1. A function of
/// the seed alone; a mapped one is the trainable one rounded to `bf16`.
///
/// `index` is the parameter's place among all of the model.
pub(crate) fn fresh(
    config: &Config,
    kernels: &dyn Kernels,
    parameter: Parameter,
    (seed, index): (u64, u64),
    storage: Storage,
) -> Result<Tensor> {
    let (first, shape) = (First::of(config, parameter), config.parameter_shape(parameter));
    let count = shape.iter().product();
    match storage {
        Storage::Trainable => Ok(kernels.from_f32(&first.values((seed, index), count), &shape)?),
        Storage::Mapped => {
            let owner: Arc<dyn AsRef<[u8]> + Send + Sync> = Arc::new(first.bf16((seed, index), count));
            Ok(kernels.from_bytes(SharedBytes::new(owner, 0..2 * count)?, DType::Bf16, &shape)?)
        }
    }
}

/// What a tensor that no file holds begins as.
#[derive(Clone, Copy)]
enum First {
    /// The same value everywhere.
    Constant(f32),
    /// Draws of a normal distribution of this standard deviation.
    Normal(f32),
}

/// Elements that one generator draws. The generators are independent, so that threads can share a tensor.
const DRAWN: usize = 1 << 20;

impl First {
    fn of(config: &Config, parameter: Parameter) -> Self {
        match parameter {
            // Gemma's gains stand beside a 1.
            Parameter::Gain(_) if config.norm == NormKind::Rms(RmsGain::OnePlusWeight) => {
                First::Constant(0.0)
            }
            Parameter::Gain(_) => First::Constant(1.0),
            Parameter::Shift(_) | Parameter::Bias(_) | Parameter::PoolerBias | Parameter::ClassifierBias => {
                First::Constant(0.0)
            }
            Parameter::Embedding
            | Parameter::PositionEmbedding
            | Parameter::TokenTypeEmbedding
            | Parameter::Head
            | Parameter::Pooler
            | Parameter::Classifier
            | Parameter::Weight(_) => First::Normal(config.initializer_range as f32),
        }
    }

    /// Elements `part * DRAWN` and on of tensor `index`.
    fn fill(self, (seed, index): (u64, u64), part: usize, out: &mut [f32]) {
        match self {
            First::Constant(value) => out.fill(value),
            First::Normal(deviation) => {
                let use_of_seed = index | (part as u64) << 32;
                Generator::new(seed, Stream::Weights, use_of_seed).normal(deviation, out);
            }
        }
    }

    fn values(self, of: (u64, u64), count: usize) -> Vec<f32> {
        let mut values = vec![0.0; count];
        let parts = values.par_chunks_mut(DRAWN).enumerate();
        parts.for_each(|(part, out)| self.fill(of, part, out));
        values
    }

    /// The same as little-endian `bf16`.
    fn bf16(self, of: (u64, u64), count: usize) -> Vec<u8> {
        let mut bytes = vec![0; 2 * count];
        bytes.par_chunks_mut(2 * DRAWN).enumerate().for_each(|(part, out)| {
            let mut values = vec![0.0; out.len() / 2];
            self.fill(of, part, &mut values);
            for (out, value) in out.chunks_exact_mut(2).zip(values) {
                out.copy_from_slice(&bf16::from_f32(value).to_le_bytes());
            }
        });
        bytes
    }
}
