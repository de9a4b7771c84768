//! What a configuration asks for: the numbers that are read, and the features that are refused because they would
//! change the result.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::HEAD_MODULES;
use crate::{AdapterConfig, Error, InitConfig, Method, Result, Targets};

/// Keys that change what the adapter computes; each is accepted where it is absent or switched off.
const UNSUPPORTED: [&str; 16] = [
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
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
];

/// Initialisations that change the base's weights, and which PEFT can take back when it saves.
const CONVERTIBLE: [&str; 4] = ["pissa", "corda", "olora", "lora_ga"];

const MERGE: &str = "merge the adapter with PEFT (merge_and_unload) and use the merged model";

/// Refuses what is not supported.
pub(super) fn refuse_unsupported(path: &Path, written: &Map<String, Value>) -> Result<()> {
    let refuse = |feature: String, hint: &str| {
        Err(Error::Unsupported { path: path.into(), feature, hint: hint.into() })
    };
    let kind = written.get("peft_type").unwrap_or(&Value::Null);
    if kind != "LORA" {
        return refuse(format!("peft_type {kind}"), MERGE);
    }
    let task = written.get("task_type").unwrap_or(&Value::Null);
    if !task.is_null() && !["CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION"].iter().any(|known| task == known) {
        return refuse(
            format!("task_type {task}"),
            "only language models and sequence classifiers are supported",
        );
    }
    let init = written.get("init_lora_weights").unwrap_or(&Value::Null);
    if let Some(word) = init.as_str().filter(|word| !["gaussian", "eva", "orthogonal"].contains(word)) {
        let convertible = CONVERTIBLE.iter().any(|known| word.to_ascii_lowercase().starts_with(known));
        let hint = match convertible {
            true => format!(
                "its start changed the base's weights; save it as a plain LoRA with PEFT, by \
                 save_pretrained(DIR, path_initial_model_for_weight_conversion=START), where START is the adapter as \
                 it was saved before training with init_lora_weights = True, or {MERGE}"
            ),
            false => MERGE.to_owned(),
        };
        return refuse(format!("init_lora_weights {init}"), &hint);
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
            return refuse(format!("{key} {value}"), MERGE);
        }
    }
    Ok(())
}

/// The adapter that a configuration describes, on `targets`; with `latent`, its file holds R.
pub(super) fn settings(
    path: &Path,
    written: &Map<String, Value>,
    target_modules: Targets,
    modules_to_save: Vec<String>,
    latent: bool,
) -> Result<AdapterConfig> {
    let rank = match written.get("r").unwrap_or(&json!(8)) {
        found if found.as_u64().is_some_and(|rank| rank > 0) => found.as_u64().unwrap_or(8) as usize,
        found => return wrong(path, "r", "a positive integer", found),
    };
    let alpha = match number(written, "lora_alpha", 8.0) {
        Ok(alpha) if alpha.is_finite() && alpha > 0.0 => alpha,
        Ok(alpha) => return wrong(path, "lora_alpha", "a positive number", &json!(alpha)),
        Err(found) => return wrong(path, "lora_alpha", "a number", &found),
    };
    let lora_dropout = match number(written, "lora_dropout", 0.0) {
        Ok(rate) if (0.0..1.0).contains(&rate) => rate,
        Ok(rate) => return wrong(path, "lora_dropout", "at least 0 and below 1", &json!(rate)),
        Err(found) => return wrong(path, "lora_dropout", "a number", &found),
    };
    let [rank_stabilised, dora] = [flag(path, written, "use_rslora")?, flag(path, written, "use_dora")?];
    let method = match (latent, dora, rank_stabilised) {
        (true, true, _) => {
            let (feature, hint) =
                ("use_dora with an R at each module".into(), "no program writes this".into());
            return Err(Error::Unsupported { path: path.into(), feature, hint });
        }
        // B, R and A are read from the file; of LoRA-XS and LoRA-SB it does not tell which made them.
        (true, ..) => Method::LoraSb,
        (_, true, _) => Method::Dora,
        (.., true) => Method::RsLora,
        _ => Method::Lora,
    };
    // rsLoRA scales by alpha / sqrt(r) (Kalajdzievski, arXiv 2312.03732), the others here by alpha / r.
    let root = rank_stabilised && method != Method::RsLora;
    let lora_alpha = if root { alpha * (rank as f64).sqrt() } else { alpha };
    let init = InitConfig::NONE;
    Ok(AdapterConfig {
        method,
        rank,
        lora_alpha,
        lora_dropout,
        target_modules,
        init,
        modules_to_save,
        seed: 0,
    })
}

fn number(written: &Map<String, Value>, key: &str, absent: f64) -> Result<f64, Value> {
    written.get(key).map_or(Ok(absent), |found| found.as_f64().ok_or_else(|| found.clone()))
}

fn flag(path: &Path, written: &Map<String, Value>, key: &str) -> Result<bool> {
    match written.get(key).unwrap_or(&Value::Null) {
        Value::Null => Ok(false),
        Value::Bool(on) => Ok(*on),
        found => wrong(path, key, "true or false", found),
    }
}

/// The configuration's targets, or the file's own modules where it describes them by a regular expression.
pub(super) fn targets(
    path: &Path,
    written: &Map<String, Value>,
    modules: BTreeSet<String>,
) -> Result<Targets> {
    let found = written.get("target_modules").unwrap_or(&Value::Null);
    match found {
        Value::String(word) if word == "all-linear" => Ok(Targets::AllLinear),
        Value::String(_) => Ok(Targets::Names(modules.into_iter().collect())),
        found => match names(found) {
            Some(names) => Ok(Targets::Names(names)),
            None => wrong(path, "target_modules", "names, a pattern or \"all-linear\"", found),
        },
    }
}

/// The modules that are saved whole; PEFT adds its own to those of a classifier.
pub(super) fn modules_to_save(path: &Path, written: &Map<String, Value>) -> Result<Vec<String>> {
    let found = written.get("modules_to_save").unwrap_or(&Value::Null);
    let mut modules = match found {
        Value::Null => Vec::new(),
        found => match names(found) {
            Some(names) => names,
            None => return wrong(path, "modules_to_save", "a list of names", found),
        },
    };
    if is_classifier(written) {
        modules.extend(HEAD_MODULES.iter().map(|&name| name.to_owned()));
        modules.sort();
        modules.dedup();
    }
    Ok(modules)
}

/// Whether the configuration is a sequence classifier's.
pub(super) fn is_classifier(written: &Map<String, Value>) -> bool {
    written.get("task_type").is_some_and(|task| task == "SEQ_CLS")
}

fn names(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|name| name.as_str().map(str::to_owned)).collect()
}

fn wrong<T>(path: &Path, key: &str, expected: &str, found: &Value) -> Result<T> {
    let message = format!("{key}: expected {expected}, found {found}");
    Err(Error::File { path: path.into(), message, hint: None })
}
