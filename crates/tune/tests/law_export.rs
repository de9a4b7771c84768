//! What is written is what was trained, and what is not that is refused.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::*;
use lora_sb_kernels::{SharedBytes, Tensor};
use lora_sb_model::{Frozen, LinearHook, Model, SaveType, Storage, WeightFile, WeightFileWriter};
use lora_sb_tune::export::{merge, native, peft};
use lora_sb_tune::{AdapterConfig, Error, Method, Targets, Tuned};

const ADAPTERS: [Method; 3] = [Method::LoraSb, Method::LoraXs, Method::Lora];

fn all_tensors(tuned: &Tuned) -> Vec<(String, Vec<f32>)> {
    let all = tuned.trained_tensors().into_iter().chain(tuned.frozen_tensors());
    all.map(|(name, tensor)| (name, tuned.model.kernels().to_f32(tensor).unwrap())).collect()
}

fn logits(model: &Model, hook: &dyn LinearHook) -> Vec<f32> {
    let batch = mean_batch(model.kernels().as_ref(), &tiny_examples(4));
    model.kernels().to_f32(&model.logits(&batch, hook).unwrap()).unwrap()
}

/// The tiny model as a directory, for readers that want one.
fn save_base(dir: &Path) {
    merge::merge(dir, &Tuned::full(tiny_model(2)).unwrap(), None).unwrap();
}

fn names(dir: &Path) -> Vec<String> {
    let entries =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = entries.collect();
    names.sort();
    names
}

#[test]
fn law_native_directories_keep_every_bit() {
    for method in ADAPTERS {
        let dir = tempfile::tempdir().unwrap();
        let tuned = tiny_tuned(method);
        // Twice: a directory can be written over.
        native::save(dir.path(), &tuned, "somewhere/base").unwrap();
        native::save(dir.path(), &tuned, "somewhere/base").unwrap();
        assert_eq!(names(dir.path()), ["adapter.json", "adapter.safetensors"]);
        let loaded = native::load(dir.path(), tiny_model(2)).unwrap();
        assert_eq!(loaded.config(), tuned.config());
        assert_eq!(all_tensors(&loaded), all_tensors(&tuned), "{method}");
        let manifest = native::manifest(dir.path()).unwrap();
        assert_eq!(manifest.base.name_or_path, "somewhere/base");
        let file = WeightFile::open(&dir.path().join("adapter.safetensors")).unwrap();
        assert_eq!(file.metadata()["method"], method.name());
        assert_eq!(file.metadata()["base_fingerprint"], manifest.base.fingerprint);
    }
}

#[test]
fn law_saved_state_restores_every_method() {
    for method in [Method::LoraSb, Method::Lora, Method::Full] {
        let mut tuned = match method {
            Method::Full => Tuned::full(tiny_model(2)).unwrap(),
            _ => tiny_tuned(method),
        };
        shake(&mut tuned, 0.2);
        let saved = all_tensors(&tuned);
        let kernels = tuned.model.kernels().clone();
        let shapes = tuned.trained_tensors().into_iter().chain(tuned.frozen_tensors());
        let tensor = |(name, old): (String, &Tensor)| {
            let values = &saved.iter().find(|(other, _)| *other == name).unwrap().1;
            (name, kernels.from_f32(values, old.shape()).unwrap())
        };
        let tensors = shapes.map(tensor).collect();
        let config = tuned.config().cloned().unwrap_or_else(|| config(Method::Full));
        let restored = Tuned::restore(tiny_model(2), &config, tensors).unwrap();
        assert_eq!(restored.method(), method);
        assert_eq!(all_tensors(&restored), saved);
    }
}

#[test]
fn law_a_peft_directory_has_the_same_update() {
    for method in ADAPTERS {
        let dir = tempfile::tempdir().unwrap();
        let tuned = tiny_tuned(method);
        peft::export(dir.path(), &tuned, "base", SaveType::F32).unwrap();
        let imported = peft::import(dir.path(), tiny_model(2)).unwrap();
        assert_eq!(imported.config().unwrap().scale(), 1.0);
        let kernels = tuned.model.kernels().as_ref();
        for site in tuned.model.sites() {
            let delta = |tuned: &Tuned| {
                kernels.to_f32(&tuned.adapter().unwrap().delta(kernels, site).unwrap().unwrap()).unwrap()
            };
            // One way or the other it is the product of the same two f32 factors.
            assert_eq!(delta(&imported), delta(&tuned), "{method} {site}");
        }
        let tolerance = rounding(4 * 23 * 14);
        assert_near(
            method.name(),
            &logits(&imported.model, imported.hook()),
            &logits(&tuned.model, tuned.hook()),
            tolerance,
        );
    }
}

