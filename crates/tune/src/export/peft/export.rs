//! Writing.
//!
//! The r x r family has no place in the format, but `s B R A = (s B R) A` is a plain LoRA of the same rank; what is
//! relative to its own start, `s (B A - B0 A0)`, is one of twice the rank. All are written with `lora_alpha = r`, so
//! that the scale is 1 under every consumer's rule (some ignore `use_rslora` or the patterns), and a language model's
//! with nothing but `lora_A` and `lora_B`, since others refuse more. DoRA keeps its magnitude: a product of two
//! factors cannot say it. W0 is not changed by any start here, so an adapter is relative to the published base.
//! Products are taken in f32 and rounded once.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lora_sb_kernels::{Kernels, Tensor};
use lora_sb_model::{Model, Parameter, SaveType, Site, Task};
use serde_json::{Value, json};

use super::super::files::{self, Entry};
use super::super::native::adapter_config;
use super::{FINGERPRINT, HEAD_MODULES, NAMES, PREFIX};
use crate::adapter::{Adapter, Part};
use crate::method::Kind;
use crate::{AdapterConfig, Error, Result, Targets, Tuned, head};

/// The values of vLLM's `--max-lora-rank`, which an adapter's rank must not exceed.
pub const VLLM_RANKS: [usize; 9] = [1, 8, 16, 32, 64, 128, 256, 320, 512];

/// The one where nothing is said.
const VLLM_DEFAULT_RANK: usize = 16;

/// How a PEFT directory is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The type of its tensors.
    pub dtype: SaveType,
    /// A larger rank to write: A is filled up with rows and B with columns of zeros, which changes nothing that is
    /// computed. For consumers with a list of ranks, as [`VLLM_RANKS`].
    pub pad_rank: Option<usize>,
}

/// Writes an adapter as a PEFT directory; `base` is what PEFT is to load it on. Returns a sentence for each kind of
/// program that cannot load it, with what to do.
///
/// # Errors
/// Full fine-tuning, which has no adapter; a `pad_rank` below the rank; a directory that holds a model, for which
/// transformers would apply the adapter without being told to; a value that overflows the type; a directory that cannot
/// be written.
pub fn export(dir: &Path, tuned: &Tuned, base: &str, options: &Options) -> Result<Vec<String>> {
    let config = adapter_config(tuned)?;
    let Some(adapter) = tuned.adapter() else { return Ok(Vec::new()) };
    let (model, rank) = (&tuned.model, written_rank(config, options.pad_rank)?);
    refuse_model(dir)?;
    let (head, modules_to_save) = head_to_save(model, config)?;
    let mut entries = Vec::new();
    for site in adapter.sites() {
        entries.extend(site_entries(model, adapter, site, rank, config.method.kind()));
    }
    for &parameter in &head {
        let Some(weight) = model.weight(parameter) else { continue };
        let fetch = || Ok(model.kernels().to_f32(weight)?);
        entries.push((
            format!("{PREFIX}{}", model.name(parameter)),
            weight.shape().to_vec(),
            Box::new(fetch),
        ));
    }
    entries.sort_by(|a: &Entry<'_>, b| a.0.cmp(&b.0));
    let metadata = BTreeMap::from([
        ("format".to_owned(), "pt".to_owned()),
        (FINGERPRINT.to_owned(), model.fingerprint()?),
        ("lora_sb.lora_alpha".to_owned(), config.lora_alpha.to_string()),
        ("lora_sb.method".to_owned(), config.method.to_string()),
        ("lora_sb.version".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
    ]);
    let manifest = json!({
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
        "modules_to_save": if modules_to_save.is_empty() { Value::Null } else { json!(modules_to_save) },
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": null,
        "target_modules": Targets::naming(model.config(), &adapter.sites()),
        "task_type": if model.config().task == Task::LanguageModel { "CAUSAL_LM" } else { "SEQ_CLS" },
        "use_dora": config.method.kind() == Kind::Magnitude,
        "use_rslora": false,
    });
    files::write(dir, &NAMES, entries, &metadata, options.dtype, &manifest)?;
    Ok(warnings(config.method.kind(), rank, !head.is_empty()))
}

fn written_rank(config: &AdapterConfig, padded: Option<usize>) -> Result<usize> {
    let rank = if config.method.subtracts_start() { 2 * config.rank } else { config.rank };
    match padded {
        Some(padded) if padded < rank => Err(Error::Config {
            name: "pad_rank".into(),
            expected: format!("at least the rank that is written, {rank}"),
            found: padded.to_string(),
        }),
        padded => Ok(padded.unwrap_or(rank)),
    }
}

/// A, B and the magnitude of a site, each computed when its turn comes.
fn site_entries<'a>(
    model: &'a Model,
    adapter: &'a dyn Adapter,
    site: Site,
    rank: usize,
    kind: Kind,
) -> Vec<Entry<'a>> {
    let kernels = model.kernels().as_ref();
    let parts =
        if kind == Kind::Magnitude { &[Part::A, Part::B, Part::Magnitude][..] } else { &[Part::A, Part::B] };
    let entry = |&part: &Part| {
        let ending = if part == Part::Magnitude { "" } else { ".weight" };
        let name = format!("{PREFIX}{}.{}{ending}", model.module(site), part.name());
        let shape = part.shape(rank, model.shape(site));
        let padded = shape.clone();
        let fetch = move || {
            let Some(factors) = adapter.fold(kernels, site)? else { return Ok(Vec::new()) };
            match part {
                Part::A => pad(kernels, &factors.a, &padded),
                Part::B => pad(kernels, &factors.b, &padded),
                _ => factors.magnitude.map_or(Ok(Vec::new()), |magnitude| Ok(kernels.to_f32(&magnitude)?)),
            }
        };
        (name, shape, Box::new(fetch) as _)
    };
    parts.iter().map(entry).collect()
}

