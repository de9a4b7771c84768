//! Files that are missing, damaged or of another model: every message names what, expected and found.

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use lora_sb_model::{Batch, Error, Frozen, Model, SaveType, Sequence, Storage, WeightFileWriter, save_model};
use serde_json::{Map, Value, json};
use support::{Texts, config_error, device, model};
use tempfile::TempDir;

fn saved() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    save_model(dir.path(), &model(json!({})), SaveType::F32, &mut |_, values| Ok(values)).unwrap();
    dir
}

fn load_error(dir: &Path) -> Error {
    Model::load(dir, device(), Storage::Mapped).unwrap_err()
}

fn assert_names(error: &Error, parts: &[&str]) {
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

/// Lets `change` rewrite the header of the saved weights.
fn rewrite(dir: &Path, change: impl FnOnce(&mut Map<String, Value>)) {
    let path = dir.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Map<String, Value> = serde_json::from_slice(&bytes[8..end]).unwrap();
    change(&mut header);
    let header = Value::Object(header).to_string();
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.bytes());
    out.extend(&bytes[end..]);
    std::fs::write(path, out).unwrap();
}

#[test]
fn a_missing_directory_or_config() {
    let dir = tempfile::tempdir().unwrap();
    let error = load_error(&dir.path().join("nowhere"));
    assert_names(&error, &["nowhere/config.json", "not found"]);
    assert!(error.hint().unwrap().contains("Hugging Face"));
}

#[test]
fn missing_and_pickled_weights() {
    let dir = saved();
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let error = load_error(dir.path());
    assert_names(&error, &["model.safetensors", "not found", "model.safetensors.index.json"]);
    assert!(error.hint().is_none());
    std::fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
    assert!(load_error(dir.path()).hint().unwrap().contains("safe_serialization"));
}

#[test]
fn a_missing_tensor() {
    let dir = saved();
    rewrite(dir.path(), |header| {
        let info = header.remove("model.layers.1.mlp.up_proj.weight").unwrap();
        header.insert("renamed".into(), info);
    });
    let error = load_error(dir.path());
    assert_names(&error, &["model.safetensors", "model.layers.1.mlp.up_proj.weight", "[11, 13]"]);
}

#[test]
fn a_tensor_of_another_shape() {
    let dir = saved();
    rewrite(dir.path(), |header| {
        header["model.layers.1.mlp.up_proj.weight"]["shape"] = json!([13, 11]);
    });
    let error = load_error(dir.path());
    assert_names(&error, &["model.safetensors", "model.layers.1.mlp.up_proj.weight", "[11, 13]", "[13, 11]"]);
    assert!(error.hint().unwrap().contains("config.json"));
}

#[test]
fn a_tensor_of_another_type() {
    let dir = saved();
    rewrite(dir.path(), |header| header["model.norm.weight"]["dtype"] = json!("I32"));
    assert_names(&load_error(dir.path()), &["model.safetensors", "model.norm.weight", "I32", "BF16"]);
}

#[test]
fn a_truncated_file() {
    let dir = saved();
    let path = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let whole = bytes.len();
    for length in [0, 5, 8, 100, whole - 1] {
        std::fs::write(&path, &bytes[..length]).unwrap();
        let error = load_error(dir.path());
        assert_names(&error, &["model.safetensors", "truncated", &format!("{length} bytes")]);
        assert!(error.hint().unwrap().contains("again"));
    }
    std::fs::write(&path, &bytes[..whole - 1]).unwrap();
    assert_names(&load_error(dir.path()), &[&format!("expected {whole}")]);
    std::fs::write(&path, b"\x02\0\0\0\0\0\0\0[]").unwrap();
    assert_names(&load_error(dir.path()), &["model.safetensors", "header"]);
}

#[test]
fn unaligned_data_are_read() {
    let dir = saved();
    let fingerprint = || Model::load(dir.path(), device(), Storage::Mapped).unwrap().fingerprint().unwrap();
    let aligned = fingerprint();
    // Without padding the data begin wherever the header ends.
    let mut odd = 0;
    for letters in 1..=4 {
        rewrite(dir.path(), |header| {
            header.insert("__metadata__".into(), json!({ "format": "x".repeat(letters) }));
        });
        let bytes = std::fs::read(dir.path().join("model.safetensors")).unwrap();
        odd += usize::from(!u64::from_le_bytes(bytes[..8].try_into().unwrap()).is_multiple_of(4));
        assert_eq!(fingerprint(), aligned);
    }
    assert_eq!(odd, 3);
}

#[test]
fn tensors_that_nobody_asks_for() {
    let dir = tempfile::tempdir().unwrap();
    let tied = model(json!({ "tie_word_embeddings": true }));
    save_model(dir.path(), &tied, SaveType::F32, &mut |_, values| Ok(values)).unwrap();
    let mut tensors: Vec<(String, Vec<usize>)> =
        tied.parameters().iter().map(|&p| (tied.name(p), tied.config().parameter_shape(p))).collect();
    tensors.push(("model.layers.0.self_attn.rotary_emb.inv_freq".into(), vec![3]));
    // A copy of the embedding.
    tensors.push(("lm_head.weight".into(), vec![29, 13]));
    tensors.push(("vision.tower".into(), vec![1]));
    let path = dir.path().join("model.safetensors");
    let mut writer = WeightFileWriter::create(&path, SaveType::F32, &BTreeMap::new(), &tensors).unwrap();
    for (_, shape) in &tensors {
        writer.write(&vec![0.5; shape.iter().product()]).unwrap();
    }
    writer.finish().unwrap();
    let model = Model::load(dir.path(), device(), Storage::Mapped).unwrap();
    assert_eq!(model.warnings().len(), 1);
    assert!(model.warnings()[0].contains("`vision.tower`"), "{:?}", model.warnings());
}

