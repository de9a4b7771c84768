//! Loss, predictions and scores on held-out examples.

pub mod metric;
mod prediction;

use lora_sb_data::{Example, Label};
use lora_sb_model::{Batch, LinearHook, Model, Sequence, Target};

use crate::{Result, Tuned};

pub use self::metric::Metric;
pub(crate) use self::prediction::measure;
pub use self::prediction::{Measured, metrics_of, predictions, scores};

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

/// The mean loss of a tuned model over all labels of `examples`; see [`loss_of`].
///
/// # Errors
/// As there.
pub fn held_out_loss(tuned: &Tuned, examples: &[Example], batch_size: usize) -> Result<Mean> {
    loss_of(&tuned.model, tuned.hook(), examples, batch_size)
}

/// The mean loss over all labelled tokens of `examples`, or over the examples themselves where they have a label;
/// in batches of `batch_size` examples in their order.
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
        let batch = pack(model, chunk, 1.0)?;
        mean.add(Mean::of_sum(model.loss(&batch, hook)?, batch.labelled() as u64));
    }
    Ok(mean)
}

/// An example as the model takes it, each of its labels weighing `weight` in the loss: its trained tokens, or its
/// one class or value.
pub fn sequence(example: &Example, weight: f32) -> Sequence<'_> {
    let target = match example.label {
        None => Target::Tokens(&example.trained),
        Some(Label::Class(class)) => Target::Class(class),
        Some(Label::Value(value)) => Target::Value(value),
    };
    Sequence { ids: &example.ids, second: example.second, target, weight }
}

/// Labels of an example that are in the loss: 1 where it has a class or value, else its trained tokens. Nothing
/// predicts the first token, whatever its flag says.
pub fn labels(example: &Example) -> usize {
    match example.label {
        Some(_) => 1,
        None => example.trained.iter().skip(1).filter(|&&trained| trained).count(),
    }
}

/// One batch of examples, each label's loss multiplied by `weight`.
pub(crate) fn pack<'a>(
    model: &Model,
    examples: impl IntoIterator<Item = &'a Example>,
    weight: f32,
) -> Result<Batch> {
    let sequences: Vec<_> = examples.into_iter().map(|example| sequence(example, weight)).collect();
    Ok(Batch::pack(model.kernels().as_ref(), &sequences)?)
}
