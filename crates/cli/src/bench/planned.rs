//! What a plan says of the memory that is measured.

use lora_sb_model::{Recompute, Storage};
use lora_sb_tune::plan::{BatchSize, MemoryPlan, MemoryRequest};
use lora_sb_tune::{AdapterConfig, Method, Tuned, head};

use super::batches::Batches;
use crate::failure::Result;

/// Bytes of the steps at their largest, as `plan` adds them up; `taken` are those that were taken before the model was
/// read, `file_element` is the size of a weight as it was read.
pub(crate) fn planned(
    tuned: &Tuned,
    adapter: &AdapterConfig,
    batches: &Batches,
    recompute: Recompute,
    file_element: usize,
    taken: usize,
) -> Result<usize> {
    let (config, footprint) = (tuned.model.config(), tuned.model.footprint());
    let mut train = BatchSize::default();
    batches.steps.iter().for_each(|examples| train.include(examples));
    let ids: Vec<u32> = batches.steps.iter().flatten().flat_map(|example| example.ids.clone()).collect();
    let plan = MemoryPlan::new(&MemoryRequest {
        config,
        storage: if adapter.method == Method::Full { Storage::Trainable } else { Storage::Mapped },
        file_element,
        adapter,
        sites: &adapter.target_modules.resolve(config)?,
        head: &head::resolve(&adapter.modules_to_save, config)?,
        dtype: footprint.dtype,
        recompute,
        loss_chunk: footprint.loss_chunk,
        place: footprint.place,
        train,
        evaluation: BatchSize::default(),
        init: None,
        ids: &ids,
        process: taken,
    });
    Ok(plan.train_peak() - plan.copied)
}
