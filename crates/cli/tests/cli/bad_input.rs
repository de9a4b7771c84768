//! What is wrong is said: exit code, the thing by its name, and how to mend it. Never a panic.

use crate::common::{SMALL, Workshop, replace};

/// A run of the small settings on other data.
fn train_on(shop: &Workshop, data: &str) -> crate::common::Run {
    let arguments = SMALL.replace("--data data.jsonl", &format!("--data {data}"));
    shop.run(&format!("train {arguments} --output-dir run"))
}

/// Copies the model, changes its weight file, and trains on it.
fn train_with_weights(change: impl FnOnce(&mut Vec<u8>)) -> crate::common::Run {
    let shop = Workshop::new();
    let mut bytes = shop.read("model/model.safetensors");
    change(&mut bytes);
    shop.write("model/model.safetensors", bytes);
    shop.train("run", "")
}

#[test]
fn missing_files() {
    let shop = Workshop::new();
    train_on(&shop, "none.jsonl").failed(1, &["none.jsonl"]);
    shop.run("train --model nowhere --data data.jsonl --output-dir run").failed(1, &["nowhere"]);
    shop.run("generate --adapter nowhere --prompt x").failed(1, &["nowhere"]);
    shop.run("generate --model model --prompts none.txt").failed(1, &["none.txt"]);
    shop.run("inspect nowhere").failed(1, &["nowhere"]);
    shop.run("merge --adapter nowhere --out out").failed(1, &["nowhere"]);
    shop.run("export --adapter nowhere --out out").failed(1, &["nowhere"]);
    shop.run("inspect data.jsonl").failed(1, &["data.jsonl", "directory"]);
    std::fs::remove_file(shop.path("model/tokenizer.json")).unwrap();
    shop.train("run", "").failed(1, &["tokenizer.json"]);
    assert!(!shop.path("run").exists());
}

#[test]
fn a_broken_json_line() {
    let shop = Workshop::new();
    let text = crate::common::records(4) + "{\"prompt\": \"a\", \"completion\": }\n";
    shop.write("broken.jsonl", text);
    train_on(&shop, "broken.jsonl").failed(1, &["broken.jsonl:5"]);
    shop.write("field.jsonl", crate::common::records(2) + "{\"prompt\": \"a\"}\n");
    train_on(&shop, "field.jsonl").failed(1, &["field.jsonl:3", "completion"]);
}

#[test]
fn a_wrong_dtype() {
    let run = train_with_weights(|bytes| replace(bytes, "\"dtype\":\"F32\"", "\"dtype\":\"I32\""));
    run.failed(1, &["model.safetensors", "I32", "tensor"]);
}

#[test]
fn a_truncated_safetensors_file() {
    train_with_weights(|bytes| bytes.truncate(bytes.len() - 100)).failed(1, &["model.safetensors"]);
    train_with_weights(|bytes| bytes.truncate(5)).failed(1, &["model.safetensors"]);
    train_with_weights(Vec::clear).failed(1, &["model.safetensors"]);
}

#[test]
fn a_missing_tensor() {
    let run = train_with_weights(|bytes| replace(bytes, "layers.1.mlp.up_proj", "layers.1.mlp.xp_proj"));
    run.failed(1, &["model.safetensors", "model.layers.1.mlp.up_proj.weight"]);
}

#[test]
fn an_unknown_architecture() {
    let shop = Workshop::new();
    shop.write("model/config.json", crate::common::config(420).replace("\"llama\"", "\"mamba\""));
    shop.train("run", "").failed(1, &["config.json", "mamba", "llama"]);
    shop.write("model/config.json", "{ not json");
    shop.train("run", "").failed(1, &["config.json:1"]);
}

#[test]
fn unknown_targets_and_ranks_that_do_not_fit() {
    let shop = Workshop::new();
    shop.train("run", "--target-modules q_prj,v_proj").failed(1, &["q_prj", "q_proj"]);
    // The keys of one head of 8.
    shop.train("run", "--rank 9").failed(1, &["rank 9", "k_proj"]);
    shop.run(&format!("plan {SMALL} --rank 9")).failed(1, &["rank 9", "k_proj"]);
    shop.train("run", "--rank 0").failed(1, &["rank"]);
    assert!(!shop.path("run").exists(), "nothing is written for a run that cannot be");
}

