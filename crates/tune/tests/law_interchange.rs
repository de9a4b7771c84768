//! PEFT directories: what is written is what was trained, under the names and numbers that every consumer reads alike;
//! what is read is what the directory says, or nothing.

mod common;
mod files;

use std::path::Path;

use common::*;
use files::*;
use lora_sb_model::{Model, SaveType, WeightFile};
use lora_sb_tune::adapter::Factors;
use lora_sb_tune::export::{native, peft};
use lora_sb_tune::{AdapterConfig, Error, Method, Targets, Tuned};
use serde_json::{Value, json};

const TENSORS: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";
const K_PROJ: &str = "base_model.model.model.layers.0.self_attn.k_proj";

fn import(dir: &Path) -> Tuned {
    peft::import(dir, tiny_model(2)).unwrap().tuned
}

fn written_config(dir: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join(CONFIG)).unwrap()).unwrap()
}

#[test]
fn law_a_peft_directory_has_the_same_update() {
    for method in adapters() {
        let dir = tempfile::tempdir().unwrap();
        let tuned = tiny_tuned(method);
        assert_eq!(export(dir.path(), &tuned).len(), usize::from(method == Method::Dora));
        let imported = peft::import(dir.path(), tiny_model(2)).unwrap();
        assert!(imported.warnings.is_empty(), "{:?}", imported.warnings);
        let imported = imported.tuned;
        let config = imported.config().unwrap();
        let expected = if method == Method::Dora { Method::Dora } else { Method::Lora };
        let doubled = if method.subtracts_start() { 2 } else { 1 };
        assert_eq!(config.rank, doubled * tuned.config().unwrap().rank);
        assert_eq!((config.scale(), config.method), (1.0, expected));
        for site in tuned.model.sites() {
            // One way or the other it is the product of the same two f32 factors, but for the scale in DoRA's norm.
            let tolerance = if method == Method::Dora { rounding(23) } else { 0.0 };
            assert_near(
                &format!("{method} {site}"),
                &delta(&imported, site),
                &delta(&tuned, site),
                tolerance,
            );
        }
        let (found, expected) = (both_logits(&imported), both_logits(&tuned));
        assert_near(method.name(), &found.0, &expected.0, rounding(4 * 23 * 14));
        assert_eq!(found.1, expected.1);
    }
}

#[test]
fn law_a_peft_directory_holds_what_every_consumer_reads_alike() {
    let dir = tempfile::tempdir().unwrap();
    export(dir.path(), &tiny_tuned(Method::LoraSb));
    assert_eq!(names(dir.path()), [CONFIG, TENSORS]);
    let config = written_config(dir.path());
    assert_eq!(
        (&config["r"], &config["lora_alpha"], &config["use_rslora"]),
        (&5.into(), &5.into(), &false.into())
    );
    assert_eq!((&config["task_type"], &config["modules_to_save"]), (&"CAUSAL_LM".into(), &Value::Null));
    assert_eq!(config["base_model_name_or_path"], "org/base");
    let all = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"];
    assert_eq!(config["target_modules"], json!(all));
    let file = WeightFile::open(&dir.path().join(TENSORS)).unwrap();
    assert_eq!(file.names().len(), 2 * 14);
    let b = file.get("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight").unwrap().unwrap();
    assert_eq!(b.shape, [23, 5]);
    assert_eq!(file.metadata()["format"], "pt");
    assert_eq!(file.metadata()["lora_sb.method"], "lora-sb");

    // PEFT's own names and shapes of a DoRA.
    export(dir.path(), &tiny_tuned(Method::Dora));
    assert_eq!(written_config(dir.path())["use_dora"], true);
    let file = WeightFile::open(&dir.path().join(TENSORS)).unwrap();
    assert_eq!(file.names().len(), 3 * 14);
    assert_eq!(file.get(&format!("{K_PROJ}.lora_magnitude_vector")).unwrap().unwrap().shape, [6]);
}

