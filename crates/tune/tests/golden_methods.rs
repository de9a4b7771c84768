//! LoRA-XS, LoRA, full fine-tuning and a real PEFT adapter against the golden numbers.

mod common;

use std::path::Path;

use common::device::on_each_device;
use common::*;
use lora_sb_model::{Frozen, Recompute, Storage};
use lora_sb_tune::export::peft;
use lora_sb_tune::{AdapterConfig, InitConfig, Method, Tuned};

fn config(dir: &Path, method: Method, rank: usize, scale: f64) -> AdapterConfig {
    AdapterConfig {
        method,
        rank,
        lora_alpha: scale * rank as f64,
        lora_dropout: 0.0,
        target_modules: golden_targets(dir),
        init: InitConfig::NONE,
        modules_to_save: Vec::new(),
        seed: 1,
    }
}

fn rank(file: &Golden) -> usize {
    file.i64("rank").1[0] as usize
}

/// The largest difference that rounding makes of a gradient, relative to its largest entry, ten times over.
fn gradient_tolerance(dir: &Path) -> f64 {
    10.0 * meta(dir)["f32_vs_f64"]["grad_max_rel_to_tensor_max"].as_f64().unwrap()
}

fn run(tuned: &mut Tuned, dir: &Path) -> Vec<f64> {
    let batches = mean_batches(tuned.model.kernels().as_ref(), &train_batches(dir));
    adamw_losses(tuned, &batches, 20, 1e-3)
}

#[test]
fn golden_lora_xs_from_the_stored_factors() {
    on_each_device(|| {
        for (family, dir) in goldens_with("lora_xs.safetensors") {
            println!("{family}"); // shown where a line below fails
            let xs = Golden::open(&dir.join("lora_xs.safetensors"));
            let model = golden_model(&dir, Storage::Mapped);
            let kernels = model.kernels().clone();
            let mut tensors = named_tensors(&xs, &[("A", "lora_A"), ("B", "lora_B")], kernels.as_ref());
            for module in xs.after("A.") {
                tensors.insert(format!("{module}.lora_R"), kernels.zeros(&[rank(&xs), rank(&xs)]).unwrap());
            }
            let mut tuned =
                Tuned::restore(model, &config(&dir, Method::LoraXs, rank(&xs), 1.0), tensors).unwrap();
            tuned
                .loss_and_gradients(&mean_batch(kernels.as_ref(), &train_batches(&dir)[0]), Recompute::Block)
                .unwrap();
            for (name, gradient) in gradients(&mut tuned) {
                let expected = xs.f32(&format!("R_grad_step0.{}", name.replace(".lora_R", ""))).1;
                assert_near(&name, &gradient, &expected, gradient_tolerance(&dir));
            }
            assert_losses(&run(&mut tuned, &dir), &xs, "losses");
        }
    });
}

#[test]
fn golden_lora_xs_from_our_own_factors() {
    on_each_device(|| {
        for (family, dir) in goldens_with("lora_xs.safetensors") {
            println!("{family}"); // shown where a line below fails
            let xs = Golden::open(&dir.join("lora_xs.safetensors"));
            let gap = meta(&dir)["lora_xs"]["min_rel_gap_within_top_r_plus_1"].as_f64().unwrap();
            let model = golden_model(&dir, Storage::Mapped);
            let mut tuned =
                Tuned::adapt(model, &config(&dir, Method::LoraXs, rank(&xs), 1.0), &[], &mut |_| ()).unwrap();
            for site in tuned.adapter().unwrap().sites() {
                let module = tuned.model.module(site);
                let (out, input) = tuned.model.shape(site);
                // B A is delta for R = 1.
                let name = format!("{module}.lora_R");
                let mut one = vec![0.0; rank(&xs) * rank(&xs)];
                one.iter_mut().step_by(rank(&xs) + 1).for_each(|entry| *entry = 1.0);
                set(&mut tuned, &name, &one);
                let tolerance = rounding(out.max(input)) / gap;
                let expected = xs.f32(&format!("ba.{module}")).1;
                assert_near(&format!("ba.{module}"), &delta(&tuned, site), &expected, tolerance);
                // The golden run starts at R = 0 exactly.
                set(&mut tuned, &name, &vec![0.0; one.len()]);
            }
            assert_losses(&run(&mut tuned, &dir), &xs, "losses");
        }
    });
}

