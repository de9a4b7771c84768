//! `--device`: what is asked for, what is found, and a run on the emulated GPU from its plan to its text.

use lora_sb_kernels::{Cuda, DType, Place};

use crate::common::{Run, SMALL, Workshop, json, json_lines};

/// The emulated GPU's name, where the command can have one.
fn emulated() -> Option<&'static str> {
    let there = Cuda::stand_in().unwrap().is_some();
    if !there {
        eprintln!("SKIPPED: no C++ compiler to build the emulated GPU with");
    }
    there.then_some("cuda:emulated")
}

/// A value of a plan that was printed for machines, and where it came from.
fn planned(plan: &serde_json::Value, name: &str) -> (String, String) {
    let found = &plan["plan"][name];
    let text = |key: &str| found[key].as_str().unwrap_or_else(|| panic!("{name} in {plan}")).to_owned();
    (text("value"), text("source"))
}

#[test]
fn the_device_is_a_value_of_the_plan_with_its_source() {
    let shop = Workshop::new();
    let plan = |arguments: &str| json(&shop.run(&format!("plan {SMALL} --json {arguments}")).ok().out);
    let (value, source) = planned(&plan(""), "device");
    assert!(value == "cpu" && source.starts_with("auto: no GPU: "), "{value}, {source}");
    assert_eq!(planned(&plan("--device cpu"), "device"), ("cpu".into(), "command line".into()));
    shop.write("r.toml", "device = \"cpu\"\n");
    assert_eq!(planned(&plan("--config r.toml"), "device"), ("cpu".into(), "r.toml:1".into()));
    let shown = shop.run(&format!("plan {SMALL}")).ok().out;
    assert!(shown.contains("device") && shown.contains("cpu (1 threads); no GPU: "), "{shown}");
}

#[test]
fn a_device_that_is_none_or_not_there_is_refused() {
    let shop = Workshop::new();
    for command in
        ["plan --model model --data data.jsonl", "generate --model model --prompt x", "bench --model model"]
    {
        for name in ["gpu", "cuda:x", "cpu:1"] {
            let run = shop.run(&format!("{command} --device {name}"));
            assert_eq!(run.code, Some(2), "{}", run.err);
            assert!(run.err.contains("--device") && run.err.contains("auto, cpu, or cuda:N"), "{}", run.err);
        }
        shop.run(&format!("{command} --device cuda:7"))
            .failed(1, &["--device cuda:7", "--device cpu computes"]);
    }
}

#[test]
fn a_gpus_memory_is_planned_as_what_its_driver_has_free() {
    let (shop, Some(gpu)) = (Workshop::new(), emulated()) else { return };
    let plan = |arguments: &str| {
        json(&shop.run(&format!("plan {SMALL} --device {gpu} --json {arguments}")).ok().out)
    };
    let found = plan("");
    let (memory, number) = (&found["memory"], |key: &str| found["memory"][key].as_u64().unwrap() as usize);
    let overhead = Place::Cuda.overhead_bytes().unwrap();
    assert_eq!((number("process"), number("limit")), (overhead, overhead + (16 << 30)), "{memory}");
    // The vocabulary's table and five gains as they are in the file; the head and two blocks' matrices rounded.
    let (held, rounded) = (|n| Place::Cuda.bytes(n), |n| Place::Cuda.bytes_of(DType::Bf16, n));
    let block = 2 * rounded(16 * 16) + 2 * rounded(8 * 16) + 3 * rounded(24 * 16);
    assert_eq!(number("weights"), held(420 * 16) + 5 * held(16) + rounded(420 * 16) + 2 * block);
    assert_eq!(planned(&found, "dtype"), ("bf16".into(), format!("what {gpu} multiplies fastest")));
    assert_eq!(planned(&plan("--dtype f32"), "dtype").0, "f32");
    let refused = shop.run(&format!("plan {SMALL} --device {gpu} --memory-limit 1MiB"));
    refused.failed(1, &["driver", "no single setting is enough", "--device cpu"]);
}

