//! The gradient of the initialisation, some blocks at a time.
//!
//! LoRA-SB needs `G = sum over samples of dL/dW` of every target before it can take its sign, and holding G of a
//! whole model costs as much as full fine-tuning. Here the blocks stand in groups. The last group goes forward and
//! backward with every micro-batch as it comes; of the groups below, their input and the gradient of their output are
//! kept, and they go forward a second time and backward over all micro-batches when the group above is done. As soon
//! as a group's G are complete, they are handed on.
//!
//! | blocks at once | operations of the blocks, x parameters x tokens | kept beside the weights |
//! |---|---|---|
//! | all L | 6 | G of all blocks, and what one micro-batch keeps in all of them |
//! | b | 8 - 2 b / L | G of b blocks, what one micro-batch keeps in them, one gradient `[T, D]` of all samples, and the groups' inputs `[T, D]`, of neither the first nor the last |
//!
//! All of them give the same bits: a weight's gradient is added up over the same micro-batches in the same order. What is
//! best is the plan's to say ([`EstimatePlan`](crate::plan::EstimatePlan)).
//!
//! The sum has to be complete before `sign`, so sketches of the parts cannot be added up; exact sums can.
//!
//! A label is a token to be predicted, or a sample's class or value; the gradient of an encoder comes through its
//! classification head as it stands.

use std::collections::BTreeMap;
use std::ops::Range;

use lora_sb_data::Example;
use lora_sb_kernels::Tensor;
use lora_sb_model::{
    Batch, BlockSaved, Frozen, InputGradient, Model, NoGradients, Parameter, Sequence, Site,
};

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
    /// How many blocks were taken at once.
    pub blocks_at_once: usize,
}

/// Computes G of each site, `[out, in]`, `blocks_at_once` blocks at a time, and hands those of each group of blocks to
/// `take`, the last group first.
///
/// The model must have been [prepared](Model::prepare) for the longest example.
///
/// # Errors
/// No sample with a label; a gradient that is not finite, naming its module; what `take` returns.
pub fn stream_gradients(
    model: &Model,
    sites: &[Site],
    examples: &[Example],
    config: &InitConfig,
    blocks_at_once: usize,
    progress: &mut dyn FnMut(InitProgress),
    take: &mut dyn FnMut(BTreeMap<Site, Tensor>) -> Result<()>,
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
        blocks_at_once,
    };
    let groups = block_groups(lowest..model.config().num_hidden_layers, blocks_at_once);
    let mut gradients = zeros(model, sites, &groups[0])?;
    let lengths: Vec<usize> = sequences.iter().map(|sequence| sequence.ids.len()).collect();
    let mut waiting = Vec::new();
    for samples in micro_batches(&lengths, config.max_tokens) {
        let batch = Batch::pack(model.kernels().as_ref(), &sequences[samples.clone()])?;
        let (micro_batch, loss) = first_pass(model, &groups, batch, &mut gradients)?;
        estimate.labelled_tokens += micro_batch.batch.labelled();
        estimate.loss += loss;
        progress(InitProgress::Forward { samples: samples.end, of: sequences.len() });
        waiting.push(micro_batch);
    }
    take(finite(model, gradients)?)?;
    for group in &groups[1..] {
        let mut gradients = zeros(model, sites, group)?;
        for micro_batch in &mut waiting {
            micro_batch.second_pass(model, group, lowest, &mut gradients)?;
        }
        take(finite(model, gradients)?)?;
    }
    Ok(estimate)
}

/// The gradients by site, where all of them are finite. Of several that are not, the last is told of: from it on down every
/// gradient is spoilt.
fn finite(model: &Model, gradients: BTreeMap<Parameter, Tensor>) -> Result<BTreeMap<Site, Tensor>> {
    let squares = model.kernels().sums_of_squares(&gradients.values().collect::<Vec<_>>())?;
    let mut finite = BTreeMap::new();
    for ((parameter, gradient), squares) in gradients.into_iter().zip(squares).rev() {
        let Parameter::Weight(site) = parameter else { continue };
        if !squares.is_finite() {
            let what = format!("the initialisation's gradient of {}", model.module(site));
            return Err(Error::NotFinite { what });
        }
        finite.insert(site, gradient);
    }
    Ok(finite)
}

/// The blocks in groups of `at_once`, from the last to the first; the last group takes what is left.
pub(crate) fn block_groups(blocks: Range<usize>, at_once: usize) -> Vec<Range<usize>> {
    let (mut groups, mut end) = (Vec::new(), blocks.end);
    while end > blocks.start {
        let start = end.saturating_sub(at_once.max(1)).max(blocks.start);
        groups.push(start..end);
        end = start;
    }
    groups
}

