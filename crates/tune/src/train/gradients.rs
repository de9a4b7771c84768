//! Loss and gradient of one optimizer step.

use lora_sb_data::Example;
use lora_sb_model::Recompute;

use crate::eval::{labelled_tokens, pack};
use crate::optim::global_norm;
use crate::{Error, Result, Tuned};

/// What an optimizer step knows before AdamW moves anything.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepGradients {
    /// Mean loss over the step's labelled tokens.
    pub loss: f64,
    /// Global norm of the gradients, before clipping.
    pub grad_norm: f64,
    /// Tokens.
    pub tokens: usize,
    /// Those of them that are in the loss.
    pub trained_tokens: usize,
}

/// Computes the loss of a step's examples and leaves its gradients in `tuned`, `micro_batch` examples at a time.
///
/// Every labelled token weighs 1 over the number of labelled tokens of the whole step, so the result does not
/// depend on how the examples are split into micro-batches, beyond rounding. (A mean over the micro-batches'
/// means would weigh the tokens of short micro-batches more.)
///
/// # Errors
/// A loss or norm that is not finite, with the examples of the first micro-batch that gives it; `step` and
/// `saved` of that error are the caller's to fill in.
pub fn gradients_of_step(
    tuned: &mut Tuned,
    examples: &[&Example],
    micro_batch: usize,
    recompute: Recompute,
) -> Result<StepGradients> {
    let trained_tokens: usize = examples.iter().map(|example| labelled_tokens(example)).sum();
    let weight = 1.0 / trained_tokens as f32;
    tuned.zero_gradients()?;
    let mut loss = 0.0;
    for chunk in examples.chunks(micro_batch) {
        let part = accumulate(tuned, chunk, weight, recompute)?;
        if !part.is_finite() {
            return Err(not_finite("loss", part, chunk));
        }
        loss += part;
    }
    let grad_norm = global_norm(tuned)?;
    if !grad_norm.is_finite() {
        return Err(offender(tuned, examples, micro_batch, weight, recompute, grad_norm)?);
    }
    let tokens = examples.iter().map(|example| example.ids.len()).sum();
    Ok(StepGradients { loss, grad_norm, tokens, trained_tokens })
}

fn accumulate(tuned: &mut Tuned, examples: &[&Example], weight: f32, recompute: Recompute) -> Result<f64> {
    let batch = pack(&tuned.model, examples.iter().copied(), weight)?;
    tuned.loss_and_gradients(&batch, recompute)
}

/// Takes the micro-batches of a step again, one by one, to find the one whose gradient is not finite; all of
/// them where only their sum is not.
fn offender(
    tuned: &mut Tuned,
    examples: &[&Example],
    micro_batch: usize,
    weight: f32,
    recompute: Recompute,
    grad_norm: f64,
) -> Result<Error> {
    for chunk in examples.chunks(micro_batch) {
        tuned.zero_gradients()?;
        accumulate(tuned, chunk, weight, recompute)?;
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