/// The losses of a run's steps.
fn losses(shop: &Workshop, run: &str) -> Vec<f64> {
    let lines = json_lines(&String::from_utf8(shop.read(format!("{run}/metrics.jsonl"))).unwrap());
    let steps = lines.iter().filter(|line| line["kind"] == "step");
    steps.map(|line| line["loss"].as_f64().unwrap()).collect()
}

#[test]
fn a_run_on_the_emulated_gpu_is_that_of_the_processor_within_rounding() {
    let (shop, Some(gpu)) = (Workshop::new(), emulated()) else { return };
    let out = shop.train("gpu", &format!("--device {gpu} --dtype f32")).ok().out;
    assert!(out.contains("cuda:0 (emulator"), "{out}");
    shop.train("cpu", "--device cpu").ok();
    let (found, expected) = (losses(&shop, "gpu"), losses(&shop, "cpu"));
    assert_eq!(found.len(), 8);
    for (found, expected) in found.iter().zip(&expected) {
        assert!((found - expected).abs() < 1e-3 * expected, "{found} for {expected}");
    }

    // What was trained on one is used on the other, and says the same.
    let text = |arguments: &str| {
        let run = shop
            .run(&format!("generate {arguments} --prompt 1 --temperature 0 --max-new-tokens 4 --dtype f32"));
        run.ok().out
    };
    assert_eq!(text(&format!("--adapter gpu --device {gpu}")), text("--adapter gpu --device cpu"));
    for device in [gpu, "cpu"] {
        let merged = format!("merged-{}", device.replace(':', "-"));
        shop.run(&format!("merge --adapter gpu --out {merged} --device {device}")).ok();
        shop.run(&format!("verify --adapter gpu --exported {merged} --device {gpu}")).ok();
    }
}

#[test]
fn a_run_that_goes_on_elsewhere_says_so_and_one_that_stays_ends_in_the_same_bits() {
    let (shop, Some(gpu)) = (Workshop::new(), emulated()) else { return };
    shop.train("whole", &format!("--device {gpu}")).ok();
    shop.train("run", &format!("--device {gpu}")).ok();
    let forget = || {
        for step in ["step-6", "step-8"] {
            std::fs::remove_dir_all(shop.path("run/checkpoints").join(step)).unwrap();
        }
    };
    forget();
    let Run { err, out, .. } = shop.run("train --resume run").ok();
    assert!(out.contains("cuda:0") && !err.contains("the run began on"), "{out}\n{err}");
    let adapter = "adapter/adapter.safetensors";
    assert!(shop.read(format!("run/{adapter}")) == shop.read(format!("whole/{adapter}")));
    forget();
    let err = shop.run("train --resume run --device cpu").ok().err;
    assert!(err.contains("the run began on cuda:emulated and goes on on cpu"), "{err}");
}

#[test]
fn a_bench_on_the_emulated_gpu_counts_its_operations_apart() {
    let (shop, Some(gpu)) = (Workshop::new(), emulated()) else { return };
    let arguments =
        "--rank 3 --per-device-train-batch-size 2 --max-length 13 --steps 2 --warmup 1 --product-seconds 0";
    let result = json(&shop.run(&format!("bench --model model {arguments} --device {gpu} --json")).ok().out);
    let number = |key: &str| result[key].as_f64().unwrap_or_else(|| panic!("{key} in {result}"));
    assert_eq!((result["dtype"].as_str(), result["steps"].as_u64()), (Some("bf16"), Some(2)));
    assert_eq!(result["losses"].as_array().unwrap().len(), 3);
    let (tensors, planned) = (number("peak_tensor_bytes"), number("planned_bytes"));
    assert!(tensors > 0.0 && tensors + number("device_overhead_bytes") <= planned, "{result}");
    let ops = result["ops"].as_array().unwrap();
    let calls = |name: &str| {
        let op = ops.iter().find(|op| op["op"] == name).unwrap_or_else(|| panic!("{name} in {result}"));
        op["calls"].as_f64().unwrap()
    };
    assert_eq!((calls("adamw"), calls("cross_entropy"), calls("sums_of_squares")), (14.0, 1.0, 1.0));
    assert!(number("outside_ops_s") > 0.0);
}
