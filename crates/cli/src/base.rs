//! The base model: a directory, or the one that is built in.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lora_sb_data::Tokenizer;
use lora_sb_kernels::Kernels;
use lora_sb_model::{Config, LoadOptions, Mismatched, Model, Storage, Task};
use lora_sb_tune::config::Precision;
use lora_sb_tune::run::ResolvedPlan;
use serde_json::Value;

use crate::embedded;
use crate::failure::{Failure, Result};

/// Where a model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Base {
    /// The model of `assets/base`.
    BuiltIn,
    /// A Hugging Face directory.
    Directory(PathBuf),
}

/// How a base model is read: its weights, and the classification head of an encoder.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Reading {
    /// Random weights instead of those in its files.
    pub(crate) random_weights: bool,
    /// Of random weights, and of a head that is drawn.
    pub(crate) seed: u64,
    /// What becomes of a head of another number of labels.
    pub(crate) mismatched: Mismatched,
    /// The head's task, where it is not that of `config.json`.
    pub(crate) task: Option<Task>,
    /// The names of its classes, where they are not those of `config.json`.
    pub(crate) label_names: Option<Vec<String>>,
    /// What it computes in. A plan does not decide that for those who read the weights themselves, as `merge` does.
    pub(crate) dtype: Precision,
}

impl Reading {
    /// How a run reads its base model.
    pub(crate) fn of_plan(plan: &ResolvedPlan) -> Reading {
        let value = |name: &str| plan.values.get(name).map(|found| &found.value);
        let names = value("label_names").and_then(Value::as_array);
        let number = value("num_labels").and_then(Value::as_u64);
        let task = number.map(|number| match number {
            0 | 1 => Task::Regression,
            labels => Task::Classification { labels: labels as usize },
        });
        Reading {
            random_weights: value("random_weights") == Some(&Value::Bool(true)),
            seed: value("seed").and_then(Value::as_u64).unwrap_or(0),
            mismatched: match value("ignore_mismatched_sizes") {
                Some(Value::Bool(true)) => Mismatched::Draw,
                _ => Mismatched::Refuse,
            },
            task,
            label_names: names
                .map(|names| names.iter().filter_map(|name| Some(name.as_str()?.to_owned())).collect()),
            dtype: Precision::F32,
        }
    }
}

/// What stands beside a model's weights and belongs to every copy of it.
const TOKENIZER_FILES: [&str; 6] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
];

impl Base {
    /// A name as plans and adapters have it.
    pub(crate) fn named(name: &Path) -> Base {
        match name == Path::new(embedded::NAME) && !name.exists() {
            true => Base::BuiltIn,
            false => Base::Directory(name.into()),
        }
    }

    /// The name for plans and adapters: an absolute path, so that it holds in every working directory.
    pub(crate) fn name(&self) -> String {
        match self {
            Base::BuiltIn => embedded::NAME.into(),
            Base::Directory(dir) => absolute(dir),
        }
    }

    /// The name as it was given, for the screen.
    pub(crate) fn shown(&self) -> String {
        match self {
            Base::BuiltIn => embedded::NAME.into(),
            Base::Directory(dir) => dir.display().to_string(),
        }
    }

    /// The architecture, for which a `config.json` by itself is enough.
    pub(crate) fn architecture(&self) -> Result<Config> {
        match self {
            Base::Directory(path) if path.is_file() => {
                let json = std::fs::read(path).map_err(|error| Failure::file(path, "read", &error))?;
                Config::from_json(&json).map_err(|error| Failure::from(error).in_file(path))
            }
            _ => self.config(),
        }
    }

    /// The architecture of a directory, without the weights.
    pub(crate) fn config(&self) -> Result<Config> {
        match self {
            Base::BuiltIn => embedded::config(),
            Base::Directory(dir) => {
                must_be_directory(dir, "model")?;
                Ok(Config::from_dir(dir)?)
            }
        }
    }

