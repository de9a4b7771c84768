//! Checkpoints: directories that are whole or do not count.
//!
//! A checkpoint is written as `step-N.partial`, every file forced to the disk, the manifest last, and then
//! renamed to `step-N`. The manifest holds the size and the SHA-256 of every other file.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use lora_sb_kernels::{Kernels, Tensor};
use serde::{Deserialize, Serialize};

use super::Disk;
use super::tensors::{self, Hashing};
use crate::{Error, Result};

const MANIFEST: &str = "manifest.json";
const STATE: &str = "state.json";
const TRAINED: &str = "trained.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
/// The version of the files' layout and of the fields of [`TrainState`].
const VERSION: u32 = 1;

/// Where a run stands after an optimizer step; together with the tensors, all that a resumption needs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainState {
    /// Optimizer steps finished.
    pub step: usize,
    /// Steps that AdamW has taken.
    pub optimizer_step: u64,
    /// The epoch of the next step, counted from 0.
    pub epoch: usize,
    /// Examples of that epoch that have been seen.
    pub examples_in_epoch: usize,
    /// Micro-batches already accumulated into the next step: 0, since runs are saved between steps.
    pub accumulated_micro_batches: usize,
    /// The seed that the order of the examples is drawn with.
    pub seed: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Labels that were in the loss: trained tokens, or examples with a class or value.
    pub trained_tokens: u64,
    /// Held-out loss before the first step, where there is held-out data.
    pub first_eval_loss: Option<f64>,
    /// The best evaluation: that with the lowest held-out loss, or the highest score where the plan names one.
    pub best: Option<Best>,
    /// The last evaluation.
    pub last_eval: Option<Best>,
    /// [`ResolvedPlan::sha256`](super::ResolvedPlan::sha256) of the run.
    pub plan_sha256: String,
    /// Over the ids, masks and labels of all examples.
    pub data_sha256: String,
    /// The base model's fingerprint; `None` for full fine-tuning, which replaces it.
    pub base: Option<String>,
    /// SHA-256 of `frozen.safetensors`; `None` where nothing is frozen but the base model.
    pub frozen_sha256: Option<String>,
}

/// A held-out loss and when it was measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Optimizer steps finished.
    pub step: usize,
    /// The mean held-out loss.
    pub eval_loss: f64,
    /// The score that the plan's `metric_for_best_model` names; none where it names none, or where the score was
    /// not defined.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
}

