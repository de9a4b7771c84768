//! What is measured: a model by directory, configuration or preset, and an adapter on it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lora_sb_kernels::{DType, Generator, Kernels, Stream, Tensor};
use lora_sb_model::{Config, LoadOptions, Mismatched, Model, Storage, Task};
use lora_sb_tune::adapter::Part;
use lora_sb_tune::method::Kind;
use lora_sb_tune::plan::check_rank;
use lora_sb_tune::{AdapterConfig, InitConfig, Method, Tuned, head};

use super::preset;
use crate::base::Base;
use crate::failure::Result;
use crate::resolve::default_targets;

/// A model that can be measured.
#[derive(Debug)]
pub(crate) struct Subject {
    /// As it was asked for.
    pub(crate) name: String,
    /// Its architecture.
    pub(crate) config: Config,
    /// The directory with its weights and tokenizer; a preset has none.
    pub(crate) directory: Option<PathBuf>,
    /// Whether its weights are random.
    pub(crate) random: bool,
}

impl Subject {
    /// The model of a directory, of a `config.json`, or of a preset.
    pub(crate) fn named(name: &Path) -> Result<Subject> {
        let shown = name.display().to_string();
        if !name.exists() {
            return Ok(Subject {
                config: preset::config(&shown)?,
                name: shown,
                directory: None,
                random: true,
            });
        }
        let config = Base::Directory(name.into()).architecture()?;
        let directory = name.is_dir().then(|| name.to_path_buf());
        Ok(Subject { name: shown, config, directory, random: !has_weights(name) })
    }

    /// The model on a device.
    pub(crate) fn load(
        &self,
        kernels: Arc<dyn Kernels>,
        method: Method,
        dtype: DType,
        seed: u64,
    ) -> Result<Model> {
        let storage = if method == Method::Full { Storage::Trainable } else { Storage::Mapped };
        let Some(dir) = self.directory.as_deref().filter(|_| !self.random) else {
            let mut model = Model::random(self.config.clone(), kernels, seed, storage)?;
            model.set_dtype(dtype)?;
            return Ok(model);
        };
        let task = (self.config.task != Task::LanguageModel).then_some(self.config.task);
        let options = LoadOptions { task, seed, mismatched: Mismatched::Draw, dtype };
        Ok(Model::load_with(dir, kernels, storage, options)?)
    }
}

fn has_weights(dir: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(dir) else { return false };
    entries.flatten().any(|entry| entry.path().extension().is_some_and(|found| found == "safetensors"))
}

/// An adapter on the modules that are adapted by default, and beside it the head that is trained by default.
pub(crate) fn adapter_config(model: &Config, method: Method, rank: usize, seed: u64) -> AdapterConfig {
    AdapterConfig {
        method,
        rank,
        lora_alpha: rank as f64,
        lora_dropout: 0.0,
        target_modules: default_targets(model),
        init: InitConfig::NONE,
        modules_to_save: head::default_modules(model),
        seed,
    }
}

/// The model with an adapter of random factors; for full fine-tuning the model itself.
///
/// Nothing is factorised: whatever the factors hold, a step takes as long.
pub(crate) fn adapted(model: Model, config: &AdapterConfig) -> Result<Tuned> {
    let AdapterConfig { method, rank, seed, .. } = *config;
    if method == Method::Full {
        return Ok(Tuned::full(model)?);
    }
    let sites = config.target_modules.resolve(model.config())?;
    check_rank(model.config(), &sites, method, rank)?;
    let kernels = model.kernels().clone();
    let mut generator = Generator::new(seed, Stream::Adapter, 0);
    let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
    for site in sites {
        for &part in parts(method) {
            let shape = part.shape(rank, model.shape(site));
            let values = random(part, &shape, &mut generator);
            let name = format!("{}.{}", model.module(site), part.name());
            tensors.insert(name, kernels.from_f32(&values, &shape)?);
        }
    }
    for parameter in head::resolve(&config.modules_to_save, model.config())? {
        let Some(weight) = model.weight(parameter) else { continue };
        tensors.insert(model.name(parameter), kernels.to_owned_f32(weight)?);
    }
    Ok(Tuned::restore(model, config, tensors)?)
}

/// The tensors that a method keeps at a site.
fn parts(method: Method) -> &'static [Part] {
    match method.kind() {
        Kind::Weights => &[],
        Kind::Product if method.subtracts_start() => &[Part::A, Part::B, Part::StartA, Part::StartB],
        Kind::Product => &[Part::A, Part::B],
        Kind::Magnitude => &[Part::A, Part::B, Part::Magnitude],
        Kind::Latent => &[Part::A, Part::B, Part::R],
    }
}

/// Rows of A and columns of B have a length of about 1, R is near 0, magnitudes are 1.
fn random(part: Part, shape: &[usize], generator: &mut Generator) -> Vec<f32> {
    let mut values = vec![1.0; shape.iter().product()];
    let longer = shape.iter().copied().max().unwrap_or(1) as f32;
    match part {
        Part::Magnitude => {}
        Part::R => generator.uniform(1e-4, &mut values),
        Part::A | Part::B | Part::StartA | Part::StartB => {
            generator.uniform((3.0 / longer).sqrt(), &mut values)
        }
    }
    values
}
