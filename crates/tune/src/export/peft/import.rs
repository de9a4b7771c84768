//! Reading.
//!
//! Stricter than PEFT itself, which passes over tensors that it does not know: every tensor of the file must be a
//! factor of a linear layer or a parameter of the head, all that the configuration names must be there in the right
//! shape, and a feature that would change the result is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lora_sb_kernels::Tensor;
use lora_sb_model::{Config, Model, WeightFile};
use serde_json::{Map, Value};

use super::super::{files, reference};
use super::{FINGERPRINT, HEAD_MODULES, NAMES, PREFIX, features};
use crate::adapter::Part;
use crate::tuned::Restoring;
use crate::{Error, Result, Tuned, head};

/// A PEFT directory on its base model.
#[derive(Debug)]
pub struct Imported {
    /// The model with the adapter.
    pub tuned: Tuned,
    /// What could not be checked, a sentence each.
    pub warnings: Vec<String>,
}

/// Puts the adapter of a PEFT directory on its base model: LoRA, rsLoRA or DoRA, with a classification head where
/// `modules_to_save` names one, or the r x r family in its authors' layout. Tensors may be f32, bf16 or f16.
///
/// # Errors
/// Another base model, where the file says which it is for; an unsupported feature; a tensor that is missing, too many,
/// or of another shape; files that cannot be read.
pub fn import(dir: &Path, model: Model) -> Result<Imported> {
    let path = dir.join(NAMES.manifest);
    let written: Map<String, Value> = files::read_manifest(dir, NAMES.manifest)?;
    features::refuse_unsupported(&path, &written)?;
    let file = open(dir)?;
    let warnings = check_base(dir, &file, &model)?;
    let Contents { tensors, modules, latent } = contents(&file, &model)?;
    if !latent && reference::expects_r(dir) {
        return Err(Error::Tensor {
            file: file.file().into(),
            tensor: "default_lora_latent_mapping".into(),
            expected: "an R at each module, as reconstr_config.json beside it stands for LoRA-XS or LoRA-SB"
                .into(),
            found: "none".into(),
        });
    }
    let targets = features::targets(&path, &written, modules)?;
    let modules_to_save = head_modules(&path, &written, model.config())?;
    let config = features::settings(&path, &written, targets, modules_to_save, latent)?;
    // What the library says of a setting, it says of this file's.
    let of_file = |error: Error| match error {
        Error::Config { .. } | Error::UnknownTarget { .. } | Error::RankTooLarge { .. } => {
            Error::File { path: path.clone(), message: error.to_string(), hint: error.hint() }
        }
        other => other,
    };
    let tuned = Restoring { origin: file.file(), tensors }.restore(model, &config).map_err(of_file)?;
    Ok(Imported { tuned, warnings })
}

fn open(dir: &Path) -> Result<WeightFile> {
    let path = dir.join(NAMES.tensors);
    if !path.exists() && dir.join("adapter_model.bin").exists() {
        return Err(Error::File {
            path: dir.join("adapter_model.bin"),
            message: "is not read, because it can run code".into(),
            hint: Some(
                "load it with PEFT and save it with save_pretrained(DIR, safe_serialization=True)".into(),
            ),
        });
    }
    Ok(WeightFile::open(&path)?)
}

/// The fingerprint that our exports carry; a foreign file has none.
fn check_base(dir: &Path, file: &WeightFile, model: &Model) -> Result<Vec<String>> {
    let found = model.fingerprint()?;
    match file.metadata().remove(FINGERPRINT) {
        Some(expected) if expected == found => Ok(Vec::new()),
        Some(expected) => Err(Error::BaseMismatch { path: dir.into(), expected, found }),
        None => Ok(vec![format!(
            "{}: the adapter does not say which weights it was trained on, so that the base model was checked by the \
             shapes of its layers alone",
            dir.display()
        )]),
    }
}

/// A file's tensors under our own names.
struct Contents {
    tensors: BTreeMap<String, Tensor>,
    /// The adapted modules.
    modules: BTreeSet<String>,
    /// Whether there is an R.
    latent: bool,
}

fn contents(file: &WeightFile, model: &Model) -> Result<Contents> {
    let head: BTreeSet<String> = model
        .parameters()
        .into_iter()
        .filter(|parameter| parameter.of_classification())
        .map(|parameter| model.name(parameter))
        .collect();
    let mut contents = Contents { tensors: BTreeMap::new(), modules: BTreeSet::new(), latent: false };
    for (name, tensor) in files::read_tensors(file, model.kernels().as_ref())? {
        let refuse = |expected: &str, found: &str| {
            let (file, tensor) = (file.file().into(), name.clone());
            Err(Error::Tensor { file, tensor, expected: expected.into(), found: found.into() })
        };
        let Some(own) = name.strip_prefix(PREFIX).map(without_adapter_name) else {
            return refuse(&format!("a name that begins with {PREFIX}"), "another name");
        };
        let own = match part(&own) {
            Some((module, part)) => {
                contents.latent |= part == Part::R;
                contents.modules.insert(module.to_owned());
                format!("{module}.{}", part.name())
            }
            None if head.contains(&own) => own,
            None => {
                let expected = format!(
                    "{PREFIX}<module>.lora_A.weight, .lora_B.weight, .lora_magnitude_vector, or a parameter of a \
                     classification head that the base model has"
                );
                return refuse(&expected, "another name");
            }
        };
        if contents.tensors.insert(own, tensor).is_some() {
            return refuse("each tensor once", "a second one for the same place");
        }
    }
    Ok(contents)
}

/// A name as PEFT saves it, from one that still has the adapter's name in it: `lora_A.default.weight`, or
/// `classifier.modules_to_save.default.weight`.
fn without_adapter_name(name: &str) -> String {
    let parts: Vec<&str> =
        name.split('.').filter(|part| !["default", "modules_to_save"].contains(part)).collect();
    parts.join(".")
}

/// The module and part that a tensor is of.
fn part(name: &str) -> Option<(&str, Part)> {
    if let Some(module) = reference::module_of_r(name) {
        return Some((module, Part::R));
    }
    let (module, last) = name.strip_suffix(".weight").unwrap_or(name).rsplit_once('.')?;
    let part = [Part::A, Part::B, Part::Magnitude].into_iter().find(|part| part.name() == last)?;
    Some((module, part))
}

/// The modules of the model's head that the file holds whole.
fn head_modules(path: &Path, written: &Map<String, Value>, config: &Config) -> Result<Vec<String>> {
    let (mut modules, classifier) = (Vec::new(), features::is_classifier(written));
    for module in features::modules_to_save(path, written)? {
        match head::resolve(std::slice::from_ref(&module), config) {
            Ok(_) => modules.push(module),
            // Of these a model has one, under its own name, and PEFT lists both.
            Err(_) if classifier && HEAD_MODULES.contains(&module.as_str()) => {}
            Err(error) => {
                return Err(Error::Unsupported {
                    path: path.into(),
                    feature: format!("modules_to_save {module:?} ({error})"),
                    hint: "only a classification head is saved whole; merge the adapter with PEFT \
                           (merge_and_unload) and use the merged model"
                        .into(),
                });
            }
        }
    }
    if classifier && modules.is_empty() {
        return Err(Error::Unsupported {
            path: path.into(),
            feature: "task_type \"SEQ_CLS\" on a base model without a classification head".into(),
            hint: "give the encoder that the adapter was trained on".into(),
        });
    }
    Ok(modules)
}