#[test]
fn law_a_peft_directory_holds_what_every_consumer_reads_alike() {
    let dir = tempfile::tempdir().unwrap();
    let tuned = tiny_tuned(Method::LoraSb);
    peft::export(dir.path(), &tuned, "org/base", SaveType::F32).unwrap();
    assert_eq!(names(dir.path()), ["adapter_config.json", "adapter_model.safetensors"]);
    let json = std::fs::read(dir.path().join("adapter_config.json")).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!((&json["r"], &json["lora_alpha"], &json["use_rslora"]), (&5.into(), &5.into(), &false.into()));
    assert_eq!(json["base_model_name_or_path"], "org/base");
    let all = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"];
    assert_eq!(json["target_modules"], serde_json::json!(all));
    let file = WeightFile::open(&dir.path().join("adapter_model.safetensors")).unwrap();
    assert_eq!(file.names().len(), 2 * 14);
    let b = file.get("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight").unwrap().unwrap();
    assert_eq!(b.shape, [23, 5]);
    assert_eq!(
        (file.metadata()["format"].as_str(), file.metadata()["lora_sb.method"].as_str()),
        ("pt", "lora-sb")
    );

    // Where some layers are left out, their names are not enough.
    let config = AdapterConfig {
        target_modules: Targets::parse("o_proj,layers.1.mlp.up_proj"),
        ..config(Method::Lora)
    };
    let some = Tuned::adapt(tiny_model(2), &config, &[], &mut |_| ()).unwrap();
    peft::export(dir.path(), &some, "org/base", SaveType::F32).unwrap();
    let imported = peft::import(dir.path(), tiny_model(2)).unwrap();
    assert_eq!(imported.adapter().unwrap().sites(), some.adapter().unwrap().sites());
    let names = Targets::Names(vec!["model.layers.1.mlp.up_proj".into(), "o_proj".into()]);
    assert_eq!(imported.config().unwrap().target_modules, names);
}

#[test]
fn law_narrow_exports_round_once() {
    let tuned = tiny_tuned(Method::LoraSb);
    for (dtype, unit) in [(SaveType::Bf16, 2f64.powi(-8)), (SaveType::F16, 2f64.powi(-11))] {
        let dir = tempfile::tempdir().unwrap();
        peft::export(dir.path(), &tuned, "base", dtype).unwrap();
        let narrow = all_tensors(&peft::import(dir.path(), tiny_model(2)).unwrap());
        peft::export(dir.path(), &tuned, "base", SaveType::F32).unwrap();
        let exact = all_tensors(&peft::import(dir.path(), tiny_model(2)).unwrap());
        for ((name, narrow), (_, exact)) in narrow.iter().zip(&exact) {
            assert_near(name, narrow, exact, unit);
        }
        assert_ne!(narrow, exact);
    }
}

#[test]
fn law_a_merged_directory_is_the_tuned_model() {
    for method in ADAPTERS {
        let dir = tempfile::tempdir().unwrap();
        let tuned = tiny_tuned(method);
        merge::merge(dir.path(), &tuned, None).unwrap();
        let merged = Model::load(dir.path(), cpu(), Storage::Mapped).unwrap();
        let tolerance = rounding(4 * 23 * 14);
        assert_near(method.name(), &logits(&merged, &Frozen), &logits(&tuned.model, tuned.hook()), tolerance);
        assert!(merged.fingerprint().unwrap() != tuned.model.fingerprint().unwrap());
    }
}

