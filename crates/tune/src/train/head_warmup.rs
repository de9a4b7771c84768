//! The warm-up of a classification head, before an adapter is made.
//!
//! The first gradient of LoRA-SB and LoRA-GA comes through the head as it stands, and a head that is new is random: the
//! estimated update then says as much of the draw as of the task. A few steps on the head alone come before. Everything
//! below it is frozen and without an adapter, so a step is
//!
//! ```text
//! x = blocks(embed(tokens))     [T, D]   forward alone, nothing kept
//! loss, dP = head(x; P)                  P: the head's parameters of `modules_to_save`
//! P <- AdamW(P, dP)                      at the run's peak learning rate throughout, without weight decay
//! ```
//!
//! Source of the order, head first: Kumar et al., arXiv 2202.10054. In arXiv 2411.19557 the gradient comes through the
//! head as it was drawn, which is 0 steps.

use std::collections::BTreeMap;

use lora_sb_data::Example;
use lora_sb_kernels::{AdamWStep, Tensor};
use lora_sb_model::{Config, Frozen, Gradients, InputGradient, Model, NoGradients, Parameter, Task};

use super::start::check_examples;
use super::{Cursor, TrainingData};
use crate::eval::{labels, pack};
use crate::optim::clip_factor;
use crate::tuned::own;
use crate::{AdapterConfig, Error, Method, Result, TrainConfig, head};

/// What a warm-up came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadWarmup {
    /// Optimizer steps.
    pub steps: usize,
    /// Mean loss of the first step's examples, before it.
    pub loss_before: f64,
    /// Mean loss of the same examples after the last step.
    pub loss_after: f64,
}

/// A step of a warm-up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadWarmupStep {
    /// Steps finished, this one counted.
    pub step: usize,
    /// Steps in all.
    pub of: usize,
    /// Mean loss of the step's examples, before the step.
    pub loss: f64,
}

/// Checks that there is a head to be warmed up, for which the weights need not be read.
///
/// # Errors
/// More than 0 steps for a model without a classification head, for full fine-tuning, whose own first steps train the
/// head, or where no module of the head is trained.
pub fn check_head_warmup(steps: usize, adapter: &AdapterConfig, model: &Config) -> Result<()> {
    let reason = match (steps, adapter.method, model.task) {
        (0, ..) => return Ok(()),
        (_, _, Task::LanguageModel) => "the model has no classification head",
        (_, Method::Full, _) => "the first steps of full fine-tuning train the head as well",
        _ if head::resolve(&adapter.modules_to_save, model)?.is_empty() => {
            "modules_to_save names no module of the head"
        }
        _ => return Ok(()),
    };
    let (name, expected) = ("head_warmup_steps".into(), format!("0, as {reason}"));
    Err(Error::Config { name, expected, found: steps.to_string() })
}

/// Trains the head's `modules_to_save` for some optimizer steps and nothing else, in place, so that an adapter made
/// next ([`Tuned::adapt`](crate::Tuned::adapt)) starts from them. `None` for 0 steps, which change nothing.
///
/// The examples of step n are those that step n of the run itself takes. The result does not depend on the number of
/// threads, and a resumed run does without: its checkpoint holds the head.
///
/// # Errors
/// As [`check_head_warmup`]; settings out of range; labels that are not the task's; a loss or gradient that is not
/// finite, with its examples, and the head is then as before that step.
pub fn warm_up_head(
    model: &mut Model,
    adapter: &AdapterConfig,
    data: &TrainingData,
    config: &TrainConfig,
    steps: usize,
    progress: &mut dyn FnMut(HeadWarmupStep),
) -> Result<Option<HeadWarmup>> {
    check_head_warmup(steps, adapter, model.config())?;
    if steps == 0 {
        return Ok(None);
    }
    config.validate()?;
    check_examples(data, model.config())?;
    let mut cursor = Cursor::new(data.train.len(), config)?;
    model.prepare(data.train.iter().map(|example| example.ids.len()).max().unwrap_or(0))?;
    let parameters = head::resolve(&adapter.modules_to_save, model.config())?;
    let mut optimizer = Optimizer::new(model, parameters)?;
    let mut first = 0.0;
    for step in 0..steps {
        let examples = examples_of(step, &mut cursor, data);
        let loss = optimizer.step(model, &examples, config, step + 1)?;
        if step == 0 {
            first = loss;
        }
        progress(HeadWarmupStep { step: step + 1, of: steps, loss });
    }
    let again = examples_of(0, &mut cursor, data);
    let last = loss_of_step(model, &again, config, steps, &mut NoGradients)?;
    Ok(Some(HeadWarmup { steps, loss_before: first, loss_after: last }))
}

