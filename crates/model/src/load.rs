//! Finding and checking a model's files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use lora_sb_kernels::{DType, Kernels, SharedBytes, Tensor};
use serde_json::Value;

use crate::fingerprint::Fingerprint;
use crate::memory::rounded;
use crate::weight_file::{WeightFile, WeightView};
use crate::weights::{Storage, Weights, fresh, in_bf16};
use crate::{Config, Error, Parameter, Result, Task};

pub(crate) const CONFIG_FILE: &str = "config.json";
pub(crate) const WEIGHTS_FILE: &str = "model.safetensors";
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";

/// What is decided when a model is read, besides what its files say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// The task of an encoder's head, where it is not the one of `config.json`; a decoder's is
    /// [`Task::LanguageModel`].
    pub task: Option<Task>,
    /// Of a classification head that is drawn.
    pub seed: u64,
    /// What becomes of a classification head of another number of labels.
    pub mismatched: Mismatched,
    /// What the model computes in, `f32` or `bf16`; see [`Model::set_dtype`](crate::Model::set_dtype).
    pub dtype: DType,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions { task: None, seed: 0, mismatched: Mismatched::default(), dtype: DType::F32 }
    }
}

/// What becomes of a layer in the files whose number of labels is not the task's.
///
/// A tensor of another width, or one that is no part of the head, is an error in any case: it is of another model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mismatched {
    /// [`Error::Head`].
    #[default]
    Refuse,
    /// It is left out and a new one drawn, as if there were none; [`Model::warnings`](crate::Model::warnings) names
    /// it. transformers' `ignore_mismatched_sizes`.
    Draw,
}

impl LoadOptions {
    pub(crate) fn applied_to(self, config: Config) -> Result<Config> {
        match self.task {
            Some(task) => config.with_task(task),
            None => Ok(config),
        }
    }
}

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

/// What was read of a model's files.
pub(crate) struct Read {
    pub(crate) weights: Weights,
    /// Of the weights as they lie in the files, where the model holds some of them rounded.
    pub(crate) fingerprint: Option<String>,
    /// A sentence for each tensor that nobody asks for, and one for what is new of a classification head.
    pub(crate) warnings: Vec<String>,
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

    /// All tensors that the configuration asks for, as a model of `options` holds them.
    pub(crate) fn read(
        &self,
        config: &Config,
        kernels: &dyn Kernels,
        storage: Storage,
        options: LoadOptions,
    ) -> Result<Read> {
        let (mut tensors, mut drawn) = (BTreeMap::new(), Drawn::default());
        let rounding = storage == Storage::Mapped && self.is_rounded(config, options.dtype)?;
        let mut fingerprint = rounding.then(|| Fingerprint::of(config));
        for (index, parameter) in config.parameters().into_iter().enumerate() {
            let found = match self.tensor(config, parameter, kernels) {
                Err(Error::Head { tensor, expected, found, .. })
                    if options.mismatched == Mismatched::Draw =>
                {
                    drawn.mismatched.push(format!("`{tensor}` ({found:?}, not {expected:?})"));
                    None
                }
                Ok(None) if parameter.of_classification() => {
                    drawn.missing.push(format!("`{}`", config.name(parameter)));
                    None
                }
                found => found?,
            };
            let tensor = match found {
                Some(tensor) => {
                    if let Some(fingerprint) = &mut fingerprint {
                        fingerprint.add(kernels, config, parameter, &tensor)?;
                    }
                    self.held(config, kernels, parameter, tensor, storage, options.dtype)?
                }
                None if parameter.of_classification() => {
                    fresh(config, kernels, parameter, (options.seed, index as u64), Storage::Trainable)?
                }
                None => {
                    let (file, tensor) = (self.searched.clone(), config.name(parameter));
                    let expected = config.parameter_shape(parameter);
                    return Err(Error::MissingTensor { file, tensor, expected });
                }
            };
            tensors.insert(parameter, tensor);
        }
        let mut warnings = self.unused(config);
        warnings.extend(self.untied(config)?);
        warnings.extend(drawn.sentence(&self.searched));
        let weights = Weights::new(config, tensors, storage);
        Ok(Read { weights, fingerprint: fingerprint.map(Fingerprint::finish), warnings })
    }

    /// A tensor of the files as the model holds it. What the files keep of one that is a copy by then is given back at
    /// once: neither the host nor the device has room for the whole model twice.
    fn held(
        &self,
        config: &Config,
        kernels: &dyn Kernels,
        parameter: Parameter,
        read: Tensor,
        storage: Storage,
        dtype: DType,
    ) -> Result<Tensor> {
        // A classification head is trained in any case, beside an adapter too.
        let copy = if parameter.of_classification() || storage == Storage::Trainable {
            Some(kernels.to_owned_f32(&read)?)
        } else if dtype == DType::Bf16 && rounded(config, parameter) && read.dtype() != dtype {
            Some(in_bf16(kernels, &read)?)
        } else {
            None
        };
        if copy.is_some() || !kernels.place().is_host() {
            self.release(config, parameter);
        }
        Ok(copy.unwrap_or(read))
    }