#[test]
fn law_targets_are_named_without_touching_other_layers() {
    let dir = tempfile::tempdir().unwrap();
    let some = AdapterConfig {
        target_modules: Targets::parse("o_proj,layers.1.mlp.up_proj"),
        ..config(Method::Lora)
    };
    let some = Tuned::adapt(tiny_model(2), &some, &[], &mut |_| ()).unwrap();
    export(dir.path(), &some);
    let imported = import(dir.path());
    assert_eq!(imported.adapter().unwrap().sites(), some.adapter().unwrap().sites());
    let names = Targets::Names(vec!["1.mlp.up_proj".into(), "o_proj".into()]);
    assert_eq!(imported.config().unwrap().target_modules, names);

    // `dense` alone would reach the head's first layer.
    for model_type in ["bert", "roberta"] {
        let tuned = tiny_classifier(model_type, Method::Lora, &["classifier"]);
        export(dir.path(), &tuned);
        let expected = ["intermediate.dense", "key", "output.dense", "query", "value"];
        assert_eq!(written_config(dir.path())["target_modules"], json!(expected), "{model_type}");
    }
}

#[test]
fn law_narrow_exports_round_once() {
    for method in [Method::LoraSb, Method::Dora] {
        let tuned = tiny_tuned(method);
        let written = |dtype| {
            let dir = tempfile::tempdir().unwrap();
            peft::export(dir.path(), &tuned, "base", &peft::Options { dtype, pad_rank: None }).unwrap();
            all_tensors(&import(dir.path()))
        };
        let exact = written(SaveType::F32);
        for (dtype, unit) in [(SaveType::Bf16, 2f64.powi(-8)), (SaveType::F16, 2f64.powi(-11))] {
            let narrow = written(dtype);
            for ((name, narrow), (_, exact)) in narrow.iter().zip(&exact) {
                assert_near(name, narrow, exact, unit);
            }
            assert_ne!(narrow, exact);
        }
    }
}

#[test]
fn law_padding_of_the_rank_is_exact() {
    for method in [Method::LoraSb, Method::Pissa, Method::Dora] {
        let dir = tempfile::tempdir().unwrap();
        let tuned = tiny_tuned(method);
        let padded = |rank| {
            let options = peft::Options { dtype: SaveType::F32, pad_rank: Some(rank) };
            peft::export(dir.path(), &tuned, "base", &options)
        };
        padded(16).unwrap();
        let (config, imported) = (written_config(dir.path()), import(dir.path()));
        assert_eq!((&config["r"], &config["lora_alpha"]), (&16.into(), &16.into()));
        let kernels = tuned.model.kernels().as_ref();
        for site in tuned.model.sites() {
            let factors = |tuned: &Tuned| {
                let Factors { a, b, .. } = tuned.adapter().unwrap().fold(kernels, site).unwrap().unwrap();
                (kernels.to_f32(&a).unwrap(), kernels.to_f32(&b).unwrap(), b.shape()[1])
            };
            let ((a, b, rank), (wide_a, wide_b, wide)) = (factors(&tuned), factors(&imported));
            assert_eq!((&wide_a[..a.len()], largest(&wide_a[a.len()..]), wide), (&a[..], 0.0, 16));
            for (row, wide) in b.chunks_exact(rank).zip(wide_b.chunks_exact(16)) {
                assert_eq!((&wide[..rank], largest(&wide[rank..])), (row, 0.0));
            }
        }
        let error = padded(3).unwrap_err();
        assert!(error.to_string().contains("pad_rank"), "{error}");
    }
}

