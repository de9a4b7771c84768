//! What is written is what was trained, and what is not that is refused: native directories, merged models, averages
//! and the verification of what was written. PEFT directories are in `law_interchange.rs`.

mod common;
mod files;

use std::path::Path;

use common::*;
use files::*;
use lora_sb_kernels::Tensor;
use lora_sb_model::{Frozen, LoadOptions, Model, SaveType, Storage, Task, WeightFile};
use lora_sb_tune::export::average::{Member, average};
use lora_sb_tune::export::verify::{Verification, random_sequences, verify};
use lora_sb_tune::export::{merge, native, peft};
use lora_sb_tune::{AdapterConfig, Error, Method, Targets, Tuned};

#[test]
fn law_native_directories_keep_every_bit() {
    for method in adapters() {
        let dir = tempfile::tempdir().unwrap();
        let tuned = tiny_tuned(method);
        // Twice: a directory can be written over.
        native::save(dir.path(), &tuned, "somewhere/base").unwrap();
        native::save(dir.path(), &tuned, "somewhere/base").unwrap();
        assert_eq!(names(dir.path()), ["adapter.json", "adapter.safetensors"]);
        let loaded = native::load(dir.path(), tiny_model(2)).unwrap();
        assert_eq!(loaded.config(), tuned.config());
        assert_eq!(all_tensors(&loaded), all_tensors(&tuned), "{method}");
        assert_eq!(both_logits(&loaded), both_logits(&tuned), "{method}");
        let manifest = native::manifest(dir.path()).unwrap();
        assert_eq!(manifest.base.name_or_path, "somewhere/base");
        let file = WeightFile::open(&dir.path().join("adapter.safetensors")).unwrap();
        assert_eq!(file.metadata()["method"], method.name());
        assert_eq!(file.metadata()["base_fingerprint"], manifest.base.fingerprint);
    }
}

#[test]
fn law_native_directories_keep_a_head() {
    for (model_type, modules) in [("roberta", &["classifier"][..]), ("bert", &["classifier", "pooler"])] {
        let dir = tempfile::tempdir().unwrap();
        let mut tuned = tiny_classifier(model_type, Method::LoraSb, modules);
        tuned.model.name_labels(&["bad", "good", "neither"]).unwrap();
        native::save(dir.path(), &tuned, "base").unwrap();
        let loaded = native::load(dir.path(), tiny_encoder(model_type, 3)).unwrap();
        assert_eq!(loaded.model.config().label_names(), ["bad", "good", "neither"]);
        assert_eq!(loaded.config(), tuned.config());
        assert_eq!(loaded.head_parameters(), 18 * 18 + 18 + 3 * 18 + 3);
        assert_eq!(both_logits(&loaded), both_logits(&tuned));
    }
}

