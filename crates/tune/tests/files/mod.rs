//! What the tests of written directories share.
#![allow(dead_code)] // each test file uses its own part

use std::path::Path;
use std::sync::Arc;

use lora_sb_data::Label;
use lora_sb_kernels::{SharedBytes, Tensor};
use lora_sb_model::{Frozen, LinearHook, Model, SaveType, WeightFile, WeightFileWriter};
use lora_sb_tune::export::{merge, peft};
use lora_sb_tune::{AdapterConfig, Error, Method, Tuned};

use crate::common::*;

/// All tensors that are trained or frozen, by name.
pub(crate) fn all_tensors(tuned: &Tuned) -> Vec<(String, Vec<f32>)> {
    let all = tuned.trained_tensors().into_iter().chain(tuned.frozen_tensors());
    all.map(|(name, tensor): (String, &Tensor)| (name, tuned.model.kernels().to_f32(tensor).unwrap()))
        .collect()
}

/// Logits of a few sequences.
pub(crate) fn logits(model: &Model, hook: &dyn LinearHook) -> Vec<f32> {
    let batch = mean_batch(model.kernels().as_ref(), &tiny_examples(4));
    model.kernels().to_f32(&model.logits(&batch, hook).unwrap()).unwrap()
}

/// The logits with the adapter, and without it.
pub(crate) fn both_logits(tuned: &Tuned) -> (Vec<f32>, Vec<f32>) {
    (logits(&tuned.model, tuned.hook()), logits(&tuned.model, &Frozen))
}

/// The tiny model as a directory, for readers that want one.
pub(crate) fn save_base(dir: &Path) {
    merge::merge(dir, &Tuned::full(tiny_model(2)).unwrap(), None).unwrap();
}

/// An encoder for three classes with an adapter and a head that have moved.
pub(crate) fn tiny_classifier(model_type: &str, method: Method, modules_to_save: &[&str]) -> Tuned {
    let modules_to_save = modules_to_save.iter().map(|&name| name.to_owned()).collect();
    let config = AdapterConfig { modules_to_save, ..config(method) };
    let examples = labelled_examples(6, 1, Label::Class);
    let mut tuned = Tuned::adapt(tiny_encoder(model_type, 3), &config, &examples, &mut |_| ()).unwrap();
    shake(&mut tuned, 0.1);
    tuned
}

/// What a directory holds.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let entries =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = entries.collect();
    names.sort();
    names
}

/// Writes a PEFT directory in f32 as it is without further choices.
pub(crate) fn export(dir: &Path, tuned: &Tuned) -> Vec<String> {
    peft::export(dir, tuned, "org/base", &peft::Options { dtype: SaveType::F32, pad_rank: None }).unwrap()
}

/// A JSON file with some of its keys replaced.
pub(crate) fn edit_json(path: &Path, changes: &serde_json::Value) {
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        json[key] = value.clone();
    }
    std::fs::write(path, json.to_string()).unwrap();
}

/// Tensors of a file: name, shape, values.
pub(crate) type Written = Vec<(String, Vec<usize>, Vec<f32>)>;

/// Writes the tensors of a file again, with a change, in a type of one's own choice.
pub(crate) fn rewrite_as(path: &Path, dtype: SaveType, change: impl Fn(&mut Written)) {
    let bytes = std::fs::read(path).unwrap();
    let length = bytes.len();
    let bytes = SharedBytes::new(Arc::new(bytes), 0..length).unwrap();
    let file = WeightFile::from_bytes(bytes, "old".into()).unwrap();
    let tensor = |name: String| {
        let view = file.get(&name).unwrap().unwrap();
        let values = view.to_f32();
        (name, view.shape, values)
    };
    let mut tensors: Vec<_> = file.names().into_iter().map(tensor).collect();
    change(&mut tensors);
    let listed: Vec<_> = tensors.iter().map(|(name, shape, _)| (name.clone(), shape.clone())).collect();
    let mut writer = WeightFileWriter::create(path, dtype, &file.metadata(), &listed).unwrap();
    for (_, _, values) in &tensors {
        writer.write(values).unwrap();
    }
    writer.finish().unwrap();
}

/// The same in f32.
pub(crate) fn rewrite(path: &Path, change: impl Fn(&mut Written)) {
    rewrite_as(path, SaveType::F32, change);
}

/// A reader refuses a file with `one` tensor missing, one too many, one misshapen, or cut off.
pub(crate) fn check_strictness(
    tensors: &str,
    one: &str,
    save: impl Fn(&Path),
    load: impl Fn(&Path) -> Result<Tuned, Error>,
) {
    let damaged = |change: &dyn Fn(&mut Written)| {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path());
        rewrite(&dir.path().join(tensors), change);
        let error = load(dir.path()).unwrap_err();
        let Error::Tensor { file, tensor, found, .. } = error else { panic!("{error}") };
        assert!(file.ends_with(tensors), "{file}");
        (tensor, found)
    };
    let missing = damaged(&|all| all.retain(|(name, ..)| name != one));
    assert!(one.contains(&missing.0) && missing.1.contains("no such"), "{missing:?}");
    let extra = damaged(&|all| {
        let copy = all.iter().find(|(name, ..)| name == one).unwrap().clone();
        all.push((one.replace(".0.", ".7."), copy.1, copy.2));
    });
    assert!(extra.0.contains(".7."), "{extra:?}");
    let foreign = damaged(&|all| all.push(("something".into(), vec![1], vec![0.0])));
    assert_eq!(foreign.0, "something");
    let misshapen = damaged(&|all| {
        let found = all.iter_mut().find(|(name, ..)| name == one).unwrap();
        match found.1.len() {
            1 => (found.1, found.2) = (vec![found.2.len() - 1], found.2[1..].to_vec()),
            _ => found.1.reverse(),
        }
    });
    assert!(misshapen.1.contains("shape ["), "{misshapen:?}");

    let dir = tempfile::tempdir().unwrap();
    save(dir.path());
    let path = dir.path().join(tensors);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 5]).unwrap();
    assert!(matches!(load(dir.path()), Err(Error::Model(_))));
    std::fs::remove_file(&path).unwrap();
    assert!(load(dir.path()).unwrap_err().to_string().contains(tensors));
}
