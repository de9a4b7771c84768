//! Encoders with a classification head: training, scores, predictions, and what they refuse.

use serde_json::{Value, json};

use crate::common::{ENCODER_CONFIG, SMALL_ENCODER, Workshop, json, json_lines, labelled_records};

/// What is predicted of the data, and the scores on the standard error.
fn predicted(shop: &Workshop, arguments: &str) -> (Vec<Value>, String) {
    let run = shop.run(&format!("predict {arguments} --data data.jsonl --threads 1")).ok();
    (json_lines(&run.out), run.err)
}

/// The same labels, and probabilities that rounding explains.
#[track_caller]
fn assert_alike(found: &[Value], expected: &[Value], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!(found["text"], expected["text"], "{what}");
        for (class, share) in expected["probabilities"].as_object().unwrap() {
            let apart = found["probabilities"][class].as_f64().unwrap() - share.as_f64().unwrap();
            assert!(apart.abs() < 1e-5, "{what}: {found} is not {expected}");
        }
    }
}

#[test]
fn train_then_resume_export_verify_and_predict() {
    let shop = Workshop::encoder();
    let metrics = "--metrics accuracy,f1 --metric-for-best-model eval_accuracy";
    let run = shop.run(&format!("train {SMALL_ENCODER} {metrics} --output-dir run")).ok();
    for expected in
        ["2 classes: harbour", "classifier in full", "step 4: held-out loss", "  accuracy 0.", "  f1 "]
    {
        assert!(run.out.contains(expected), "{expected:?} is not in {}", run.out);
    }
    let end = run.out.lines().find(|line| line.trim_start().starts_with("accuracy")).unwrap();
    assert!(end.contains("before") && end.contains("after") && !end.contains("not defined"), "{end}");
    assert!(run.out.contains("lora-sb predict --adapter run"), "{}", run.out);
    let lines = json_lines(&String::from_utf8(shop.read("run/metrics.jsonl")).unwrap());
    let scored = lines.iter().filter(|line| line["metrics"]["accuracy"].is_number());
    assert_eq!(scored.count(), 3, "before, at step 4 and at the end");

    // The same bits where the run goes on from its middle.
    let whole = shop.read("run/adapter/adapter.safetensors");
    std::fs::remove_dir_all(shop.path("run/adapter")).unwrap();
    for step in ["run/checkpoints/step-6", "run/checkpoints/step-8"] {
        std::fs::remove_dir_all(shop.path(step)).unwrap();
    }
    let resumed = shop.run("train --resume run").ok();
    assert!(resumed.out.contains("resumed from run/checkpoints/step-4"), "{}", resumed.out);
    assert!(shop.read("run/adapter/adapter.safetensors") == whole);

    let (expected, scores) = predicted(&shop, "--adapter run");
    assert_eq!(expected.len(), 41);
    assert!(scores.contains("41 labelled examples: accuracy 0.") && scores.contains("f1 "), "{scores}");
    shop.run("export --adapter run --out peft").ok();
    shop.run("merge --adapter run --out merged").ok();
    for exported in ["peft", "merged"] {
        let verified = shop.run(&format!("verify --adapter run --exported {exported} --json")).ok();
        assert_eq!(json(&verified.out)["equal"], true);
    }
    for source in [
        "--adapter run/adapter --model model",
        "--adapter run/checkpoints/step-8",
        "--model model --adapter peft --label-names harbour,valley",
        "--model merged",
    ] {
        assert_alike(&predicted(&shop, source).0, &expected, source);
    }
    // Away from its run an adapter has its head with the names of its classes.
    std::fs::rename(shop.path("run/adapter"), shop.path("moved")).unwrap();
    let alone = shop.run("predict --adapter moved --text sea").ok();
    assert!(["harbour", "valley"].contains(&json(&alone.out)["label"].as_str().unwrap()), "{}", alone.out);
    let inspected = json(&shop.run("inspect merged --json").ok().out);
    assert_eq!(
        (&inspected["task"], &inspected["labels"]),
        (&json!("classification, 2 classes"), &json!("harbour, valley"))
    );
    let inspected = json(&shop.run("inspect moved --json").ok().out);
    // 8 modules x 3 x 3, and 2 x (16 + 1) of the head.
    assert_eq!(
        (&inspected["trained parameters"], &inspected["of them the head's"]),
        (&json!(106), &json!(34))
    );
    assert!(shop.run("inspect run").ok().out.contains("accuracy"));
}