#[test]
fn law_a_classifier_travels_with_its_head() {
    let head = |dir: &Path| -> Vec<String> {
        let file = WeightFile::open(&dir.join(TENSORS)).unwrap();
        file.names().into_iter().filter(|name| !name.contains(".lora_")).collect()
    };
    for (model_type, modules, saved, tensors) in [
        ("roberta", &["classifier"][..], json!(["classifier", "score"]), 4),
        ("bert", &["classifier"], json!(["classifier", "score"]), 2),
        ("bert", &["classifier", "pooler"], json!(["classifier", "score", "pooler"]), 4),
        // PEFT wants the classifier of a SEQ_CLS adapter even where nothing of it was trained.
        ("roberta", &[], json!(["classifier", "score"]), 4),
    ] {
        for method in [Method::LoraSb, Method::Dora] {
            let dir = tempfile::tempdir().unwrap();
            let tuned = tiny_classifier(model_type, method, modules);
            let warnings = export(dir.path(), &tuned);
            assert!(warnings.iter().any(|warning| warning.contains("modules_to_save")), "{warnings:?}");
            assert!(warnings.iter().all(|warning| warning.contains("vLLM") && warning.contains("merge")));
            let config = written_config(dir.path());
            assert_eq!((&config["task_type"], &config["modules_to_save"]), (&"SEQ_CLS".into(), &saved));
            assert_eq!(head(dir.path()).len(), tensors);
            assert!(
                head(dir.path()).contains(&"base_model.model.classifier.dense.bias".into())
                    || model_type == "bert"
            );
            let imported = peft::import(dir.path(), tiny_encoder(model_type, 3)).unwrap().tuned;
            assert_near(model_type, &both_logits(&imported).0, &both_logits(&tuned).0, rounding(4 * 23 * 14));
        }
    }
}

#[test]
fn law_heads_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    export(dir.path(), &tiny_classifier("bert", Method::Lora, &["classifier"]));
    let error = peft::import(dir.path(), tiny_encoder("bert", 2)).unwrap_err();
    // The fingerprint leaves the head out, so that it is the tensor which tells.
    assert!(matches!(&error, Error::Tensor { tensor, .. } if tensor.starts_with("classifier.")), "{error}");
    rewrite(&dir.path().join(TENSORS), |all| all.retain(|(name, ..)| !name.ends_with("classifier.bias")));
    let error = peft::import(dir.path(), tiny_encoder("bert", 3)).unwrap_err();
    assert!(matches!(&error, Error::Tensor { found, .. } if found.contains("no such")), "{error}");
    // A classifier's adapter on a language model, without tensors of a head.
    let error = with_config(json!({"task_type": "SEQ_CLS"})).unwrap_err();
    assert!(matches!(&error, Error::Unsupported { feature, .. } if feature.contains("SEQ_CLS")), "{error}");
}

#[test]
fn law_warnings_name_who_cannot_load_an_export() {
    let dir = tempfile::tempdir().unwrap();
    let tuned = tiny_tuned(Method::LoraSb);
    let warnings = |rank| {
        let options = peft::Options { dtype: SaveType::F32, pad_rank: Some(rank) };
        peft::export(dir.path(), &tuned, "base", &options).unwrap().join("\n")
    };
    assert_eq!(warnings(5), "");
    assert_eq!(warnings(16), "");
    assert!(warnings(17).contains("--max-lora-rank 32"));
    assert!(warnings(600).contains("does not load an adapter of rank 600"));
    assert!(export(dir.path(), &tiny_tuned(Method::Dora))[0].contains("DoRA"));
}

#[test]
fn law_peft_loading_is_strict() {
    for (method, part) in [
        (Method::LoraSb, "lora_A.weight"),
        (Method::Dora, "lora_magnitude_vector"),
        (Method::Pissa, "lora_B.weight"),
    ] {
        check_strictness(
            TENSORS,
            &format!("{K_PROJ}.{part}"),
            |dir| _ = export(dir, &tiny_tuned(method)),
            |dir| Ok(peft::import(dir, tiny_model(2))?.tuned),
        );
    }
    // A magnitude that the configuration does not announce would otherwise be passed over.
    let dir = tempfile::tempdir().unwrap();
    export(dir.path(), &tiny_tuned(Method::Dora));
    edit_json(&dir.path().join(CONFIG), &json!({"use_dora": false}));
    let error = peft::import(dir.path(), tiny_model(2)).unwrap_err();
    assert!(matches!(&error, Error::Tensor { tensor, .. } if tensor.contains("magnitude")), "{error}");
    // Weights that can run code.
    std::fs::rename(dir.path().join(TENSORS), dir.path().join("adapter_model.bin")).unwrap();
    let error = peft::import(dir.path(), tiny_model(2)).unwrap_err();
    assert!(error.hint().unwrap().contains("safe_serialization"), "{error}");
}