impl Best {
    /// Whether it is better than another: by the score where they are compared by one, and then one that is defined
    /// is better than none; else by the loss.
    pub fn beats(&self, other: &Best, by_score: bool) -> bool {
        match (by_score, self.score, other.score) {
            (true, Some(own), Some(other)) => own > other,
            (true, Some(_), None) => true,
            (true, None, Some(_)) => false,
            (true, None, None) | (false, ..) => self.eval_loss < other.eval_loss,
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    version: u32,
    files: BTreeMap<String, FileEntry>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct FileEntry {
    bytes: u64,
    sha256: String,
}

/// A checkpoint on disk that has been checked to be whole.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    path: PathBuf,
    state: TrainState,
}

impl Checkpoint {
    /// Opens a checkpoint and checks every file of it against the manifest.
    ///
    /// # Errors
    /// A missing or broken manifest; a file that is missing or differs from it.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        let manifest: Manifest = read_json(&path.join(MANIFEST))?;
        if manifest.version != VERSION {
            let message = format!("checkpoint version {}, expected {VERSION}", manifest.version);
            return Err(broken(path, message));
        }
        for name in [STATE, TRAINED, OPTIMIZER] {
            if !manifest.files.contains_key(name) {
                return Err(broken(path, format!("the manifest does not list {name}")));
            }
        }
        for (name, expected) in &manifest.files {
            let file = path.join(name);
            let found = entry_of(&file).map_err(|error| Error::io(&file, "read", error))?;
            if found != *expected {
                let FileEntry { bytes, sha256 } = expected;
                let message = format!(
                    "{} bytes with SHA-256 {}, expected {bytes} with {sha256}",
                    found.bytes, found.sha256
                );
                return Err(broken(&file, message));
            }
        }
        Ok(Checkpoint { path: path.into(), state: read_json(&path.join(STATE))? })
    }

    /// The newest checkpoint of a run directory that is whole. Broken ones are skipped, each with a call of
    /// `warn`.
    ///
    /// # Errors
    /// Where the directory of the checkpoints cannot be read.
    pub fn latest(run: &Path, warn: &mut dyn FnMut(&Error)) -> Result<Option<Checkpoint>> {
        for (_, path) in list(&run.join(super::CHECKPOINTS))?.into_iter().rev() {
            match Checkpoint::open(&path) {
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(error) => warn(&error),
            }
        }
        Ok(None)
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the run stood.
    pub fn state(&self) -> &TrainState {
        &self.state
    }

    /// What was trained, by name, on a device.
    ///
    /// # Errors
    /// Where the file cannot be read.
    pub fn trained(&self, kernels: &dyn Kernels) -> Result<BTreeMap<String, Tensor>> {
        tensors::read(&self.path.join(TRAINED), kernels)
    }

    /// The optimizer's moments, by name, on a device.
    ///
    /// # Errors
    /// Where the file cannot be read.
    pub fn optimizer(&self, kernels: &dyn Kernels) -> Result<BTreeMap<String, Tensor>> {
        tensors::read(&self.path.join(OPTIMIZER), kernels)
    }
}

/// Writes a checkpoint into `checkpoints`; returns its directory.
pub(super) fn write(
    disk: &dyn Disk,
    checkpoints: &Path,
    kernels: &dyn Kernels,
    state: &TrainState,
    trained: &[(String, &Tensor)],
    optimizer: &[(String, &Tensor)],
) -> io::Result<PathBuf> {
    let path = directory(checkpoints, state.step);
    let partial = path.with_extension("partial");
    disk.remove(&partial)?;
    disk.create_dir(&partial)?;
    let mut files = BTreeMap::new();
    let mut put = |name: &str, fill: &mut dyn FnMut(&mut dyn Write) -> io::Result<()>| {
        let mut entry = FileEntry { bytes: 0, sha256: String::new() };
        disk.write(&partial.join(name), &mut |out| {
            let mut hashing = Hashing::new(out);
            fill(&mut hashing)?;
            (entry.bytes, entry.sha256) = hashing.finish();
            Ok(())
        })?;
        files.insert(name.to_owned(), entry);
        io::Result::Ok(())
    };
    put(TRAINED, &mut |out| tensors::write(out, kernels, trained))?;
    put(OPTIMIZER, &mut |out| tensors::write(out, kernels, optimizer))?;
    put(STATE, &mut |out| write_json(out, state))?;
    let manifest = Manifest { version: VERSION, files };
    disk.write(&partial.join(MANIFEST), &mut |out| write_json(out, &manifest))?;
    // An older attempt at this step: a broken one, or one that the run was resumed from before.
    disk.remove(&path)?;
    disk.rename(&partial, &path)?;
    Ok(path)
}

/// The directory of a step's checkpoint.
pub(super) fn directory(checkpoints: &Path, step: usize) -> PathBuf {
    checkpoints.join(format!("step-{step}"))
}

/// The directories that are named as checkpoints, by step. No directory is no checkpoint.
pub(super) fn list(checkpoints: &Path) -> Result<Vec<(usize, PathBuf)>> {
    let entries = match fs::read_dir(checkpoints) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(|error| Error::io(checkpoints, "read", error))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| Error::io(checkpoints, "read", error))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if let Some(step) = name.strip_prefix("step-").and_then(|step| step.parse().ok()) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

fn entry_of(path: &Path) -> io::Result<FileEntry> {
    let mut sink = io::sink();
    let mut hashing = Hashing::new(&mut sink);
    io::copy(&mut fs::File::open(path)?, &mut hashing)?;
    let (bytes, sha256) = hashing.finish();
    Ok(FileEntry { bytes, sha256 })
}

pub(super) fn write_json(out: &mut dyn Write, value: &impl Serialize) -> io::Result<()> {
    out.write_all(&serde_json::to_vec_pretty(value)?)?;
    out.write_all(b"\n")
}

pub(super) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = fs::read(path).map_err(|error| Error::io(path, "read", error))?;
    serde_json::from_slice(&bytes).map_err(|error| broken(path, error.to_string()))
}

fn broken(path: &Path, message: String) -> Error {
    let hint =
        Some("the file was damaged or not written by this program; an older checkpoint may be whole".into());
    Error::File { path: path.into(), message, hint }
}
