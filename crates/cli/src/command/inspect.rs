//! `inspect`: what is in a directory, and whether it is whole.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use lora_sb_data::thousands;
use lora_sb_model::{Storage, Task, WeightFile};
use lora_sb_tune::export::native;
use lora_sb_tune::method::Kind as MethodKind;
use lora_sb_tune::run::{Checkpoint, Metric, RunDirectory};
use serde_json::{Map, Value, json};

use crate::args::{InspectArgs, ModelArgs};
use crate::base::{Base, Reading};
use crate::device::{DeviceChoice, processor};
use crate::directory::{self, Kind, Loaded};
use crate::display::{self, bytes};
use crate::failure::{Failure, Result};
use crate::resolve::longest_text;

/// Facts by their names, in the order they are shown.
type Facts = Map<String, Value>;

/// Runs the command.
pub(crate) fn run(arguments: &InspectArgs) -> Result<ExitCode> {
    let dir = &arguments.dir;
    let kind = Kind::of(dir)?;
    let facts = match kind {
        Kind::Model => model(dir)?,
        Kind::Adapter => adapter(dir)?,
        Kind::Peft => peft(dir)?,
        Kind::Checkpoint => checkpoint(dir)?,
        Kind::Run => run_directory(dir)?,
    };
    if arguments.json {
        display::output(&Value::Object(facts).to_string())?;
        return Ok(ExitCode::SUCCESS);
    }
    let rows: Vec<(&str, String)> = facts
        .iter()
        .filter(|(name, _)| *name != "plan")
        .map(|(name, value)| (name.as_str(), shown(value)))
        .collect();
    display::output(&display::table(&rows))?;
    if kind == Kind::Run {
        display::heading("Values and where they come from");
        display::output(&display::plan_table(&RunDirectory::read_plan(dir)?))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => match number.as_u64() {
            Some(number) => thousands(number as usize),
            None => number
                .as_f64()
                .map_or_else(|| number.to_string(), |found| ((found * 1e4).round() / 1e4).to_string()),
        },
        Value::Array(items) => items.iter().map(shown).collect::<Vec<_>>().join("\n"),
        Value::Object(fields) => fields
            .iter()
            .map(|(name, value)| format!("{name} {}", shown(value)))
            .collect::<Vec<_>>()
            .join(", "),
        Value::Bool(true) => "yes".into(),
        Value::Bool(false) => "no".into(),
        Value::Null => "-".into(),
    }
}

fn facts(fields: Value) -> Facts {
    match fields {
        Value::Object(facts) => facts,
        _ => Facts::new(),
    }
}

/// Loading it checks every tensor's name, shape and place.
fn model(dir: &Path) -> Result<Facts> {
    let base = Base::Directory(dir.into());
    let model = base.load(processor(Some(1))?, Storage::Mapped, &Reading::default())?;
    let config = model.config();
    let vocabulary = match dir.join("tokenizer.json").exists() {
        true => json!(base.tokenizer()?.vocab_size()),
        false => json!("no tokenizer.json"),
    };
    let mut found = facts(json!({
        "kind": "model",
        "family": config.family.model_type(),
        "task": task(config.task),
        "parameters": config.parameter_count(),
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": format!("{} of {}, {} for keys and values", config.num_attention_heads, config.head_dim,
            config.num_key_value_heads),
        "feed-forward": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "tokenizer": vocabulary,
        "tied embeddings": config.tie_word_embeddings,
        "positions": longest_text(config),
    }));
    if config.task != Task::LanguageModel {
        let head = config.parameters().into_iter().filter(|parameter| parameter.of_classification());
        let size = |parameter| config.parameter_shape(parameter).iter().product::<usize>();
        found.insert("head parameters".into(), json!(head.map(size).sum::<usize>()));
        found.insert("labels".into(), json!(config.label_names().join(", ")));
    }
    found.extend(facts(json!({
        "files": weight_files(dir)?,
        "fingerprint": model.fingerprint()?,
        "warnings": model.warnings(),
        "whole": true,
    })));
    Ok(found)
}

fn task(task: Task) -> String {
    match task {
        Task::LanguageModel => "language model".into(),
        Task::Classification { labels } => format!("classification, {labels} classes"),
        Task::Regression => "regression".into(),
    }
}

fn adapter(dir: &Path) -> Result<Facts> {
    let manifest = native::manifest(dir)?;
    let settings = &manifest.adapter;
    let base = Base::named(Path::new(&manifest.base.name_or_path));
    let found = match &base {
        Base::Directory(dir) => dir.is_dir(),
        Base::BuiltIn => true,
    };
    let mut told = facts(json!({
        "kind": "adapter",
        "method": settings.method.name(),
        "rank": settings.rank,
        "scale": settings.scale(),
        "dropout": settings.lora_dropout,
        "target modules": settings.target_modules.to_string(),
        "seed": settings.seed,
    }));
    if settings.method.kind() == MethodKind::Latent {
        told.insert("start".into(), json!(settings.init.bases.name()));
    }
    if !settings.modules_to_save.is_empty() {
        told.insert("head modules".into(), json!(settings.modules_to_save.join(", ")));
    }
    let checked = if found {
        // On its base every tensor is checked by name and shape.
        let source = ModelArgs { model: None, device: None, threads: Some(1) };
        let opened = directory::open(&source, Some(dir), DeviceChoice::Cpu)?;
        if let Loaded::Tuned(tuned) = &opened.loaded {
            told.insert("trained parameters".into(), json!(tuned.trained_parameters()));
            if tuned.head_parameters() > 0 {
                told.insert("of them the head's".into(), json!(tuned.head_parameters()));
                told.insert("labels".into(), json!(tuned.model.config().label_names().join(", ")));
            }
        }
        "every tensor, on its base model"
    } else {
        "the file only: its base model is not there"
    };
    told.extend(facts(json!({
        "base": manifest.base.name_or_path,
        "base fingerprint": manifest.base.fingerprint,
        "files": weight_files(dir)?,
        "checked": checked,
        "whole": true,
    })));
    Ok(told)
}