#[test]
fn numbers_are_learnt_from_pairs_and_scored_by_correlations() {
    let shop = Workshop::encoder();
    let record = |index: usize| {
        let texts = ["the sea", "a river", "a river and the sea", "it"];
        let (first, second) = (texts[index % 4], texts[index / 4 % 4]);
        json!({ "sentence1": first, "sentence2": second, "score": (index % 4) as f64 + 0.5 }).to_string()
            + "\n"
    };
    shop.write("data.jsonl", (0..24).map(record).collect::<String>());
    shop.write("held-out.jsonl", (0..8).map(record).collect::<String>());
    let arguments = SMALL_ENCODER.replace("--val-set-size 9", "--validation-data held-out.jsonl");
    let run = shop
        .run(&format!(
            "train {arguments} --metric-for-best-model spearman --metrics pearson,spearmanr --output-dir run"
        ))
        .ok();
    assert!(run.out.contains("values from 0.5 to 3.5") && run.out.contains("pearson"), "{}", run.out);
    let (lines, scores) = predicted(&shop, "--adapter run");
    assert!(lines.iter().all(|line| line["label"].is_number() && line["text_pair"].is_string()));
    assert!(lines.iter().all(|line| line.get("probabilities").is_none() && line["expected"].is_number()));
    assert!(scores.contains("pearson") && scores.contains("spearman"), "{scores}");
    let plan = shop.run(&format!("plan {arguments}")).ok().out;
    assert!(plan.contains("regression") && plan.contains("(label: 0.5)"), "{plan}");
    // Whole numbers are classes until somebody says otherwise.
    shop.write("data.jsonl", labelled_records(20).replace("\"harbour\"", "0").replace("\"valley\"", "1"));
    let plan =
        |flag: &str| json(&shop.run(&format!("plan {SMALL_ENCODER} --json {flag}")).ok().out)["plan"].take();
    assert_eq!(plan("")["problem_type"]["value"], "single_label_classification");
    assert_eq!(plan("")["label_names"]["value"], json!(["LABEL_0", "LABEL_1"]));
    assert_eq!(plan("--num-labels 1")["problem_type"]["value"], "regression");
    assert_eq!(plan("--problem-type regression")["metrics"]["value"], json!(["pearson"]));
    assert_eq!(plan("--num-labels 3")["num_labels"]["value"], 3);
}

#[test]
fn classes_have_the_models_names_where_it_knows_them() {
    let shop = Workshop::encoder();
    let named = ENCODER_CONFIG.replace(
        "\"made_by\"",
        r#""id2label": {"0": "valley", "1": "harbour"}, "label2id": {"valley": 0, "harbour": 1}, "made_by""#,
    );
    shop.write_random("model", &named, "wordpiece.json");
    let names = |flag: &str| {
        let plan = json(&shop.run(&format!("plan {SMALL_ENCODER} --json {flag}")).ok().out);
        (plan["plan"]["label_names"]["value"].clone(), plan["plan"]["label_names"]["source"].clone())
    };
    assert_eq!(names(""), (json!(["valley", "harbour"]), json!("model")));
    assert_eq!(names("--label-names harbour,valley"), (json!(["harbour", "valley"]), json!("command line")));
    let text = shop.run(&format!("plan {SMALL_ENCODER}")).ok().out;
    assert!(text.contains("(label: harbour, class 1)") && text.contains("[CLS]"), "{text}");
    shop.write("data.jsonl", labelled_records(20).replace("valley", "mountain"));
    assert_eq!(names(""), (json!(["harbour", "mountain"]), json!("data")));
    // The head of the model has two rows, and 3 classes need another.
    shop.write("data.jsonl", labelled_records(20) + &labelled_records(3).replace("harbour", "mountain"));
    let names = ["classifier", "3", "--ignore-mismatched-sizes"];
    shop.run(&format!("train {SMALL_ENCODER} --output-dir run")).failed(1, &names);
    shop.run(&format!("plan {SMALL_ENCODER}")).failed(1, &names);
    assert!(!shop.path("run").exists());
}

