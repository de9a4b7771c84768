//! Model directories: what is written is read again, whole or in shards.

mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};
use lora_sb_kernels::{DType, SharedBytes};
use lora_sb_model::{
    Frozen, Model, Norm, Parameter, Projection, SaveType, Storage, WeightFile, WeightFileWriter, save_model,
};
use serde_json::{Value, json};
use support::{Texts, config_json, device, model, values};

fn save(dir: &Path, model: &Model, dtype: SaveType) {
    save_model(dir, model, dtype, &mut |_, values| Ok(values)).unwrap();
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn logits(model: &Model) -> Vec<f32> {
    values(model.kernels(), &model.logits(&Texts::new().batch(model), &Frozen).unwrap())
}

#[test]
fn a_saved_model_loads_with_the_rounded_values() {
    let changes = json!({ "attention_bias": true, "tie_word_embeddings": true });
    let original = model(changes);
    for (dtype, element, torch) in [
        (SaveType::F32, DType::F32, "float32"),
        (SaveType::Bf16, DType::Bf16, "bfloat16"),
        (SaveType::F16, DType::F16, "float16"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), &original, dtype);
        let mapped = Model::load(dir.path(), device(), Storage::Mapped).unwrap();
        let trainable = Model::load(dir.path(), device(), Storage::Trainable).unwrap();
        assert!(mapped.warnings().is_empty());
        for parameter in original.parameters() {
            let exact = values(original.kernels(), original.weight(parameter).unwrap());
            let rounded: Vec<f32> = exact
                .iter()
                .map(|&value| match dtype {
                    SaveType::F32 => value,
                    SaveType::Bf16 => bf16::from_f32(value).to_f32(),
                    SaveType::F16 => f16::from_f32(value).to_f32(),
                })
                .collect();
            assert_eq!(mapped.weight(parameter).unwrap().dtype(), element);
            assert_eq!(trainable.weight(parameter).unwrap().dtype(), DType::F32);
            assert_eq!(values(mapped.kernels(), mapped.weight(parameter).unwrap()), rounded);
            assert_eq!(values(trainable.kernels(), trainable.weight(parameter).unwrap()), rounded);
        }
        assert_eq!(logits(&mapped), logits(&trainable));
        assert_eq!(mapped.fingerprint().unwrap(), trainable.fingerprint().unwrap());
        let config = json(&dir.path().join("config.json"));
        assert_eq!(config["torch_dtype"], torch);
        assert_eq!(config["unknown_key"], json!({ "kept": [1, 2.5] }));
        assert!(!dir.path().join("config.json.partial").exists());
        assert!(!dir.path().join("model.safetensors.partial").exists());
    }
}

#[test]
fn changed_values_are_written_and_tokenizer_files_travel() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    save(first.path(), &model(json!({})), SaveType::F32);
    std::fs::write(first.path().join("tokenizer.json"), "{}").unwrap();
    std::fs::write(first.path().join("notes.txt"), "not a model's").unwrap();
    let base = Model::load(first.path(), device(), Storage::Mapped).unwrap();
    let site = Projection::Down.of(2);
    save_model(second.path(), &base, SaveType::F32, &mut |parameter, values| match parameter {
        Parameter::Weight(here) if here == site => Ok(values.iter().map(|value| value + 1.0).collect()),
        _ => Ok(values),
    })
    .unwrap();
    let changed = Model::load(second.path(), device(), Storage::Mapped).unwrap();
    for parameter in base.parameters() {
        let before = values(base.kernels(), base.weight(parameter).unwrap());
        let after = values(changed.kernels(), changed.weight(parameter).unwrap());
        let plus = if parameter == Parameter::Weight(site) { 1.0 } else { 0.0 };
        assert_eq!(after, before.iter().map(|value| value + plus).collect::<Vec<_>>());
    }
    assert_ne!(base.fingerprint().unwrap(), changed.fingerprint().unwrap());
    assert!(second.path().join("tokenizer.json").exists());
    assert!(!second.path().join("notes.txt").exists());
}

#[test]
fn a_directory_is_no_model_until_all_of_it_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(json!({}));
    save(dir.path(), &model, SaveType::F32);
    let failed = save_model(dir.path(), &model, SaveType::F32, &mut |parameter, values| match parameter {
        Parameter::Gain(Norm::Final) => Ok(vec![1.0]),
        _ => Ok(values),
    });
    let message = failed.unwrap_err().to_string();
    assert!(
        message.contains("model.norm.weight") && message.contains("1 elements") && message.contains("13"),
        "{message}"
    );
    let message = Model::load(dir.path(), device(), Storage::Mapped).unwrap_err().to_string();
    assert!(message.contains("config.json") && message.contains("not found"), "{message}");
}

