//! A look at the memory of a run: before its first step, and at its end.
//!
//! The examples' order is part of a run's result, so the longest micro-batch stays where the seed puts it, perhaps
//! hours away. It is gone through once before the first step instead, forward and backward, and nothing of that
//! remains: a run that does not fit fails in its first minute, and the steps have the same bits as without.

use lora_sb_data::Example;

use super::MicroBatches;
use super::gradients::accumulate;
use crate::adapter::Pass;
use crate::plan::{BatchSize, micro_batches, reads};
use crate::{Result, TrainConfig, Tuned};

/// How much of a plan's peak may be exceeded before it is worth a warning: what plans are tested to.
const TOLERANCE: f64 = 0.1;
/// And how many bytes: the pages of the program itself are no part of a plan, and of a small run they are a tenth.
const SLACK: usize = 16 << 20;

/// The memory that a run was planned to take and what it has taken, handed in so that tests can set it.
pub trait MemoryWatch {
    /// Bytes of the whole run at its largest, as planned.
    fn planned(&self) -> usize;

    /// The most bytes that it has taken so far, of the memory that is planned; `None` where nobody counts them.
    fn peak(&self) -> Option<usize>;
}

/// What was planned and what was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeakMemory {
    /// Bytes as planned.
    pub planned: usize,
    /// The most bytes that it has taken; `None` where nobody counts them.
    pub peak: Option<usize>,
}

impl PeakMemory {
    pub(super) fn of(watch: &dyn MemoryWatch) -> Self {
        PeakMemory { planned: watch.planned(), peak: watch.peak() }
    }

    /// Whether it has taken more than 10 % beyond the plan, and more than the 16 MiB that a program may differ
    /// by from itself.
    ///
    /// ```
    /// use lora_sb_tune::train::PeakMemory;
    ///
    /// let mebibytes = |planned: usize, peak: usize| {
    ///     PeakMemory { planned: planned << 20, peak: Some(peak << 20) }.exceeds_plan()
    /// };
    /// assert_eq!([mebibytes(1000, 1100), mebibytes(1000, 1101), mebibytes(20, 36)], [false, true, false]);
    /// ```
    pub fn exceeds_plan(&self) -> bool {
        let allowed = self.planned + SLACK.max((self.planned as f64 * TOLERANCE) as usize);
        self.peak.is_some_and(|peak| peak > allowed)
    }
}

/// The indices of the micro-batch that takes the most memory of a whole run, the first of equals.
fn largest(tuned: &Tuned, examples: &[Example], config: &TrainConfig) -> Result<Vec<usize>> {
    let mut footprint = tuned.model.footprint();
    footprint.loss_chunk = config.loss_chunk.unwrap_or(footprint.loss_chunk);
    let reads = reads(tuned.method());
    let mut largest = (0, BatchSize::default(), Vec::new());
    micro_batches(examples, config, &mut |indices| {
        let mut size = BatchSize::default();
        size.include(indices.iter().map(|&index| &examples[index]));
        let (most, known, _) = &largest;
        // Neither longer nor with more labels: not worth the sum.
        if size.tokens <= known.tokens && size.labelled <= known.labelled {
            return;
        }
        let bytes = footprint.activations(size.tokens, size.labelled, config.recompute(), reads);
        if bytes > *most {
            largest = (bytes, size, indices.to_vec());
        }
    })?;
    Ok(largest.2)
}

/// Takes the run's largest micro-batch forward and backward and leaves no trace of it; its size.
///
/// # Errors
/// Settings out of range; where the model fails, for want of memory perhaps.
pub(super) fn rehearse(tuned: &mut Tuned, examples: &[Example], config: &TrainConfig) -> Result<BatchSize> {
    let chosen: Vec<&Example> =
        largest(tuned, examples, config)?.into_iter().map(|index| &examples[index]).collect();
    let mut size = BatchSize::default();
    size.include(chosen.iter().copied());
    let micro_batches =
        MicroBatches { size: chosen.len(), recompute: config.recompute(), seed: config.seed, step: 0 };
    tuned.zero_gradients()?;
    let passed = accumulate(tuned, &chosen, 1.0 / size.labelled.max(1) as f32, &micro_batches, 0);
    tuned.begin(Pass::Evaluation);
    tuned.zero_gradients()?;
    // Whether the loss is finite is for the step that takes these examples to say.
    passed.map(|_| size)
}
