//! `bench` on tiny models: what is measured is real, and what is printed is complete.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::common::{Workshop, json, json_lines};

/// A measurement that takes a moment.
const SMALL: &str = "--rank 3 --per-device-train-batch-size 2 --max-length 13 --steps 2 --warmup 1 --threads 1 \
     --product-seconds 0";

fn measured(shop: &Workshop, arguments: &str) -> Value {
    json(&shop.run(&format!("bench --model model {SMALL} --json {arguments}")).ok().out)
}

fn number(result: &Value, key: &str) -> f64 {
    result[key].as_f64().unwrap_or_else(|| panic!("{key} in {result}"))
}

#[test]
fn every_method_is_measured_in_full() {
    let shop = Workshop::new();
    for method in ["lora-sb", "lora-xs", "lora", "rslora", "pissa", "dora", "lora-pro", "lora-ga", "full"] {
        let result = measured(&shop, &format!("--method {method}"));
        assert_eq!(result["method"], method);
        for key in [
            "tokens_per_second",
            "slowest",
            "fastest",
            "tokens_per_second_overall",
            "gflops",
            "ceiling_gflops",
            "share",
            "peak_tensor_bytes",
            "ready_s",
            "necessary_flop_per_step",
            "trained",
            "parameters",
        ] {
            assert!(number(&result, key) > 0.0, "{method} {key}: {result}");
        }
        assert_eq!(result["step_tokens"], json("[26, 26]"));
        let losses = result["losses"].as_array().unwrap();
        assert!(losses.len() == 3 && losses.iter().all(|loss| loss.as_f64().unwrap() > 1.0), "{result}");
        assert!(result["decode"].is_null());
    }
}

#[test]
fn the_time_of_a_step_is_broken_down_without_counting_twice() {
    let shop = Workshop::new();
    let result = measured(&shop, "--steps 4");
    let ops = result["ops"].as_array().unwrap();
    let names: BTreeSet<&str> = ops.iter().map(|op| op["op"].as_str().unwrap()).collect();
    for op in ["attention", "attention_backward", "cross_entropy", "adamw", "embedding"] {
        assert!(names.contains(op), "{op} in {names:?}");
    }
    let inside: f64 = ops.iter().map(|op| number(op, "seconds")).sum();
    let steps: f64 = result["step_seconds"].as_array().unwrap().iter().map(|s| s.as_f64().unwrap()).sum();
    #[cfg(target_os = "linux")]
    assert!(
        (0.0..=1.0).contains(&number(&result, "taken_by_others")) && number(&result, "peak_rss_bytes") > 1e6
    );
    let outside = number(&result, "outside_ops_s");
    assert!(outside > 0.0 && (inside + outside - steps / 4.0).abs() < 1e-9, "{inside} {outside} {steps}");
    let adamw = ops.iter().find(|op| op["op"] == "adamw").unwrap();
    assert_eq!(number(adamw, "calls"), 14.0, "one R for each of 2 x 7 layers");
    let by_weight: f64 =
        result["ops_by_weight"].as_array().unwrap().iter().map(|op| number(op, "seconds")).sum();
    assert!((by_weight - inside).abs() < 1e-9);
}

#[test]
fn what_is_computed_depends_on_neither_threads_nor_recomputation() {
    let shop = Workshop::new();
    let plain = measured(&shop, "");
    for arguments in ["--threads 2", "--gradient-checkpointing", "--gradient-checkpointing 1"] {
        assert_eq!(measured(&shop, arguments)["losses"], plain["losses"], "{arguments}");
    }
    let rounded = measured(&shop, "--dtype bf16");
    assert_eq!(rounded["dtype"], "bf16");
    assert_ne!(rounded["losses"], plain["losses"]);
}

#[test]
fn real_examples_are_counted_without_padding_and_written_for_others() {
    let shop = Workshop::new();
    let result = measured(&shop, "--data data.jsonl --max-length 40 --write-batches batches.jsonl");
    let lines = json_lines(&String::from_utf8(shop.read("batches.jsonl")).unwrap());
    assert_eq!(lines.len(), 6, "two examples of three steps");
    let length = |line: &Value| line["ids"].as_array().unwrap().len();
    let tokens: Vec<usize> = [2, 4].map(|at| length(&lines[at]) + length(&lines[at + 1])).to_vec();
    assert_eq!(result["step_tokens"], json(&format!("{tokens:?}")));
    let trained = lines[0]["trained"].as_array().unwrap();
    assert_eq!(trained.len(), length(&lines[0]));
    assert!(trained.contains(&Value::from(0)) && trained.contains(&Value::from(1)), "{}", lines[0]);

    let shop = Workshop::encoder();
    let result = measured(&shop, "--data data.jsonl --write-batches batches.jsonl");
    let lines = json_lines(&String::from_utf8(shop.read("batches.jsonl")).unwrap());
    assert!(lines.iter().all(|line| line["label"].is_u64() && line.get("trained").is_none()));
    assert!(number(&result, "tokens_per_second_overall") > 0.0);
}