#[test]
fn a_head_of_another_number_of_labels_is_drawn_anew_and_kept_with_the_run() {
    let shop = Workshop::encoder();
    shop.write_random("model", ENCODER_CONFIG, "wordpiece.json");
    shop.write("data.jsonl", labelled_records(26) + &labelled_records(15).replace("harbour", "mountain"));
    shop.write("recipe.toml", "ignore_mismatched_sizes = true\n");
    let train = |out: &str, more: &str| {
        shop.run(&format!("train {SMALL_ENCODER} --config recipe.toml --output-dir {out} {more}"))
    };
    train("refused", "--ignore-mismatched-sizes false").failed(1, &["classifier", "draws this layer anew"]);
    let run = train("run", "").ok();
    for name in
        ["warning: ", "`classifier.weight` ([2, 16], not [3, 16])", "`classifier.bias` ([2], not [3])"]
    {
        assert!(run.err.contains(name), "{name:?} is not in {}", run.err);
    }
    assert!(!run.err.contains("pooler"), "it fits, and is kept: {}", run.err);
    let whole = shop.read("run/adapter/adapter.safetensors");
    for dir in ["run/adapter", "run/checkpoints/step-6", "run/checkpoints/step-8"] {
        std::fs::remove_dir_all(shop.path(dir)).unwrap();
    }
    shop.run("train --resume run").ok();
    assert!(shop.read("run/adapter/adapter.safetensors") == whole);

    let (expected, _) = predicted(&shop, "--adapter run");
    assert_eq!(expected[0]["probabilities"].as_object().unwrap().len(), 3);
    shop.run("export --adapter run --out peft").ok();
    shop.run("merge --adapter run --out merged").ok();
    for exported in ["peft", "merged"] {
        let verified = shop.run(&format!("verify --adapter run --exported {exported} --json")).ok();
        assert_eq!(json(&verified.out)["equal"], true);
    }
    // Away from its run an adapter brings its head with it.
    std::fs::create_dir(shop.path("elsewhere")).unwrap();
    std::fs::rename(shop.path("run/adapter"), shop.path("elsewhere/adapter")).unwrap();
    for source in [
        "--adapter run/checkpoints/step-8",
        "--model merged",
        "--model model --adapter peft --label-names harbour,mountain,valley",
        "--model model --adapter elsewhere/adapter",
    ] {
        assert_alike(&predicted(&shop, source).0, &expected, source);
    }
    train("full", "--method full --learning-rate 1e-3").ok();
    assert_eq!(predicted(&shop, "--adapter full").0.len(), 41);

    // What was drawn and not trained is drawn again.
    train("drawn", "--modules-to-save pooler").ok();
    let (expected, _) = predicted(&shop, "--adapter drawn");
    std::fs::rename(shop.path("drawn/adapter"), shop.path("elsewhere/drawn")).unwrap();
    assert_alike(&predicted(&shop, "--model model --adapter elsewhere/drawn").0, &expected, "drawn again");
}

