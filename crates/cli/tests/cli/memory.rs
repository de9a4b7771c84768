//! The memory that `plan` foretells, against the peak that the system counts for the process.

use serde_json::{Value, json as to_json};

use crate::common::{Workshop, json};

/// The largest part by which the two may differ.
const BOUND: f64 = 0.1;

/// "... peak memory 188.1 MiB, planned 188.9 MiB": measured and planned.
fn peaks(out: &str) -> (f64, f64) {
    let line = out.lines().find(|line| line.starts_with("  peak memory ")).unwrap_or_else(|| panic!("{out}"));
    let (measured, planned) = line.split_once(", planned ").unwrap();
    let number = |words: &str| {
        let words: Vec<&str> = words.split_whitespace().collect();
        let at = words.iter().position(|&word| word == "MiB").unwrap_or_else(|| panic!("{line}"));
        words[at - 1].parse().unwrap()
    };
    (number(measured), number(planned))
}

/// One step of the built-in model, wide enough for its tensors to outweigh the process.
#[test]
fn the_planned_peak_is_the_measured_one() {
    let shop = plays();
    let shapes = [
        "--method lora-sb --rank 16 --max-length 200 --per-device-train-batch-size 6 --init-samples 9",
        "--method lora --rank 16 --max-length 509 --per-device-train-batch-size 4 --gradient-checkpointing true",
        "--method full --max-length 128 --per-device-train-batch-size 3",
        "--method lora-sb --rank 16 --max-length 256 --per-device-train-batch-size 8 --init-samples 9 --dtype bf16",
        "--method lora --rank 8 --max-length 256 --per-device-train-batch-size 8 --gradient-checkpointing 2 \
         --loss-chunk 100",
    ];
    for (index, shape) in shapes.into_iter().enumerate() {
        let run = shop.run(&format!(
            "train --model built-in --data plays.txt --output-dir run-{index} --max-steps 1 --threads 2 \
             --gradient-accumulation-steps 1 {shape}"
        ));
        let run = run.ok();
        let (measured, planned) = peaks(&run.out);
        let ratio = planned / measured;
        println!("{shape}: planned {planned} MiB, measured {measured} MiB, {ratio:.3}");
        assert!((ratio - 1.0).abs() <= BOUND, "{shape}: planned {planned} MiB, measured {measured} MiB");
        assert!(!run.err.contains("were planned"), "{}", run.err);
        let rehearsed = run.out.find("longest micro-batch (").unwrap_or_else(|| panic!("{}", run.out));
        assert!(rehearsed < run.out.find("step 1/1").unwrap(), "{}", run.out);
        let metrics = String::from_utf8(shop.read(format!("run-{index}/metrics.jsonl"))).unwrap();
        let last = json(metrics.lines().last().unwrap());
        assert_eq!(last["kind"], "memory");
        let mebibytes = |key: &str| last[key].as_f64().unwrap() / f64::from(1 << 20);
        assert!((mebibytes("peak_bytes") - measured).abs() < 0.1, "{last}");
        assert!((mebibytes("planned_bytes") - planned).abs() < 0.1, "{last}");
    }
}

/// Long examples of the built-in model's: activations are the most of it.
const LONG: &str = "--model built-in --data plays.txt --method lora --rank 8 --max-length 400 \
                    --per-device-train-batch-size 8 --gradient-accumulation-steps 1 --max-steps 1 --threads 1";

fn plays() -> Workshop {
    let shop = Workshop::new();
    let text = include_str!("../../../../assets/shakespeare.txt");
    shop.write("plays.txt", &text[..60_000]);
    shop
}

#[test]
fn a_run_is_laid_out_for_the_memory_that_it_may_take() {
    let shop = plays();
    let planned = |arguments: &str| json(&shop.run(&format!("plan {LONG} --json {arguments}")).ok().out);
    let peak = |plan: &Value| plan["memory"]["peak"].as_u64().unwrap();
    let value = |plan: &Value, name: &str| plan["plan"][name]["value"].clone();
    let free = planned("--memory-limit 900GiB");
    assert_eq!(value(&free, "gradient_checkpointing"), false);
    let all = planned("--gradient-checkpointing true");
    assert!(peak(&all) < peak(&free));

    let between = (peak(&all) + peak(&free)) / 2;
    let some = planned(&format!("--memory-limit {between}"));
    assert!(peak(&some) <= between, "{some}");
    let blocks = value(&some, "gradient_checkpointing").as_u64().unwrap_or_else(|| panic!("{some}"));
    assert!((1..5).contains(&blocks), "{some}");
    assert!(some["plan"]["gradient_checkpointing"]["source"].as_str().unwrap().starts_with("auto"), "{some}");
    assert_eq!(some["memory"]["limit"].as_u64(), Some(between));
    // What was chosen can be given, and is the same then.
    let given = planned(&format!("--gradient-checkpointing {blocks}"));
    assert_eq!(given["memory"]["activations"], some["memory"]["activations"]);

    let text = shop.run(&format!("plan {LONG} --memory-limit {between} --loss-chunk 50")).ok().out;
    for part in ["of 5 blocks computed again", "the loss of 50 tokens at a time", "that it may take"] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
}

