//! The directory of a training run.
//!
//! ```text
//! plan.json              every resolved value, with where it came from
//! metrics.jsonl          one line for each optimizer step and each evaluation, at the end one for the memory
//! frozen.safetensors     what an adapter keeps and never changes, as the bases B and A of LoRA-SB, written once
//! best.json              the step with the lowest held-out loss or the best score, and what it was
//! adapter/               the adapter after the last step, with its head where one is trained
//! adapter-best/          the adapter of the best step, where that was another one
//! checkpoints/step-N/    what is trained, the optimizer's moments, the state, and the manifest
//! ```
//!
//! Whatever happens while it is written (a full disk, `kill -9`), a checkpoint that is found whole is whole, and
//! the ones before it are untouched.

mod checkpoint;
mod disk;
mod metrics;
mod resolved;
pub(crate) mod tensors;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use lora_sb_kernels::{Kernels, Tensor};

pub use self::checkpoint::{Best, Checkpoint, TrainState};
pub use self::disk::{Disk, Fill, LocalDisk};
pub use self::metrics::Metric;
pub use self::resolved::{PlanValue, ResolvedPlan};

use self::checkpoint::{directory, list, read_json, write_json};
use self::disk::replace;
use self::metrics::MetricsLog;
use self::tensors::Hashing;
use crate::optim::AdamW;
use crate::{Error, Result, Tuned};

pub(crate) const CHECKPOINTS: &str = "checkpoints";
const PLAN: &str = "plan.json";
const METRICS: &str = "metrics.jsonl";
const FROZEN: &str = "frozen.safetensors";
const BEST: &str = "best.json";

/// The directory of one training run.
#[derive(Debug)]
pub struct RunDirectory {
    path: PathBuf,
    plan: ResolvedPlan,
    metrics: MetricsLog,
    disk: Box<dyn Disk>,
    frozen_written: bool,
}

impl RunDirectory {
    /// Starts a run in a new directory, or in one that holds no run.
    ///
    /// # Errors
    /// A directory that holds a run already, or cannot be written.
    pub fn create(path: &Path, plan: ResolvedPlan) -> Result<RunDirectory> {
        RunDirectory::create_on(Box::new(LocalDisk), path, plan)
    }

    /// [`create`](RunDirectory::create) with the file operations of `disk`.
    ///
    /// # Errors
    /// As there.
    pub fn create_on(disk: Box<dyn Disk>, path: &Path, plan: ResolvedPlan) -> Result<RunDirectory> {
        if path.join(PLAN).exists() {
            return Err(Error::File {
                path: path.into(),
                message: "holds a run already".into(),
                hint: Some("resume it, or give another directory".into()),
            });
        }
        let failed = |error| unwritable(path, &error);
        disk.create_dir(path).map_err(failed)?;
        replace(disk.as_ref(), &path.join(PLAN), &mut |out| write_json(out, &plan)).map_err(failed)?;
        Ok(RunDirectory::new(disk, path, plan))
    }

    /// Opens the run in a directory to go on with it under `plan`.
    ///
    /// # Errors
    /// A directory without a run; a plan that differs in a value that the result depends on.
    pub fn open(path: &Path, plan: ResolvedPlan) -> Result<RunDirectory> {
        RunDirectory::open_on(Box::new(LocalDisk), path, plan)
    }

    /// [`open`](RunDirectory::open) with the file operations of `disk`.
    ///
    /// # Errors
    /// As there.
    pub fn open_on(disk: Box<dyn Disk>, path: &Path, plan: ResolvedPlan) -> Result<RunDirectory> {
        let changes = plan.changes_since(&RunDirectory::read_plan(path)?);
        if !changes.is_empty() {
            return Err(Error::PlanChanged { changes });
        }
        Ok(RunDirectory::new(disk, path, plan))
    }

    /// The plan that the run in a directory was started with.
    ///
    /// # Errors
    /// Where there is none, or it cannot be read.
    pub fn read_plan(path: &Path) -> Result<ResolvedPlan> {
        read_json(&path.join(PLAN))
    }

    fn new(disk: Box<dyn Disk>, path: &Path, plan: ResolvedPlan) -> RunDirectory {
        let metrics = MetricsLog::new(path.join(METRICS));
        RunDirectory { path: path.into(), plan, metrics, disk, frozen_written: false }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The plan of the run.
    pub fn plan(&self) -> &ResolvedPlan {
        &self.plan
    }

    /// The lines of `metrics.jsonl` that have been written.
    ///
    /// # Errors
    /// Where the file cannot be read.
    pub fn metrics(&self) -> Result<Vec<Metric>> {
        let path = self.path.join(METRICS);
        metrics::read(&path).map_err(|error| Error::io(path, "read", error))
    }

    /// All tensors of a checkpoint of this run, the frozen ones included, by name: what
    /// [`Tuned::restore`] takes.
    ///
    /// # Errors
    /// Where a file cannot be read.
    pub fn tensors(
        &self,
        checkpoint: &Checkpoint,
        kernels: &dyn Kernels,
    ) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = checkpoint.trained(kernels)?;
        if checkpoint.state().frozen_sha256.is_some() {
            tensors.append(&mut tensors::read(&self.path.join(FROZEN), kernels)?);
        }
        Ok(tensors)
    }