#[test]
fn a_head_is_warmed_up_before_the_adapter_is_made() {
    let shop = Workshop::encoder();
    // All 32 examples at each step.
    let settings = "--per-device-train-batch-size 32 --learning-rate 1e-2";
    let train = |out: &str, more: &str| {
        shop.run(&format!("train {SMALL_ENCODER} {settings} --output-dir {out} {more}"))
    };
    let losses = |text: &str| -> Vec<f64> {
        let line = text.lines().find(|line| line.starts_with("head warmed up")).unwrap();
        let (_, losses) = line.split_once("head warmed up for 20 steps: loss ").unwrap();
        losses.split(" -> ").map(|loss| loss.parse().unwrap()).collect()
    };
    let run = train("run", "--head-warmup-steps 20").ok();
    let found = losses(&run.out);
    assert!(found.len() == 2 && found[1] < 0.9 * found[0], "{found:?}");
    let (before, after) = (run.out.find("head warmed up").unwrap(), run.out.find("first update").unwrap());
    assert!(before < after, "{}", run.out);
    let whole = shop.read("run/adapter/adapter.safetensors");

    let resume = || {
        for dir in ["run/adapter", "run/checkpoints/step-6", "run/checkpoints/step-8"] {
            std::fs::remove_dir_all(shop.path(dir)).unwrap();
        }
        shop.run("train --resume run")
    };
    let resumed = resume().ok();
    assert!(!resumed.out.contains("head warmed up"), "{}", resumed.out);
    assert!(shop.read("run/adapter/adapter.safetensors") == whole);
    shop.run("train --resume run --head-warmup-steps 3").failed(1, &["head_warmup_steps", "20", "3"]);

    let without = train("none", "").ok();
    assert!(!without.out.contains("head warmed up"), "{}", without.out);
    train("zero", "--head-warmup-steps 0").ok();
    let cold = shop.read("none/adapter/adapter.safetensors");
    assert!(shop.read("zero/adapter/adapter.safetensors") == cold && cold != whole);
    train("refused", "--head-warmup-steps 1 --method full")
        .failed(1, &["head_warmup_steps", "full fine-tuning"]);
    assert!(!shop.path("refused").exists());
}

#[test]
fn full_fine_tuning_writes_a_classifier() {
    let shop = Workshop::encoder();
    shop.run(&format!("train {SMALL_ENCODER} --method full --learning-rate 1e-3 --output-dir run")).ok();
    let (from_run, _) = predicted(&shop, "--adapter run");
    assert_eq!(predicted(&shop, "--model run/model").0, from_run);
    assert_eq!(predicted(&shop, "--model run").0, from_run);
    let class = from_run[0]["label"].as_str().unwrap();
    assert!(["harbour", "valley"].contains(&class), "{class}");
}

#[test]
fn texts_without_labels_are_predicted_without_scores() {
    let shop = Workshop::encoder();
    let headless = shop.run("predict --model model --text sea").ok();
    assert!(headless.err.contains("warning:") && headless.err.contains("classifier"), "{}", headless.err);
    shop.write_random("model", ENCODER_CONFIG, "wordpiece.json");
    shop.write("data.jsonl", "{\"text\": \"the sea\"}\n{\"text\": \"a river\", \"label\": null}\n");
    let (lines, scores) = predicted(&shop, "--model model");
    assert_eq!((lines.len(), scores.as_str()), (2, ""));
    assert!(lines.iter().all(|line| line.get("expected").is_none()));
    let shares: f64 = lines[0]["probabilities"].as_object().unwrap().values().filter_map(Value::as_f64).sum();
    assert!((shares - 1.0).abs() < 1e-9, "{shares}");
    let pair =
        ["predict", "--model", "model", "--text", "the sea", "--text-pair", "a river", "--max-length", "5"];
    let run = crate::common::Run::of(shop.command(&pair).output().unwrap()).ok();
    assert_eq!(json(&run.out)["text_pair"], "a river");
}

