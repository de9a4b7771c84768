//! Loss on held-out examples.

use lora_sb_data::Example;
use lora_sb_model::{Batch, LinearHook, Model, Sequence};

use crate::{Result, Tuned};

/// A weighted mean that carries its weight, so that means of parts add up to the mean of the whole.
///
/// ```
/// use lora_sb_tune::eval::Mean;
///
/// let mut mean = Mean::default();
/// mean.add(Mean::of_sum(6.0, 3)); // three tokens with a mean of 2
/// mean.add(Mean::of_sum(10.0, 1));
/// assert_eq!((mean.value(), mean.weight()), (Some(4.0), 4));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Mean {
    sum: f64,
    weight: u64,
}

impl Mean {
    /// The mean of `weight` values with the given sum.
    pub fn of_sum(sum: f64, weight: u64) -> Self {
        Mean { sum, weight }
    }

    /// Takes in another part.
    pub fn add(&mut self, other: Mean) {
        self.sum += other.sum;
        self.weight += other.weight;
    }

    /// The mean; `None` of nothing.
    pub fn value(&self) -> Option<f64> {
        (self.weight > 0).then(|| self.sum / self.weight as f64)
    }

    /// How many values it is the mean of.
    pub fn weight(&self) -> u64 {
        self.weight
    }
}

/// The mean loss of a tuned model over all labelled tokens of `examples`; see [`loss_of`].
///
/// # Errors
/// As there.
pub fn held_out_loss(tuned: &Tuned, examples: &[Example], batch_size: usize) -> Result<Mean> {
    loss_of(&tuned.model, tuned.hook(), examples, batch_size)
}

/// The mean loss over all labelled tokens of `examples`, in batches of `batch_size` examples in their order.
///
/// The model must have been prepared for the longest of them.
///
/// # Errors
/// Where the model fails.
pub fn loss_of(
    model: &Model,
    hook: &dyn LinearHook,
    examples: &[Example],
    batch_size: usize,
) -> Result<Mean> {
    let mut mean = Mean::default();
    for chunk in examples.chunks(batch_size.max(1)) {
        mean.add(batch_loss(model, hook, chunk)?);
    }
    Ok(mean)
}

/// The same of one batch.
pub(crate) fn batch_loss(model: &Model, hook: &dyn LinearHook, examples: &[Example]) -> Result<Mean> {
    let batch = pack(model, examples, 1.0)?;
    Ok(Mean::of_sum(model.loss(&batch, hook)?, batch.labelled() as u64))
}

/// One batch of examples, each labelled token's loss multiplied by `weight`.
pub(crate) fn pack<'a>(
    model: &Model,
    examples: impl IntoIterator<Item = &'a Example>,
    weight: f32,
) -> Result<Batch> {
    let sequence = |example: &'a Example| Sequence { ids: &example.ids, trained: &example.trained, weight };
    let sequences: Vec<_> = examples.into_iter().map(sequence).collect();
    Ok(Batch::pack(model.kernels().as_ref(), &sequences)?)
}

/// Tokens of an example that are in the loss. Nothing predicts the first one, whatever its flag says.
pub(crate) fn labelled_tokens(example: &Example) -> usize {
    example.trained.iter().skip(1).filter(|&&trained| trained).count()
}
