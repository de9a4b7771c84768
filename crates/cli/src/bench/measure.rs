//! The times of training steps and of generated tokens.

use lora_sb_data::Example;
use lora_sb_kernels::{Generator, OpTime, Stream, Timed};
use lora_sb_model::{Generation, Next, Parameter, Recompute, Sampling, generate};
use lora_sb_tune::optim::{AdamW, clip_factor};
use lora_sb_tune::train::{Clock, MicroBatches, StepGradients, gradients_of_step};
use lora_sb_tune::{TrainConfig, Tuned};

use super::batches::Batches;
use super::machine::ProcessorTime;
use crate::failure::Result;

/// Training steps that were measured.
#[derive(Clone, Debug, Default)]
pub(crate) struct Steps {
    /// Seconds of each, from packing its examples to the optimizer's end.
    pub(crate) seconds: Vec<f64>,
    /// Tokens of each.
    pub(crate) tokens: Vec<usize>,
    /// Their losses, those of the warm-up first.
    pub(crate) losses: Vec<f64>,
    /// The share of the machine that other programs had meanwhile, where the system tells.
    pub(crate) taken_by_others: Option<f64>,
    /// Seconds of each of the steps whose operations were counted: the same, or others where counting takes time.
    pub(crate) counted: Vec<f64>,
    /// The time of all of those by operation, the longest first.
    pub(crate) by_op: Vec<OpTime>,
    /// The same with products told apart by their weight.
    pub(crate) by_weight: Vec<OpTime>,
}

/// Trains on the batches as `train` does, the first `warmup` without measuring them.
///
/// A GPU's operations are waited for one by one where they are counted, and in a step nobody waits: there they are counted
/// in steps of their own, on the same batches again.
pub(crate) fn steps(
    tuned: &mut Tuned,
    batches: &Batches,
    warmup: usize,
    config: &TrainConfig,
    recompute: Recompute,
    timed: &Timed,
    clock: &dyn Clock,
) -> Result<Steps> {
    let mut optimizer = AdamW::new(tuned)?;
    let kernels = tuned.model.kernels().clone();
    let mut take = |step: usize, examples: &[Example]| -> Result<(f64, StepGradients)> {
        kernels.synchronize()?;
        let start = clock.seconds();
        let examples: Vec<&Example> = examples.iter().collect();
        let micro = MicroBatches { size: examples.len(), recompute, seed: config.seed, step };
        let gradients = gradients_of_step(tuned, &examples, &micro)?;
        let scale = clip_factor(gradients.grad_norm, config.max_grad_norm);
        optimizer.step(tuned, config, config.learning_rate, scale)?;
        kernels.synchronize()?;
        Ok((clock.seconds() - start, gradients))
    };
    let apart = !kernels.place().is_host();
    if apart {
        timed.pause();
    }
    let (mut found, mut began) = (Steps::default(), None);
    for (step, examples) in batches.steps.iter().enumerate() {
        if step == warmup {
            timed.reset();
            began = ProcessorTime::now();
        }
        let (seconds, gradients) = take(step, examples)?;
        found.losses.push(gradients.loss);
        if step >= warmup {
            found.seconds.push(seconds);
            found.tokens.push(gradients.tokens);
        }
    }
    found.taken_by_others = ProcessorTime::now().zip(began).map(|(now, began)| now.taken_by_others(&began));
    found.counted.clone_from(&found.seconds);
    if apart {
        timed.resume();
        let again = batches.steps.iter().enumerate().skip(warmup);
        let counted = again.map(|(step, examples)| Ok(take(step, examples)?.0));
        found.counted = counted.collect::<Result<_>>()?;
    }
    (found.by_op, found.by_weight) = (timed.report(), timed.report_by_weight());
    Ok(found)
}

/// Tokens of the prompt that is continued.
pub(crate) const PROMPT: usize = 16;

/// Tokens that were written one after another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Decoded {
    /// A second, from the first new token to the last.
    pub(crate) tokens_per_second: f64,
    /// Bytes of the model's weights that each token reads.
    pub(crate) weight_bytes: usize,
}

/// Writes `tokens` (at least 2) tokens behind a synthetic prompt, always the likeliest.
///
/// The model must have been prepared for the prompt and the tokens.
pub(crate) fn decode(tuned: &Tuned, tokens: usize, clock: &dyn Clock) -> Result<Decoded> {
    let vocabulary = tuned.model.config().vocab_size as u32;
    let prompt: Vec<u32> = (0..PROMPT as u32).map(|i| i * 7919 % vocabulary).collect();
    let options = Generation { max_new_tokens: tokens, sampling: Sampling::Greedy, stop: Vec::new() };
    let mut moments = Vec::with_capacity(tokens);
    let mut on_token = |_, _| {
        moments.push(clock.seconds());
        Next::Continue
    };
    let mut generators = [Generator::new(0, Stream::Sampling, 0)];
    generate(&tuned.model, tuned.hook(), &[prompt], &options, &mut generators, &mut on_token)?;
    let (first, last) = (moments.first().copied().unwrap_or(0.0), moments.last().copied().unwrap_or(0.0));
    let tokens_per_second = moments.len().saturating_sub(1) as f64 / (last - first).max(f64::MIN_POSITIVE);
    Ok(Decoded { tokens_per_second, weight_bytes: weight_bytes(tuned) })
}

/// All weights but an embedding that is not the head as well: of that one row is read.
fn weight_bytes(tuned: &Tuned) -> usize {
    let model = &tuned.model;
    let read = model
        .parameters()
        .into_iter()
        .filter(|&parameter| parameter != Parameter::Embedding || model.config().tie_word_embeddings);
    read.filter_map(|parameter| model.weight(parameter)).map(|weight| weight.bytes()).sum()
}