/// A place for the gradients of the targets of some blocks and of nothing else: what is not in the map is not
/// computed.
fn zeros(model: &Model, sites: &[Site], blocks: &Range<usize>) -> Result<BTreeMap<Parameter, Tensor>> {
    let zeros = |site: &Site| {
        let (out, input) = model.shape(*site);
        Ok((Parameter::Weight(*site), model.kernels().zeros(&[out, input])?))
    };
    sites.iter().filter(|site| blocks.contains(&site.layer)).map(zeros).collect()
}

/// One packed micro-batch on its way through the groups.
struct MicroBatch {
    batch: Batch,
    /// The inputs `[T, D]` of the groups that have not gone backward yet, the next one's last. There is none of a
    /// group that begins with the first block, whose input is looked up again.
    inputs: Vec<Tensor>,
    /// The gradient `[T, D]` of the output of the group that goes backward next.
    dy: Option<Tensor>,
}

/// Up to the loss, keeping the inputs of the groups below the first one (which is the last of the blocks), and back
/// through that one. Also the loss.
fn first_pass(
    model: &Model,
    groups: &[Range<usize>],
    batch: Batch,
    gradients: &mut BTreeMap<Parameter, Tensor>,
) -> Result<(MicroBatch, f64)> {
    let (top, below) = (&groups[0], &groups[1..]);
    let mut inputs = Vec::new();
    let mut x = model.embed(&batch)?;
    for layer in 0..top.start {
        let (y, saved) = model.block_forward(layer, x, &batch, &Frozen)?;
        if layer > 0 && below.iter().any(|group| group.start == layer) {
            inputs.push(saved.into_input());
        }
        x = y;
    }
    let (y, saved) = forward(model, top, x, &batch)?;
    let (loss, dy) = model.head(y, &batch, &mut NoGradients, InputGradient::Wanted)?;
    let dy = match dy {
        Some(dy) => backward(model, top, saved, &batch, dy, gradients, !below.is_empty())?,
        None => None,
    };
    Ok((MicroBatch { batch, inputs, dy }, loss))
}

impl MicroBatch {
    /// Forward once more and backward through one of the groups below.
    fn second_pass(
        &mut self,
        model: &Model,
        group: &Range<usize>,
        lowest: usize,
        gradients: &mut BTreeMap<Parameter, Tensor>,
    ) -> Result<()> {
        let x = match group.start {
            0 => Some(model.embed(&self.batch)?),
            _ => self.inputs.pop(),
        };
        // Both stand here once for each group by construction.
        let (Some(x), Some(dy)) = (x, self.dy.take()) else { return Ok(()) };
        let (y, saved) = forward(model, group, x, &self.batch)?;
        drop(y);
        self.dy = backward(model, group, saved, &self.batch, dy, gradients, group.start > lowest)?;
        Ok(())
    }
}

/// The output `[T, D]` of some blocks from their input x `[T, D]`, and what their backward reads.
fn forward(
    model: &Model,
    blocks: &Range<usize>,
    mut x: Tensor,
    batch: &Batch,
) -> Result<(Tensor, Vec<BlockSaved>)> {
    let mut kept = Vec::with_capacity(blocks.len());
    for layer in blocks.clone() {
        let (y, saved) = model.block_forward(layer, x, batch, &Frozen)?;
        kept.push(saved);
        x = y;
    }
    Ok((x, kept))
}

/// The gradient `[T, D]` of the blocks' input, where it goes on, from that of their output, dy `[T, D]`; those of the
/// weights are added to `gradients`.
fn backward(
    model: &Model,
    blocks: &Range<usize>,
    saved: Vec<BlockSaved>,
    batch: &Batch,
    dy: Tensor,
    gradients: &mut BTreeMap<Parameter, Tensor>,
    go_on: bool,
) -> Result<Option<Tensor>> {
    let mut dx = Some(dy);
    for (layer, saved) in blocks.clone().zip(saved).rev() {
        let Some(dy) = dx.take() else { break };
        let wanted = match layer > blocks.start || go_on {
            true => InputGradient::Wanted,
            false => InputGradient::Unwanted,
        };
        dx = model.block_backward(layer, saved, batch, dy, &mut Frozen, gradients, wanted)?;
    }
    Ok(dx)
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

/// Cuts samples of these lengths into micro-batches of at most `max_tokens` tokens and at least one sample.
pub(crate) fn micro_batches(lengths: &[usize], max_tokens: usize) -> Vec<Range<usize>> {
    let (mut batches, mut start, mut tokens) = (Vec::new(), 0, 0);
    for (index, length) in lengths.iter().enumerate() {
        if index > start && tokens + length > max_tokens {
            batches.push(start..index);
            (start, tokens) = (index, 0);
        }
        tokens += length;
    }
    batches.push(start..lengths.len());
    batches
}