#[test]
fn law_saved_state_restores_every_method() {
    for method in Method::ALL {
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
fn law_directories_of_version_1_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let tuned = tiny_tuned(Method::LoraXs);
    native::save(dir.path(), &tuned, "base").unwrap();
    let path = dir.path().join("adapter.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    json["version"] = 1.into();
    let adapter = json["adapter"].as_object_mut().unwrap();
    for later in ["lora_dropout", "modules_to_save"] {
        adapter.remove(later).unwrap();
    }
    adapter["init"].as_object_mut().unwrap().remove("bases").unwrap();
    std::fs::write(&path, json.to_string()).unwrap();
    let loaded = native::load(dir.path(), tiny_model(2)).unwrap();
    assert_eq!(loaded.config(), tuned.config());
    assert_eq!(all_tensors(&loaded), all_tensors(&tuned));
}

#[test]
fn law_native_loading_is_strict() {
    for (method, part) in
        [(Method::LoraSb, "R"), (Method::Dora, "magnitude_vector"), (Method::Pissa, "A_start")]
    {
        check_strictness(
            "adapter.safetensors",
            &format!("model.layers.0.mlp.up_proj.lora_{}", if part == "R" { "A" } else { part }),
            |dir| native::save(dir, &tiny_tuned(method), "base").unwrap(),
            |dir| native::load(dir, tiny_model(2)),
        );
    }
    check_strictness(
        "adapter.safetensors",
        "roberta.encoder.layer.0.attention.self.key.lora_B",
        |dir| native::save(dir, &tiny_classifier("roberta", Method::Lora, &["classifier"]), "base").unwrap(),
        |dir| native::load(dir, tiny_encoder("roberta", 3)),
    );
    let dir = tempfile::tempdir().unwrap();
    let error = native::load(dir.path(), tiny_model(2)).unwrap_err();
    assert!(error.to_string().contains("adapter.json"), "{error}");
    let path = dir.path().join("adapter.json");
    std::fs::write(&path, "{\n\"version\": ").unwrap();
    assert!(native::load(dir.path(), tiny_model(2)).unwrap_err().to_string().contains("line 2"));
    native::save(dir.path(), &tiny_tuned(Method::Lora), "base").unwrap();
    edit_json(&path, &serde_json::json!({"version": 3}));
    assert!(native::load(dir.path(), tiny_model(2)).unwrap_err().to_string().contains("found 3"));
    edit_json(&path, &serde_json::json!({"version": 2, "other": 1}));
    let error = native::load(dir.path(), tiny_model(2)).unwrap_err();
    assert!(error.to_string().contains("adapter.json") && error.to_string().contains("other"), "{error}");
}

#[test]
fn law_a_head_of_another_size_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    native::save(dir.path(), &tiny_classifier("bert", Method::LoraSb, &["classifier"]), "base").unwrap();
    let error = native::load(dir.path(), tiny_encoder("bert", 5)).unwrap_err();
    assert!(matches!(&error, Error::Tensor { tensor, .. } if tensor.starts_with("classifier.")), "{error}");
}

#[test]
fn law_another_base_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let tuned = tiny_tuned(Method::LoraSb);
    native::save(dir.path(), &tuned, "base").unwrap();
    let error = native::load(dir.path(), tiny_model(3)).unwrap_err();
    assert!(matches!(error, Error::BaseMismatch { .. }), "{error}");
    assert!(error.hint().is_some());
    // The same shapes with other values.
    let moved = tempfile::tempdir().unwrap();
    merge::merge(moved.path(), &tuned, None).unwrap();
    let model = Model::load(moved.path(), device(), Storage::Mapped).unwrap();
    assert!(matches!(native::load(dir.path(), model), Err(Error::BaseMismatch { .. })));
}

#[test]
fn law_a_merged_directory_is_the_tuned_model() {
    for method in adapters() {
        let dir = tempfile::tempdir().unwrap();
        let tuned = tiny_tuned(method);
        merge::merge(dir.path(), &tuned, None).unwrap();
        let merged = Model::load(dir.path(), device(), Storage::Mapped).unwrap();
        let (adapted, base) = both_logits(&tuned);
        assert_near(method.name(), &logits(&merged, &Frozen), &adapted, rounding(4 * 23 * 14));
        assert!(distance(&adapted, &base) > 0.1, "{method}: the adapter changes nothing");
        assert!(merged.fingerprint().unwrap() != tuned.model.fingerprint().unwrap());
    }
}

#[test]
fn law_a_merged_directory_holds_the_head() {
    for (model_type, method) in [("roberta", Method::LoraSb), ("bert", Method::Dora)] {
        let dir = tempfile::tempdir().unwrap();
        let tuned = tiny_classifier(model_type, method, &["classifier"]);
        merge::merge(dir.path(), &tuned, None).unwrap();
        let options =
            LoadOptions { task: Some(Task::Classification { labels: 3 }), seed: 9, ..LoadOptions::default() };
        let merged = Model::load_with(dir.path(), device(), Storage::Mapped, options).unwrap();
        assert_eq!(merged.warnings(), [""; 0]);
        let found = logits(&merged, &Frozen);
        assert_near(model_type, &found, &logits(&tuned.model, tuned.hook()), rounding(4 * 23 * 14));
        let untrained = logits(&tiny_encoder(model_type, 3), tuned.hook());
        assert!(distance(&found, &untrained) > 0.1, "the head changes nothing");
    }
}

