//! What a directory is, and the model in it: a run is taken wherever an adapter is.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lora_sb_kernels::Kernels;
use lora_sb_model::{Config, Frozen, LinearHook, Mismatched, Model, Parameter, Storage, Task, WeightFile};
use lora_sb_tune::config::Precision;
use lora_sb_tune::export::{native, peft};
use lora_sb_tune::run::{Checkpoint, ResolvedPlan, RunDirectory};
use lora_sb_tune::{AdapterConfig, Bases, Convention, InitConfig, Method, Targets, Tuned};
use serde_json::Value;

use crate::args::ModelArgs;
use crate::base::{self, Base, Reading};
use crate::device::{Device, DeviceChoice};
use crate::display;
use crate::failure::{Failure, Result};

/// What a directory holds, known by the file that is written last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A Hugging Face model: `config.json`.
    Model,
    /// An adapter of this program: `adapter.json`.
    Adapter,
    /// A PEFT adapter: `adapter_config.json`.
    Peft,
    /// A checkpoint: `manifest.json`.
    Checkpoint,
    /// A run: `plan.json`.
    Run,
}

impl Kind {
    const MARKS: [(&'static str, Kind); 5] = [
        ("plan.json", Kind::Run),
        ("manifest.json", Kind::Checkpoint),
        ("adapter.json", Kind::Adapter),
        ("adapter_config.json", Kind::Peft),
        ("config.json", Kind::Model),
    ];

    /// Looks into a directory.
    pub(crate) fn of(dir: &Path) -> Result<Kind> {
        base::must_be_directory(dir, "model, an adapter or a run")?;
        let found = Kind::MARKS.iter().find(|(mark, _)| dir.join(mark).exists());
        found.map(|(_, kind)| *kind).ok_or_else(|| {
            let marks: Vec<_> = Kind::MARKS.iter().map(|(mark, _)| *mark).collect();
            let failure = Failure::new(format!(
                "{}: no model, adapter, checkpoint or run: expected one of {}",
                dir.display(),
                marks.join(", ")
            ));
            match dir.extension().is_some_and(|extension| extension == "partial") {
                true => failure.hint("it was not written to its end; take another checkpoint"),
                false => failure.hint("give the directory itself, as `run` or `run/checkpoints/step-100`"),
            }
        })
    }
}

/// A model with what changes it.
#[derive(Debug)]
pub(crate) enum Loaded {
    /// As it stands in its files.
    Plain(Model),
    /// With an adapter, or trained weights of a checkpoint.
    Tuned(Tuned),
}

impl Loaded {
    /// The model.
    pub(crate) fn model(&self) -> &Model {
        match self {
            Loaded::Plain(model) => model,
            Loaded::Tuned(tuned) => &tuned.model,
        }
    }

    /// The model, to be prepared.
    pub(crate) fn model_mut(&mut self) -> &mut Model {
        match self {
            Loaded::Plain(model) => model,
            Loaded::Tuned(tuned) => &mut tuned.model,
        }
    }

    /// What the model calls at its linear layers.
    pub(crate) fn hook(&self) -> &dyn LinearHook {
        match self {
            Loaded::Plain(_) => &Frozen,
            Loaded::Tuned(tuned) => tuned.hook(),
        }
    }
}

/// A model, the base whose tokenizer it has, and where the adapter was found.
pub(crate) struct Opened {
    pub(crate) loaded: Loaded,
    pub(crate) base: Base,
    /// How the base was read.
    pub(crate) reading: Reading,
    /// The longest example of the run that the adapter is of, in tokens.
    pub(crate) max_length: Option<usize>,
    pub(crate) adapter: Option<PathBuf>,
}

/// What opening needs at every turn: the device, what is computed in, and the base model where it was given.
struct Opening {
    kernels: Arc<dyn Kernels>,
    dtype: Precision,
    given: Option<Base>,
}

/// Opens `--model` and `--adapter`, the weights as they are in their files, on the device that is asked for or else on
/// `usual`.
pub(crate) fn open(arguments: &ModelArgs, adapter: Option<&Path>, usual: DeviceChoice) -> Result<Opened> {
    let device = Device::open(arguments.device.unwrap_or(usual), arguments.threads)?;
    open_on(device, Precision::F32, arguments, adapter)
}

/// The same to be computed with in one type or the other, or else in what the device is made for.
pub(crate) fn open_in(
    dtype: Option<Precision>,
    arguments: &ModelArgs,
    adapter: Option<&Path>,
) -> Result<Opened> {
    let device = Device::open(arguments.device.unwrap_or_default(), arguments.threads)?;
    let dtype = dtype.unwrap_or_else(|| device.precision());
    open_on(device, dtype, arguments, adapter)
}

fn open_on(
    Device { kernels, .. }: Device,
    dtype: Precision,
    arguments: &ModelArgs,
    adapter: Option<&Path>,
) -> Result<Opened> {
    let given = arguments.model.as_deref().map(Base::named);
    let Some(dir) = adapter else {
        let base = given.unwrap_or(Base::BuiltIn);
        if let Base::Directory(dir) = &base
            && Kind::of(dir)? == Kind::Run
        {
            return Opening { kernels, dtype, given: None }.adapter(dir);
        }
        return Opening { kernels, dtype, given: None }.plain(base, None);
    };
    Opening { kernels, dtype, given }.adapter(dir)
}

impl Opening {
    fn load(&self, base: &Base, storage: Storage, reading: &Reading) -> Result<Model> {
        let reading = Reading { dtype: self.dtype, ..reading.clone() };
        base.load(Arc::clone(&self.kernels), storage, &reading)
    }

