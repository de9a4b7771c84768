//! What a directory is, and the model in it: a run is taken wherever an adapter is.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lora_sb_kernels::Kernels;
use lora_sb_model::{Frozen, LinearHook, Model, Storage};
use lora_sb_tune::export::{native, peft};
use lora_sb_tune::run::{Checkpoint, ResolvedPlan, RunDirectory};
use lora_sb_tune::{AdapterConfig, Convention, InitConfig, Method, Targets, Tuned};
use serde_json::Value;

use crate::args::ModelArgs;
use crate::base::{self, Base};
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
    pub(crate) adapter: Option<PathBuf>,
}

/// Opens `--model` and `--adapter`.
pub(crate) fn open(arguments: &ModelArgs, adapter: Option<&Path>) -> Result<Opened> {
    let kernels = base::device(arguments.threads)?;
    let given = arguments.model.as_deref().map(Base::named);
    let Some(dir) = adapter else {
        let base = given.unwrap_or(Base::BuiltIn);
        if let Base::Directory(dir) = &base
            && Kind::of(dir)? == Kind::Run
        {
            return open_adapter(dir, None, kernels);
        }
        let loaded = Loaded::Plain(base.load(kernels, Storage::Mapped)?);
        return Ok(Opened { loaded, base, adapter: None });
    };
    open_adapter(dir, given, kernels)
}

fn open_adapter(dir: &Path, given: Option<Base>, kernels: Arc<dyn Kernels>) -> Result<Opened> {
    let opened = |loaded, base| Ok(Opened { loaded, base, adapter: Some(dir.into()) });
    match Kind::of(dir)? {
        Kind::Run => open_run(dir, given, kernels),
        Kind::Checkpoint => {
            let run = dir.parent().and_then(Path::parent).unwrap_or(dir);
            open_checkpoint(run, &Checkpoint::open(dir)?, given, kernels)
        }
        Kind::Adapter => {
            let name = native::manifest(dir)?.base.name_or_path;
            let base = given.unwrap_or_else(|| Base::named(Path::new(&name)));
            let model = base.load(kernels, Storage::Mapped)?;
            opened(Loaded::Tuned(native::load(dir, model)?), base)
        }
        Kind::Peft => {
            let base = given.ok_or_else(|| {
                Failure::new(format!("{}: a PEFT adapter needs its base model", dir.display()))
                    .hint("give the model's directory with --model")
            })?;
            let model = base.load(kernels, Storage::Mapped)?;
            opened(Loaded::Tuned(peft::import(dir, model)?), base)
        }
        Kind::Model => Err(Failure::new(format!("{}: a model, expected an adapter or a run", dir.display()))
            .hint("give it with --model")),
    }
}

/// The result of a run; of an unfinished one, its newest checkpoint.
fn open_run(dir: &Path, given: Option<Base>, kernels: Arc<dyn Kernels>) -> Result<Opened> {
    let (adapter, model) = (dir.join("adapter"), dir.join("model"));
    if adapter.join("adapter.json").exists() {
        return open_adapter(&adapter, given, kernels);
    }
    if model.join("config.json").exists() {
        let base = Base::Directory(model.clone());
        let loaded = Loaded::Plain(base.load(kernels, Storage::Mapped)?);
        return Ok(Opened { loaded, base, adapter: Some(model) });
    }
    let latest = Checkpoint::latest(dir, &mut |error| display::warn(&error.to_string()))?;
    let latest = latest.ok_or_else(|| {
        Failure::new(format!("{}: the run has neither a result nor a checkpoint yet", dir.display()))
            .hint("start it again with another --output-dir, or remove it")
    })?;
    display::warn(&format!("the run is not finished; using {}", latest.path().display()));
    open_checkpoint(dir, &latest, given, kernels)
}

fn open_checkpoint(
    run: &Path,
    checkpoint: &Checkpoint,
    given: Option<Base>,
    kernels: Arc<dyn Kernels>,
) -> Result<Opened> {
    let plan = RunDirectory::read_plan(run)?;
    let config = adapter_of_plan(&plan, run)?;
    let name = plan.values.get("model").and_then(|found| found.value.as_str()).unwrap_or_default();
    let base = given.unwrap_or_else(|| Base::named(Path::new(name)));
    let random = plan.values.get("random_weights").is_some_and(|found| found.value == Value::Bool(true));
    let model = match (config.method, random) {
        (Method::Full, true) => Model::random(base.config()?, Arc::clone(&kernels), config.seed)?,
        (Method::Full, false) => base.load(Arc::clone(&kernels), Storage::Trainable)?,
        _ => base.load(Arc::clone(&kernels), Storage::Mapped)?,
    };
    let tensors = RunDirectory::open(run, plan)?.tensors(checkpoint, kernels.as_ref())?;
    let tuned = Tuned::restore(model, &config, tensors)?;
    Ok(Opened { loaded: Loaded::Tuned(tuned), base, adapter: Some(checkpoint.path().into()) })
}

/// The adapter's settings as a plan has them.
fn adapter_of_plan(plan: &ResolvedPlan, run: &Path) -> Result<AdapterConfig> {
    let value = |name: &str| plan.values.get(name).map(|found| &found.value);
    let read = || {
        let method: Method = value("method")?.as_str()?.parse().ok()?;
        let seed = value("seed")?.as_u64()?;
        if method == Method::Full {
            let (rank, lora_alpha) = (1, 1.0);
            let (target_modules, init) = (Targets::AllLinear, InitConfig::NONE);
            return Some(AdapterConfig { method, rank, lora_alpha, target_modules, init, seed });
        }
        let init = InitConfig {
            samples: value("init_samples").and_then(Value::as_u64).unwrap_or(0) as usize,
            convention: Convention::PerSample,
            eta: value("init_eta").and_then(Value::as_f64).unwrap_or(0.0),
            max_tokens: 0,
        };
        Some(AdapterConfig {
            method,
            rank: value("rank")?.as_u64()? as usize,
            lora_alpha: value("lora_alpha")?.as_f64()?,
            target_modules: serde_json::from_value(value("target_modules")?.clone()).ok()?,
            init,
            seed,
        })
    };
    read().ok_or_else(|| {
        Failure::new(format!("{}: the plan does not say what is trained", run.join("plan.json").display()))
            .hint("the file was changed; restore it or start the run again")
    })
}
