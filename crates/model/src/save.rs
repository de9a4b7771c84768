//! Writing a model as a Hugging Face directory.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::load::{CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE};
use crate::weight_file::{WeightFileWriter, partial};
use crate::{Error, Model, Parameter, Result};

/// The beginning of a shard's name, as transformers writes it.
const SHARD: &str = "model-";

/// What stands beside a model's weights and is copied as it is.
const COPIED: [&str; 11] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
];

/// The element type of written weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveType {
    /// IEEE single precision.
    F32,
    /// The upper half of an `f32`.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl SaveType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            SaveType::F32 => 4,
            SaveType::Bf16 | SaveType::F16 => 2,
        }
    }

    /// The name in messages and arguments.
    pub fn name(self) -> &'static str {
        match self {
            SaveType::F32 => "f32",
            SaveType::Bf16 => "bf16",
            SaveType::F16 => "f16",
        }
    }

    /// The name in safetensors headers.
    pub(crate) fn safetensors_name(self) -> &'static str {
        match self {
            SaveType::F32 => "F32",
            SaveType::Bf16 => "BF16",
            SaveType::F16 => "F16",
        }
    }

    /// The name in `config.json`.
    fn torch_name(self) -> &'static str {
        match self {
            SaveType::F32 => "float32",
            SaveType::Bf16 => "bfloat16",
            SaveType::F16 => "float16",
        }
    }
}

/// Bytes of weights in one file: what transformers 4 splits at.
pub const SHARD_BYTES: usize = 5_000_000_000;

/// Writes a directory that transformers and its kin load: `config.json`, `model.safetensors`, and the
/// tokenizer's files where the model came from a directory that has them. Weights of more than
/// [`SHARD_BYTES`] are dealt to several files with an index.
///
/// `changed` sees every tensor, widened, and returns what is written in its place: the same values, or with
/// an adapter merged into them. One tensor is in memory at a time. `config.json` keeps the keys that this
/// program does not know, and is written last: without it a directory is not taken for a model.
///
/// # Errors
/// Where a file cannot be written, a value overflows `dtype`, or `changed` fails.
pub fn save_model(
    dir: &Path,
    model: &Model,
    dtype: SaveType,
    changed: &mut dyn FnMut(Parameter, Vec<f32>) -> Result<Vec<f32>>,
) -> Result<()> {
    save_model_in_shards(dir, model, dtype, SHARD_BYTES, changed)
}

/// The same with files of at most `shard_bytes` bytes of weights; a tensor that is larger has its own.
///
/// # Errors
/// As [`save_model`].
pub fn save_model_in_shards(
    dir: &Path,
    model: &Model,
    dtype: SaveType,
    shard_bytes: usize,
    changed: &mut dyn FnMut(Parameter, Vec<f32>) -> Result<Vec<f32>>,
) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|error| Error::io(dir, error))?;
    let config = dir.join(CONFIG_FILE);
    remove(&config)?;
    for name in COPIED {
        if let Some(source) =
            model.source.as_ref().map(|source| source.join(name)).filter(|path| path.exists())
        {
            let bytes = std::fs::read(&source).map_err(|error| Error::io(&source, error))?;
            write_whole(&dir.join(name), &bytes)?;
        }
    }
    let shards = shards(model, dtype, shard_bytes);
    for (name, parameters) in &shards {
        write_weights(&dir.join(name), model, parameters, dtype, changed)?;
    }
    if shards.len() > 1 {
        write_json(&dir.join(INDEX_FILE), &index_json(model, dtype, &shards))?;
    }
    remove_others(dir, &shards)?;
    write_json(&config, &config_json(model, dtype))
}

/// The files' names and what each holds, in the order of the forward pass.
fn shards(model: &Model, dtype: SaveType, shard_bytes: usize) -> Vec<(String, Vec<Parameter>)> {
    let (mut shards, mut filled) = (vec![Vec::new()], 0);
    for parameter in model.parameters() {
        let bytes = bytes(model, parameter, dtype);
        if filled > 0 && filled + bytes > shard_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push(parameter);
        }
    }
    let count = shards.len();
    let name = |index: usize| match count {
        1 => WEIGHTS_FILE.to_string(),
        _ => format!("{SHARD}{:05}-of-{count:05}.safetensors", index + 1),
    };
    shards.into_iter().enumerate().map(|(index, shard)| (name(index), shard)).collect()
}

fn bytes(model: &Model, parameter: Parameter, dtype: SaveType) -> usize {
    model.config.parameter_shape(parameter).iter().product::<usize>() * dtype.size()
}

fn index_json(model: &Model, dtype: SaveType, shards: &[(String, Vec<Parameter>)]) -> Value {
    let total: usize = model.parameters().into_iter().map(|parameter| bytes(model, parameter, dtype)).sum();
    let places = shards.iter().flat_map(|(file, parameters)| {
        parameters.iter().map(move |&parameter| (model.name(parameter), json!(file)))
    });
    json!({ "metadata": { "total_size": total }, "weight_map": places.collect::<Map<_, _>>() })
}

/// Removes the weights of a model that was here before, which would be read in place of these.
fn remove_others(dir: &Path, shards: &[(String, Vec<Parameter>)]) -> Result<()> {
    let entries = std::fs::read_dir(dir).map_err(|error| Error::io(dir, error))?;
    for entry in entries {
        let entry = entry.map_err(|error| Error::io(dir, error))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let shard = name.starts_with(SHARD) && name.contains("-of-") && name.ends_with(".safetensors");
        let written = shards.iter().any(|(file, _)| *file == name) || name == INDEX_FILE && shards.len() > 1;
        if (shard || name == WEIGHTS_FILE || name == INDEX_FILE) && !written {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

fn write_weights(
    path: &Path,
    model: &Model,
    parameters: &[Parameter],
    dtype: SaveType,
    changed: &mut dyn FnMut(Parameter, Vec<f32>) -> Result<Vec<f32>>,
) -> Result<()> {
    let tensors: Vec<(String, Vec<usize>)> =
        parameters.iter().map(|&p| (model.name(p), model.config.parameter_shape(p))).collect();
    // transformers refuses a file that does not say which framework's layout it has.
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    let mut writer = WeightFileWriter::create(path, dtype, &metadata, &tensors)?;
    for &parameter in parameters {
        let values = model.kernels.to_f32(model.weights.required(parameter)?)?;
        writer.write(&changed(parameter, values)?)?;
    }
    writer.finish()
}

fn config_json(model: &Model, dtype: SaveType) -> Value {
    let mut json = model.config.json.clone();
    json.insert("model_type".into(), json!(model.config.family.model_type()));
    json.insert("architectures".into(), json!([model.config.family.architecture()]));
    // It names Python files that do not travel with the weights.
    json.remove("auto_map");
    // transformers 5 writes `dtype`; `torch_dtype` is the name that all versions read.
    let key = if json.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    json.insert(key.into(), json!(dtype.torch_name()));
    Value::Object(json)
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path, error)),
        _ => Ok(()),
    }
}

fn write_json(path: &Path, json: &Value) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(json).map_err(|error| Error::Json {
        file: path.display().to_string(),
        line: error.line(),
        message: error.to_string(),
    })?;
    text.push(b'\n');
    write_whole(path, &text)
}

fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let beside = partial(path);
    std::fs::write(&beside, bytes).map_err(|error| Error::io(&beside, error))?;
    std::fs::rename(&beside, path).map_err(|error| Error::io(path, error))
}