    /// Where the checkpoint of a step is, or would be.
    pub fn checkpoint_path(&self, step: usize) -> PathBuf {
        directory(&self.path.join(CHECKPOINTS), step)
    }

    /// What the plan calls the base model (its value `model`); empty where it has none.
    pub(crate) fn base_model(&self) -> String {
        let named = self.plan.values.get("model").and_then(|found| found.value.as_str());
        named.unwrap_or_default().to_owned()
    }

    /// Removes a file or directory of the run, if it is there.
    pub(crate) fn remove(&self, path: &Path) -> Result<()> {
        self.disk.remove(path).map_err(|error| Error::io(path, "removed", error))
    }

    /// Drops the lines of `metrics.jsonl` behind a step that the run goes on from; `None` drops all.
    pub(crate) fn rewind(&mut self, last: Option<usize>) -> Result<()> {
        let path = self.path.join(METRICS);
        self.metrics.keep_through(last).map_err(|error| Error::io(path, "read", error))
    }

    /// Adds a line to `metrics.jsonl`. What cannot be written now is written with the next line.
    pub(crate) fn log(&mut self, metric: &Metric) -> Result<()> {
        self.metrics.push(metric);
        self.metrics.flush(self.disk.as_ref()).map_err(|error| unwritable(&self.path.join(METRICS), &error))
    }

    /// Writes a checkpoint, and the frozen tensors before the first one. Older checkpoints beyond `limit` go,
    /// the best one excepted.
    pub(crate) fn save(
        &mut self,
        state: &TrainState,
        tuned: &Tuned,
        optimizer: &AdamW,
        limit: Option<usize>,
    ) -> Result<PathBuf> {
        let checkpoints = self.path.join(CHECKPOINTS);
        let saved = self.try_save(&checkpoints, state, tuned, optimizer);
        let saved = saved.map_err(|error| unwritable(&checkpoints, &error))?;
        self.prune(state, limit)?;
        Ok(saved)
    }

    fn try_save(
        &mut self,
        checkpoints: &Path,
        state: &TrainState,
        tuned: &Tuned,
        optimizer: &AdamW,
    ) -> io::Result<PathBuf> {
        let kernels = tuned.model.kernels().as_ref();
        let disk = self.disk.as_ref();
        self.metrics.sync(disk)?;
        if state.frozen_sha256.is_some() && !self.frozen_written {
            let frozen = tuned.frozen_tensors();
            replace(disk, &self.path.join(FROZEN), &mut |out| tensors::write(out, kernels, &frozen))?;
            self.frozen_written = true;
        }
        let (trained, moments) = (tuned.trained_tensors(), optimizer.tensors());
        let path = checkpoint::write(disk, checkpoints, kernels, state, &trained, &moments)?;
        if let Some(best) = &state.best {
            replace(disk, &self.path.join(BEST), &mut |out| write_json(out, best))?;
        }
        Ok(path)
    }

    fn prune(&self, state: &TrainState, limit: Option<usize>) -> Result<()> {
        let Some(limit) = limit else { return Ok(()) };
        let checkpoints = self.path.join(CHECKPOINTS);
        let found = list(&checkpoints)?;
        // A step behind this one is left from before the run was resumed; it does not make this one old.
        let older: Vec<_> = found.into_iter().filter(|(step, _)| *step <= state.step).collect();
        let surplus = older.len().saturating_sub(limit.max(1));
        let best = state.best.map(|best| best.step);
        for (_, path) in older[..surplus].iter().filter(|(step, _)| Some(*step) != best) {
            // Renamed first: a directory half removed must not look like a broken checkpoint.
            let doomed = path.with_extension("partial");
            let removed = self.disk.rename(path, &doomed).and_then(|()| self.disk.remove(&doomed));
            removed.map_err(|error| Error::io(path, "removed", error))?;
        }
        Ok(())
    }
}

/// SHA-256 of the file that `frozen_tensors` would make; `None` where there are none.
pub(crate) fn frozen_sha256(tuned: &Tuned) -> Result<Option<String>> {
    let frozen = tuned.frozen_tensors();
    if frozen.is_empty() {
        return Ok(None);
    }
    let mut sink = io::sink();
    let mut hashing = Hashing::new(&mut sink);
    let written = tensors::write(&mut hashing, tuned.model.kernels().as_ref(), &frozen);
    written.map_err(|error| Error::io(FROZEN, "hashed", error))?;
    Ok(Some(hashing.finish().1))
}

fn unwritable(path: &Path, error: &io::Error) -> Error {
    let hint = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "make room on the disk, then resume the run"
        }
        io::ErrorKind::PermissionDenied => "give a directory that can be written",
        io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => {
            "a file is in the way: give another directory"
        }
        _ => "check the disk, then resume the run",
    };
    Error::File { path: path.into(), message: format!("cannot be written: {error}"), hint: Some(hint.into()) }
}