#[test]
fn law_the_base_type_is_kept_by_merging() {
    let (base, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    merge::merge(base.path(), &Tuned::full(tiny_model(2)).unwrap(), Some(SaveType::Bf16)).unwrap();
    let mut model = Model::load(base.path(), cpu(), Storage::Mapped).unwrap();
    model.prepare(64).unwrap();
    let tuned = Tuned::adapt(model, &config(Method::LoraSb), &tiny_examples(6), &mut |_| ()).unwrap();
    for (dtype, bytes) in [(None, 2), (Some(SaveType::F32), 4)] {
        merge::merge(out.path(), &tuned, dtype).unwrap();
        let file = WeightFile::open(&out.path().join("model.safetensors")).unwrap();
        let view = file.get("model.layers.0.mlp.up_proj.weight").unwrap().unwrap();
        assert_eq!(view.dtype.size(), bytes);
        let merged = Model::load(out.path(), cpu(), Storage::Mapped).unwrap();
        // bf16 weights are off by 2^-9 of themselves each, through two blocks.
        let tolerance = if bytes == 4 { rounding(4 * 23 * 14) } else { 0.05 };
        assert_near("logits", &logits(&merged, &Frozen), &logits(&tuned.model, tuned.hook()), tolerance);
    }
}

#[test]
fn law_another_base_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    native::save(dir.path(), &tiny_tuned(Method::LoraSb), "base").unwrap();
    let other = tiny_model(3);
    let error = native::load(dir.path(), other).unwrap_err();
    assert!(matches!(error, Error::BaseMismatch { .. }), "{error}");
    assert!(error.hint().is_some());
    // The same shapes with other values.
    let tuned = tiny_tuned(Method::LoraSb);
    let moved = tempfile::tempdir().unwrap();
    merge::merge(moved.path(), &tuned, None).unwrap();
    let model = Model::load(moved.path(), cpu(), Storage::Mapped).unwrap();
    assert!(matches!(native::load(dir.path(), model), Err(Error::BaseMismatch { .. })));
}

/// Tensors of a file: name, shape, values.
type Written = Vec<(String, Vec<usize>, Vec<f32>)>;

/// Writes the tensors of a file again, with a change.
fn rewrite(path: &Path, change: impl Fn(&mut Written)) {
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
    let mut writer = WeightFileWriter::create(path, SaveType::F32, &file.metadata(), &listed).unwrap();
    for (_, _, values) in &tensors {
        writer.write(values).unwrap();
    }
    writer.finish().unwrap();
}