    fn plain(self, base: Base, adapter: Option<PathBuf>) -> Result<Opened> {
        let reading = Reading::default();
        let loaded = Loaded::Plain(self.load(&base, Storage::Mapped, &reading)?);
        let max_length = adapter.as_deref().and_then(plan_above).and_then(|plan| longest_example(&plan));
        Ok(Opened { loaded, base, reading, max_length, adapter })
    }

    fn adapter(self, dir: &Path) -> Result<Opened> {
        match Kind::of(dir)? {
            Kind::Run => self.run(dir),
            Kind::Checkpoint => {
                let run = dir.parent().and_then(Path::parent).unwrap_or(dir);
                self.checkpoint(run, &Checkpoint::open(dir)?)
            }
            Kind::Adapter => self.native(dir),
            Kind::Peft => self.peft(dir),
            Kind::Model => {
                Err(Failure::new(format!("{}: a model, expected an adapter or a run", dir.display()))
                    .hint("give it with --model"))
            }
        }
    }

    fn native(self, dir: &Path) -> Result<Opened> {
        let manifest = native::manifest(dir)?;
        let base = self.given.clone().unwrap_or_else(|| Base::named(Path::new(&manifest.base.name_or_path)));
        let plan = plan_above(dir);
        let reading = match &plan {
            Some(plan) => Reading::of_plan(plan),
            None => {
                let head = head_of(dir, "adapter.safetensors", &base)?;
                let task = head.task.unwrap_or(task_of_rows(manifest.label_names.len(), &base.config()?));
                // A layer that the adapter does not bring was drawn by the run's seed, as here.
                let (seed, mismatched) = (manifest.adapter.seed, Mismatched::Draw);
                Reading { seed, mismatched, task: Some(task), ..head }
            }
        };
        let model = self.load(&base, Storage::Mapped, &reading)?;
        let loaded = Loaded::Tuned(native::load(dir, model)?);
        let max_length = plan.as_ref().and_then(longest_example);
        Ok(Opened { loaded, base, reading, max_length, adapter: Some(dir.into()) })
    }

    fn peft(self, dir: &Path) -> Result<Opened> {
        let base = self.given.clone().ok_or_else(|| {
            Failure::new(format!("{}: a PEFT adapter needs its base model", dir.display()))
                .hint("give the model's directory with --model")
        })?;
        let reading = head_of(dir, "adapter_model.safetensors", &base)?;
        let model = self.load(&base, Storage::Mapped, &reading)?;
        let peft::Imported { tuned, warnings } = peft::import(dir, model)?;
        warnings.iter().for_each(|warning| display::warn(warning));
        Ok(Opened {
            loaded: Loaded::Tuned(tuned),
            base,
            reading,
            max_length: None,
            adapter: Some(dir.into()),
        })
    }

    /// The result of a run; of an unfinished one, its newest checkpoint.
    fn run(self, dir: &Path) -> Result<Opened> {
        let (adapter, model) = (dir.join("adapter"), dir.join("model"));
        if adapter.join("adapter.json").exists() {
            return self.native(&adapter);
        }
        if model.join("config.json").exists() {
            return self.plain(Base::Directory(model.clone()), Some(model));
        }
        let latest = Checkpoint::latest(dir, &mut |error| display::warn(&error.to_string()))?;
        let latest = latest.ok_or_else(|| {
            Failure::new(format!("{}: the run has neither a result nor a checkpoint yet", dir.display()))
                .hint("start it again with another --output-dir, or remove it")
        })?;
        display::warn(&format!("the run is not finished; using {}", latest.path().display()));
        self.checkpoint(dir, &latest)
    }