#[test]
fn golden_lora() {
    on_each_device(|| {
        for (family, dir) in goldens_with("lora.safetensors") {
            println!("{family}"); // shown where a line below fails
            let lora = Golden::open(&dir.join("lora.safetensors"));
            for (scale, suffix) in [(1.0, ""), (2.0, "_s2")] {
                let model = golden_model(&dir, Storage::Mapped);
                let kernels = model.kernels().clone();
                let mut tensors = named_tensors(&lora, &[("A", "lora_A")], kernels.as_ref());
                for site in golden_targets(&dir).resolve(model.config()).unwrap() {
                    let zeros = kernels.zeros(&[model.shape(site).0, rank(&lora)]).unwrap();
                    tensors.insert(format!("{}.lora_B", model.module(site)), zeros);
                }
                let mut tuned =
                    Tuned::restore(model, &config(&dir, Method::Lora, rank(&lora), scale), tensors).unwrap();
                let batch = mean_batch(kernels.as_ref(), &train_batches(&dir)[0]);
                tuned.loss_and_gradients(&batch, Recompute::None).unwrap();
                for (name, gradient) in gradients(&mut tuned) {
                    match name.strip_suffix(".lora_B") {
                        Some(module) => {
                            let expected = lora.f32(&format!("B_grad_step0{suffix}.{module}")).1;
                            assert_near(&name, &gradient, &expected, gradient_tolerance(&dir));
                        }
                        // B = 0 lets nothing through to A.
                        None => assert_eq!(largest(&gradient), 0.0, "{name}"),
                    }
                }
                assert_losses(&run(&mut tuned, &dir), &lora, &format!("losses{suffix}"));
                for part in ["A", "B"] {
                    for module in lora.after(&format!("{part}_final{suffix}.")) {
                        let found = tensor(&tuned, &format!("{module}.lora_{part}"));
                        let expected = lora.f32(&format!("{part}_final{suffix}.{module}")).1;
                        assert_final(&format!("{module}.lora_{part}"), &found, &expected);
                    }
                }
            }
        }
    });
}

#[test]
fn golden_full_fine_tuning() {
    on_each_device(|| {
        for (family, dir) in goldens_with("full_ft.safetensors") {
            println!("{family}"); // shown where a line below fails
            let full = Golden::open(&dir.join("full_ft.safetensors"));
            let mut tuned = Tuned::full(golden_model(&dir, Storage::Trainable)).unwrap();
            assert_losses(&run(&mut tuned, &dir), &full, "losses");
            let names = full.after("final.");
            assert_eq!(names.len(), 4);
            for name in names {
                assert_final(&name, &tensor(&tuned, &name), &full.f32(&format!("final.{name}")).1);
            }
        }
    });
}

/// AdamW divides by the gradient's own size: where a gradient is rounding noise, its step may go either way by
/// the learning rate. Such elements are few, and none is further off than a step.
#[track_caller]
fn assert_final(what: &str, found: &[f32], expected: &[f32]) {
    let worst = distance(found, expected);
    assert!(worst <= 1e-3, "{what}: {worst:.3e}");
    let off = found.iter().zip(expected).filter(|(a, b)| (**a - **b).abs() > 1e-5).count();
    assert!(off * 100 <= found.len(), "{what}: {off} of {} differ by more than 1e-5", found.len());
}

#[test]
fn golden_real_peft_adapter() {
    on_each_device(|| {
        for (family, dir) in goldens_with("peft_expected.safetensors") {
            println!("{family}"); // shown where a line below fails
            let adapter = dir.join("peft_adapter");
            let tuned = peft::import(&adapter, golden_model(&dir, Storage::Mapped)).unwrap().tuned;
            let kernels = tuned.model.kernels().clone();
            let inputs = Golden::open(&dir.join("inputs.safetensors"));
            let expected = Golden::open(&dir.join("peft_expected.safetensors"));
            let examples = rows(&inputs, "");
            let batch = mean_batch(kernels.as_ref(), &examples);
            let loss = tuned.loss(&batch).unwrap();
            assert!((loss - f64::from(expected.f32("loss").1[0])).abs() <= 1e-5, "loss {loss}");

            let logits = kernels.to_f32(&tuned.model.logits(&batch, tuned.hook()).unwrap()).unwrap();
            let base = kernels.to_f32(&tuned.model.logits(&batch, &Frozen).unwrap()).unwrap();
            let (shape, padded) = expected.f32("logits");
            let mask = inputs.i64("attention_mask").1;
            // A classifier's are one row for each sequence, a language model's one for each token.
            let expected: Vec<f32> = match shape[..] {
                [_, _, width] => {
                    let real = (0..mask.len()).filter(|&at| mask[at] == 1);
                    real.flat_map(|at| padded[at * width..][..width].to_vec()).collect()
                }
                _ => padded,
            };
            let noise = meta(&dir)["f32_vs_f64"]["logits_max_abs"].as_f64().unwrap();
            let worst = distance(&logits, &expected);
            assert!(worst <= 10.0 * noise, "logits differ by {worst:.3e}");
            assert!(distance(&base, &expected) > 0.01, "the adapter changes nothing");
        }
    });
}
