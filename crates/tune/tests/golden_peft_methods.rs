//! rsLoRA, DoRA, PiSSA and LoRA-GA against the real PEFT's numbers.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::device::on_each_device;
use common::*;
use lora_sb_kernels::{Kernels, Tensor};
use lora_sb_model::{Batch, Recompute, Storage};
use lora_sb_tune::{AdapterConfig, Convention, InitConfig, Method, Targets, Tuned};
use serde_json::Value;

/// The folder of a method and the family's own, or `None` with a line.
fn folder(method: Method) -> Option<(PathBuf, PathBuf)> {
    let family = golden("llama")?;
    let dir = family.join("peft_methods").join(method.name().replace('-', "_"));
    if dir.join("expected.safetensors").is_file() {
        return Some((dir, family));
    }
    say(&format!("SKIPPED golden {method}: {} is missing", dir.display()));
    None
}

/// What `peft_methods/meta.json` says of a method.
fn noise(dir: &Path) -> Value {
    let bytes = std::fs::read(dir.join("../meta.json")).unwrap();
    let all: Value = serde_json::from_slice(&bytes).unwrap();
    all[dir.file_name().unwrap().to_str().unwrap()].clone()
}

/// The adapter that PEFT's configuration describes.
fn config(method: Method, dir: &Path) -> AdapterConfig {
    let bytes = std::fs::read(dir.join("adapter/adapter_config.json")).unwrap();
    let written: Value = serde_json::from_slice(&bytes).unwrap();
    let names = written["target_modules"].as_array().unwrap().iter().map(|name| name.as_str().unwrap());
    AdapterConfig {
        method,
        rank: written["r"].as_u64().unwrap() as usize,
        lora_alpha: written["lora_alpha"].as_f64().unwrap(),
        lora_dropout: 0.0,
        target_modules: Targets::Names(names.map(str::to_owned).collect()),
        init: InitConfig::NONE,
        modules_to_save: Vec::new(),
        seed: 1,
    }
}

/// The tensors of PEFT's file under the names that they have here.
fn adapter_tensors(dir: &Path, kernels: &dyn Kernels) -> BTreeMap<String, Tensor> {
    let file = Golden::open(&dir.join("adapter/adapter_model.safetensors"));
    let one = |name: String| {
        let (shape, values) = file.f32(&format!("base_model.model.{name}"));
        let own = name.strip_suffix(".weight").unwrap_or(&name);
        (own.to_owned(), kernels.from_f32(&values, &shape).unwrap())
    };
    file.after("base_model.model.").into_iter().map(one).collect()
}

fn inputs(family: &Path, kernels: &dyn Kernels) -> Batch {
    mean_batch(kernels, &rows(&Golden::open(&family.join("inputs.safetensors")), ""))
}

/// Holds the logits and the loss of the inputs against the expected ones, by the measured noise.
fn assert_outputs(tuned: &Tuned, family: &Path, expected: &Golden, noise: &Value) {
    let kernels = tuned.model.kernels();
    let batch = inputs(family, kernels.as_ref());
    let loss = tuned.loss(&batch).unwrap();
    let off = (loss - f64::from(expected.f32("loss").1[0])).abs();
    assert!(off <= 10.0 * noise["f32_vs_f64"]["loss_abs"].as_f64().unwrap(), "the loss is off by {off:.2e}");

    let logits = kernels.to_f32(&tuned.model.logits(&batch, tuned.hook()).unwrap()).unwrap();
    let (shape, padded) = expected.f32("logits");
    let mask = Golden::open(&family.join("inputs.safetensors")).i64("attention_mask").1;
    let real = (0..mask.len()).filter(|&at| mask[at] == 1);
    let expected: Vec<f32> = real.flat_map(|at| padded[at * shape[2]..][..shape[2]].to_vec()).collect();
    let worst = distance(&logits, &expected);
    let tolerance = 10.0 * noise["f32_vs_f64"]["logits_max_abs"].as_f64().unwrap();
    assert!(worst <= tolerance, "logits are off by {worst:.2e}, the tolerance is {tolerance:.2e}");
}

