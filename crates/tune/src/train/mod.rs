//! The training loop.
//!
//! One optimizer step, top to bottom: the step's number names its examples ([`Cursor`]); they are packed a
//! micro-batch at a time and their gradients added up ([`gradients_of_step`]); the global norm gives the
//! clipping factor; AdamW moves what is trained. Everything that decides the outcome is in the plan, the data
//! and the state of the last checkpoint, so that a resumed run equals an uninterrupted one bit for bit.

mod cursor;
mod event;
mod gradients;
mod trainer;

use std::sync::atomic::AtomicBool;

use lora_sb_data::Example;

pub use self::cursor::{Cursor, StepExamples};
pub use self::event::{Event, Observer, StepReport, Summary};
pub use self::gradients::{StepGradients, gradients_of_step};

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
/// Held-out loss is measured before the first step, every `eval_steps`, and after the last; each new best is
/// saved. A checkpoint is written before the first step, every `save_steps`, and after the last. Where `stop`
/// becomes true, the step at hand is finished and saved. A checkpoint that cannot be written is reported to the
/// observer and tried again at the next one; training goes on meanwhile.
///
/// # Errors
/// Settings out of range, or other than the plan of `run` says; data without a token to train on; a checkpoint
/// of another run; a loss or gradient that is not finite (the state before that step is saved); a last
/// checkpoint that cannot be written.
pub fn train(
    tuned: &mut Tuned,
    data: &TrainingData,
    config: &TrainConfig,
    run: &mut RunDirectory,
    resume: Option<Checkpoint>,
    observer: &mut dyn Observer,
    clock: &dyn Clock,
    stop: &AtomicBool,
) -> Result<Summary> {
    trainer::Trainer::new(tuned, data, config, run, resume, observer, clock)?.run(stop)
}