    fn checkpoint(self, run: &Path, checkpoint: &Checkpoint) -> Result<Opened> {
        let plan = RunDirectory::read_plan(run)?;
        let config = adapter_of_plan(&plan, run)?;
        let name = plan.values.get("model").and_then(|found| found.value.as_str()).unwrap_or_default();
        let base = self.given.clone().unwrap_or_else(|| Base::named(Path::new(name)));
        let (reading, max_length) = (Reading::of_plan(&plan), longest_example(&plan));
        let storage = if config.method == Method::Full { Storage::Trainable } else { Storage::Mapped };
        let model = self.load(&base, storage, &reading)?;
        let tensors = RunDirectory::open(run, plan)?.tensors(checkpoint, self.kernels.as_ref())?;
        let loaded = Loaded::Tuned(Tuned::restore(model, &config, tensors)?);
        Ok(Opened { loaded, base, reading, max_length, adapter: Some(checkpoint.path().into()) })
    }
}

/// The native adapter of a directory: itself, or the result of a run.
pub(crate) fn native_adapter(dir: &Path) -> Result<PathBuf> {
    let refused = |what: &str| {
        Failure::new(format!("{}: {what}, expected a native adapter or a finished run", dir.display()))
            .hint("adapters are averaged as `lora-sb train` writes them: give RUN or RUN/adapter")
    };
    match Kind::of(dir)? {
        Kind::Adapter => Ok(dir.into()),
        Kind::Run if dir.join("adapter/adapter.json").exists() => Ok(dir.join("adapter")),
        Kind::Run => Err(refused("a run without an adapter")),
        Kind::Checkpoint => Err(refused("a checkpoint")),
        Kind::Peft => Err(refused("a PEFT adapter")),
        Kind::Model => Err(refused("a model")),
    }
}

/// The plan of the run that an adapter is the result of.
fn plan_above(adapter: &Path) -> Option<ResolvedPlan> {
    let run = std::path::absolute(adapter).ok()?.parent()?.to_owned();
    run.join("plan.json").exists().then(|| RunDirectory::read_plan(&run).ok())?
}

fn longest_example(plan: &ResolvedPlan) -> Option<usize> {
    plan.values.get("max_length")?.value.as_u64().map(|length| length as usize)
}

/// The classification head that an adapter's tensors hold, by its rows; nothing of a language model.
fn head_of(dir: &Path, tensors: &str, base: &Base) -> Result<Reading> {
    let (config, path) = (base.config()?, dir.join(tensors));
    if config.task == Task::LanguageModel || !path.exists() {
        return Ok(Reading::default());
    }
    let file = WeightFile::open(&path)?;
    let wanted = config.name(Parameter::Classifier);
    let named = |name: &String| name.strip_prefix("base_model.model.").unwrap_or(name) == wanted;
    let rows = match file.names().into_iter().find(named) {
        Some(name) => file.get(&name)?.and_then(|view| view.shape.first().copied()),
        None => None,
    };
    Ok(Reading {
        task: rows.map(|rows| task_of_rows(rows, &config)),
        // The adapter's own takes its place.
        mismatched: if rows.is_some() { Mismatched::Draw } else { Mismatched::Refuse },
        ..Reading::default()
    })
}

fn task_of_rows(rows: usize, config: &Config) -> Task {
    match rows {
        // Loading the file will say what is wrong with it.
        0 => config.task,
        1 => Task::Regression,
        labels => Task::Classification { labels },
    }
}

/// The adapter's settings as a plan has them.
fn adapter_of_plan(plan: &ResolvedPlan, run: &Path) -> Result<AdapterConfig> {
    let value = |name: &str| plan.values.get(name).map(|found| &found.value);
    let number = |name: &str| value(name).and_then(Value::as_f64);
    let read = || {
        let method: Method = value("method")?.as_str()?.parse().ok()?;
        let seed = value("seed")?.as_u64()?;
        if method == Method::Full {
            return Some(AdapterConfig {
                method,
                rank: 1,
                lora_alpha: 1.0,
                lora_dropout: 0.0,
                target_modules: Targets::AllLinear,
                init: InitConfig::NONE,
                modules_to_save: Vec::new(),
                seed,
            });
        }
        let bases = match value("init") {
            Some(name) => name.as_str()?.parse().ok()?,
            None => Bases::of(method),
        };
        let init = InitConfig {
            bases,
            samples: value("init_samples").and_then(Value::as_u64).unwrap_or(0) as usize,
            convention: Convention::PerSample,
            // Of a start that was made long ago: any number that is allowed.
            eta: number("init_eta").unwrap_or(1.0),
            max_tokens: 0,
            blocks_at_once: None,
        };
        Some(AdapterConfig {
            method,
            rank: value("rank")?.as_u64()? as usize,
            lora_alpha: number("lora_alpha")?,
            lora_dropout: number("lora_dropout").unwrap_or(0.0),
            target_modules: serde_json::from_value(value("target_modules")?.clone()).ok()?,
            init,
            modules_to_save: match value("modules_to_save") {
                Some(names) => serde_json::from_value(names.clone()).ok()?,
                None => Vec::new(),
            },
            seed,
        })
    };
    read().ok_or_else(|| {
        Failure::new(format!("{}: the plan does not say what is trained", run.join("plan.json").display()))
            .hint("the file was changed; restore it or start the run again")
    })
}