/// Exports a LoRA and changes keys of its configuration.
fn with_config(changes: Value) -> Result<Tuned, Error> {
    let dir = tempfile::tempdir().unwrap();
    export(dir.path(), &tiny_tuned(Method::Lora));
    edit_json(&dir.path().join(CONFIG), &changes);
    Ok(peft::import(dir.path(), tiny_model(2))?.tuned)
}

#[test]
fn law_peft_scales_are_honoured() {
    let scale = |changes| with_config(changes).unwrap().config().unwrap().scale();
    assert_eq!(scale(json!({})), 1.0);
    assert_eq!(scale(json!({"lora_alpha": 13})), 13.0 / 5.0);
    let stabilised = with_config(json!({"lora_alpha": 13, "use_rslora": true})).unwrap();
    assert_eq!(stabilised.method(), Method::RsLora);
    assert!((f64::from(stabilised.config().unwrap().scale()) - 13.0 / 5f64.sqrt()).abs() < 1e-6);
    let dropped = with_config(json!({"lora_dropout": 0.05})).unwrap();
    assert_eq!(dropped.config().unwrap().lora_dropout, 0.05);
    // A regular expression is replaced by what the file holds.
    let pattern = with_config(json!({"target_modules": ".*_proj"})).unwrap();
    assert_eq!(pattern.adapter().unwrap().sites(), pattern.model.sites());
    assert!(with_config(json!({"target_modules": "all-linear", "a_later_key": 1})).is_ok());

    // rsLoRA's rule holds for DoRA too.
    let dir = tempfile::tempdir().unwrap();
    export(dir.path(), &tiny_tuned(Method::Dora));
    edit_json(&dir.path().join(CONFIG), &json!({"lora_alpha": 13, "use_rslora": true}));
    let stabilised = import(dir.path());
    assert_eq!(stabilised.method(), Method::Dora);
    assert!((f64::from(stabilised.config().unwrap().scale()) - 13.0 / 5f64.sqrt()).abs() < 1e-6);
}

#[test]
fn law_peft_features_that_change_the_result_are_refused() {
    for (key, value) in [
        ("peft_type", json!("LOHA")),
        ("task_type", "TOKEN_CLS".into()),
        ("rank_pattern", json!({"q_proj": 4})),
        ("alpha_pattern", json!({"q_proj": 4})),
        ("modules_to_save", json!(["lm_head"])),
        ("bias", "all".into()),
        ("fan_in_fan_out", true.into()),
        ("init_lora_weights", "loftq".into()),
        ("layer_replication", json!([[0, 2]])),
    ] {
        let error = with_config(json!({ key: value })).unwrap_err();
        let Error::Unsupported { feature, .. } = &error else { panic!("{key}: {error}") };
        assert!(feature.contains(key), "{error}");
        assert!(error.hint().is_some());
    }
    // These changed the base's weights, which PEFT can take back when it saves.
    for start in ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga"] {
        let error = with_config(json!({ "init_lora_weights": start })).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        assert!(error.hint().unwrap().contains("path_initial_model_for_weight_conversion"));
    }
    for (key, value) in [
        ("r", json!(0)),
        ("lora_alpha", "big".into()),
        ("lora_alpha", json!(-1)),
        ("lora_dropout", json!(1.0)),
        ("target_modules", 3.into()),
        ("modules_to_save", "classifier".into()),
        ("use_dora", "yes".into()),
    ] {
        let error = with_config(json!({ key: value })).unwrap_err();
        assert!(matches!(error, Error::File { .. }) && error.to_string().contains(key), "{error}");
    }
    // Wrong rank, a magnitude or a target that the file does not hold, a target that it has and nobody names.
    for changes in [json!({"r": 4}), json!({"use_dora": true}), json!({"target_modules": ["q_proj"]})] {
        assert!(matches!(with_config(changes), Err(Error::Tensor { .. })));
    }
    let unknown = with_config(json!({"target_modules": ["query"]}));
    let unknown = unknown.unwrap_err().to_string();
    assert!(unknown.contains("adapter_config.json") && unknown.contains("\"query\""), "{unknown}");
}

