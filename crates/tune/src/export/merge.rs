//! Merged models: an ordinary Hugging Face directory whose weights hold the update.

use std::path::Path;

use lora_sb_kernels::DType;
use lora_sb_model::{Parameter, SaveType, save_model};

use super::files;
use crate::{Error, Result, Tuned};

/// Writes the tuned model as a plain one, in `dtype` or in the type of the base's embedding.
///
/// Weight and update are added in f32 and rounded once. A classification head is written as it was trained; with full
/// fine-tuning all weights are.
///
/// # Errors
/// The base model's own directory, or one that holds a PEFT adapter, which transformers would apply once more; a value
/// that overflows the type; a directory that cannot be written.
pub fn merge(dir: &Path, tuned: &Tuned, dtype: Option<SaveType>) -> Result<()> {
    let (model, adapter) = (&tuned.model, tuned.adapter());
    files::refuse_base(dir, model)?;
    if dir.join(super::peft::MANIFEST).exists() {
        return Err(Error::File {
            path: dir.into(),
            message: "holds a PEFT adapter, which transformers would apply to the merged weights once more"
                .into(),
            hint: Some("write the model to another directory".into()),
        });
    }
    let kernels = model.kernels();
    let mut changed = |parameter: Parameter, mut values: Vec<f32>| {
        let (Parameter::Weight(site), Some(adapter)) = (parameter, adapter) else { return Ok(values) };
        let Some(weight) = model.weight(parameter) else { return Ok(values) };
        let Some(delta) = adapter.delta(kernels.as_ref(), site, weight)? else { return Ok(values) };
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
