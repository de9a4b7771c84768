//! What a run begins with: its data checked, its state fresh or from a checkpoint.

use lora_sb_data::{Example, Label};
use lora_sb_model::{Config, Model, Positions, Task};

use super::TrainingData;
use crate::config::Precision;
use crate::eval::labels;
use crate::optim::AdamW;
use crate::run::tensors::sha256;
use crate::run::{Checkpoint, RunDirectory, TrainState, frozen_sha256};
use crate::{Error, Method, PlanChange, Result, TrainConfig, Tuned};

/// The state before the first step, with the hashes of everything that a run's results depend on.
pub(super) fn fresh_state(
    tuned: &Tuned,
    data: &TrainingData,
    config: &TrainConfig,
    run: &RunDirectory,
) -> Result<TrainState> {
    // Full fine-tuning replaces every value of its base, so there is nothing that a resumption could mistake.
    let base = match tuned.method() {
        Method::Full => None,
        _ => Some(tuned.model.fingerprint()?),
    };
    Ok(TrainState {
        step: 0,
        optimizer_step: 0,
        epoch: 0,
        examples_in_epoch: 0,
        accumulated_micro_batches: 0,
        seed: config.seed,
        tokens: 0,
        trained_tokens: 0,
        first_eval_loss: None,
        best: None,
        last_eval: None,
        plan_sha256: run.plan().sha256(),
        data_sha256: data_sha256(data),
        base,
        frozen_sha256: frozen_sha256(tuned)?,
    })
}

/// Puts what a checkpoint trained into `tuned`, after checking that it is one of the same run.
pub(super) fn restore(tuned: &mut Tuned, checkpoint: &Checkpoint, fresh: &TrainState) -> Result<AdamW> {
    let state = checkpoint.state();
    let none = || "none".to_owned();
    let pairs = [
        ("plan", state.plan_sha256.clone(), fresh.plan_sha256.clone()),
        ("data", state.data_sha256.clone(), fresh.data_sha256.clone()),
        ("base model", state.base.clone().unwrap_or_else(none), fresh.base.clone().unwrap_or_else(none)),
        (
            "frozen tensors",
            state.frozen_sha256.clone().unwrap_or_else(none),
            fresh.frozen_sha256.clone().unwrap_or_else(none),
        ),
    ];
    let differs = pairs.into_iter().filter(|(_, old, new)| old != new);
    let changes: Vec<PlanChange> =
        differs.map(|(key, old, new)| PlanChange { key: key.into(), old, new }).collect();
    if !changes.is_empty() {
        return Err(Error::PlanChanged { changes });
    }
    load_trained(tuned, checkpoint)?;
    let kernels = tuned.model.kernels().clone();
    AdamW::restore(tuned, state.optimizer_step, checkpoint.optimizer(kernels.as_ref())?)
}

/// Overwrites everything that is trained with a checkpoint's values.
pub(super) fn load_trained(tuned: &mut Tuned, checkpoint: &Checkpoint) -> Result<()> {
    let kernels = tuned.model.kernels().clone();
    let mut saved = checkpoint.trained(kernels.as_ref())?;
    let wrong = |tensor: &str, expected: String, found: String| Error::Tensor {
        file: checkpoint.path().display().to_string(),
        tensor: tensor.into(),
        expected,
        found,
    };
    tuned.visit(&mut |name, value, _| match saved.remove(name) {
        Some(tensor) if tensor.shape() == value.shape() => {
            Ok(kernels.write_f32(value, &kernels.to_f32(&tensor)?)?)
        }
        found => {
            let found = found.map_or("no such tensor".into(), |tensor| format!("shape {:?}", tensor.shape()));
            Err(wrong(name, format!("shape {:?}", value.shape()), found))
        }
    })?;
    match saved.into_keys().next() {
        None => Ok(()),
        Some(extra) => Err(wrong(&extra, "only what is trained".into(), "a tensor that is not".into())),
    }
}

/// Checks that the model computes in what the settings say: an adapter's start was computed in it as well.
pub(super) fn check_dtype(dtype: Precision, model: &Model) -> Result<()> {
    match model.dtype() == dtype.dtype() {
        true => Ok(()),
        false => Err(Error::Config {
            name: "dtype".into(),
            expected: format!("{}, what the model computes in", model.dtype()),
            found: dtype.to_string(),
        }),
    }
}

/// Checks the examples against the model, before anything is computed.
pub(super) fn check_examples(data: &TrainingData, model: &Config) -> Result<()> {
    for example in data.train.iter().chain(&data.validation) {
        if let Some((expected, found)) = mismatch(example, model) {
            return Err(Error::Config { name: example.source.to_string(), expected, found });
        }
    }
    Ok(())
}

/// What the model expects of an example, and what it found.
fn mismatch(example: &Example, model: &Config) -> Option<(String, String)> {
    let Example { ids, trained, second, label, .. } = example;
    if let Some(mismatch) = wrong_label(*label, model.task) {
        return Some(mismatch);
    }
    if ids.len() != trained.len() {
        return Some(("one flag for each token".into(), format!("{} flags", trained.len())));
    }
    if labels(example) == 0 {
        return Some(("at least one trained token behind the first".into(), "none".into()));
    }
    if ids.is_empty() || second.is_some_and(|second| second > ids.len()) {
        return Some(("tokens, those of a second text among them".into(), format!("{} tokens", ids.len())));
    }
    if let Positions::Learned { offset } = model.positions {
        let longest = model.max_position_embeddings.saturating_sub(offset);
        if ids.len() > longest {
            let expected = format!("at most the {longest} tokens that the model has positions for");
            return Some((expected, ids.len().to_string()));
        }
    }
    let id = ids.iter().find(|&&id| id as usize >= model.vocab_size)?;
    Some((format!("token ids below the model's vocabulary of {}", model.vocab_size), id.to_string()))
}

fn wrong_label(label: Option<Label>, task: Task) -> Option<(String, String)> {
    let expected = match (task, label) {
        (Task::LanguageModel, None) => return None,
        (Task::Classification { labels }, Some(Label::Class(class))) if (class as usize) < labels => {
            return None;
        }
        (Task::Regression, Some(Label::Value(value))) if value.is_finite() => return None,
        (Task::LanguageModel, _) => "no label, as the model predicts tokens".into(),
        (Task::Classification { labels }, _) => format!("a class below the {labels} that the model has"),
        (Task::Regression, _) => "a finite number as label".into(),
    };
    let found = match label {
        None => "no label".into(),
        Some(Label::Class(class)) => format!("class {class}"),
        Some(Label::Value(value)) => format!("the number {value}"),
    };
    Some((expected, found))
}

fn data_sha256(data: &TrainingData) -> String {
    let mut bytes = Vec::new();
    for part in [&data.train, &data.validation] {
        bytes.extend((part.len() as u64).to_le_bytes());
        for example in part {
            bytes.extend((example.ids.len() as u64).to_le_bytes());
            bytes.extend(example.ids.iter().flat_map(|id| id.to_le_bytes()));
            bytes.extend(example.trained.iter().map(|&trained| u8::from(trained)));
            let (kind, label) = match example.label {
                None => (0u8, 0),
                Some(Label::Class(class)) => (1, class),
                Some(Label::Value(value)) => (2, value.to_bits()),
            };
            bytes.push(kind);
            bytes.extend(label.to_le_bytes());
            bytes.extend(example.second.map_or(u64::MAX, |second| second as u64).to_le_bytes());
        }
    }
    sha256(&bytes)
}
