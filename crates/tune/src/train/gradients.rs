//! Loss and gradient of one optimizer step.

use lora_sb_data::Example;
use lora_sb_kernels::{Generator, Stream};
use lora_sb_model::Recompute;

use crate::adapter::Pass;
use crate::eval::{labels, pack};
use crate::optim::global_norm;
use crate::{Error, Result, Tuned};

/// How the examples of an optimizer step are gone through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MicroBatches {
    /// Examples of one micro-batch.
    pub size: usize,
    /// What the model keeps for its backward pass.
    pub recompute: Recompute,
    /// The run's seed.
    pub seed: u64,
    /// The optimizer step, counted from 0.
    pub step: usize,
}

impl MicroBatches {
    /// The pass of a micro-batch, counted from 0: what it drops follows from the run's seed, the step and its
    /// number, so that a resumed run drops the same.
    pub fn pass(&self, number: usize) -> Pass {
        let index = ((self.step as u64) << 32) | number as u64;
        Pass::Training { seed: Generator::new(self.seed, Stream::Dropout, index).seed() }
    }
}

/// What an optimizer step knows before AdamW moves anything.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepGradients {
    /// Mean loss over the step's labels: its trained tokens, or its examples where they have a class or value.
    pub loss: f64,
    /// Global norm of the gradients, before clipping.
    pub grad_norm: f64,
    /// Tokens.
    pub tokens: usize,
    /// Labels that are in the loss.
    pub trained_tokens: usize,
}

/// Computes the loss of a step's examples and leaves its gradients in `tuned`, as its method adjusts them.
///
/// Every label weighs 1 over the number of labels of the whole step, so the result does not depend on how the
/// examples are split into micro-batches, beyond rounding and dropout. (A mean over the micro-batches' means would
/// weigh the tokens of short micro-batches more.)
///
/// # Errors
/// A loss or norm that is not finite, with the examples of the first micro-batch that gives it; `step` and
/// `saved` of that error are the caller's to fill in.
pub fn gradients_of_step(
    tuned: &mut Tuned,
    examples: &[&Example],
    micro_batches: &MicroBatches,
) -> Result<StepGradients> {
    let found = pass_over(tuned, examples, micro_batches);
    tuned.begin(Pass::Evaluation);
    found
}

fn pass_over(
    tuned: &mut Tuned,
    examples: &[&Example],
    micro_batches: &MicroBatches,
) -> Result<StepGradients> {
    let trained_tokens: usize = examples.iter().map(|example| labels(example)).sum();
    let weight = 1.0 / trained_tokens as f32;
    tuned.zero_gradients()?;
    let mut loss = 0.0;
    for (number, chunk) in examples.chunks(micro_batches.size).enumerate() {
        let part = accumulate(tuned, chunk, weight, micro_batches, number)?;
        if !part.is_finite() {
            return Err(not_finite("loss", part, chunk));
        }
        loss += part;
    }
    tuned.adjust_gradients()?;
    let grad_norm = global_norm(tuned)?;
    if !grad_norm.is_finite() {
        return Err(offender(tuned, examples, weight, micro_batches, grad_norm)?);
    }
    let tokens = examples.iter().map(|example| example.ids.len()).sum();
    Ok(StepGradients { loss, grad_norm, tokens, trained_tokens })
}

/// Adds the gradients of a micro-batch, each of its labels weighing `weight`; its loss.
pub(super) fn accumulate(
    tuned: &mut Tuned,
    examples: &[&Example],
    weight: f32,
    micro_batches: &MicroBatches,
    number: usize,
) -> Result<f64> {
    let batch = pack(&tuned.model, examples.iter().copied(), weight)?;
    tuned.begin(micro_batches.pass(number));
    tuned.loss_and_gradients(&batch, micro_batches.recompute)
}

/// Takes the micro-batches of a step again, one by one, to find the one whose gradient is not finite; all of
/// them where only their sum is not.
fn offender(
    tuned: &mut Tuned,
    examples: &[&Example],
    weight: f32,
    micro_batches: &MicroBatches,
    grad_norm: f64,
) -> Result<Error> {
    for (number, chunk) in examples.chunks(micro_batches.size).enumerate() {
        tuned.zero_gradients()?;
        accumulate(tuned, chunk, weight, micro_batches, number)?;
        let alone = global_norm(tuned)?;
        if !alone.is_finite() {
            return Ok(not_finite("gradient norm", alone, chunk));
        }
    }
    Ok(not_finite("gradient norm", grad_norm, examples))
}

fn not_finite(quantity: &'static str, found: f64, examples: &[&Example]) -> Error {
    let examples = examples.iter().map(|example| example.source.clone()).collect();
    Error::NotFiniteStep { step: 0, quantity, found, examples, saved: String::new() }
}
