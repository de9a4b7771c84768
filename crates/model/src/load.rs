//! Finding and checking a model's files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use lora_sb_kernels::{Kernels, SharedBytes, Tensor};
use serde_json::Value;

use crate::weight_file::WeightFile;
use crate::weights::{Storage, Weights};
use crate::{Config, Error, Parameter, Result};

pub(crate) const CONFIG_FILE: &str = "config.json";
pub(crate) const WEIGHTS_FILE: &str = "model.safetensors";
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";

/// A model's weight files, and which of them holds which tensor.
pub(crate) struct Shelf {
    files: Vec<WeightFile>,
    /// Tensor to file; the index of a sharded model, or all names of all files.
    places: BTreeMap<String, usize>,
    /// Where a tensor is looked for, for messages.
    searched: String,
}

pub(crate) fn config(dir: &Path) -> Result<Config> {
    let path = dir.join(CONFIG_FILE);
    let hint = "give a directory in Hugging Face's layout: config.json and model.safetensors".into();
    let bytes = read(&path, "every model has one", Some(hint))?;
    Config::from_named(&bytes, &path.display().to_string())
}

fn read(path: &Path, needed_for: &str, hint: Option<String>) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => missing(path.to_path_buf(), needed_for, hint),
        _ => Error::io(path, error),
    })
}

fn missing(path: PathBuf, needed_for: &str, hint: Option<String>) -> Error {
    Error::MissingFile { path, needed_for: needed_for.into(), hint }
}

impl Shelf {
    /// The weights of a directory: one file, or shards with their index.
    pub(crate) fn open(dir: &Path) -> Result<Shelf> {
        let (single, index) = (dir.join(WEIGHTS_FILE), dir.join(INDEX_FILE));
        if single.exists() {
            return Ok(Shelf::of(vec![WeightFile::open(&single)?]));
        }
        if index.exists() {
            return Shelf::sharded(dir, &index);
        }
        let pickled =
            ["pytorch_model.bin", "pytorch_model.bin.index.json"].map(|name| dir.join(name).exists());
        let hint = pickled.contains(&true).then(|| {
            "the directory holds pytorch_model.bin, which is not read because it can run code; convert it with \
             transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT, safe_serialization=True)"
                .into()
        });
        let needed_for = format!("neither it nor {INDEX_FILE} is there, and the weights are needed");
        Err(missing(single, &needed_for, hint))
    }

    /// Files whose names are all taken from themselves.
    pub(crate) fn of(files: Vec<WeightFile>) -> Shelf {
        let names = files
            .iter()
            .enumerate()
            .flat_map(|(i, file)| file.names().into_iter().map(move |name| (name, i)));
        let places = names.collect();
        let searched = files.iter().map(WeightFile::file).collect::<Vec<_>>().join(", ");
        Shelf { files, places, searched }
    }

    fn sharded(dir: &Path, index: &Path) -> Result<Shelf> {
        let name = index.display().to_string();
        let bytes = std::fs::read(index).map_err(|error| Error::io(index, error))?;
        let json: Value = serde_json::from_slice(&bytes).map_err(|error| Error::Json {
            file: name.clone(),
            line: error.line(),
            message: error.to_string(),
        })?;
        let (mut files, mut indices, mut places) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
        for (tensor, shard) in json["weight_map"].as_object().into_iter().flatten() {
            // A shard is a file of this directory; an index that leads elsewhere is no index.
            let shard = shard.as_str().filter(|shard| Path::new(shard).file_name() == Some(shard.as_ref()));
            let Some(shard) = shard else {
                let key = format!("weight_map.{tensor}");
                let found = json["weight_map"][tensor].to_string();
                return Err(Error::Config { file: name, key, expected: "the name of a file".into(), found });
            };
            if !indices.contains_key(shard) {
                let path = dir.join(shard);
                if !path.exists() {
                    return Err(missing(path, &format!("{INDEX_FILE} puts `{tensor}` there"), None));
                }
                indices.insert(shard.to_string(), files.len());
                files.push(WeightFile::open(&path)?);
            }
            places.insert(tensor.clone(), indices[shard]);
        }
        Ok(Shelf { files, places, searched: name })
    }

    /// All tensors that the configuration asks for, and a warning for each that nobody asks for.
    pub(crate) fn weights(
        &self,
        config: &Config,
        kernels: &dyn Kernels,
        storage: Storage,
    ) -> Result<(Weights, Vec<String>)> {
        let mut tensors = BTreeMap::new();
        for parameter in config.parameters() {
            let (name, shape) = (config.name(parameter), config.parameter_shape(parameter));
            let mapped = self.tensor(&name, &shape, kernels)?;
            let tensor = match storage {
                Storage::Mapped => mapped,
                Storage::Trainable => kernels.to_owned_f32(&mapped)?,
            };
            tensors.insert(parameter, tensor);
        }
        Ok((Weights::new(config, tensors), self.unused(config)))
    }

    fn tensor(&self, name: &str, shape: &[usize], kernels: &dyn Kernels) -> Result<Tensor> {
        let file = self.places.get(name).map(|&index| &self.files[index]);
        let view = match file {
            Some(file) => file.get(name)?,
            None => None,
        };
        let file = file.map_or_else(|| self.searched.clone(), |file| file.file().to_string());
        let Some(view) = view else {
            return Err(Error::MissingTensor { file, tensor: name.into(), expected: shape.to_vec() });
        };
        if view.shape != shape {
            let (tensor, expected) = (name.into(), shape.to_vec());
            return Err(Error::TensorShape { file, tensor, expected, found: view.shape });
        }
        Ok(kernels.from_bytes(view.bytes, view.dtype, shape)?)
    }

    fn unused(&self, config: &Config) -> Vec<String> {
        let names = config.family.names();
        let mut known: BTreeSet<String> = config.parameters().into_iter().map(|p| config.name(p)).collect();
        // Some tied models carry a copy of the embedding as their head.
        known.insert(config.name(Parameter::Head));
        let harmless = |name: &str| names.ignored.iter().any(|ending| name.ends_with(ending));
        let unused = self.places.iter().filter(|(name, _)| !known.contains(*name) && !harmless(name));
        unused
            .map(|(name, &index)| {
                format!(
                    "{}: tensor `{name}` is not part of the model and was left out",
                    self.files[index].file()
                )
            })
            .collect()
    }
}

/// Weight files that are in memory.
pub(crate) fn in_memory(weights: Vec<SharedBytes>) -> Result<Shelf> {
    let files = weights.into_iter().enumerate();
    let files = files.map(|(index, bytes)| WeightFile::from_bytes(bytes, format!("weights[{index}]")));
    Ok(Shelf::of(files.collect::<Result<_>>()?))
}
