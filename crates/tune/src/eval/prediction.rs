//! What a classification head says of examples, and how good that is.

use std::collections::BTreeMap;

use lora_sb_data::{Example, Label};
use lora_sb_kernels::{Kernels, Tensor};
use lora_sb_model::{Batch, LinearHook, Model, Sequence, Target, Task};

use super::{Mean, Metric, pack, sequence};
use crate::{Error, Result, Tuned};

/// What one forward pass over examples tells.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// The mean loss over their labels.
    pub loss: Mean,
    /// What is predicted of each; empty for language modelling.
    pub predictions: Vec<Label>,
}

/// The class or value that is predicted of each example, in batches of `batch_size`. Their own labels are not read.
///
/// # Errors
/// A language model, which predicts tokens; where the model fails.
pub fn predictions(tuned: &Tuned, examples: &[Example], batch_size: usize) -> Result<Vec<Label>> {
    let (kernels, task) = (tuned.model.kernels().as_ref(), tuned.model.config().task);
    if task == Task::LanguageModel {
        return Err(Error::Config {
            name: "predictions".into(),
            expected: "a model with a classification head".into(),
            found: "a language model".into(),
        });
    }
    let mut all = Vec::with_capacity(examples.len());
    for chunk in examples.chunks(batch_size.max(1)) {
        let mut sequences = Vec::with_capacity(chunk.len());
        for example in chunk {
            sequences.push(Sequence { target: Target::Tokens(&example.trained), ..sequence(example, 1.0) });
        }
        let logits = tuned.model.logits(&Batch::pack(kernels, &sequences)?, tuned.hook())?; // [N, C]
        all.extend(read(kernels, &logits, task)?);
    }
    Ok(all)
}

/// The loss of one batch and, where the examples have labels, what is predicted of them, out of one pass.
pub(crate) fn measure(model: &Model, hook: &dyn LinearHook, examples: &[Example]) -> Result<Measured> {
    let batch = pack(model, examples, 1.0)?;
    let weight = batch.labelled() as u64;
    if examples.iter().any(|example| example.label.is_none()) {
        let loss = Mean::of_sum(model.loss(&batch, hook)?, weight);
        return Ok(Measured { loss, predictions: Vec::new() });
    }
    let kernels = model.kernels().as_ref();
    let logits = model.logits(&batch, hook)?; // [N, C]
    let predictions = read(kernels, &logits, model.config().task)?;
    let sum = loss_of_logits(kernels, logits, examples)?;
    Ok(Measured { loss: Mean::of_sum(sum, weight), predictions })
}

/// The class with the largest logit, the first of equal ones; or the value.
fn read(kernels: &dyn Kernels, logits: &Tensor, task: Task) -> Result<Vec<Label>> {
    let classes = logits.shape()[1];
    let values = kernels.to_f32(logits)?;
    let class = |row: &[f32]| {
        let largest = (1..row.len()).fold(0, |best, at| if row[at] > row[best] { at } else { best });
        Label::Class(largest as u32)
    };
    Ok(match task {
        Task::Classification { .. } => values.chunks_exact(classes).map(class).collect(),
        Task::LanguageModel | Task::Regression => values.into_iter().map(Label::Value).collect(),
    })
}

/// The summed loss of logits `[N, C]`, each example weighing 1.
fn loss_of_logits(kernels: &dyn Kernels, mut logits: Tensor, examples: &[Example]) -> Result<f64> {
    let count = [examples.len()];
    let weights = kernels.from_f32(&vec![1.0; examples.len()], &count)?;
    let (mut classes, mut values) = (Vec::new(), Vec::new());
    for example in examples {
        match example.label {
            Some(Label::Class(class)) => classes.push(class),
            Some(Label::Value(value)) => values.push(value),
            None => {}
        }
    }
    if values.is_empty() {
        let labels = kernels.from_u32(&classes, &count)?;
        return Ok(kernels.cross_entropy_of_logits(&mut logits, &labels, &weights)?);
    }
    let mut predicted = kernels.from_f32(&kernels.to_f32(&logits)?, &count)?;
    let targets = kernels.from_f32(&values, &count)?;
    Ok(kernels.squared_error(&mut predicted, &targets, &weights)?)
}

/// The metrics that say something of a task: none of a language model, and F1 of two classes alone.
pub fn metrics_of(task: Task) -> Vec<Metric> {
    match task {
        Task::LanguageModel => Vec::new(),
        Task::Classification { labels: 2 } => vec![Metric::Accuracy, Metric::F1, Metric::Matthews],
        Task::Classification { .. } => vec![Metric::Accuracy, Metric::Matthews],
        Task::Regression => vec![Metric::Pearson, Metric::Spearman],
    }
}

/// The scores of predictions, by the metrics' names. One that is not defined, as a correlation of predictions that
/// are all the same, is left out.
///
/// # Errors
/// A metric that is not of the task; other than one prediction for each example, of the kind of its label.
pub fn scores(
    task: Task,
    predictions: &[Label],
    examples: &[Example],
    metrics: &[Metric],
) -> Result<BTreeMap<String, f64>> {
    let wrong = |name: &str, expected: String, found: String| {
        Err(Error::Config { name: name.into(), expected, found })
    };
    if predictions.len() != examples.len() {
        let expected = format!("one for each of {} examples", examples.len());
        return wrong("predictions", expected, predictions.len().to_string());
    }
    let (mut classes, mut values) = (Vec::new(), Vec::new());
    for (prediction, example) in predictions.iter().zip(examples) {
        match (*prediction, example.label) {
            (Label::Class(found), Some(Label::Class(expected))) => classes.push((found, expected)),
            (Label::Value(found), Some(Label::Value(expected))) => {
                values.push((f64::from(found), f64::from(expected)));
            }
            (_, label) => {
                let found = label.map_or("none".into(), |label| format!("{label:?}"));
                return wrong(&example.source.to_string(), "a label as it is predicted".into(), found);
            }
        }
    }
    let mut found = BTreeMap::new();
    for metric in metrics {
        if !metrics_of(task).contains(metric) {
            let known: Vec<&str> = metrics_of(task).into_iter().map(Metric::name).collect();
            return wrong("metric", format!("one of [{}]", known.join(", ")), metric.to_string());
        }
        let score = if values.is_empty() { metric.of_classes(&classes) } else { metric.of_values(&values) };
        found.extend(score.map(|score| (metric.name().to_owned(), score)));
    }
    Ok(found)
}
