//! The gradient of the initialisation, one block at a time.
//!
//! LoRA-SB needs `G = sum over samples of dL/dW` of every target before it can take its sign, and holding G for
//! a whole model would cost as much as full fine-tuning. Here all samples go forward once and only each block's
//! input is kept; then the blocks go backward one by one, each over all samples, and as soon as a block's G is
//! complete it is handed on and dropped. In memory at once: the weights, one block's gradients, the kept inputs
//! (freed as they are used), and one micro-batch's working set. The price is one more forward of each block.
//!
//! The sum has to be complete before `sign`, so sketches of the parts cannot be added up; exact sums can.
//!
//! A label is a token to be predicted, or a sample's class or value; the gradient of an encoder comes through its
//! classification head as it stands.

use std::collections::BTreeMap;

use lora_sb_data::Example;
use lora_sb_kernels::Tensor;
use lora_sb_model::{Batch, Frozen, InputGradient, Model, NoGradients, Parameter, Sequence, Site};

use super::InitProgress;
use crate::eval::{labels, sequence};
use crate::{Convention, Error, InitConfig, Result};

/// What the gradient was estimated on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// Samples with a label.
    pub samples: usize,
    /// Samples without one, which say nothing about the gradient.
    pub skipped: usize,
    /// Tokens of the used samples.
    pub tokens: usize,
    /// Labels the loss was taken over: trained tokens, or samples with a class or value.
    pub labelled_tokens: usize,
    /// The weighted sum of their losses, whose gradient G is.
    pub loss: f64,
}

/// Computes G of each site and hands it to `each`, `[out, in]`, from the last block to the first.
///
/// The model must have been [prepared](Model::prepare) for the longest example.
///
/// # Errors
/// No sample with a label; a gradient that is not finite, naming its module; what `each` returns.
pub fn stream_gradients(
    model: &Model,
    sites: &[Site],
    examples: &[Example],
    config: &InitConfig,
    progress: &mut dyn FnMut(InitProgress),
    each: &mut dyn FnMut(Site, Tensor) -> Result<()>,
) -> Result<Estimate> {
    let sequences = weigh(examples, config.convention);
    if sequences.is_empty() {
        return Err(Error::NoLabelledSample { samples: examples.len() });
    }
    let Some(lowest) = sites.iter().map(|site| site.layer).min() else {
        let (expected, found) = ("at least one site".into(), "none".into());
        return Err(Error::Config { name: "target_modules".into(), expected, found });
    };
    let mut estimate = Estimate {
        samples: sequences.len(),
        skipped: examples.len() - sequences.len(),
        tokens: sequences.iter().map(|sequence| sequence.ids.len()).sum(),
        labelled_tokens: 0,
        loss: 0.0,
    };
    let mut micro_batches = Vec::new();
    let mut done = 0;
    for group in group(&sequences, config.max_tokens) {
        let (micro_batch, loss) = forward(model, group, lowest)?;
        done += group.len();
        estimate.labelled_tokens += micro_batch.batch.labelled();
        estimate.loss += loss;
        progress(InitProgress::Forward { samples: done, of: sequences.len() });
        micro_batches.push(micro_batch);
    }
    let mut factorised = 0;
    for layer in (lowest..model.config().num_hidden_layers).rev() {
        let gradients = backward(model, layer, layer > lowest, sites, &mut micro_batches)?;
        for (parameter, gradient) in gradients {
            let Parameter::Weight(site) = parameter else { continue };
            if !model.kernels().sum_of_squares(&gradient)?.is_finite() {
                let what = format!("the initialisation's gradient of {}", model.module(site));
                return Err(Error::NotFinite { what });
            }
            each(site, gradient)?;
            factorised += 1;
            progress(InitProgress::Factorised { sites: factorised, of: sites.len() });
        }
    }
    Ok(estimate)
}

/// One packed micro-batch on its way through the model.
struct MicroBatch {
    batch: Batch,
    /// The inputs `[T, D]` of the blocks that have not gone backward yet; the last block's is the last.
    inputs: Vec<Tensor>,
    /// The gradient `[T, D]` of the output of the block that goes backward next.
    dy: Option<Tensor>,
}

/// Up to the loss, keeping the input of each block from `lowest` on.
fn forward(model: &Model, sequences: &[Sequence<'_>], lowest: usize) -> Result<(MicroBatch, f64)> {
    let kernels = model.kernels().as_ref();
    let batch = Batch::pack(kernels, sequences)?;
    let mut inputs = Vec::new();
    let mut x = model.embed(&batch)?;
    for layer in 0..model.config().num_hidden_layers {
        let (y, saved) = model.block_forward(layer, x, &batch, &Frozen)?;
        if layer >= lowest {
            inputs.push(saved.into_input());
        }
        x = y;
    }
    let (loss, dy) = model.head(x, &batch, &mut NoGradients, InputGradient::Wanted)?;
    Ok((MicroBatch { batch, inputs, dy }, loss))
}

/// One block backward over all micro-batches: the gradients of its target weights.
fn backward(
    model: &Model,
    layer: usize,
    go_on: bool,
    sites: &[Site],
    micro_batches: &mut [MicroBatch],
) -> Result<BTreeMap<Parameter, Tensor>> {
    let zeros = |site: &Site| {
        let (out, input) = model.shape(*site);
        Ok((Parameter::Weight(*site), model.kernels().zeros(&[out, input])?))
    };
    // The targets of this block and nothing else: what is not in the map is not computed.
    let mut gradients: BTreeMap<Parameter, Tensor> =
        sites.iter().filter(|site| site.layer == layer).map(zeros).collect::<Result<_>>()?;
    let wanted = if go_on { InputGradient::Wanted } else { InputGradient::Unwanted };
    for MicroBatch { batch, inputs, dy } in micro_batches {
        // Both stand here once for each block by construction.
        let (Some(x), Some(dy_now)) = (inputs.pop(), dy.take()) else { continue };
        let (y, saved) = model.block_forward(layer, x, batch, &Frozen)?;
        drop(y);
        *dy = model.block_backward(layer, saved, batch, dy_now, &mut Frozen, &mut gradients, wanted)?;
    }
    Ok(gradients)
}

/// The samples that have a label, each with the weight of one label's loss.
fn weigh(examples: &[Example], convention: Convention) -> Vec<Sequence<'_>> {
    let batch_size = match convention {
        Convention::PerSample => 1,
        Convention::Reference { batch_size } => batch_size.max(1),
    };
    let mut sequences = Vec::new();
    for batch in examples.chunks(batch_size) {
        let labelled: usize = batch.iter().map(labels).sum();
        // With one sample a batch this is 1 / (labels of the sample), the per-sample mean.
        let weight = (1.0 / (labelled * batch.len()) as f64) as f32;
        let used = batch.iter().filter(|example| labels(example) > 0);
        sequences.extend(used.map(|example| sequence(example, weight)));
    }
    sequences
}

/// Cuts the samples into micro-batches of at most `max_tokens` tokens and at least one sample.
fn group<'s, 'e>(sequences: &'s [Sequence<'e>], max_tokens: usize) -> Vec<&'s [Sequence<'e>]> {
    let (mut groups, mut start, mut tokens) = (Vec::new(), 0, 0);
    for (index, sequence) in sequences.iter().enumerate() {
        if index > start && tokens + sequence.ids.len() > max_tokens {
            groups.push(&sequences[start..index]);
            (start, tokens) = (index, 0);
        }
        tokens += sequence.ids.len();
    }
    groups.push(&sequences[start..]);
    groups
}