#[test]
fn decoding_is_held_against_reading_memory() {
    let shop = Workshop::new();
    let result = measured(&shop, "--steps 0 --decode 5");
    assert!(result["tokens_per_second"].is_null() && result["share"].is_null());
    let decode = &result["decode"];
    let share = number(decode, "tokens_per_second") * number(decode, "weight_bytes")
        / number(decode, "read_bytes_per_second");
    assert!(share > 0.0 && (number(decode, "share") - share).abs() < 1e-9, "{decode}");
    // All but the embedding [420, 16], of which a row is read: f32.
    let weights = number(&result, "parameters") - 420.0 * 16.0;
    assert_eq!(number(decode, "weight_bytes"), 4.0 * weights);
}

#[test]
fn a_preset_or_a_config_alone_gets_random_weights() {
    let shop = Workshop::new();
    let run = shop.run(&format!("bench --model minilm-l6 {SMALL}")).ok();
    for part in
        ["22,713,986 parameters, random weights", "tokens/s", "GFLOP/s of necessary operations", "linear"]
    {
        assert!(run.out.contains(part), "{part}: {}", run.out);
    }
    let result = json(&shop.run(&format!("bench --model model/config.json {SMALL} --json")).ok().out);
    assert_eq!(result["random_weights"], true);
    assert_eq!(measured(&shop, "")["random_weights"], false);
}

#[test]
fn results_are_appended_to_the_records() {
    let shop = Workshop::new();
    let arguments = format!("bench --model model {SMALL} --record new/bench.md");
    assert!(shop.run(&arguments).ok().out.contains("recorded in new/bench.md"));
    shop.run(&format!("{arguments} --method full")).ok();
    let text = String::from_utf8(shop.read("new/bench.md")).unwrap();
    let day = text.strip_prefix("# Benchmarks, ").unwrap().split_once('\n').unwrap().0.to_owned();
    assert!(day.len() == 10 && day.starts_with("20"), "{day}");
    assert!(text.contains(&format!("## model, lora-sb r = 3, f32, {day}")), "{text}");
    assert!(text.contains(&format!("## model, full, f32, {day}")), "{text}");
    for part in
        [&format!("    lora-sb {arguments}\n")[..], "* tokens/s: ", "| attention |", "necessary operations"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(text.matches("# Benchmarks").count(), 1);
    shop.run(&format!("bench --model model {SMALL} --record")).ok();
    assert_eq!(std::fs::read_dir(shop.path("records")).unwrap().count(), 1);
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let shop = Workshop::new();
    shop.run("bench --model llama-7b").failed(2, &["llama-7b", "llama-160m", "gemma-2-9b", "minilm-l6"]);
    for (arguments, code, names) in [
        ("--steps 0", 2, &["--steps 0", "--decode"][..]),
        ("--max-length 1", 2, &["--max-length", "at least 2"]),
        ("--per-device-train-batch-size 0", 2, &["--per-device-train-batch-size"]),
        ("--product-seconds -1", 2, &["--product-seconds"]),
        ("--gradient-checkpointing auto", 2, &["auto", "lora-sb plan"]),
        ("--method all", 2, &["--method all"]),
        ("--decode 1", 2, &["--decode", "at least 2"]),
        ("--rank 17", 1, &["rank", "17", "k_proj"]),
        ("--data no.jsonl", 1, &["no.jsonl"]),
    ] {
        shop.run(&format!("bench --model model {SMALL} {arguments}")).failed(code, names);
    }
    shop.run(&format!("bench --model model/config.json {SMALL} --data data.jsonl"))
        .failed(2, &["--tokenizer"]);
    let shop = Workshop::encoder();
    shop.run(&format!("bench --model model {SMALL} --decode 5")).failed(2, &["--decode", "bert"]);
}