#[test]
fn a_run_that_cannot_fit_is_refused_before_it_begins_and_says_what_would() {
    let shop = plays();
    let plan = json(
        &shop.run(&format!("plan {LONG} --json --gradient-checkpointing true --loss-chunk 16")).ok().out,
    );
    let least = plan["memory"]["peak"].as_u64().unwrap();
    let limit = format!("--memory-limit {}", least * 97 / 100);
    for command in ["plan", "train"] {
        let refused = shop.run(&format!("{command} {LONG} {limit} --output-dir never"));
        let refused = refused.failed(1, &["the run takes", "more than the", "activations", "peak"]);
        let way = refused.err.find("--per-device-train-batch-size 4 with --gradient-accumulation-steps 2");
        assert!(way.is_some_and(|way| way > refused.err.find("hint: ").unwrap()), "{}", refused.err);
        assert!(!shop.path("never").exists());
    }
    // What is said to be enough is enough.
    shop.run(&format!("plan {LONG} {limit} --per-device-train-batch-size 4 --gradient-accumulation-steps 2"))
        .ok();
    let given = shop.run(&format!("plan {LONG} {limit} --gradient-checkpointing false"));
    given.failed(1, &["the run takes"]);
    let hopeless = shop.run(&format!("train {LONG} --memory-limit 1MiB --output-dir never"));
    hopeless.failed(1, &["no single setting is enough", "smaller model"]);
    for wrong in ["--memory-limit 4gigs", "--gradient-checkpointing some", "--dtype f16", "--loss-chunk few"]
    {
        let run = shop.run(&format!("plan {LONG} {wrong}"));
        assert_eq!(run.code, Some(2), "{}", run.err);
    }
}

#[test]
fn a_resumed_run_keeps_its_type_and_its_layout() {
    let shop = Workshop::new();
    let given = "--dtype bf16 --gradient-checkpointing 1 --loss-chunk 7";
    shop.train("whole", given).ok();
    shop.train("run", given).ok();
    for step in ["step-6", "step-8"] {
        std::fs::remove_dir_all(shop.path("run/checkpoints").join(step)).unwrap();
    }
    let resumed = shop.run("train --resume run").ok();
    assert!(
        resumed.out.contains("bf16") && resumed.out.contains("1 of 2 blocks computed again"),
        "{}",
        resumed.out
    );
    assert!(!resumed.out.contains("rehearsed"), "{}", resumed.out);
    let plan = json(&String::from_utf8(shop.read("run/plan.json")).unwrap());
    for (name, value) in
        [("dtype", to_json!("bf16")), ("gradient_checkpointing", to_json!(1)), ("loss_chunk", to_json!(7))]
    {
        assert_eq!(plan["values"][name]["value"], value);
    }
    let adapter = "adapter/adapter.safetensors";
    assert!(shop.read(format!("run/{adapter}")) == shop.read(format!("whole/{adapter}")));
    shop.run("train --resume run --dtype f32").failed(1, &["dtype: \"bf16\", now \"f32\""]);
    // No bit depends on which blocks are computed again.
    shop.run("train --resume run --gradient-checkpointing auto").ok();
    // What was trained in bf16 is used in either type.
    for dtype in ["", "--dtype bf16"] {
        shop.run(&format!("generate --adapter run --prompt x --max-new-tokens 2 {dtype}")).ok();
    }
}

#[test]
fn a_type_that_would_be_faster_is_pointed_at_where_there_is_one() {
    let shop = Workshop::new();
    let prefers = lora_sb_kernels::Cpu::new(1).map(|cpu| lora_sb_kernels::Kernels::prefers(&cpu)).unwrap();
    let out = shop.train("run", "").ok().out;
    assert_eq!(out.contains("--dtype bf16"), prefers == lora_sb_kernels::DType::Bf16, "{out}");
    assert!(!shop.train("other", "--dtype bf16").ok().out.contains("--dtype bf16"));
}
