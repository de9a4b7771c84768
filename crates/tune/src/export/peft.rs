//! PEFT directories: what PEFT, vLLM, llama.cpp's converter and their kin load as LoRA.
//!
//! The r x r family has no place in that format, but `s B R A = (s B R) A` is a plain LoRA of the same rank.
//! Written with `lora_alpha = r`, so that the scale is 1 under every consumer's rule (some ignore
//! `use_rslora` or the patterns), and with nothing but `lora_A` and `lora_B`, since others refuse more.
//! `W0` is not changed by LoRA-SB's start, so the adapter is relative to the published base.
//! The product is taken in f32 and rounded once.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lora_sb_model::{Model, SaveType, WeightFile};
use serde_json::{Map, Value, json};

use super::files::{self, Entry, Names};
use super::native::adapter_config;
use crate::adapter::{Factors, Part};
use crate::tuned::Restoring;
use crate::{AdapterConfig, Error, InitConfig, Method, Result, Targets, Tuned};

const NAMES: Names = Names { tensors: "adapter_model.safetensors", manifest: "adapter_config.json" };

/// Stands before the module's path in every name of the file.
const PREFIX: &str = "base_model.model.";

/// Writes an adapter as a PEFT directory; `base` is what PEFT is to load it on.
///
/// # Errors
/// Full fine-tuning, which has no adapter; a value that overflows `dtype`; a directory that cannot be written.
pub fn export(dir: &Path, tuned: &Tuned, base: &str, dtype: SaveType) -> Result<()> {
    let config = adapter_config(tuned)?;
    let Some(adapter) = tuned.adapter() else { return Ok(()) };
    let (model, kernels, sites) = (&tuned.model, tuned.model.kernels(), adapter.sites());
    let mut entries: Vec<Entry<'_>> = Vec::new();
    for &site in &sites {
        for part in [Part::A, Part::B] {
            let name = format!("{PREFIX}{}.{}.weight", model.module(site), part.name());
            let shape = part.shape(config.rank, model.shape(site)).to_vec();
            let fetch = move || match adapter.fold(kernels.as_ref(), site)? {
                Some(Factors { a, b }) => Ok(kernels.to_f32(if part == Part::A { &a } else { &b })?),
                None => Ok(Vec::new()),
            };
            entries.push((name, shape, Box::new(fetch)));
        }
    }
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    let text = |value: &dyn ToString| value.to_string();
    let metadata = [
        ("format", text(&"pt")),
        ("lora_sb.base_fingerprint", model.fingerprint()?),
        ("lora_sb.lora_alpha", text(&config.lora_alpha)),
        ("lora_sb.method", text(&config.method)),
        ("lora_sb.version", text(&env!("CARGO_PKG_VERSION"))),
    ];
    let metadata = metadata.map(|(key, value)| (key.to_owned(), value)).into();
    let manifest = written_config(config.rank, Targets::naming(model, &sites), base);
    files::write(dir, &NAMES, entries, &metadata, dtype, &manifest)
}

fn written_config(rank: usize, target_modules: Vec<String>, base: &str) -> Value {
    json!({
        "alpha_pattern": {},
        "auto_mapping": null,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": null,
        "layers_to_transform": null,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": null,
        "target_modules": target_modules,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": false,
    })
}

/// Puts the LoRA of a PEFT directory on its base model.
///
/// Stricter than PEFT itself, which passes over tensors it does not know: every tensor of the file must be an
/// `lora_A` or `lora_B` of a linear layer, all layers that the configuration names must be there, and a feature
/// that would change the result is refused.
///
/// # Errors
/// An unsupported feature; a tensor that is missing, too many, or of another shape; files that cannot be read.
pub fn import(dir: &Path, model: Model) -> Result<Tuned> {
    let path = dir.join(NAMES.manifest);
    let written: Map<String, Value> = files::read_manifest(dir, NAMES.manifest)?;
    refuse_unsupported(&path, &written)?;
    let (rank, lora_alpha) = rank_and_alpha(&path, &written)?;
    let file = WeightFile::open(&dir.join(NAMES.tensors))?;
    let mut tensors = BTreeMap::new();
    let mut modules = BTreeSet::new();
    for (name, tensor) in files::read_tensors(&file, model.kernels().as_ref())? {
        let own = name.strip_prefix(PREFIX).and_then(|rest| rest.strip_suffix(".weight"));
        let parts = [Part::A, Part::B].map(Part::name);
        match own.and_then(|own| own.rsplit_once('.')) {
            Some((module, part)) if parts.contains(&part) => {
                modules.insert(module.to_owned());
                tensors.insert(format!("{module}.{part}"), tensor);
            }
            _ => {
                return Err(Error::Tensor {
                    file: file.file().into(),
                    tensor: name,
                    expected: format!("{PREFIX}<module>.lora_A.weight or .lora_B.weight"),
                    found: "another name".into(),
                });
            }
        }
    }
    let config = AdapterConfig {
        method: Method::Lora,
        rank,
        lora_alpha,
        target_modules: targets(&path, &written, modules)?,
        init: InitConfig::NONE,
        seed: 0,
    };
    Restoring { origin: file.file(), tensors }.restore(model, &config)
}

