//! What a run will take, before its first step: parameters, and memory; and how it is laid out to fit.

mod fit;
mod initialisation;
mod memory;
mod parameters;
pub mod system;

use std::collections::BTreeSet;

use lora_sb_data::Example;

pub use self::fit::{Fitted, fit};
pub use self::initialisation::{EstimatePlan, EstimateSize};
pub(crate) use self::memory::reads;
pub use self::memory::{BatchSize, MemoryPlan, MemoryRequest, PROCESS_OVERHEAD};
pub use self::parameters::{ParameterReport, ParameterRow, ParameterTable, check_rank};

use crate::method::Kind;
use crate::train::Cursor;
use crate::{AdapterConfig, Method, Result, TrainConfig};

/// Whether an adapter's start is estimated from a gradient on training examples.
pub fn estimates_gradient(adapter: &AdapterConfig) -> bool {
    adapter.method == Method::LoraGa
        || adapter.method.kind() == Kind::Latent && adapter.init.bases.read_gradient()
}

/// The most tokens and the most labels of any micro-batch that a run over `examples` will meet. The order of the
/// examples is known from the seed, so these are no bounds: they are met.
///
/// # Errors
/// Settings out of range; no example.
pub fn largest_micro_batch(examples: &[Example], config: &TrainConfig) -> Result<BatchSize> {
    let mut largest = BatchSize::default();
    micro_batches(examples, config, &mut |indices| {
        largest.include(indices.iter().map(|&index| &examples[index]));
    })?;
    Ok(largest)
}

/// Visits the examples' indices of every micro-batch that a run over `examples` will meet, in their order.
pub(crate) fn micro_batches(
    examples: &[Example],
    config: &TrainConfig,
    visit: &mut dyn FnMut(&[usize]),
) -> Result<()> {
    config.validate()?;
    let mut cursor = Cursor::new(examples.len(), config)?;
    for step in 0..config.total_steps(examples.len()) {
        cursor.step(step).indices.chunks(config.per_device_train_batch_size).for_each(&mut *visit);
    }
    Ok(())
}

/// The ids, in order and each once, of all tokens that a run over `examples` will meet in training.
///
/// # Errors
/// Settings out of range; no example.
pub fn ids_met(examples: &[Example], config: &TrainConfig) -> Result<Vec<u32>> {
    config.validate()?;
    let mut cursor = Cursor::new(examples.len(), config)?;
    let mut met = vec![false; examples.len()];
    for step in 0..config.total_steps(examples.len()) {
        cursor.step(step).indices.iter().for_each(|&index| met[index] = true);
    }
    let met = examples.iter().zip(met).filter(|(_, met)| *met);
    let ids: BTreeSet<u32> = met.flat_map(|(example, _)| example.ids.iter().copied()).collect();
    Ok(ids.into_iter().collect())
}

/// The largest batch of an evaluation.
pub fn largest_eval_batch(examples: &[Example], config: &TrainConfig) -> BatchSize {
    let mut largest = BatchSize::default();
    for chunk in examples.chunks(config.per_device_eval_batch_size.max(1)) {
        largest.include(chunk);
    }
    largest
}