#[test]
fn law_names_and_types_of_other_writers_are_read() {
    let tuned = tiny_classifier("roberta", Method::Dora, &["classifier"]);
    let dir = tempfile::tempdir().unwrap();
    export(dir.path(), &tuned);
    let expected = both_logits(&peft::import(dir.path(), tiny_encoder("roberta", 3)).unwrap().tuned);
    // PEFT's names in memory.
    let spell = |name: &mut String| {
        for (from, to) in [
            ("lora_A.weight", "lora_A.default.weight"),
            ("lora_B.weight", "lora_B.default.weight"),
            ("lora_magnitude_vector", "lora_magnitude_vector.default.weight"),
            ("classifier.", "classifier.modules_to_save.default."),
        ] {
            *name = name.replace(from, to);
        }
    };
    rewrite(&dir.path().join(TENSORS), |all| all.iter_mut().for_each(|(name, ..)| spell(name)));
    let spelt = peft::import(dir.path(), tiny_encoder("roberta", 3)).unwrap().tuned;
    assert_eq!(both_logits(&spelt), expected);
    // The same tensor under both names.
    let dir = tempfile::tempdir().unwrap();
    export(dir.path(), &tiny_tuned(Method::Lora));
    rewrite(&dir.path().join(TENSORS), |all| {
        let (_, shape, values) = all[0].clone();
        let name = all[0].0.replace("lora_A.weight", "lora_A.default.weight");
        all.push((name, shape, values));
    });
    let error = peft::import(dir.path(), tiny_model(2)).unwrap_err();
    assert!(matches!(&error, Error::Tensor { found, .. } if found.contains("second")), "{error}");
}

#[test]
fn law_another_base_is_refused_where_the_file_tells() {
    let dir = tempfile::tempdir().unwrap();
    let tuned = tiny_tuned(Method::LoraSb);
    export(dir.path(), &tuned);
    let other =
        |seed| Model::random(tuned.model.config().clone(), device(), seed, lora_sb_model::Storage::Trainable);
    let error = peft::import(dir.path(), other(12).unwrap()).unwrap_err();
    assert!(matches!(error, Error::BaseMismatch { .. }) && error.hint().is_some(), "{error}");
    // A foreign file says nothing of it, which is passed on.
    foreign(dir.path());
    let imported = peft::import(dir.path(), other(12).unwrap()).unwrap();
    assert!(imported.warnings[0].contains("shapes of its layers alone"), "{:?}", imported.warnings);
    let error = peft::import(dir.path(), tiny_model(1)).unwrap_err();
    assert!(matches!(error, Error::Tensor { .. }), "{error}");
}

/// Takes our metadata out of a file, as another program would have written it.
fn foreign(dir: &Path) {
    let path = dir.join(TENSORS);
    let mut bytes = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = String::from_utf8(bytes[8..8 + length].to_vec()).unwrap();
    // As long as ours, so that the header keeps its length.
    let renamed = header.replace("lora_sb.base_fingerprint", "other_tool.fingerprint_x");
    assert!(renamed != header && renamed.len() == length);
    bytes[8..8 + length].copy_from_slice(renamed.as_bytes());
    std::fs::write(&path, bytes).unwrap();
}

/// An adapter in its authors' layout: A, B and R apart, R under the name that `spell` gives.
fn reference_layout(dir: &Path, spell: &dyn Fn(&str) -> String, dtype: SaveType) -> Tuned {
    let tuned = tiny_tuned(Method::LoraXs);
    export(dir, &tuned);
    rewrite_as(&dir.join(TENSORS), dtype, |all| {
        for (name, shape, values) in all.iter_mut() {
            let own = name.strip_prefix("base_model.model.").unwrap().strip_suffix(".weight").unwrap();
            (*shape, *values) = (shape.clone(), tensor(&tuned, own));
        }
        for site in tuned.model.sites() {
            let module = tuned.model.module(site);
            all.push((spell(&module), vec![5, 5], tensor(&tuned, &format!("{module}.lora_R"))));
        }
    });
    // tiny_tuned's scale is 2.
    edit_json(&dir.join(CONFIG), &json!({"r": 5, "lora_alpha": 10}));
    tuned
}

