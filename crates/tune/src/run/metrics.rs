//! `metrics.jsonl`: one JSON object a line for every optimizer step and every evaluation, and one for the memory.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Disk;

/// A line of `metrics.jsonl`. Everything but times and memory is the same in every run of the same plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Metric {
    /// An optimizer step.
    Step {
        /// Optimizer steps finished, this one counted.
        step: usize,
        /// Passes over the training examples finished, as a fraction.
        epoch: f64,
        /// Mean loss of the step's labels before the step.
        loss: f64,
        /// The step's learning rate.
        learning_rate: f64,
        /// Global norm of the gradients before clipping.
        grad_norm: f64,
        /// Tokens of the step.
        tokens: usize,
        /// Labels that are in the loss.
        trained_tokens: usize,
        /// Time that the step took.
        seconds: f64,
    },
    /// An evaluation on the held-out examples.
    Evaluation {
        /// Optimizer steps finished.
        step: usize,
        /// Mean held-out loss.
        eval_loss: f64,
        /// Scores by their metric's name, where the examples have labels.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        metrics: BTreeMap<String, f64>,
        /// Time that the evaluation took.
        seconds: f64,
    },
    /// The memory of the process at its largest: the last line of a run. Whoever resumes it writes its own.
    Memory {
        /// Optimizer steps finished.
        step: usize,
        /// Bytes as planned.
        planned_bytes: usize,
        /// Bytes as measured; left out where nobody counts them.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        peak_bytes: Option<usize>,
    },
}

impl Metric {
    /// Optimizer steps finished.
    pub fn step(&self) -> usize {
        match self {
            Metric::Step { step, .. } | Metric::Evaluation { step, .. } | Metric::Memory { step, .. } => {
                *step
            }
        }
    }

    /// The same line without its times and bytes, for comparing runs.
    pub fn timeless(mut self) -> Self {
        match &mut self {
            Metric::Step { seconds, .. } | Metric::Evaluation { seconds, .. } => *seconds = 0.0,
            Metric::Memory { planned_bytes, peak_bytes, .. } => (*planned_bytes, *peak_bytes) = (0, None),
        }
        self
    }
}

/// The file, appended to. Lines that could not be written wait for the next attempt.
#[derive(Debug)]
pub(super) struct MetricsLog {
    path: PathBuf,
    /// Bytes of the file that are whole lines.
    length: u64,
    pending: Vec<u8>,
}

impl MetricsLog {
    pub(super) fn new(path: PathBuf) -> Self {
        MetricsLog { path, length: 0, pending: Vec::new() }
    }

    /// Keeps the lines of steps up to `last`, from which a run goes on, and not the last one of the session that ended
    /// there; `None` keeps nothing.
    pub(super) fn keep_through(&mut self, last: Option<usize>) -> io::Result<()> {
        self.pending.clear();
        self.length = 0;
        let Some(last) = last else { return Ok(()) };
        for line in read_lines(&self.path)? {
            match serde_json::from_str::<Metric>(&line) {
                Ok(Metric::Memory { .. }) => break,
                Ok(metric) if metric.step() <= last => self.length += line.len() as u64 + 1,
                _ => break,
            }
        }
        Ok(())
    }

    pub(super) fn push(&mut self, metric: &Metric) {
        // A struct of numbers always has a JSON form.
        self.pending.extend(serde_json::to_vec(metric).unwrap_or_default());
        self.pending.push(b'\n');
    }

    pub(super) fn flush(&mut self, disk: &dyn Disk) -> io::Result<()> {
        disk.append(&self.path, self.length, &self.pending)?;
        self.length += self.pending.len() as u64;
        self.pending.clear();
        Ok(())
    }

    /// Lastingly: a checkpoint must never be newer than the lines before it.
    pub(super) fn sync(&mut self, disk: &dyn Disk) -> io::Result<()> {
        self.flush(disk)?;
        disk.sync(&self.path)
    }
}

/// The lines of a metrics file that are whole.
pub(super) fn read(path: &Path) -> io::Result<Vec<Metric>> {
    Ok(read_lines(path)?.iter().map_while(|line| serde_json::from_str(line).ok()).collect())
}

/// Lines that end with a line break; a torn last one is left out. No file is no line.
fn read_lines(path: &Path) -> io::Result<Vec<String>> {
    let bytes = match std::fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let text = String::from_utf8_lossy(&bytes);
    Ok(text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')).map(str::to_owned).collect())
}
