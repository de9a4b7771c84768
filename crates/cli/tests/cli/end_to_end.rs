//! The commands one after another on a tiny model: what one writes, the next reads.

use crate::common::{Workshop, json};

#[test]
fn train_then_generate_merge_export_inspect() {
    let shop = Workshop::new();
    let run = shop.train("run", "").ok();
    for expected in ["held-out loss", "before", "after", "run/adapter", "peak memory  ", "Files"] {
        assert!(run.out.contains(expected), "{expected:?} is not in {}", run.out);
    }
    assert!(run.err.is_empty(), "{}", run.err);
    let metrics = String::from_utf8(shop.read("run/metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().filter(|line| json(line)["kind"] == "step").count(), 8);

    // The same text from the run, its adapter, its last checkpoint, the merged model and the PEFT adapter.
    let text = |arguments: &str| {
        let arguments = format!("generate {arguments} --prompt river --temperature 0 --max-new-tokens 12");
        shop.run(&arguments).ok().out
    };
    let from_run = text("--adapter run");
    assert!(from_run.starts_with("river") && from_run.len() > "river\n".len(), "{from_run:?}");
    assert_eq!(text("--adapter run/adapter --model model"), from_run);
    assert_eq!(text("--adapter run/checkpoints/step-8"), from_run);
    shop.run("merge --adapter run --out merged").ok();
    assert_eq!(text("--model merged"), from_run);
    shop.run("export --adapter run --format peft --out peft").ok();
    assert_eq!(text("--model model --adapter peft"), from_run);
    assert_ne!(shop.read("merged/model.safetensors"), shop.read("model/model.safetensors"));
    assert!(shop.path("merged/tokenizer.json").exists());
    let kept = json(std::str::from_utf8(&shop.read("merged/config.json")).unwrap());
    assert_eq!(kept["made_by"], "a test");

    let inspect = |dir: &str| json(&shop.run(&format!("inspect {dir} --json")).ok().out);
    let kinds = [
        ("model", "model"),
        ("merged", "model"),
        ("run", "run"),
        ("run/adapter", "adapter"),
        ("run/checkpoints/step-4", "checkpoint"),
        ("peft", "PEFT adapter"),
    ];
    for (dir, kind) in kinds {
        assert_eq!(inspect(dir)["kind"], kind);
        assert!(shop.run(&format!("inspect {dir}")).ok().out.contains(kind));
    }
    assert_eq!(inspect("run")["plan"]["rank"]["source"], "command line");
    assert_eq!(inspect("run/adapter")["base fingerprint"], inspect("model")["fingerprint"]);
}

#[test]
fn full_training_from_random_weights_writes_a_model() {
    let shop = Workshop::new();
    // Only config.json and the tokenizer are read.
    std::fs::remove_file(shop.path("model/model.safetensors")).unwrap();
    shop.train("base", "--method full --random-weights --learning-rate 1e-2").ok();
    shop.run("inspect base/model").ok();
    shop.run("train --model base/model --data data.jsonl --rank 2 --max-steps 1 --output-dir next").ok();
    // A run is a model too, and stays one without its result.
    let from_model = shop.run("generate --model base --prompt sea --temperature 0").ok().out;
    std::fs::remove_dir_all(shop.path("base/model")).unwrap();
    assert_eq!(shop.run("generate --adapter base --prompt sea --temperature 0").ok().out, from_model);
}

#[test]
fn plan_says_what_train_does_and_writes_nothing() {
    let shop = Workshop::new();
    shop.write("recipe.toml", "learning_rate = 3e-3\nrank = 5\n");
    let arguments = format!("plan {} --config recipe.toml", crate::common::SMALL);
    let plan = shop.run(&arguments).ok().out;
    let line = |name: &str| {
        let found = plan.lines().find(|line| line.trim_start().starts_with(name));
        found.unwrap_or_else(|| panic!("{name} is not in {plan}")).to_owned()
    };
    assert!(line("learning_rate").contains("3e-3") && line("learning_rate").contains("recipe.toml:1"));
    // The command line goes before the recipe.
    assert!(line("rank ").contains(" 3 ") && line("rank ").contains("command line"));
    assert!(line("adam_beta2").contains("default"));
    assert!(line("lora_alpha").contains("the rank"));
    // 14 modules x 3 x 3
    assert!(line("trained").contains("126 parameters"), "{plan}");
    assert!(plan.contains('⟦') && plan.contains("at most") | plan.contains("longest"), "{plan}");
    assert!(!shop.path("lora-sb-run").exists());
    let names: Vec<_> = std::fs::read_dir(shop.path("")).unwrap().collect();
    assert_eq!(names.len(), 3, "{names:?}");
}

#[test]
fn the_step_size_of_the_first_update_can_be_chosen() {
    let shop = Workshop::new();
    let eta = |arguments: &str| {
        let plan = shop.run(&format!("plan {} {arguments}", crate::common::SMALL)).ok().out;
        let line = plan.lines().find(|line| line.trim_start().starts_with("init_eta")).unwrap().to_owned();
        line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap()
    };
    // 8 steps, 4 of warm-up: the first has a quarter of the peak.
    assert!((eta("--learning-rate 0.01 --warmup-steps 4") - 0.0025).abs() < 1e-12);
    assert_eq!(eta("--init-eta 0.125"), 0.125);
    // 24 examples in batches of 2 are 12 steps: 0.01 / (0.5 * 12)
    assert!((eta("--learning-rate 0.01 --warmup-ratio 0.5 --init-eta reference") - 0.01 / 6.0).abs() < 1e-12);
    let refused = shop.run(&format!("plan {} --warmup-ratio 0 --init-eta reference", crate::common::SMALL));
    refused.failed(2, &["warmup_ratio"]);
}

#[test]
fn prompts_of_a_file_become_json_lines() {
    let shop = Workshop::new();
    shop.write("prompts.txt", "river\n\nthe \"sea\" — grün\n");
    let arguments = "generate --model model --prompts prompts.txt --max-new-tokens 6";
    let out = shop.run(arguments).ok().out;
    let lines: Vec<_> = out.lines().map(json).collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[1]["prompt"], "the \"sea\" — grün");
    assert!(lines.iter().all(|line| line["completion"].is_string()));
    assert_eq!(shop.run(arguments).ok().out, out, "the same seed gives the same text");
    assert_ne!(shop.run(&format!("{arguments} --seed 43")).ok().out, out);
}

#[test]
fn a_sample_is_shown_before_and_after() {
    let shop = Workshop::new();
    let out = shop.train("run", "--sample-prompt river").ok().out;
    let (before, after) = (out.find("Before\nriver").unwrap(), out.find("After\nriver").unwrap());
    assert!(before < after);
}