    /// Whether a frozen model that computes in `dtype` holds any parameter in another type than that of the files.
    fn is_rounded(&self, config: &Config, dtype: DType) -> Result<bool> {
        if dtype != DType::Bf16 {
            return Ok(false);
        }
        for parameter in config.parameters().into_iter().filter(|&parameter| rounded(config, parameter)) {
            if self.view(config, parameter)?.is_some_and(|(_, _, view)| view.dtype != dtype) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// A parameter under any of its names: its file, its name there, and what stands there.
    fn view(
        &self,
        config: &Config,
        parameter: Parameter,
    ) -> Result<Option<(&WeightFile, String, WeightView)>> {
        for name in config.family.names().spellings(parameter) {
            let Some(file) = self.file_of(&name) else { continue };
            if let Some(view) = file.get(&name)? {
                return Ok(Some((file, name, view)));
            }
        }
        Ok(None)
    }

    /// A tensor as it lies in its file.
    fn tensor(&self, config: &Config, parameter: Parameter, kernels: &dyn Kernels) -> Result<Option<Tensor>> {
        let expected = config.parameter_shape(parameter);
        let Some((file, tensor, view)) = self.view(config, parameter)? else { return Ok(None) };
        if view.shape == expected {
            return Ok(Some(kernels.from_bytes(view.bytes, view.dtype, &expected)?));
        }
        let (file, found) = (file.file().into(), view.shape);
        let head = matches!(parameter, Parameter::Classifier | Parameter::ClassifierBias);
        Err(match head && found.get(1..) == expected.get(1..) {
            true => Error::Head { file, tensor, expected, found },
            false => Error::TensorShape { file, tensor, expected, found },
        })
    }

    /// Gives back the memory of a parameter's bytes, as far as it is only a copy of a file's; they can be read again.
    fn release(&self, config: &Config, parameter: Parameter) {
        for name in config.family.names().spellings(parameter) {
            if let Some(file) = self.file_of(&name) {
                return file.release(&name);
            }
        }
    }

    fn file_of(&self, name: &str) -> Option<&WeightFile> {
        self.places.get(name).map(|&index| &self.files[index])
    }

    fn unused(&self, config: &Config) -> Vec<String> {
        let names = config.family.names();
        let parameters = config.parameters();
        let mut known: BTreeSet<String> = parameters.iter().flat_map(|&p| names.spellings(p)).collect();
        if config.tie_word_embeddings {
            known.insert(config.name(Parameter::Head));
        }
        let unused = self.places.iter().filter(|(name, _)| !known.contains(*name) && !names.ignores(name));
        unused
            .map(|(name, &index)| {
                format!(
                    "{}: tensor `{name}` is not part of the model and was left out",
                    self.files[index].file()
                )
            })
            .collect()
    }

    /// A sentence where the files of a tied model hold a head that is not a copy of the embedding.
    ///
    /// transformers 4 ties nevertheless, as this program does; from 5 on it follows the file.
    fn untied(&self, config: &Config) -> Result<Option<String>> {
        let head = config.name(Parameter::Head);
        let Some(file) = self.file_of(&head).filter(|_| config.tie_word_embeddings) else { return Ok(None) };
        let Some(head_view) = file.get(&head)? else { return Ok(None) };
        for name in config.family.names().spellings(Parameter::Embedding) {
            let Some(embedding) = self.file_of(&name) else { continue };
            if embedding.get(&name)?.is_some_and(|view| !looks_alike(&view, &head_view)) {
                return Ok(Some(format!(
                    "{}: `{head}` differs from the embedding `{name}` and was left out, as config.json says \
                     `tie_word_embeddings`",
                    file.file()
                )));
            }
        }
        Ok(None)
    }
}

/// What is new of a classification head.
#[derive(Default)]
struct Drawn {
    /// Tensors that are not in the files.
    missing: Vec<String>,
    /// Tensors of another number of labels, with their shapes.
    mismatched: Vec<String>,
}

impl Drawn {
    fn sentence(&self, file: &str) -> Option<String> {
        let missing = (!self.missing.is_empty()).then(|| format!("no {}", self.missing.join(", ")));
        let mismatched = (!self.mismatched.is_empty())
            .then(|| format!("{} left out, of another number of labels", self.mismatched.join(", ")));
        let why = [missing, mismatched].into_iter().flatten().collect::<Vec<_>>().join("; ");
        (!why.is_empty()).then(|| {
            format!(
                "{file}: {why}; this part of the classification head is new, drawn at random, and means nothing \
                 until it is trained"
            )
        })
    }
}

/// Whether two tables are of one type and shape and agree in some places; to read all of them would double
/// the time of loading.
fn looks_alike(a: &WeightView, b: &WeightView) -> bool {
    let (left, right) = (a.bytes.bytes(), b.bytes.bytes());
    let (pieces, length) = (64, 256);
    let mut starts = (0..pieces).map(|i| i * left.len() / pieces);
    a.dtype == b.dtype
        && a.shape == b.shape
        && starts.all(|start| {
            let end = (start + length).min(left.len());
            left[start..end] == right[start..end]
        })
}

/// Weight files that are in memory.
pub(crate) fn in_memory(weights: Vec<SharedBytes>) -> Result<Shelf> {
    let files = weights.into_iter().enumerate();
    let files = files.map(|(index, bytes)| WeightFile::from_bytes(bytes, format!("weights[{index}]")));
    Ok(Shelf::of(files.collect::<Result<_>>()?))
}