/// The rank, and the alpha that gives the directory's scale under `alpha / rank`.
fn rank_and_alpha(path: &Path, written: &Map<String, Value>) -> Result<(usize, f64)> {
    let wrong = |key: &str, expected: &str, found: &Value| {
        let message = format!("{key}: expected {expected}, found {found}");
        Err(Error::File { path: path.into(), message, hint: None })
    };
    // Both default to 8 in PEFT.
    let eight = json!(8);
    let found = written.get("r").unwrap_or(&eight);
    let Some(rank) = found.as_u64().filter(|&rank| rank > 0) else {
        return wrong("r", "a positive integer", found);
    };
    let found = written.get("lora_alpha").unwrap_or(&eight);
    let Some(alpha) = found.as_f64() else { return wrong("lora_alpha", "a number", found) };
    // rsLoRA scales by alpha / sqrt(r) (Kalajdzievski, arXiv 2312.03732).
    let rank_stabilised = written.get("use_rslora").and_then(Value::as_bool).unwrap_or(false);
    Ok((rank as usize, if rank_stabilised { alpha * (rank as f64).sqrt() } else { alpha }))
}

/// The configuration's targets, or the file's own modules where it describes them by a regular expression.
fn targets(path: &Path, written: &Map<String, Value>, modules: BTreeSet<String>) -> Result<Targets> {
    let found = written.get("target_modules").unwrap_or(&Value::Null);
    let names = |names: &[Value]| -> Option<Vec<String>> {
        names.iter().map(|name| name.as_str().map(str::to_owned)).collect()
    };
    match found {
        Value::Array(listed) => names(listed).map(Targets::Names),
        Value::String(word) if word == "all-linear" => Some(Targets::AllLinear),
        Value::String(_) => Some(Targets::Names(modules.into_iter().collect())),
        _ => None,
    }
    .ok_or_else(|| {
        let message = format!("target_modules: expected names, a pattern or \"all-linear\", found {found}");
        Error::File { path: path.into(), message, hint: None }
    })
}

/// Keys that change what the adapter computes; each is accepted where it is absent or switched off.
const UNSUPPORTED: [&str; 18] = [
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
];

fn refuse_unsupported(path: &Path, written: &Map<String, Value>) -> Result<()> {
    let refuse = |feature: String| {
        let hint = "merge the adapter with PEFT (merge_and_unload) and use the merged model".into();
        Err(Error::Unsupported { path: path.into(), feature, hint })
    };
    let kind = written.get("peft_type").unwrap_or(&Value::Null);
    if kind != "LORA" {
        return refuse(format!("peft_type {kind}"));
    }
    // PiSSA, OLoRA, LoftQ and others change the base's weights as well as the adapter's.
    let init = written.get("init_lora_weights").unwrap_or(&Value::Null);
    if !matches!(init, Value::Null | Value::Bool(_))
        && init != "gaussian"
        && init != "eva"
        && init != "orthogonal"
    {
        return refuse(format!("init_lora_weights {init}"));
    }
    for key in UNSUPPORTED {
        let value = written.get(key).unwrap_or(&Value::Null);
        let off = match value {
            Value::Null | Value::Bool(false) => true,
            Value::String(word) => word == "none",
            Value::Array(entries) => entries.is_empty(),
            Value::Object(entries) => entries.is_empty(),
            _ => false,
        };
        if !off {
            return refuse(format!("{key} {value}"));
        }
    }
    Ok(())
}
