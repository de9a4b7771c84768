//! Writing a model as a Hugging Face directory.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use crate::load::{CONFIG_FILE, WEIGHTS_FILE};
use crate::weight_file::{WeightFileWriter, partial};
use crate::{Error, Model, Parameter, Result};

/// What stands beside a model's weights and is copied as it is.
const COPIED: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
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

/// Writes a directory that transformers and its kin load: `config.json`, `model.safetensors`, and the
/// tokenizer's files where the model came from a directory that has them.
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
    std::fs::create_dir_all(dir).map_err(|error| Error::io(dir, error))?;
    let config = dir.join(CONFIG_FILE);
    match std::fs::remove_file(&config) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(&config, error)),
        _ => {}
    }
    for name in COPIED {
        if let Some(source) =
            model.source.as_ref().map(|source| source.join(name)).filter(|path| path.exists())
        {
            let bytes = std::fs::read(&source).map_err(|error| Error::io(&source, error))?;
            write_whole(&dir.join(name), &bytes)?;
        }
    }
    write_weights(&dir.join(WEIGHTS_FILE), model, dtype, changed)?;
    let mut text = serde_json::to_vec_pretty(&config_json(model, dtype)).map_err(|error| Error::Json {
        file: CONFIG_FILE.into(),
        line: error.line(),
        message: error.to_string(),
    })?;
    text.push(b'\n');
    write_whole(&config, &text)
}

fn write_weights(
    path: &Path,
    model: &Model,
    dtype: SaveType,
    changed: &mut dyn FnMut(Parameter, Vec<f32>) -> Result<Vec<f32>>,
) -> Result<()> {
    let parameters = model.parameters();
    let tensors: Vec<(String, Vec<usize>)> =
        parameters.iter().map(|&p| (model.name(p), model.config.parameter_shape(p))).collect();
    // transformers refuses a file that does not say which framework's layout it has.
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    let mut writer = WeightFileWriter::create(path, dtype, &metadata, &tensors)?;
    for parameter in parameters {
        let values = model.kernels.to_f32(model.weights.required(parameter)?)?;
        writer.write(&changed(parameter, values)?)?;
    }
    writer.finish()
}

fn config_json(model: &Model, dtype: SaveType) -> Value {
    let mut json = model.config.json.clone();
    json.insert("model_type".into(), json!(model.config.family.model_type()));
    json.entry("architectures").or_insert_with(|| json!([model.config.family.architecture()]));
    // transformers 5 writes `dtype`; `torch_dtype` is the name that all versions read.
    let key = if json.contains_key("dtype") { "dtype" } else { "torch_dtype" };
    json.insert(key.into(), json!(dtype.torch_name()));
    Value::Object(json)
}

fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let beside = partial(path);
    std::fs::write(&beside, bytes).map_err(|error| Error::io(&beside, error))?;
    std::fs::rename(&beside, path).map_err(|error| Error::io(path, error))
}