#[test]
fn a_prediction_tells_what_it_cut_and_is_never_made_of_nan() {
    let shop = Workshop::encoder();
    shop.write_random("model", ENCODER_CONFIG, "wordpiece.json");
    let long = vec!["sea"; 60].join(" ");
    shop.write("data.jsonl", format!("{{\"text\": \"{long}\"}}\n{{\"text\": \"sea\"}}\n"));
    let (lines, told) = predicted(&shop, "--model model");
    assert_eq!(lines.len(), 2);
    assert!(told.contains("1 text cut to 40 tokens; the longest had 62"), "{told}");
    let run = crate::common::Run::of(
        shop.command(&["predict", "--model", "model", "--text", &long]).output().unwrap(),
    );
    assert!(run.ok().err.contains("1 text cut to 40 tokens"));
    let run = shop.run("predict --model model");
    assert!(run.code == Some(2) && run.err.contains("<--text <TEXT>|--data <FILE>...>"), "{}", run.err);

    // The last values of the file are NaN.
    let mut weights = shop.read("model/model.safetensors");
    let end = weights.len();
    for value in weights[end - 64..].chunks_exact_mut(4) {
        value.copy_from_slice(&f32::NAN.to_le_bytes());
    }
    shop.write("model/model.safetensors", weights);
    shop.run("predict --model model --data data.jsonl").failed(1, &["data.jsonl:1", "not finite"]);
}

#[test]
fn what_a_model_has_no_use_for_is_refused() {
    let encoder = Workshop::encoder();
    let train = |arguments: &str| encoder.run(&format!("train {SMALL_ENCODER} --output-dir run {arguments}"));
    train("--train-on completion").failed(2, &["--train-on", "command line", "bert"]);
    train("--sample-prompt sea").failed(2, &["--sample-prompt", "bert"]);
    train("--format text").failed(2, &["--format"]);
    encoder.write("recipe.toml", "chat_template = \"x.jinja\"\n");
    train("--config recipe.toml").failed(2, &["--chat-template", "recipe.toml:1"]);
    train("--metrics pearson").failed(2, &["pearson", "accuracy"]);
    train("--metric-for-best-model spearman").failed(1, &["metric_for_best_model", "accuracy"]);
    train("--modules-to-save pooler.dens").failed(1, &["modules_to_save", "pooler.dens", "classifier"]);
    train("--num-labels 1 --label-names a").failed(2, &["regression"]);
    train("--num-labels 3").failed(2, &["--num-labels 3", "harbour, valley", "--label-names"]);
    train("--num-labels 3 --label-names a,b").failed(2, &["--num-labels 3", "2 --label-names"]);
    train("--label-names harbour,city").failed(1, &["data.jsonl:", "valley", "harbour"]);
    train("--max-length 41").failed(2, &["max_length", "40"]);
    train("--excess-length-strategy split").failed(1, &["excess_length", "split"]);
    encoder.write("held-out.jsonl", "{\"sentence\": \"sea\", \"label\": \"city\"}\n");
    train("--val-set-size 0 --validation-data held-out.jsonl").failed(1, &["held-out.jsonl:1", "city"]);
    encoder.run("generate --model model --prompt sea").failed(2, &["bert", "lora-sb predict"]);
    encoder.run("predict --model model --text sea --metrics pearson").failed(2, &["pearson"]);
    encoder.run("predict --model model --text sea --label-names a").failed(2, &["--label-names", "2 labels"]);
    encoder.run("predict --model model --text sea --batch-size 0").failed(2, &["batch-size"]);
    encoder.run("predict --model model --text sea --max-length 41").failed(2, &["max-length", "40"]);
    assert!(!encoder.path("run").exists());

    let decoder = Workshop::new();
    let train = |arguments: &str| decoder.train("run", arguments);
    train("--num-labels 2").failed(2, &["--num-labels", "llama", "BERT"]);
    train("--label-names a,b").failed(2, &["--label-names", "llama"]);
    train("--metrics accuracy").failed(2, &["--metrics", "llama"]);
    train("--metric-for-best-model f1").failed(2, &["--metric-for-best-model", "llama"]);
    train("--modules-to-save lm_head").failed(2, &["--modules-to-save", "llama"]);
    train("--ignore-mismatched-sizes").failed(2, &["--ignore-mismatched-sizes", "llama", "BERT"]);
    train("--head-warmup-steps 2").failed(2, &["--head-warmup-steps", "llama"]);
    decoder.run("predict --model model --text sea").failed(2, &["llama", "lora-sb generate"]);
    assert!(!decoder.path("run").exists());
    train("--metric-for-best-model eval_loss --max-steps 1").ok();
}