fn examples_of<'a>(step: usize, cursor: &mut Cursor, data: &'a TrainingData) -> Vec<&'a Example> {
    cursor.step(step).indices.iter().map(|&index| &data.train[index]).collect()
}

/// The head's gradients and AdamW's two moments of each.
struct Optimizer {
    gradients: BTreeMap<Parameter, Tensor>,
    moments: BTreeMap<Parameter, (Tensor, Tensor)>,
}

impl Optimizer {
    fn new(model: &mut Model, parameters: Vec<Parameter>) -> Result<Self> {
        let gradients = own(model, parameters)?;
        let kernels = model.kernels();
        let mut moments = BTreeMap::new();
        for (&parameter, gradient) in &gradients {
            let shape = gradient.shape();
            moments.insert(parameter, (kernels.zeros(shape)?, kernels.zeros(shape)?));
        }
        Ok(Optimizer { gradients, moments })
    }

    /// Takes a step, counted from 1; the loss before it.
    fn step(
        &mut self,
        model: &mut Model,
        examples: &[&Example],
        config: &TrainConfig,
        step: usize,
    ) -> Result<f64> {
        let kernels = model.kernels().clone();
        self.gradients.values_mut().try_for_each(|gradient| kernels.fill(0.0, gradient))?;
        let loss = loss_of_step(model, examples, config, step, &mut self.gradients)?;
        let squares = kernels.sums_of_squares(&self.gradients.values().collect::<Vec<_>>())?;
        let norm = squares.into_iter().sum::<f64>().sqrt();
        if !norm.is_finite() {
            return Err(not_finite(step, "gradient norm of the head's warm-up", norm, examples));
        }
        let adamw = AdamWStep {
            learning_rate: config.learning_rate,
            beta1: config.adam_beta1,
            beta2: config.adam_beta2,
            epsilon: config.adam_epsilon,
            weight_decay: 0.0,
            gradient_scale: clip_factor(norm, config.max_grad_norm),
            step: step as u64,
        };
        for (&parameter, (first, second)) in &mut self.moments {
            let (Some(gradient), Some(value)) = (self.gradients.get(&parameter), model.weight_mut(parameter))
            else {
                continue;
            };
            kernels.adamw(&adamw, gradient, value, first, second)?;
        }
        Ok(loss)
    }
}

/// The mean loss of a step's examples, each label weighing the same, as in
/// [`gradients_of_step`](super::gradients_of_step); its gradients are added to `gradients`.
fn loss_of_step(
    model: &Model,
    examples: &[&Example],
    config: &TrainConfig,
    step: usize,
    gradients: &mut dyn Gradients,
) -> Result<f64> {
    let count: usize = examples.iter().map(|example| labels(example)).sum();
    let weight = 1.0 / count as f32;
    let mut loss = 0.0;
    for chunk in examples.chunks(config.per_device_train_batch_size) {
        let batch = pack(model, chunk.iter().copied(), weight)?;
        let mut x = model.embed(&batch)?; // [T, D]
        for layer in 0..model.config().num_hidden_layers {
            (x, _) = model.block_forward(layer, x, &batch, &Frozen)?;
        }
        let (part, _) = model.head(x, &batch, gradients, InputGradient::Unwanted)?;
        if !part.is_finite() {
            return Err(not_finite(step, "loss of the head's warm-up", part, chunk));
        }
        loss += part;
    }
    Ok(loss)
}

fn not_finite(step: usize, quantity: &'static str, found: f64, examples: &[&Example]) -> Error {
    let examples = examples.iter().map(|example| example.source.clone()).collect();
    let saved = "nothing is saved, as the run had not begun".into();
    Error::NotFiniteStep { step, quantity, found, examples, saved }
}
