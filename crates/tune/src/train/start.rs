//! What a run begins with: its data checked, its state fresh or from a checkpoint.

use super::TrainingData;
use crate::eval::labelled_tokens;
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

/// Checks the examples against the model, before anything is computed.
pub(super) fn check_examples(data: &TrainingData, vocab_size: usize) -> Result<()> {
    for example in data.train.iter().chain(&data.validation) {
        let wrong = |expected: &str, found: String| {
            let (name, expected) = (example.source.to_string(), expected.to_owned());
            Err(Error::Config { name, expected, found })
        };
        if example.ids.len() != example.trained.len() {
            return wrong("one flag for each token", format!("{} flags", example.trained.len()));
        }
        if labelled_tokens(example) == 0 {
            return wrong("at least one trained token behind the first", "none".into());
        }
        if let Some(id) = example.ids.iter().find(|&&id| id as usize >= vocab_size) {
            return wrong(&format!("token ids below the model's vocabulary of {vocab_size}"), id.to_string());
        }
    }
    Ok(())
}

fn data_sha256(data: &TrainingData) -> String {
    let mut bytes = Vec::new();
    for part in [&data.train, &data.validation] {
        bytes.extend((part.len() as u64).to_le_bytes());
        for example in part {
            bytes.extend((example.ids.len() as u64).to_le_bytes());
            bytes.extend(example.ids.iter().flat_map(|id| id.to_le_bytes()));
            bytes.extend(example.trained.iter().map(|&trained| u8::from(trained)));
        }
    }
    sha256(&bytes)
}