fn older(module: &str) -> String {
    format!("base_model.model.{module}_lora_latent_mapping.weight")
}

fn newer(module: &str) -> String {
    format!("base_model.model.{module}.default_lora_latent_mapping.weight")
}

#[test]
fn law_the_layout_of_the_references_is_read_with_its_r() {
    for spell in [older, newer] {
        let dir = tempfile::tempdir().unwrap();
        let tuned = reference_layout(dir.path(), &spell, SaveType::F32);
        let imported = import(dir.path());
        let config = imported.config().unwrap();
        assert_eq!((config.method, config.rank, config.scale()), (Method::LoraSb, 5, 2.0));
        assert_eq!(all_tensors(&imported), all_tensors(&tuned));
        assert_eq!(both_logits(&imported), both_logits(&tuned));
        // It is a native adapter of the r x r family from then on.
        let own = tempfile::tempdir().unwrap();
        native::save(own.path(), &imported, "base").unwrap();
        assert_eq!(all_tensors(&native::load(own.path(), tiny_model(2)).unwrap()), all_tensors(&tuned));

        let narrow = tempfile::tempdir().unwrap();
        reference_layout(narrow.path(), &spell, SaveType::Bf16);
        for ((name, narrow), (_, exact)) in
            all_tensors(&import(narrow.path())).iter().zip(&all_tensors(&tuned))
        {
            assert_near(name, narrow, exact, 2f64.powi(-8));
        }
    }
}

#[test]
fn law_an_r_is_never_passed_over() {
    let refused = |change: &dyn Fn(&Path)| {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join("adapter");
        reference_layout(&dir, &newer, SaveType::F32);
        change(&dir);
        peft::import(&dir, tiny_model(2)).unwrap_err()
    };
    // One of them is missing; all are, where the authors' settings stand beside the directory.
    let one = refused(&|dir| {
        rewrite(&dir.join(TENSORS), |all| {
            all.retain(|(name, ..)| *name != newer("model.layers.1.mlp.up_proj"))
        });
    });
    assert!(matches!(&one, Error::Tensor { tensor, .. } if tensor.ends_with("up_proj.lora_R")), "{one}");
    let all = refused(&|dir| {
        std::fs::write(dir.parent().unwrap().join("reconstr_config.json"), "{}").unwrap();
        rewrite(&dir.join(TENSORS), |all| all.retain(|(name, ..)| !name.contains("latent_mapping")));
    });
    assert!(matches!(&all, Error::Tensor { expected, .. } if expected.contains("an R")), "{all}");
    let misshapen = refused(&|dir| {
        let change = |all: &mut Written| {
            let r = all.iter_mut().find(|(name, ..)| name.contains("latent_mapping")).unwrap();
            (r.1, r.2) = (vec![4, 5], r.2[..20].to_vec());
        };
        rewrite(&dir.join(TENSORS), change);
    });
    assert!(matches!(&misshapen, Error::Tensor { found, .. } if found == "shape [4, 5]"), "{misshapen}");
    let nowhere = refused(&|dir| {
        rewrite(&dir.join(TENSORS), |all| {
            all.push((newer("model.layers.0.other"), vec![5, 5], vec![0.0; 25]))
        });
    });
    assert!(matches!(&nowhere, Error::Tensor { tensor, .. } if tensor.contains("other")), "{nowhere}");
    let both = refused(&|dir| edit_json(&dir.join(CONFIG), &json!({"use_dora": true})));
    assert!(matches!(both, Error::Unsupported { .. }), "{both}");
    // rsLoRA's rule gives the same scale as it would there.
    let dir = tempfile::tempdir().unwrap();
    reference_layout(dir.path(), &older, SaveType::F32);
    edit_json(&dir.path().join(CONFIG), &json!({"use_rslora": true}));
    assert!((f64::from(import(dir.path()).config().unwrap().scale()) - 10.0 / 5f64.sqrt()).abs() < 1e-6);
}