/// A matrix `[n, k]` with zeros below and to its right.
fn pad(kernels: &dyn Kernels, matrix: &Tensor, shape: &[usize]) -> Result<Vec<f32>> {
    let values = kernels.to_f32(matrix)?;
    if matrix.shape() == shape {
        return Ok(values);
    }
    let (columns, wide) = (matrix.shape()[1], shape[1]);
    let mut padded = vec![0.0; shape.iter().product()];
    for (row, filled) in values.chunks_exact(columns).zip(padded.chunks_exact_mut(wide)) {
        filled[..columns].copy_from_slice(row);
    }
    Ok(padded)
}

/// The parameters of the head that belong into the file, and the modules that hold them.
///
/// PEFT adds [`HEAD_MODULES`] for SEQ_CLS by itself and wants all of their tensors, trained or not.
fn head_to_save(model: &Model, config: &AdapterConfig) -> Result<(BTreeSet<Parameter>, Vec<String>)> {
    if model.config().task == Task::LanguageModel {
        return Ok((BTreeSet::new(), Vec::new()));
    }
    let mut head: BTreeSet<Parameter> = BTreeSet::new();
    for module in HEAD_MODULES {
        // A model has one of them and not the other.
        head.extend(head::resolve(&[module.to_owned()], model.config()).unwrap_or_default());
    }
    let mut modules: Vec<String> = HEAD_MODULES.map(str::to_owned).to_vec();
    for module in &config.modules_to_save {
        let below = head::resolve(std::slice::from_ref(module), model.config())?;
        if below.iter().any(|parameter| !head.contains(parameter)) {
            modules.push(module.clone());
            head.extend(below);
        }
    }
    Ok((head, modules))
}

/// transformers looks for an adapter beside a model's `config.json` and applies it.
fn refuse_model(dir: &Path) -> Result<()> {
    if !dir.join("config.json").exists() {
        return Ok(());
    }
    Err(Error::File {
        path: dir.into(),
        message: "holds a model, on which transformers would load the adapter without being told to".into(),
        hint: Some("write the adapter to another directory".into()),
    })
}

fn warnings(kind: Kind, rank: usize, head: bool) -> Vec<String> {
    let mut warnings = Vec::new();
    let refused = "vLLM, llama.cpp and mistral.rs refuse it; merge the adapter for them";
    if kind == Kind::Magnitude {
        warnings.push(format!("the adapter is a DoRA, which PEFT loads; {refused}"));
    }
    if head {
        warnings.push(format!(
            "the adapter holds a classification head (modules_to_save), which PEFT loads; {refused}"
        ));
    }
    if !warnings.is_empty() {
        return warnings;
    }
    match VLLM_RANKS.iter().find(|&&listed| listed >= rank) {
        Some(..=VLLM_DEFAULT_RANK) => {}
        Some(listed) => {
            warnings.push(format!("vLLM needs --max-lora-rank {listed} for an adapter of rank {rank}"))
        }
        None => warnings.push(format!("vLLM does not load an adapter of rank {rank}; merge it for vLLM")),
    }
    warnings
}