#[test]
fn a_value_beyond_the_type_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let failed = save_model(dir.path(), &model(json!({})), SaveType::F16, &mut |parameter, mut values| {
        if parameter == Parameter::Gain(Norm::Attention(1)) {
            values[3] = 70_000.0;
        }
        Ok(values)
    });
    let error = failed.unwrap_err();
    assert_eq!(
        error.to_string(),
        "tensor `model.layers.1.input_layernorm.weight`: 70000 does not fit into f16"
    );
    assert!(error.hint().unwrap().contains("bf16"));
}

/// Writes the tensors of a saved model anew, dealt to `shards` files with an index.
fn shard(dir: &Path, shards: usize) {
    let whole = WeightFile::open(&dir.join("model.safetensors")).unwrap();
    let mut map = BTreeMap::new();
    for shard in 0..shards {
        let file = format!("model-{:05}-of-{shards:05}.safetensors", shard + 1);
        let names: Vec<String> = whole.names().into_iter().skip(shard).step_by(shards).collect();
        let view = |name: &String| whole.get(name).unwrap().unwrap();
        let tensors: Vec<_> = names.iter().map(|name| (name.clone(), view(name).shape)).collect();
        let mut writer =
            WeightFileWriter::create(&dir.join(&file), SaveType::F32, &BTreeMap::new(), &tensors).unwrap();
        for name in &names {
            writer.write(&view(name).to_f32()).unwrap();
            map.insert(name.clone(), file.clone());
        }
        writer.finish().unwrap();
    }
    std::fs::write(dir.join("model.safetensors.index.json"), json!({ "weight_map": map }).to_string())
        .unwrap();
    std::fs::remove_file(dir.join("model.safetensors")).unwrap();
}

#[test]
fn shards_are_one_model() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), &model(json!({})), SaveType::F32);
    let whole = Model::load(dir.path(), device(), Storage::Mapped).unwrap();
    let (logits_of_whole, fingerprint) = (logits(&whole), whole.fingerprint().unwrap());
    shard(dir.path(), 3);
    let sharded = Model::load(dir.path(), device(), Storage::Mapped).unwrap();
    assert_eq!(logits(&sharded), logits_of_whole);
    assert_eq!(sharded.fingerprint().unwrap(), fingerprint);

    let second = dir.path().join("model-00002-of-00003.safetensors");
    std::fs::remove_file(&second).unwrap();
    let message = Model::load(dir.path(), device(), Storage::Mapped).unwrap_err().to_string();
    assert!(message.contains("model-00002-of-00003.safetensors: not found"), "{message}");
}

#[test]
fn an_index_that_leaves_its_directory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), &model(json!({})), SaveType::F32);
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    for shard in [json!("../secret.safetensors"), json!("/etc/passwd"), json!(7)] {
        let index = json!({ "weight_map": { "model.norm.weight": shard } });
        std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        let message = Model::load(dir.path(), device(), Storage::Mapped).unwrap_err().to_string();
        assert!(message.contains("weight_map.model.norm.weight"), "{message}");
    }
}

#[test]
fn files_in_memory_are_a_model() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), &model(json!({})), SaveType::Bf16);
    let loaded = Model::load(dir.path(), device(), Storage::Mapped).unwrap();
    let bytes = std::fs::read(dir.path().join("model.safetensors")).unwrap();
    let length = bytes.len();
    let shared = SharedBytes::new(Arc::new(bytes), 0..length).unwrap();
    let config = Value::Object(config_json(json!({}))).to_string();
    let embedded = Model::from_files(config.as_bytes(), vec![shared], device(), Storage::Mapped).unwrap();
    assert_eq!(logits(&embedded), logits(&loaded));
}

#[test]
fn a_seed_is_a_model() {
    let (one, same) = (model(json!({})), model(json!({})));
    let other = Model::random(one.config().clone(), device(), 12, Storage::Trainable).unwrap();
    assert_eq!(one.fingerprint().unwrap(), same.fingerprint().unwrap());
    assert_ne!(one.fingerprint().unwrap(), other.fingerprint().unwrap());
    assert_eq!(values(one.kernels(), one.weight(Parameter::Gain(Norm::Final)).unwrap()), [1.0; 13]);
    let weights = values(one.kernels(), one.weight(Parameter::Embedding).unwrap());
    let deviation = (weights.iter().map(|w| w * w).sum::<f32>() / weights.len() as f32).sqrt();
    // Four standard errors of a deviation of 0.3 over 377 draws.
    assert!((deviation - 0.3).abs() < 4.0 * 0.3 / (2.0 * 377f32).sqrt(), "{deviation}");
}
