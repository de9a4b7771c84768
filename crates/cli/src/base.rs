//! The base model: a directory, or the one that is built in.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lora_sb_data::Tokenizer;
use lora_sb_kernels::{Cpu, Kernels};
use lora_sb_model::{Config, Model, Storage};

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

    /// The architecture, without the weights.
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
    pub(crate) fn load(&self, kernels: Arc<dyn Kernels>, storage: Storage) -> Result<Model> {
        match self {
            Base::BuiltIn => embedded::model(kernels, storage),
            Base::Directory(dir) => {
                must_be_directory(dir, "model")?;
                Ok(Model::load(dir, kernels, storage)?)
            }
        }
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

/// The device: the processor with so many threads, all of its cores where none are given.
pub(crate) fn device(threads: Option<usize>) -> Result<Arc<dyn Kernels>> {
    Ok(Arc::new(Cpu::new(threads.unwrap_or_else(all_cores))?))
}

/// The cores of this machine that this process may use.
pub(crate) fn all_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
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
