//! What the tests of training share: a run in a temporary directory, its events, and disks that fail.
#![allow(dead_code, unreachable_pub)] // each test file uses its own part

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};

use lora_sb_data::{Example, Location};
use lora_sb_kernels::Kernels;
use lora_sb_model::{Model, Recompute};
use lora_sb_tune::optim::Scheduler;
use lora_sb_tune::run::{Checkpoint, Disk, Fill, LocalDisk, Metric, ResolvedPlan, RunDirectory};
use lora_sb_tune::train::{
    Clock, Event, MemoryWatch, MicroBatches, Observer, PeakMemory, Summary, TrainingData, train,
};
use lora_sb_tune::{AdapterConfig, Method, Result, TrainConfig, Tuned};

use crate::common;

/// A clock on which every look takes half a second.
#[derive(Default)]
pub struct FakeClock(Cell<f64>);

impl Clock for FakeClock {
    fn seconds(&self) -> f64 {
        self.0.set(self.0.get() + 0.5);
        self.0.get()
    }
}

/// Records all events; sets a flag after a step, as Ctrl-C does.
#[derive(Default)]
pub struct Recorder<'a> {
    pub events: Vec<Event>,
    pub stop_after: Option<(usize, &'a AtomicBool)>,
}

impl Observer for Recorder<'_> {
    fn event(&mut self, event: &Event) {
        if let (Event::Step(report), Some((step, stop))) = (event, self.stop_after)
            && report.step == step
        {
            stop.store(true, Ordering::Relaxed);
        }
        self.events.push(event.clone());
    }
}

impl Recorder<'_> {
    /// The numbers of the saved steps.
    pub fn saved(&self) -> Vec<usize> {
        let saved = |event: &Event| if let Event::Saved { step, .. } = event { Some(*step) } else { None };
        self.events.iter().filter_map(saved).collect()
    }

    /// The messages of failed writes.
    pub fn failures(&self) -> Vec<(usize, String)> {
        let failed = |event: &Event| match event {
            Event::SaveFailed { step, message } => Some((*step, message.clone())),
            _ => None,
        };
        self.events.iter().filter_map(failed).collect()
    }
}

/// Examples of 4 to 14 tokens below `vocabulary`, each from its own line of `train.jsonl`.
pub fn examples(count: usize, vocabulary: usize, seed: u64) -> Vec<Example> {
    let mut generator = lora_sb_kernels::Generator::new(seed, lora_sb_kernels::Stream::Order, 7);
    let one = |line| {
        let length = 4 + generator.below(11);
        let ids = (0..length).map(|_| generator.below(vocabulary) as u32).collect();
        let trained = (0..length).map(|at| at > length / 3).collect();
        let source = Location { file: Path::new("train.jsonl").into(), line, element: None };
        Example::text(ids, trained, source)
    };
    (1..=count).map(one).collect()
}

/// 11 examples to train on and 3 held out: neither 4 nor 2 divides them.
pub fn data() -> TrainingData {
    TrainingData { train: examples(11, 29, 1), validation: examples(3, 29, 2) }
}

/// 9 steps of 2 x 2 examples in three epochs, the third step of each with 3 examples.
pub fn settings() -> TrainConfig {
    TrainConfig {
        learning_rate: 1e-2,
        lr_scheduler_type: Scheduler::Cosine,
        warmup_steps: 2,
        weight_decay: 0.01,
        per_device_train_batch_size: 2,
        per_device_eval_batch_size: 2,
        gradient_accumulation_steps: 2,
        num_train_epochs: 3.0,
        eval_steps: 4,
        save_steps: 3,
        save_total_limit: None,
        seed: 5,
        ..TrainConfig::defaults(Method::LoraSb)
    }
}

/// The plan of settings, as a command would resolve it.
pub fn plan(config: &TrainConfig) -> ResolvedPlan {
    let mut plan = ResolvedPlan::default();
    plan.set_all(config, &|_| "test".into()).unwrap();
    plan.set("model", "tiny", "test");
    plan
}

/// A tiny model to be trained with a method, always the same.
pub fn tuned(method: Method) -> Tuned {
    tuned_with(&adapter(method))
}

/// The adapter of these runs. LoRA-GA takes twice its rank of singular vectors, and the smallest side is 6.
pub fn adapter(method: Method) -> AdapterConfig {
    let rank = if method == Method::LoraGa { 3 } else { 5 };
    AdapterConfig { rank, lora_alpha: rank as f64, ..common::config(method) }
}

/// The same with other settings.
pub fn tuned_with(adapter: &AdapterConfig) -> Tuned {
    Tuned::adapt(common::tiny_model(2), adapter, &common::tiny_examples(6), &mut |_| ()).unwrap()
}

/// The same, out of a checkpoint, as a new process does it.
pub fn restored(method: Method, run: &RunDirectory, checkpoint: &Checkpoint) -> Tuned {
    restored_on(common::tiny_model(2), &adapter(method), run, checkpoint)
}

/// The same with other settings on another model.
pub fn restored_on(
    model: Model,
    adapter: &AdapterConfig,
    run: &RunDirectory,
    checkpoint: &Checkpoint,
) -> Tuned {
    let tensors = run.tensors(checkpoint, model.kernels().as_ref()).unwrap();
    Tuned::restore(model, adapter, tensors).unwrap()
}

/// All of a step's examples, `size` at a time.
pub fn micro_batches(size: usize, recompute: Recompute) -> MicroBatches {
    MicroBatches { size, recompute, seed: 1, step: 0 }
}