/// Both formats, with the names of their files and the reader of each.
fn check_strictness(
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
        all.push((one.replace("layers.0", "layers.7"), copy.1, copy.2));
    });
    assert!(extra.0.contains("layers.7"), "{extra:?}");
    let foreign = damaged(&|all| all.push(("something".into(), vec![1], vec![0.0])));
    assert_eq!(foreign.0, "something");
    let misshapen = damaged(&|all| {
        let found = all.iter_mut().find(|(name, ..)| name == one).unwrap();
        found.1.reverse();
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

#[test]
fn law_native_loading_is_strict() {
    check_strictness(
        "adapter.safetensors",
        "model.layers.0.self_attn.k_proj.lora_A",
        |dir| native::save(dir, &tiny_tuned(Method::LoraSb), "base").unwrap(),
        |dir| native::load(dir, tiny_model(2)),
    );
    let dir = tempfile::tempdir().unwrap();
    let error = native::load(dir.path(), tiny_model(2)).unwrap_err();
    assert!(error.to_string().contains("adapter.json"), "{error}");
    std::fs::write(dir.path().join("adapter.json"), "{\n\"version\": ").unwrap();
    assert!(native::load(dir.path(), tiny_model(2)).unwrap_err().to_string().contains("line 2"));
    native::save(dir.path(), &tiny_tuned(Method::Lora), "base").unwrap();
    let path = dir.path().join("adapter.json");
    let text = std::fs::read_to_string(&path).unwrap().replace("\"version\": 1", "\"version\": 2");
    std::fs::write(&path, text).unwrap();
    assert!(native::load(dir.path(), tiny_model(2)).unwrap_err().to_string().contains("expected 1, found 2"));
}

#[test]
fn law_peft_loading_is_strict() {
    check_strictness(
        "adapter_model.safetensors",
        "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight",
        |dir| peft::export(dir, &tiny_tuned(Method::LoraSb), "base", SaveType::F32).unwrap(),
        |dir| peft::import(dir, tiny_model(2)),
    );
}

/// Exports a LoRA and changes keys of its configuration.
fn with_config(changes: serde_json::Value) -> Result<Tuned, Error> {
    let dir = tempfile::tempdir().unwrap();
    peft::export(dir.path(), &tiny_tuned(Method::Lora), "base", SaveType::F32).unwrap();
    let path = dir.path().join("adapter_config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        json[key] = value.clone();
    }
    std::fs::write(&path, json.to_string()).unwrap();
    peft::import(dir.path(), tiny_model(2))
}

#[test]
fn law_peft_scales_are_honoured() {
    let scale = |changes| with_config(changes).unwrap().config().unwrap().scale();
    assert_eq!(scale(serde_json::json!({})), 1.0);
    assert_eq!(scale(serde_json::json!({"lora_alpha": 13})), 13.0 / 5.0);
    let stabilised = scale(serde_json::json!({"lora_alpha": 13, "use_rslora": true}));
    assert!((f64::from(stabilised) - 13.0 / 5f64.sqrt()).abs() < 1e-6);
    // A regular expression is replaced by what the file holds.
    let pattern = with_config(serde_json::json!({"target_modules": ".*_proj"})).unwrap();
    assert_eq!(pattern.adapter().unwrap().sites(), pattern.model.sites());
    assert!(with_config(serde_json::json!({"target_modules": "all-linear", "a_later_key": 1})).is_ok());
}

#[test]
fn law_peft_features_that_change_the_result_are_refused() {
    for (key, value) in [
        ("peft_type", serde_json::json!("LOHA")),
        ("use_dora", true.into()),
        ("rank_pattern", serde_json::json!({"q_proj": 4})),
        ("alpha_pattern", serde_json::json!({"q_proj": 4})),
        ("modules_to_save", serde_json::json!(["lm_head"])),
        ("bias", "all".into()),
        ("fan_in_fan_out", true.into()),
        ("init_lora_weights", "pissa".into()),
        ("layer_replication", serde_json::json!([[0, 2]])),
    ] {
        let error = with_config(serde_json::json!({ key: value })).unwrap_err();
        let Error::Unsupported { feature, .. } = &error else { panic!("{key}: {error}") };
        assert!(feature.contains(key), "{error}");
        assert!(error.hint().is_some());
    }
    for (key, value) in
        [("r", serde_json::json!(0)), ("lora_alpha", "big".into()), ("target_modules", 3.into())]
    {
        let error = with_config(serde_json::json!({ key: value })).unwrap_err();
        assert!(matches!(error, Error::File { .. }) && error.to_string().contains(key), "{error}");
    }
    // Wrong rank, and a target that the file does not hold.
    assert!(matches!(with_config(serde_json::json!({"r": 4})), Err(Error::Tensor { .. })));
    assert!(matches!(
        with_config(serde_json::json!({"target_modules": ["q_proj"]})),
        Err(Error::Tensor { .. })
    ));
    let unknown = with_config(serde_json::json!({"target_modules": ["query"]}));
    assert!(matches!(unknown, Err(Error::UnknownTarget { .. })));
}

#[test]
fn law_full_fine_tuning_has_no_adapter_to_write() {
    let dir = tempfile::tempdir().unwrap();
    let full = Tuned::full(tiny_model(1)).unwrap();
    for error in [
        native::save(dir.path(), &full, "base").unwrap_err(),
        peft::export(dir.path(), &full, "base", SaveType::F32).unwrap_err(),
    ] {
        assert!(error.to_string().contains("full"), "{error}");
    }
    assert!(names(dir.path()).is_empty());
}

#[test]
fn law_a_mapped_base_gives_the_same_bits_as_an_owned_one() {
    let dir = tempfile::tempdir().unwrap();
    save_base(dir.path());
    let adapted = |storage| {
        let mut model = Model::load(dir.path(), cpu(), storage).unwrap();
        model.prepare(64).unwrap();
        Tuned::adapt(model, &config(Method::LoraSb), &tiny_examples(6), &mut |_| ()).unwrap()
    };
    assert_eq!(all_tensors(&adapted(Storage::Mapped)), all_tensors(&adapted(Storage::Trainable)));
}
