//! Merged models: an ordinary Hugging Face directory with `W0 + s B R A` as its weights.

use std::path::Path;

use lora_sb_kernels::DType;
use lora_sb_model::{Parameter, SaveType, save_model};

use crate::{Result, Tuned};

/// Writes the tuned model as a plain one, in `dtype` or in the type of the base's embedding.
///
/// Weight and update are added in f32 and rounded once. With full fine-tuning the weights are written as they
/// are.
///
/// # Errors
/// A value that overflows the type; a directory that cannot be written.
pub fn merge(dir: &Path, tuned: &Tuned, dtype: Option<SaveType>) -> Result<()> {
    let (model, adapter) = (&tuned.model, tuned.adapter());
    let kernels = model.kernels();
    let mut changed = |parameter: Parameter, mut values: Vec<f32>| {
        let (Parameter::Weight(site), Some(adapter)) = (parameter, adapter) else { return Ok(values) };
        let Some(delta) = adapter.delta(kernels.as_ref(), site)? else { return Ok(values) };
        for (value, change) in values.iter_mut().zip(kernels.to_f32(&delta)?) {
            *value += change;
        }
        Ok(values)
    };
    Ok(save_model(dir, model, dtype.unwrap_or_else(|| base_type(tuned)), &mut changed)?)
}

fn base_type(tuned: &Tuned) -> SaveType {
    match tuned.model.weight(Parameter::Embedding).map(lora_sb_kernels::Tensor::dtype) {
        Some(DType::Bf16) => SaveType::Bf16,
        Some(DType::F16) => SaveType::F16,
        _ => SaveType::F32,
    }
}