/// A run to its end, or to `stop_after`.
pub fn run(
    tuned: &mut Tuned,
    config: &TrainConfig,
    directory: &mut RunDirectory,
    resume: Option<Checkpoint>,
    stop_after: Option<usize>,
) -> (Result<Summary>, Vec<Event>) {
    run_on(&data(), tuned, config, directory, resume, stop_after)
}

/// The same on other data.
pub fn run_on(
    data: &TrainingData,
    tuned: &mut Tuned,
    config: &TrainConfig,
    directory: &mut RunDirectory,
    resume: Option<Checkpoint>,
    stop_after: Option<usize>,
) -> (Result<Summary>, Vec<Event>) {
    run_watched(data, tuned, config, directory, resume, stop_after, None)
}

/// The same with an eye on the memory.
pub fn run_watched(
    data: &TrainingData,
    tuned: &mut Tuned,
    config: &TrainConfig,
    directory: &mut RunDirectory,
    resume: Option<Checkpoint>,
    stop_after: Option<usize>,
    watch: Option<&dyn MemoryWatch>,
) -> (Result<Summary>, Vec<Event>) {
    let stop = AtomicBool::new(false);
    let mut recorder = Recorder { events: Vec::new(), stop_after: stop_after.map(|step| (step, &stop)) };
    let clock = FakeClock::default();
    let summary = train(tuned, data, config, directory, resume, &mut recorder, &clock, watch, &stop);
    (summary, recorder.events)
}

/// A process whose peak is what it is said to be.
pub struct FakeMemory(pub PeakMemory);

impl MemoryWatch for FakeMemory {
    fn planned(&self) -> usize {
        self.0.planned
    }

    fn peak(&self) -> Option<usize> {
        self.0.peak
    }
}

/// The bits of everything a run leaves: trained values, moments, metrics without times.
#[derive(Debug, PartialEq)]
pub struct Outcome {
    pub values: BTreeMap<String, Vec<u32>>,
    pub moments: BTreeMap<String, Vec<u32>>,
    pub metrics: Vec<Metric>,
}

/// What the newest checkpoint of a run and its metrics hold.
pub fn outcome(path: &Path, config: &TrainConfig) -> Outcome {
    let cpu = common::device();
    let checkpoint = Checkpoint::latest(path, &mut |error| panic!("{error}")).unwrap().unwrap();
    let directory = RunDirectory::open(path, plan(config)).unwrap();
    let bits = |tensors: BTreeMap<String, lora_sb_kernels::Tensor>| {
        let bits = |tensor| cpu.to_f32(&tensor).unwrap().into_iter().map(f32::to_bits).collect();
        tensors.into_iter().map(|(name, tensor)| (name, bits(tensor))).collect()
    };
    Outcome {
        values: bits(checkpoint.trained(cpu.as_ref()).unwrap()),
        moments: bits(checkpoint.optimizer(cpu.as_ref()).unwrap()),
        metrics: directory.metrics().unwrap().into_iter().map(Metric::timeless).collect(),
    }
}

/// A device's kernels, to name the type.
pub fn kernels(tuned: &Tuned) -> std::sync::Arc<dyn Kernels> {
    tuned.model.kernels().clone()
}

/// A disk whose operations fail from one on, until another one; a failing operation is half done. Nothing is
/// forced to the real disk, for speed: it is the order of the operations that these tests are about.
#[derive(Clone, Debug)]
pub struct FaultyDisk {
    pub operations: Rc<Cell<usize>>,
    pub fails_from: usize,
    pub fails_until: usize,
}

impl FaultyDisk {
    /// Fails from the given operation on, counted from 0, for ever: what a killed process does.
    pub fn killed_at(operation: usize) -> FaultyDisk {
        FaultyDisk { operations: Rc::default(), fails_from: operation, fails_until: usize::MAX }
    }

    /// Never fails.
    pub fn sound() -> FaultyDisk {
        FaultyDisk::killed_at(usize::MAX)
    }

    fn check(&self) -> io::Result<()> {
        let operation = self.operations.get();
        self.operations.set(operation + 1);
        if (self.fails_from..self.fails_until).contains(&operation) {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "no space left on device"));
        }
        Ok(())
    }
}

impl Disk for FaultyDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.check()?;
        LocalDisk.create_dir(path)
    }

    fn write(&self, path: &Path, fill: &mut Fill<'_>) -> io::Result<()> {
        let checked = self.check();
        let mut whole = Vec::new();
        fill(&mut whole)?;
        if checked.is_err() {
            // Where the directory is missing there is nothing to half write.
            let _ = std::fs::write(path, &whole[..whole.len() / 2]);
            return checked;
        }
        std::fs::write(path, whole)
    }

    fn append(&self, path: &Path, length: u64, bytes: &[u8]) -> io::Result<()> {
        let checked = self.check();
        let bytes = if checked.is_err() { &bytes[..bytes.len() / 2] } else { bytes };
        LocalDisk.append(path, length, bytes)?;
        checked
    }

    fn sync(&self, _path: &Path) -> io::Result<()> {
        self.check()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.check()?;
        std::fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let checked = self.check();
        if checked.is_err() {
            // A directory half removed.
            let first = std::fs::read_dir(path).ok().and_then(|mut entries| entries.next());
            if let Some(Ok(entry)) = first {
                std::fs::remove_file(entry.path())?;
            }
            return checked;
        }
        LocalDisk.remove(path)
    }
}