/// Steps of the golden run: the loss before each and after the last.
fn run(tuned: &mut Tuned, family: &Path, steps: usize) -> Vec<f64> {
    let batches = mean_batches(tuned.model.kernels().as_ref(), &train_batches(family));
    adamw_losses(tuned, &batches, steps, 1e-3)
}

#[test]
fn golden_llama_peft_adapters_and_their_gradients() {
    on_each_device(|| {
        for method in [Method::RsLora, Method::Dora] {
            let Some((dir, family)) = folder(method) else { continue };
            let (expected, noise) = (Golden::open(&dir.join("expected.safetensors")), noise(&dir));
            let model = golden_model(&family, Storage::Mapped);
            let kernels = model.kernels().clone();
            let tensors = adapter_tensors(&dir, kernels.as_ref());
            let mut tuned = Tuned::restore(model, &config(method, &dir), tensors).unwrap();
            assert_outputs(&tuned, &family, &expected, &noise);

            tuned.loss_and_gradients(&inputs(&family, kernels.as_ref()), Recompute::Block).unwrap();
            let tolerance = 10.0 * noise["f32_vs_f64"]["grad_max_rel_to_tensor_max"].as_f64().unwrap();
            let found = gradients(&mut tuned);
            assert_eq!(found.len(), expected.after("grad.").len());
            for (name, gradient) in found {
                let weight = if name.ends_with("lora_magnitude_vector") { "" } else { ".weight" };
                let expected = expected.f32(&format!("grad.base_model.model.{name}{weight}")).1;
                assert!(largest(&expected) > 0.0, "{name} is no test");
                assert_near(&format!("{method}: {name}"), &gradient, &expected, tolerance);
            }
            assert_losses(&run(&mut tuned, &family, 10), &expected, "losses");
        }
    });
}

/// The update after five steps against the adapter that PEFT made of its own five, which is relative to W0.
fn assert_converted(tuned: &Tuned, family: &Path, dir: &Path, expected: &Golden) {
    let model = golden_model(family, Storage::Mapped);
    let tensors = adapter_tensors(dir, model.kernels().as_ref());
    let converted = Tuned::restore(model, &config(Method::Lora, dir), tensors).unwrap();
    assert_outputs(&converted, family, expected, &noise(dir));
    for site in converted.adapter().unwrap().sites() {
        let (found, expected) = (delta(tuned, site), delta(&converted, site));
        // Where a gradient is rounding noise, AdamW may step by the learning rate either way: few such elements of
        // A or B, each a small part of a row or column of the product.
        let worst = distance(&found, &expected);
        assert!(worst <= 2e-2 * largest(&expected), "{site}: {worst:.2e} of {:.2e}", largest(&expected));
        let off = found.iter().zip(&expected).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        let size = expected.iter().map(|b| f64::from(*b).powi(2)).sum::<f64>();
        assert!(off <= 1e-6 * size, "{site}: {:.2e} of the update's norm", (off / size).sqrt());
    }
}

/// The settings of a start that PEFT converted to twice its rank.
fn started(method: Method, dir: &Path) -> AdapterConfig {
    let (noise, config) = (noise(dir), config(method, dir));
    let rank = noise["r"].as_u64().unwrap() as usize;
    assert_eq!(config.rank, 2 * rank);
    AdapterConfig { rank, lora_alpha: noise["lora_alpha"].as_f64().unwrap(), ..config }
}