#[test]
fn a_config_that_is_not_json() {
    let dir = saved();
    std::fs::write(dir.path().join("config.json"), "{\n  \"model_type\": llama\n}").unwrap();
    assert_names(&load_error(dir.path()), &["config.json:2"]);
    std::fs::write(dir.path().join("config.json"), "[]").unwrap();
    assert_names(&load_error(dir.path()), &["config.json:1", "expected an object"]);
}

#[test]
fn an_unknown_architecture() {
    let message = config_error(json!({ "model_type": "mamba" }));
    assert!(
        message.contains("\"mamba\"") && message.contains("known: llama (LlamaForCausalLM)"),
        "{message}"
    );
    let message = config_error(json!({ "model_type": null, "architectures": ["GPT2LMHeadModel"] }));
    assert!(message.contains("\"GPT2LMHeadModel\""), "{message}");
    let message = config_error(json!({ "model_type": null, "architectures": null }));
    assert!(message.contains("without `model_type`"), "{message}");
}

#[test]
fn configurations_that_are_not_computed() {
    for (changes, parts) in [
        (json!({ "hidden_act": "relu" }), vec!["`hidden_act`", "\"silu\"", "\"relu\""]),
        (json!({ "hidden_size": null }), vec!["`hidden_size`", "a whole number", "nothing"]),
        (json!({ "vocab_size": "many" }), vec!["`vocab_size`", "\"many\""]),
        (json!({ "vocab_size": -1 }), vec!["`vocab_size`", "-1"]),
        (json!({ "intermediate_size": 0 }), vec!["`intermediate_size`", "positive", "0"]),
        (json!({ "num_attention_heads": 0, "head_dim": null }), vec!["`num_attention_heads`", "0"]),
        (json!({ "num_key_value_heads": 2 }), vec!["`num_key_value_heads`", "divisor", "3", "2"]),
        (json!({ "head_dim": 5 }), vec!["`head_dim`", "even", "5"]),
        (json!({ "head_dim": null }), vec!["`num_attention_heads`", "13", "3"]),
        (json!({ "rms_norm_eps": -1e-5 }), vec!["`rms_norm_eps`", "positive"]),
        (
            json!({ "rope_scaling": { "rope_type": "yarn", "factor": 4.0 } }),
            vec!["`rope_scaling.rope_type`", "yarn"],
        ),
        (
            json!({ "rope_scaling": { "type": "dynamic", "factor": 4.0 } }),
            vec!["`rope_scaling.type`", "dynamic"],
        ),
        (json!({ "rope_scaling": { "type": "linear" } }), vec!["`rope_scaling.factor`", "nothing"]),
        (json!({ "rope_scaling": 3 }), vec!["`rope_scaling`", "an object", "3"]),
        (json!({ "tie_word_embeddings": "yes" }), vec!["`tie_word_embeddings`", "true or false"]),
        (json!({ "quantization_config": { "quant_method": "gptq" } }), vec!["`quantization_config`", "gptq"]),
    ] {
        let message = config_error(changes);
        for part in parts {
            assert!(message.contains(part), "`{part}` is not in: {message}");
        }
    }
}

#[test]
fn sequences_that_make_no_batch() {
    let kernels = device();
    let pack = |sequences: &[Sequence<'_>]| Batch::pack(&*kernels, sequences).unwrap_err().to_string();
    let good = Sequence::text(&[1, 2], &[false, true], 1.0);
    assert!(pack(&[]).contains("at least one"));
    let message = pack(&[good, Sequence::text(&[], &[], 1.0)]);
    assert!(message.contains("sequence 1") && message.contains("no tokens"), "{message}");
    let message = pack(&[Sequence::text(&[1, 2, 3], &[true], 1.0)]);
    assert!(message.contains("3 token ids") && message.contains("1 flags"), "{message}");
}

#[test]
fn ids_and_lengths_beyond_the_model() {
    let mut model = model(json!({}));
    let batch = |ids: &[u32]| {
        let trained = vec![true; ids.len()];
        Batch::pack(&*device(), &[Sequence::text(ids, &trained, 1.0)]).unwrap()
    };
    assert_names(&model.loss(&batch(&[1, 29]), &Frozen).unwrap_err(), &["29"]);
    let long = batch(&[3; 65]);
    let error = model.loss(&long, &Frozen).unwrap_err();
    assert_names(&error, &["65", "64"]);
    assert!(error.hint().unwrap().contains("prepare"));
    let before = model.loss(&Texts::new().batch(&model), &Frozen).unwrap();
    model.prepare(65).unwrap();
    assert!(model.loss(&long, &Frozen).unwrap().is_finite());
    assert_eq!(model.loss(&Texts::new().batch(&model), &Frozen).unwrap(), before);
    let x = model.embed(&Texts::new().batch(&model)).unwrap();
    let error = model.block_forward(3, x, &Texts::new().batch(&model), &Frozen).unwrap_err();
    assert_names(&error, &["Attention(3)"]);
}