#[test]
fn data_without_anything_to_train() {
    let shop = Workshop::new();
    shop.write("empty.jsonl", "\n\n");
    train_on(&shop, "empty.jsonl").failed(1, &["empty.jsonl"]);
    let long = "word ".repeat(60);
    shop.write("masked.jsonl", format!("{{\"prompt\": \"{long}\", \"completion\": \"x\"}}\n"));
    train_on(&shop, "masked.jsonl").failed(1, &["masked.jsonl:1", "trained token"]);
    shop.train("run", "--val-set-size 29").failed(1, &["29"]);
}

#[test]
fn a_tokenizer_of_another_model() {
    let shop = Workshop::new();
    shop.write_model("small", 150);
    let arguments = SMALL.replace("--model model", "--model small");
    let run = shop.run(&format!("train {arguments} --output-dir run"));
    run.failed(1, &["150", "420", "data.jsonl:1"]);
    shop.run("generate --model small --prompt river").failed(1, &["150", "420"]);
    assert!(!shop.path("run").exists());
}

#[test]
fn resuming_with_a_changed_plan() {
    let shop = Workshop::new();
    shop.train("run", "").ok();
    let resume = |arguments: &str| shop.run(&format!("train --resume run {arguments}"));
    resume("--learning-rate 0.5").failed(1, &["learning_rate", "0.5"]);
    resume("--rank 2").failed(1, &["rank", "3", "2"]);
    // Where and how often is not what.
    resume("--logging-steps 1 --save-steps 3 --threads 2").ok();
    shop.write("data.jsonl", crate::common::records(29).replace("river", "garden"));
    resume("").failed(1, &["data"]);
    shop.run("train --resume latest --output-dir nothing").failed(1, &["nothing"]);
    let state = shop.path("run/checkpoints/step-8/state.json");
    std::fs::write(&state, "{}").unwrap();
    shop.run("train --resume run/checkpoints/step-8").failed(1, &["state.json"]);
}

#[test]
fn what_is_there_is_not_overwritten() {
    let shop = Workshop::new();
    shop.train("run", "").ok();
    let before = shop.read("run/plan.json");
    shop.train("run", "--rank 2").failed(1, &["run", "--resume"]);
    assert_eq!(shop.read("run/plan.json"), before);
    shop.train("model", "").failed(1, &["model", "--output-dir"]);
    for command in ["merge", "export"] {
        shop.run(&format!("{command} --adapter run --out model")).failed(1, &["model", "--out"]);
    }
}

#[test]
fn an_adapter_on_another_base() {
    let shop = Workshop::new();
    shop.train("run", "").ok();
    shop.write_model("other", 421);
    shop.run("generate --model other --adapter run --prompt x").failed(1, &["run/adapter"]);
    shop.run("merge --model other --adapter run --out merged").failed(1, &["run/adapter"]);
    assert!(!shop.path("merged").exists());
}

#[test]
fn arguments_and_recipes_that_make_no_sense() {
    let shop = Workshop::new();
    shop.write("recipe.toml", "rank = 4\nlerning_rate = 1e-3\n");
    shop.train("run", "--config recipe.toml")
        .failed(2, &["recipe.toml:2", "lerning_rate", "`learning_rate`"]);
    shop.write("recipe.toml", "method = \"lora-bs\"\n");
    shop.train("run", "--config recipe.toml").failed(2, &["recipe.toml:1", "method", "lora-sb"]);
    shop.run("train --model model").failed(2, &["--data"]);
    shop.train("run", "--validation-data data.jsonl").failed(2, &["--val-set-size"]);
    shop.train("run", "--learning-rate -1").failed(1, &["learning_rate"]);
    shop.train("run", "--max-length 1").failed(1, &["max_length"]);
    shop.run("generate --model model --prompt x --temperature -1").failed(2, &["temperature"]);
    shop.run("generate --model model --prompt x --top-p 2").failed(2, &["top-p"]);
    // clap's own, with its suggestion.
    let typed = shop.run("train --lerning-rate 1");
    assert_eq!(typed.code, Some(2));
    assert!(typed.err.contains("--learning-rate"), "{}", typed.err);
}