#[test]
fn golden_llama_peft_pissa() {
    on_each_device(|| {
        let Some((dir, family)) = folder(Method::Pissa) else { return };
        let expected = Golden::open(&dir.join("expected.safetensors"));
        let config = started(Method::Pissa, &dir);
        let start =
            || Tuned::adapt(golden_model(&family, Storage::Mapped), &config, &[], &mut |_| ()).unwrap();
        let mut tuned = start();
        for site in tuned.adapter().unwrap().sites() {
            let module = tuned.model.module(site);
            let kernels = tuned.model.kernels();
            let of = |part: &str, shape: [usize; 2]| {
                kernels.from_f32(&tensor(&tuned, &format!("{module}.{part}")), &shape).unwrap()
            };
            let (out, input) = tuned.model.shape(site);
            let (a, b) = (of("lora_A", [config.rank, input]), of("lora_B", [out, config.rank]));
            let mut ba = kernels.empty(&[out, input]).unwrap();
            kernels.linear_input_gradient(&b, &a, 1.0, lora_sb_kernels::Accum::Replace, &mut ba).unwrap();
            let expected = expected.f32(&format!("start.ba.{module}")).1;
            assert_near(&module, &kernels.to_f32(&ba).unwrap(), &expected, 20.0 * rounding(out.max(input)));
        }
        assert_losses(&run(&mut tuned, &family, 10), &expected, "losses");
        let mut tuned = start();
        run(&mut tuned, &family, 5);
        assert_converted(&tuned, &family, &dir, &expected);
    });
}

#[test]
fn golden_llama_peft_lora_ga() {
    on_each_device(|| {
        let Some((dir, family)) = folder(Method::LoraGa) else { return };
        let expected = Golden::open(&dir.join("expected.safetensors"));
        let config = started(Method::LoraGa, &dir);
        let init = InitConfig {
            convention: Convention::Reference { batch_size: 3 },
            eta: 1.0,
            max_tokens: 64,
            blocks_at_once: None,
            ..InitConfig::NONE
        };
        let ours = AdapterConfig { init, ..config.clone() };
        let examples = train_batches(&family).concat();
        let ours =
            Tuned::adapt(golden_model(&family, Storage::Mapped), &ours, &examples, &mut |_| ()).unwrap();
        // Directions are PEFT's; the size of B is the paper's, and PEFT's another.
        let gap = noise(&dir)["min_rel_gap_within_top_2r_plus_1"].as_f64().unwrap();
        for module in expected.after("start.A.") {
            let (shape, theirs) = expected.f32(&format!("start.A.{module}"));
            let a = tensor(&ours, &format!("{module}.lora_A"));
            assert_directions(&module, &a, &theirs, shape[1], rounding(shape[1]) / gap);
            let (shape, theirs) = expected.f32(&format!("start.B.{module}"));
            let columns = |values: &[f32]| -> Vec<f32> {
                (0..values.len()).map(|at| values[at % shape[0] * shape[1] + at / shape[0]]).collect()
            };
            let b = tensor(&ours, &format!("{module}.lora_B"));
            assert_directions(&module, &columns(&b), &columns(&theirs), shape[0], rounding(shape[0]) / gap);
        }

        let start = || {
            let model = golden_model(&family, Storage::Mapped);
            let kernels = model.kernels().clone();
            let parts = [("A", "lora_A"), ("B", "lora_B"), ("A", "lora_A_start"), ("B", "lora_B_start")];
            let mut tensors = BTreeMap::new();
            for (factor, part) in parts {
                for module in expected.after(&format!("start.{factor}.")) {
                    let (shape, values) = expected.f32(&format!("start.{factor}.{module}"));
                    tensors.insert(format!("{module}.{part}"), kernels.from_f32(&values, &shape).unwrap());
                }
            }
            Tuned::restore(model, &config, tensors).unwrap()
        };
        assert_losses(&run(&mut start(), &family, 10), &expected, "losses");
        let mut tuned = start();
        run(&mut tuned, &family, 5);
        assert_converted(&tuned, &family, &dir, &expected);
    });
}

/// Rows that are multiples of each other, of either sign.
#[track_caller]
fn assert_directions(what: &str, found: &[f32], expected: &[f32], width: usize, tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    for (row, (a, b)) in found.chunks_exact(width).zip(expected.chunks_exact(width)).enumerate() {
        let cosine = dot(a, b).abs() / (dot(a, a) * dot(b, b)).sqrt();
        // A small angle's cosine is 1 less half its square.
        assert!(
            1.0 - cosine <= tolerance * tolerance + 1e-9,
            "{what}: direction {row} has the cosine {cosine}"
        );
    }
}
