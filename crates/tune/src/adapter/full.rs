//! Full fine-tuning: every parameter of the model is trained in place.
//!
//! There is nothing to add to a layer's output; what this file holds is a gradient the size of each parameter.
//! Trained: all values of the model.

use std::collections::BTreeMap;

use lora_sb_kernels::{Result, Tensor};
use lora_sb_model::{Model, Parameter};

/// Zero gradients of all parameters.
///
/// # Errors
/// Where the device has no room for them.
pub fn gradients(model: &Model) -> Result<BTreeMap<Parameter, Tensor>> {
    let zeros = |parameter| Some((parameter, model.kernels().zeros(model.weight(parameter)?.shape())));
    let gradients = model.parameters().into_iter().filter_map(zeros);
    gradients.map(|(parameter, zeros)| Ok((parameter, zeros?))).collect()
}
