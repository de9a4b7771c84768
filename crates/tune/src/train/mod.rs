//! The training loop.
//!
//! One optimizer step, top to bottom: the step's number names its examples ([`Cursor`]); they are packed a
//! micro-batch at a time and their gradients added up ([`gradients_of_step`]); the global norm gives the
//! clipping factor; AdamW moves what is trained. Everything that decides the outcome is in the plan, the data
//! and the state of the last checkpoint, so that a resumed run equals an uninterrupted one bit for bit.
//!
//! A classification head may be trained by itself for some steps before an adapter is made ([`warm_up_head`]).

mod cursor;
mod event;
mod gradients;
mod head_warmup;
mod rehearsal;
mod start;
mod trainer;

use std::sync::atomic::AtomicBool;

use lora_sb_data::Example;

pub use self::cursor::{Cursor, StepExamples};
pub use self::event::{Event, Observer, StepReport, Summary};
pub use self::gradients::{MicroBatches, StepGradients, gradients_of_step};
pub use self::head_warmup::{HeadWarmup, HeadWarmupStep, check_head_warmup, warm_up_head};
pub use self::rehearsal::{MemoryWatch, PeakMemory};

use crate::run::{Checkpoint, RunDirectory};
use crate::{Result, TrainConfig, Tuned};

/// What is trained on and what is held out.
#[derive(Clone, Debug, Default)]
pub struct TrainingData {
    /// Examples to train on, in the order of their files; the run's seed shuffles them.
    pub train: Vec<Example>,
    /// Held-out examples; may be none, and then there is no best checkpoint.
    pub validation: Vec<Example>,
}

/// The time, handed in so that tests can set it.
pub trait Clock {
    /// Seconds since some fixed moment.
    fn seconds(&self) -> f64;
}

/// Trains `tuned`, from its start or from a checkpoint of the same run.
///
/// Held-out loss is measured before the first step, every `eval_steps`, and after the last, with the scores of
/// examples that have labels; each new best is saved. A checkpoint is written every `save_steps`, after the last step, and, where bases were factorised,
/// before the first. Where `stop` becomes true, the step at hand is finished and saved. A checkpoint that cannot
/// be written is reported to the observer and tried again at the next one; training goes on meanwhile.
///
/// Without `resume` the run starts anew, and what `metrics.jsonl` holds is dropped.
///
/// With a `watch` over the memory, a run that starts anew first goes through its largest micro-batch, forward and
/// backward, so that it fails then if it does not fit; nothing of that remains. At the end the peak is written down
/// beside the planned one.
///
/// ```
/// use std::sync::{Arc, atomic::AtomicBool};
///
/// use lora_sb_data::{Example, Location};
/// use lora_sb_kernels::Cpu;
/// use lora_sb_model::{Config, Model, Storage};
/// use lora_sb_tune::run::{ResolvedPlan, RunDirectory};
/// use lora_sb_tune::train::{Clock, Event, Observer, TrainingData, train};
/// use lora_sb_tune::{Method, TrainConfig, Tuned};
///
/// struct Print;
/// impl Observer for Print {
///     fn event(&mut self, event: &Event) {
///         if let Event::Step(report) = event {
///             println!("step {} of {}: loss {:.3}", report.step, report.total_steps, report.loss);
///         }
///     }
/// }
///
/// struct Stopwatch(std::time::Instant);
/// impl Clock for Stopwatch {
///     fn seconds(&self) -> f64 {
///         self.0.elapsed().as_secs_f64()
///     }
/// }
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let config = Config::from_json(
///     br#"{"model_type": "llama", "vocab_size": 13, "hidden_size": 8, "intermediate_size": 12,
///          "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}"#,
/// )?;
/// let mut tuned = Tuned::full(Model::random(config, Arc::new(Cpu::new(1)?), 7, Storage::Trainable)?)?;
///
/// let source = Location { file: std::path::Path::new("memory").into(), line: 1, element: None };
/// let example = Example::text(vec![1, 5, 3, 12], vec![false, true, true, true], source);
/// let data = TrainingData { train: vec![example], validation: Vec::new() };
///
/// let settings = TrainConfig { max_steps: Some(20), learning_rate: 0.01, ..TrainConfig::defaults(Method::Full) };
/// let mut plan = ResolvedPlan::default();
/// plan.set_all(&settings, &|_| "example".into())?;
/// # let directory = tempfile::tempdir()?;
/// # let directory = directory.path();
/// let mut run = RunDirectory::create(directory, plan)?;
/// let (clock, stop) = (Stopwatch(std::time::Instant::now()), AtomicBool::new(false));
/// let summary = train(&mut tuned, &data, &settings, &mut run, None, &mut Print, &clock, None, &stop)?;
/// assert_eq!((summary.step, summary.stopped), (20, false));
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Settings out of range, without use for the method or the task, other than the plan of `run` says, or of another
/// `dtype` than the model; data without a token to train on, or labels that are not the task's; a checkpoint of
/// another run; a loss or gradient that is not finite (the state before that step is saved); a last checkpoint that
/// cannot be written.
pub fn train(
    tuned: &mut Tuned,
    data: &TrainingData,
    config: &TrainConfig,
    run: &mut RunDirectory,
    resume: Option<Checkpoint>,
    observer: &mut dyn Observer,
    clock: &dyn Clock,
    watch: Option<&dyn MemoryWatch>,
    stop: &AtomicBool,
) -> Result<Summary> {
    trainer::Trainer::new(tuned, data, config, run, resume, observer, clock, watch)?.run(stop)
}