fn peft(dir: &Path) -> Result<Facts> {
    let path = dir.join("adapter_config.json");
    let text = std::fs::read(&path).map_err(|error| Failure::file(&path, "read", &error))?;
    let config: Value = serde_json::from_slice(&text)
        .map_err(|error| Failure::new(format!("{}:{}: {error}", path.display(), error.line())))?;
    Ok(facts(json!({
        "kind": "PEFT adapter",
        "type": config["peft_type"],
        "rank": config["r"],
        "lora_alpha": config["lora_alpha"],
        "use_rslora": config["use_rslora"],
        "use_dora": config["use_dora"],
        "task": config["task_type"],
        "target modules": config["target_modules"],
        "modules_to_save": config["modules_to_save"],
        "base": config["base_model_name_or_path"],
        "files": weight_files(dir)?,
        "whole": true,
    })))
}

fn checkpoint(dir: &Path) -> Result<Facts> {
    let checkpoint = Checkpoint::open(dir)?;
    let state = checkpoint.state();
    Ok(facts(json!({
        "kind": "checkpoint",
        "step": state.step,
        "epoch": state.epoch,
        "tokens": state.tokens,
        "score": state.last_eval.and_then(|eval| eval.score),
        "held-out loss": state.last_eval.map(|eval| eval.eval_loss),
        "lowest held-out loss": state.best.map(|best| json!({ "loss": best.eval_loss, "step": best.step })),
        "base fingerprint": state.base,
        "plan": state.plan_sha256,
        "files": weight_files(dir)?,
        "whole": true,
    })))
}

fn run_directory(dir: &Path) -> Result<Facts> {
    let plan = RunDirectory::read_plan(dir)?;
    let run = RunDirectory::open(dir, plan.clone())?;
    let metrics = run.metrics()?;
    let steps = metrics.iter().filter(|metric| matches!(metric, Metric::Step { .. })).count();
    let evaluations: Vec<(f64, &BTreeMap<String, f64>)> = metrics
        .iter()
        .filter_map(|metric| match metric {
            Metric::Evaluation { eval_loss, metrics, .. } => Some((*eval_loss, metrics)),
            Metric::Step { .. } | Metric::Memory { .. } => None,
        })
        .collect();
    let (first, last) = (evaluations.first(), evaluations.last());
    let scores = |(_, scores): &(f64, &BTreeMap<String, f64>)| {
        let shown = scores.iter().map(|(name, score)| format!("{name} {score:.4}"));
        shown.collect::<Vec<_>>().join(", ")
    };
    let result = ["adapter", "model"].map(|name| dir.join(name)).into_iter().find(|path| path.exists());
    let mut told = facts(json!({
        "kind": "run",
        "steps": steps,
        "held-out loss": first.zip(last)
            .map(|((first, _), (last, _))| format!("{first:.4} at first, {last:.4} at last")),
    }));
    if let Some((first, last)) = first.zip(last).filter(|(_, (_, scores))| !scores.is_empty()) {
        told.insert("scores".into(), json!(format!("{} at first; {} at last", scores(first), scores(last))));
    }
    told.extend(facts(json!({
        "result": result.map_or("none yet".into(), |path| path.display().to_string()),
        "checkpoints": checkpoints(dir)?,
        "plan": plan.values.iter()
            .map(|(name, found)| (name.clone(), json!({ "value": found.value, "source": found.source })))
            .collect::<Facts>(),
    })));
    Ok(told)
}

/// Each checkpoint's name with `whole`, or why it is not.
fn checkpoints(run: &Path) -> Result<Vec<String>> {
    let dir = run.join("checkpoints");
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Failure::file(&dir, "read", &error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| Failure::file(&dir, "read", &error))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let step: usize = name.trim_start_matches("step-").parse().unwrap_or(usize::MAX);
        let state = match Checkpoint::open(&path) {
            Ok(_) => "whole".to_owned(),
            Err(_) if name.ends_with(".partial") => "not written to its end, not used".to_owned(),
            Err(error) => format!("broken: {error}"),
        };
        found.push((step, format!("{name}: {state}")));
    }
    found.sort();
    Ok(found.into_iter().map(|(_, text)| text).collect())
}

/// The safetensors files of a directory with what is in them.
fn weight_files(dir: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(dir).map_err(|error| Failure::file(dir, "read", &error))?;
    let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    paths.sort();
    let describe = |path: &std::path::PathBuf| {
        let size = std::fs::metadata(path).map_err(|error| Failure::file(path, "read", &error))?.len();
        let file = WeightFile::open(path)?;
        let (mut values, mut types) = (0, Vec::new());
        for name in file.names() {
            if let Some(view) = file.get(&name)? {
                values += view.shape.iter().product::<usize>();
                if !types.contains(&view.dtype.name()) {
                    types.push(view.dtype.name());
                }
            }
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let tensors = display::count(file.names().len(), "tensor");
        let (values, size) = (display::count(values, "value"), bytes(size as usize));
        Ok(format!("{name}: {tensors}, {values}, {}, {size}", types.join(" and ")))
    };
    paths.iter().map(describe).collect()
}