    /// The tokenizer.
    pub(crate) fn tokenizer(&self) -> Result<Tokenizer> {
        match self {
            Base::BuiltIn => embedded::tokenizer(),
            Base::Directory(dir) => Ok(Tokenizer::from_dir(dir)?),
        }
    }

    /// The model with its weights.
    pub(crate) fn load(
        &self,
        kernels: Arc<dyn Kernels>,
        storage: Storage,
        reading: &Reading,
    ) -> Result<Model> {
        let Reading { random_weights, seed, mismatched, task, label_names, dtype } = reading;
        let mut model = match self {
            _ if *random_weights => {
                let config = self.config()?;
                let config = task.map_or(Ok(config.clone()), |task| config.with_task(task))?;
                Model::random(config, kernels, *seed, storage)?
            }
            Base::BuiltIn => embedded::model(kernels, storage)?,
            Base::Directory(dir) => {
                must_be_directory(dir, "model")?;
                let options =
                    LoadOptions { task: *task, seed: *seed, mismatched: *mismatched, dtype: dtype.dtype() };
                Model::load_with(dir, kernels, storage, options)?
            }
        };
        if model.dtype() != dtype.dtype() {
            model.set_dtype(dtype.dtype())?;
        }
        if let Some(names) = label_names {
            model.name_labels(names)?;
        }
        Ok(model)
    }

    /// Puts the tokenizer's files into a model directory where they are missing.
    pub(crate) fn add_tokenizer(&self, out: &Path) -> Result<()> {
        let write = |name: &str, bytes: &[u8]| {
            let file = out.join(name);
            if file.exists() {
                return Ok(());
            }
            std::fs::write(&file, bytes).map_err(|error| Failure::file(&file, "written", &error))
        };
        match self {
            Base::BuiltIn => {
                embedded::TOKENIZER_FILES.iter().try_for_each(|(name, bytes)| write(name, bytes))
            }
            Base::Directory(dir) => TOKENIZER_FILES.iter().try_for_each(|name| {
                let file = dir.join(name);
                match std::fs::read(&file) {
                    Ok(bytes) => write(name, &bytes),
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
                    Err(error) => Err(Failure::file(&file, "read", &error)),
                }
            }),
        }
    }
}

/// A token that a model has no embedding for would be read from elsewhere; `place` is where it stands.
pub(crate) fn check_ids(ids: &[u32], place: &str, tokenizer: &Tokenizer, model: &Config) -> Result<()> {
    let rows = model.vocab_size;
    match ids.iter().find(|&&id| id as usize >= rows) {
        None => Ok(()),
        Some(id) => Err(Failure::new(format!(
            "{place}: token {id} is outside the model's vocabulary: the tokenizer has {} tokens, the model's \
             embedding {rows} rows",
            tokenizer.vocab_size()
        ))
        .hint("take tokenizer.json and config.json from the same model")),
    }
}

/// A path that means the same in every working directory; as it is where the system cannot say.
pub(crate) fn absolute(path: &Path) -> String {
    std::path::absolute(path).unwrap_or_else(|_| path.into()).display().to_string()
}

/// A directory that a command reads.
pub(crate) fn must_be_directory(dir: &Path, what: &str) -> Result<()> {
    let hint = format!("give the directory of a {what} on this machine");
    match std::fs::metadata(dir) {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => {
            Err(Failure::new(format!("{}: expected a directory, found a file", dir.display())).hint(hint))
        }
        Err(error) => Err(Failure::new(format!("{}: {error}", dir.display())).hint(hint)),
    }
}

/// A directory that a command is to write, and that must not be there yet.
pub(crate) fn must_be_new(dir: &Path, flag: &str) -> Result<()> {
    let occupied = match std::fs::read_dir(dir) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
    };
    match occupied {
        false => Ok(()),
        true => Err(Failure::new(format!("{}: is there already and is not overwritten", dir.display()))
            .hint(format!("give another {flag}, or remove it"))),
    }
}
