//! What a run tells whoever watches it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::PeakMemory;
use crate::plan::BatchSize;
use crate::run::Best;

/// Receives the events of a run, in their order.
pub trait Observer {
    /// Called on the thread that trains.
    fn event(&mut self, event: &Event);
}

/// Something that happened in a run.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Before anything is computed.
    Started {
        /// Optimizer steps of the whole run.
        total_steps: usize,
        /// Optimizer steps of one epoch.
        steps_per_epoch: usize,
        /// Optimizer steps that a checkpoint has brought.
        finished_steps: usize,
        /// Steps of the warm-up.
        warmup_steps: usize,
        /// Examples to train on.
        train_examples: usize,
        /// Held-out examples.
        validation_examples: usize,
        /// Values that the optimizer changes, a head's included.
        trained_parameters: usize,
    },
    /// The largest micro-batch has been gone through, to see that it fits; nothing of that remains.
    Rehearsed {
        /// Its size.
        size: BatchSize,
        /// What the process has taken up to now, the start of the adapter included.
        memory: PeakMemory,
        /// Time that it took.
        seconds: f64,
    },
    /// An optimizer step.
    Step(StepReport),
    /// An evaluation.
    Evaluated {
        /// Optimizer steps finished.
        step: usize,
        /// The mean held-out loss.
        eval_loss: f64,
        /// Scores by their metric's name, where the examples have labels.
        metrics: BTreeMap<String, f64>,
        /// Labels that the loss was taken over: tokens, or examples with a class or value.
        trained_tokens: u64,
        /// Whether it is the best of the run so far.
        best: bool,
        /// Time that it took.
        seconds: f64,
    },
    /// A checkpoint.
    Saved {
        /// Optimizer steps finished.
        step: usize,
        /// Its directory.
        path: PathBuf,
    },
    /// Something could not be written; it is tried again.
    SaveFailed {
        /// Optimizer steps finished.
        step: usize,
        /// The reason.
        message: String,
    },
    /// The end, also where the run was stopped.
    Finished(Box<Summary>),
}

/// An optimizer step in numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Optimizer steps finished, this one counted.
    pub step: usize,
    /// Optimizer steps of the whole run.
    pub total_steps: usize,
    /// Passes over the training examples finished, as a fraction.
    pub epoch: f64,
    /// Mean loss of the step's labels, before the step.
    pub loss: f64,
    /// The step's learning rate.
    pub learning_rate: f64,
    /// Global norm of the gradients, before clipping.
    pub grad_norm: f64,
    /// Tokens of the step.
    pub tokens: usize,
    /// Labels that are in the loss: trained tokens, or examples with a class or value.
    pub trained_tokens: usize,
    /// Time that the step took.
    pub seconds: f64,
    /// Tokens of the step over its time; 0 where no time passed.
    pub tokens_per_second: f64,
    /// Time that the remaining steps will take at the mean speed of this session's steps.
    pub remaining_seconds: f64,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Optimizer steps finished.
    pub step: usize,
    /// Optimizer steps of the whole run.
    pub total_steps: usize,
    /// Whether it was stopped before its last step.
    pub stopped: bool,
    /// Held-out loss before the first step.
    pub first_eval_loss: Option<f64>,
    /// Held-out loss at the last evaluation.
    pub last_eval: Option<Best>,
    /// The evaluation with the lowest held-out loss, or the best score where the plan names one.
    pub best: Option<Best>,
    /// Scores at the last evaluation, by their metric's name; empty where nothing has labels, and where a finished
    /// run is resumed.
    pub last_metrics: BTreeMap<String, f64>,
    /// Tokens seen in the whole run.
    pub tokens: u64,
    /// Labels that were in the loss.
    pub trained_tokens: u64,
    /// Time of this session.
    pub seconds: f64,
    /// The last checkpoint.
    pub checkpoint: PathBuf,
    /// The checkpoint of `best`; `None` where that was the start and the start is not saved.
    pub best_checkpoint: Option<PathBuf>,
    /// The native adapter after the last step; `None` for full fine-tuning.
    pub adapter: Option<PathBuf>,
    /// The native adapter of `best_checkpoint`.
    pub best_adapter: Option<PathBuf>,
    /// The memory that the process has taken; `None` where nobody watched it.
    pub memory: Option<PeakMemory>,
    /// What could not be written at first; all of it was written in the end.
    pub failures: Vec<String>,
}
