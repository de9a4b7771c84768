//! The native adapter directory: everything that was trained and frozen, exactly as it is in memory.
//!
//! | file | holds |
//! |---|---|
//! | `adapter.safetensors` | f32 tensors `<module>.<part>`, all [parts](crate::adapter::Part) that the method has, and a trained classification head under its names in the model |
//! | `adapter.json` | the adapter's settings and the base model it belongs to; written last |
//!
//! Loading accepts exactly the tensors that the settings ask for, and only on the base they were trained on: an
//! adapter that is quietly half loaded is worse than none.

use std::collections::BTreeMap;
use std::path::Path;

use lora_sb_kernels::Tensor;
use lora_sb_model::{Model, SaveType, WeightFile};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::files::{self, Entry, Names};
use crate::tuned::Restoring;
use crate::{AdapterConfig, Bases, Error, Result, Tuned};

pub(super) const NAMES: Names = Names { tensors: "adapter.safetensors", manifest: "adapter.json" };

/// The version of the directory's layout. Version 1 had LoRA, LoRA-XS and LoRA-SB with the start that each is named
/// for, without dropout and without a head; it is still read.
pub const VERSION: u32 = 2;

/// What `adapter.json` says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The layout's version, [`VERSION`].
    pub version: u32,
    /// The base model.
    pub base: Base,
    /// The adapter's settings.
    pub adapter: AdapterConfig,
    /// What the outputs of a classification head mean, in their order; empty for a language model.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub label_names: Vec<String>,
}

/// The model that an adapter belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// Where it was loaded from, as the user wrote it.
    pub name_or_path: String,
    /// [`Model::fingerprint`].
    pub fingerprint: String,
}

/// Writes an adapter; `base` is where its model was loaded from.
///
/// # Errors
/// Full fine-tuning, which has no adapter; a directory that cannot be written.
pub fn save(dir: &Path, tuned: &Tuned, base: &str) -> Result<()> {
    let config = adapter_config(tuned)?;
    let fingerprint = tuned.model.fingerprint()?;
    let metadata = BTreeMap::from([
        ("base_fingerprint".to_owned(), fingerprint.clone()),
        ("lora_alpha".to_owned(), config.lora_alpha.to_string()),
        ("method".to_owned(), config.method.to_string()),
        ("rank".to_owned(), config.rank.to_string()),
        ("version".to_owned(), VERSION.to_string()),
    ]);
    let kernels = tuned.model.kernels();
    let mut tensors: Vec<(String, &Tensor)> = tuned.frozen_tensors();
    tensors.extend(tuned.trained_tensors());
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let mut entries: Vec<Entry<'_>> = Vec::new();
    for (name, tensor) in tensors {
        entries.push((name, tensor.shape().to_vec(), Box::new(|| Ok(kernels.to_f32(tensor)?))));
    }
    let base = Base { name_or_path: base.into(), fingerprint };
    let label_names = tuned.model.config().label_names();
    let manifest = Manifest { version: VERSION, base, adapter: config.clone(), label_names };
    files::write(dir, &NAMES, entries, &metadata, SaveType::F32, &manifest)
}

/// Reads what a directory holds, without its tensors.
///
/// # Errors
/// A directory without `adapter.json`, a broken one, or another version.
pub fn manifest(dir: &Path) -> Result<Manifest> {
    let path = dir.join(NAMES.manifest);
    let mut written: Value = files::read_manifest(dir, NAMES.manifest)?;
    match written.get("version").and_then(Value::as_u64) {
        Some(1) => complete(&mut written),
        Some(version) if version == u64::from(VERSION) => {}
        found => {
            let found = found.map_or("none".into(), |version| version.to_string());
            return Err(Error::File {
                path,
                message: format!("version: expected {VERSION} or 1, found {found}"),
                hint: Some("use the release of this program that wrote it".into()),
            });
        }
    }
    serde_json::from_value(written).map_err(|error| Error::File {
        path,
        message: error.to_string(),
        hint: None,
    })
}

/// Gives a manifest of version 1 what it left unsaid.
fn complete(written: &mut Value) {
    written["version"] = json!(VERSION);
    let Some(adapter) = written.get_mut("adapter").and_then(Value::as_object_mut) else { return };
    adapter.insert("lora_dropout".into(), json!(0.0));
    adapter.insert("modules_to_save".into(), json!([]));
    let method = adapter.get("method").cloned().and_then(|method| serde_json::from_value(method).ok());
    let bases = method.map_or(Bases::Sb, Bases::of);
    if let Some(init) = adapter.get_mut("init").and_then(Value::as_object_mut) {
        init.insert("bases".into(), json!(bases));
    }
}

/// Puts a saved adapter on its base model, whose labels take the names that they had in training.
///
/// # Errors
/// Another base model; a tensor that is missing, too many, or of another shape; files that cannot be read.
pub fn load(dir: &Path, mut model: Model) -> Result<Tuned> {
    let Manifest { base, adapter, label_names, .. } = manifest(dir)?;
    let found = model.fingerprint()?;
    if base.fingerprint != found {
        return Err(Error::BaseMismatch { path: dir.into(), expected: base.fingerprint, found });
    }
    // Of another number, the head's own tensors say best what is wrong.
    if !label_names.is_empty() && label_names.len() == model.config().labels() {
        model.name_labels(&label_names)?;
    }
    let file = WeightFile::open(&dir.join(NAMES.tensors))?;
    let tensors = files::read_tensors(&file, model.kernels().as_ref())?;
    Restoring { origin: file.file(), tensors }.restore(model, &adapter)
}

/// The settings of an adapter; an error where there is none.
pub(super) fn adapter_config(tuned: &Tuned) -> Result<&AdapterConfig> {
    tuned.config().ok_or_else(|| Error::Config {
        name: "method".into(),
        expected: "a method with an adapter; full fine-tuning is written as a model".into(),
        found: tuned.method().to_string(),
    })
}