#[test]
fn law_the_base_type_is_kept_by_merging() {
    let (base, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    merge::merge(base.path(), &Tuned::full(tiny_model(2)).unwrap(), Some(SaveType::Bf16)).unwrap();
    let mut model = Model::load(base.path(), device(), Storage::Mapped).unwrap();
    model.prepare(64).unwrap();
    let tuned = Tuned::adapt(model, &config(Method::LoraSb), &tiny_examples(6), &mut |_| ()).unwrap();
    for (dtype, bytes) in [(None, 2), (Some(SaveType::F32), 4)] {
        merge::merge(out.path(), &tuned, dtype).unwrap();
        let file = WeightFile::open(&out.path().join("model.safetensors")).unwrap();
        let view = file.get("model.layers.0.mlp.up_proj.weight").unwrap().unwrap();
        assert_eq!(view.dtype.size(), bytes);
        let merged = Model::load(out.path(), device(), Storage::Mapped).unwrap();
        // bf16 weights are off by 2^-9 of themselves each, through two blocks.
        let tolerance = if bytes == 4 { rounding(4 * 23 * 14) } else { 0.05 };
        assert_near("logits", &logits(&merged, &Frozen), &logits(&tuned.model, tuned.hook()), tolerance);
    }
}

#[test]
fn law_nothing_is_written_over_the_base_or_mixed_with_it() {
    let (base, exported) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    save_base(base.path());
    let adapted = || {
        let mut model = Model::load(base.path(), device(), Storage::Mapped).unwrap();
        model.prepare(64).unwrap();
        Tuned::adapt(model, &config(Method::Lora), &[], &mut |_| ()).unwrap()
    };
    let before = std::fs::read(base.path().join("model.safetensors")).unwrap();
    let tuned = adapted();
    // The same directory by another path.
    let other = base.path().join("../").join(base.path().file_name().unwrap());
    for dir in [base.path(), &other] {
        let error = merge::merge(dir, &tuned, None).unwrap_err();
        assert!(error.to_string().contains("base model's own") && error.hint().is_some(), "{error}");
    }
    let options = peft::Options { dtype: SaveType::F32, pad_rank: None };
    let error = peft::export(base.path(), &tuned, "base", &options).unwrap_err();
    assert!(error.to_string().contains("holds a model") && error.hint().is_some(), "{error}");
    assert_eq!(std::fs::read(base.path().join("model.safetensors")).unwrap(), before);
    export(exported.path(), &tuned);
    let error = merge::merge(exported.path(), &tuned, None).unwrap_err();
    assert!(error.to_string().contains("holds a PEFT adapter"), "{error}");
}

#[test]
fn law_full_fine_tuning_has_no_adapter_to_write() {
    let dir = tempfile::tempdir().unwrap();
    let full = Tuned::full(tiny_model(1)).unwrap();
    let options = peft::Options { dtype: SaveType::F32, pad_rank: None };
    for error in [
        native::save(dir.path(), &full, "base").unwrap_err(),
        peft::export(dir.path(), &full, "base", &options).unwrap_err(),
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
        let mut model = Model::load(dir.path(), device(), storage).unwrap();
        model.prepare(64).unwrap();
        Tuned::adapt(model, &config(Method::LoraSb), &tiny_examples(6), &mut |_| ()).unwrap()
    };
    assert_eq!(all_tensors(&adapted(Storage::Mapped)), all_tensors(&adapted(Storage::Trainable)));
}

/// A PEFT directory and a merged one of an adapter, verified.
fn verified(tuned: &Tuned, dtype: SaveType, fresh: &dyn Fn() -> Model) -> [Verification; 2] {
    let (exported, merged) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    peft::export(exported.path(), tuned, "base", &peft::Options { dtype, pad_rank: None }).unwrap();
    merge::merge(merged.path(), tuned, Some(dtype)).unwrap();
    let sequences = random_sequences(tuned.model.config(), 4);
    [exported, merged].map(|dir| verify(dir.path(), tuned, &sequences, &mut || Ok(fresh())).unwrap())
}

#[test]
fn law_what_is_written_verifies() {
    for dtype in [SaveType::F32, SaveType::Bf16, SaveType::F16] {
        for method in adapters() {
            let tuned = tiny_tuned(method);
            for verified in verified(&tuned, dtype, &|| tiny_model(2)) {
                assert_eq!(verified.tokens, 31 + 13 + 1);
                // Tight enough to be of use: an adapter that is not there, or of twice the scale, would show.
                assert!(verified.tolerance < 0.3 * verified.max_abs_logit_change, "{method}: {verified:?}");
                let exact = dtype == SaveType::F32;
                assert!(
                    exact == (verified.tolerance < 1e-3 * verified.max_abs_logit),
                    "{method}: {verified:?}"
                );
                assert!(exact || verified.max_abs_logit_difference > 0.0, "{method}: {verified:?}");
                assert!(verified.warnings.is_empty(), "{verified:?}");
            }
        }
        let tuned = tiny_classifier("roberta", Method::LoraSb, &["classifier"]);
        verified(&tuned, dtype, &|| tiny_encoder("roberta", 3));
    }
}

#[test]
fn law_what_was_damaged_does_not_verify() {
    let tuned = tiny_tuned(Method::LoraXs);
    let sequences = random_sequences(tuned.model.config(), 4);
    let failed = |change: &dyn Fn(&Path)| {
        let dir = tempfile::tempdir().unwrap();
        export(dir.path(), &tuned);
        change(dir.path());
        verify(dir.path(), &tuned, &sequences, &mut || Ok(tiny_model(2))).unwrap_err()
    };
    let tensors = "adapter_model.safetensors";
    let slightly = |all: &mut Written| all[3].2.iter_mut().for_each(|value| *value *= 1.01);
    for error in [
        failed(&|dir| edit_json(&dir.join("adapter_config.json"), &serde_json::json!({"lora_alpha": 6}))),
        failed(&|dir| edit_json(&dir.join("adapter_config.json"), &serde_json::json!({"use_rslora": true}))),
        failed(&|dir| rewrite(&dir.join(tensors), slightly)),
    ] {
        let Error::Verification { found, tolerance, largest, .. } = error else { panic!("{error}") };
        assert!(found > tolerance && tolerance > 0.0 && largest > 0.0);
        assert!(error.hint().is_some() && error.to_string().contains("differ"), "{error}");
    }
    let broken = failed(&|dir| rewrite(&dir.join(tensors), |all| all[0].2[0] = f32::NAN));
    assert!(matches!(broken, Error::NotFinite { .. }), "{broken}");
    // The merged base without the update.
    let dir = tempfile::tempdir().unwrap();
    save_base(dir.path());
    let error = verify(dir.path(), &tuned, &sequences, &mut || Ok(tiny_model(2))).unwrap_err();
    assert!(matches!(error, Error::Verification { .. }), "{error}");
    let nowhere = verify(&dir.path().join("nothing"), &tuned, &sequences, &mut || Ok(tiny_model(2)));
    assert!(matches!(nowhere, Err(Error::Model(_))));
}

/// Adapters with one start and different trained values, as directories.
fn participants(tuned: impl Fn() -> Tuned, weights: &[f64]) -> (tempfile::TempDir, Vec<Member>, Vec<Tuned>) {
    let dir = tempfile::tempdir().unwrap();
    let (mut members, mut all) = (Vec::new(), Vec::new());
    for (number, &weight) in weights.iter().enumerate() {
        let mut tuned = tuned();
        (0..number).for_each(|_| shake(&mut tuned, 0.1));
        let member = Member { dir: dir.path().join(number.to_string()), weight };
        native::save(&member.dir, &tuned, "base").unwrap();
        members.push(member);
        all.push(tuned);
    }
    (dir, members, all)
}

#[test]
fn law_the_average_of_r_is_the_average_of_the_updates() {
    let weights = [3.0, 1.0, 7.0];
    let (dir, members, all) = participants(|| tiny_tuned(Method::LoraSb), &weights);
    let out = dir.path().join("average");
    let averaged = average(&members, &out).unwrap();
    assert_eq!((averaged.modules, averaged.head.len()), (14, 0));
    let mean = native::load(&out, tiny_model(2)).unwrap();
    assert_eq!(mean.config(), all[0].config());
    for site in mean.model.sites() {
        let deltas: Vec<Vec<f32>> = all.iter().map(|tuned| delta(tuned, site)).collect();
        let expected = |at: usize| -> f32 {
            let sum: f64 =
                deltas.iter().zip(weights).map(|(delta, weight)| weight * f64::from(delta[at])).sum();
            (sum / 11.0) as f32
        };
        let expected: Vec<f32> = (0..deltas[0].len()).map(expected).collect();
        assert_near(&site.to_string(), &delta(&mean, site), &expected, rounding(4 * 5));
        assert!(distance(&expected, &deltas[0]) > 1e-2);
    }
    // Equal adapters have themselves for an average, to the bit.
    let (dir, members, all) = participants(|| tiny_tuned(Method::LoraXs), &[1.0]);
    let same = [members[0].clone(), Member { weight: 5.0, ..members[0].clone() }];
    average(&same, &dir.path().join("average")).unwrap();
    let mean = native::load(&dir.path().join("average"), tiny_model(2)).unwrap();
    assert_eq!(all_tensors(&mean), all_tensors(&all[0]));
}

#[test]
fn law_heads_are_averaged_beside_r() {
    let start = || tiny_classifier("bert", Method::LoraSb, &["classifier"]);
    let (dir, members, all) = participants(start, &[1.0, 3.0]);
    let out = dir.path().join("average");
    let averaged = average(&members, &out).unwrap();
    assert_eq!(averaged.head, ["classifier.bias", "classifier.weight"]);
    let mean = native::load(&out, tiny_encoder("bert", 3)).unwrap();
    let [a, b, found] = [&all[0], &all[1], &mean].map(|tuned| tensor(tuned, "classifier.weight"));
    for ((a, b), found) in a.iter().zip(&b).zip(found) {
        assert_eq!(found, ((f64::from(*a) + 3.0 * f64::from(*b)) / 4.0) as f32);
    }
}

#[test]
fn law_adapters_that_share_nothing_are_not_averaged() {
    let out = tempfile::tempdir().unwrap();
    let out = out.path().join("average");
    let two = |first: Tuned, second: Tuned| {
        let dir = tempfile::tempdir().unwrap();
        let member = |name: &str, tuned: &Tuned| {
            native::save(&dir.path().join(name), tuned, "base").unwrap();
            Member { dir: dir.path().join(name), weight: 1.0 }
        };
        let members = [member("a", &first), member("b", &second)];
        average(&members, &out).unwrap_err()
    };
    let adapted =
        |config: AdapterConfig| Tuned::adapt(tiny_model(2), &config, &tiny_examples(6), &mut |_| ()).unwrap();
    let sb = || config(Method::LoraSb);
    let plain = two(tiny_tuned(Method::Lora), tiny_tuned(Method::Lora));
    assert!(matches!(&plain, Error::Unsupported { feature, .. } if feature.contains("lora")), "{plain}");
    let one_target = Targets::parse("q_proj");
    for (other, reason) in [
        (adapted(config(Method::LoraXs)), "the method"),
        (adapted(AdapterConfig { rank: 4, ..sb() }), "the rank"),
        (adapted(AdapterConfig { lora_alpha: 7.0, ..sb() }), "lora_alpha"),
        (adapted(AdapterConfig { target_modules: one_target, ..sb() }), "only one of them has"),
        // Another draw of the initialisation's factorisation or samples is another A and B.
        (Tuned::adapt(tiny_model(2), &sb(), &tiny_examples(3), &mut |_| ()).unwrap(), "lora_A differs"),
    ] {
        let error = two(adapted(sb()), other);
        assert!(matches!(error, Error::Average { .. }), "{error}");
        assert!(error.to_string().contains(reason) && error.hint().is_some(), "{reason}: {error}");
    }
    let other_base = Tuned::adapt(tiny_model(1), &sb(), &tiny_examples(6), &mut |_| ()).unwrap();
    assert!(two(adapted(sb()), other_base).to_string().contains("the base model"));
    assert!(!out.exists());

    let (dir, members, _) = participants(|| tiny_tuned(Method::LoraSb), &[1.0, 2.0]);
    let target = dir.path().join("average");
    assert!(average(&[], &target).unwrap_err().to_string().contains("adapters"));
    for weight in [0.0, -1.0, f64::NAN] {
        let bad = [members[0].clone(), Member { weight, ..members[1].clone() }];
        assert!(average(&bad, &target).unwrap_err().to_string().contains("a positive number"));
    }
    let heavy: Vec<Member> =
        members.iter().map(|member| Member { weight: f64::MAX, ..member.clone() }).collect();
    assert!(matches!(average(&heavy, &target), Err(Error::NotFinite { .. })));
    assert!(average(&members, &members[1].dir).unwrap_err().to_string().contains("one of the adapters"));
}
