//! LoRA-SB against the golden numbers: the gradient, its sign, the factors, and a run of 20 steps.

mod common;

use std::collections::BTreeMap;
use std::path::PathBuf;

use common::device::on_each_device;
use common::*;
use lora_sb_data::Example;
use lora_sb_kernels::{Accum, Tensor};
use lora_sb_model::{Parameter, Recompute, Site, Storage};
use lora_sb_tune::init::stream_gradients;
use lora_sb_tune::{AdapterConfig, Bases, Convention, InitConfig, Method, Tuned, head};

/// A family's fixtures as these tests use them.
struct Fixture {
    family: String,
    dir: PathBuf,
    sb: Golden,
    meta: serde_json::Value,
    /// The rows of the four training batches.
    batches: Vec<Vec<Example>>,
    rank: usize,
}

impl Fixture {
    /// Of every family that has them.
    fn all() -> Vec<Fixture> {
        let open = |(family, dir): (String, PathBuf)| {
            let sb = Golden::open(&dir.join("lora_sb.safetensors"));
            let (meta, batches, rank) = (meta(&dir), train_batches(&dir), sb.i64("rank").1[0] as usize);
            Fixture { family, dir, sb, meta, batches, rank }
        };
        goldens_with("lora_sb.safetensors").into_iter().map(open).collect()
    }

    fn config(&self) -> AdapterConfig {
        // Batches of 3, 3, 3 and 2: chunks of 3 cut all samples as the reference did.
        AdapterConfig {
            method: Method::LoraSb,
            rank: self.rank,
            lora_alpha: self.rank as f64,
            lora_dropout: 0.0,
            target_modules: golden_targets(&self.dir),
            init: InitConfig {
                bases: Bases::Sb,
                samples: 11,
                convention: Convention::Reference { batch_size: 3 },
                eta: self.sb.f64("lr_eff")[0],
                max_tokens: largest_batch(&self.batches),
                blocks_at_once: None,
            },
            modules_to_save: Vec::new(),
            seed: 1,
        }
    }

    /// A tensor's name in a message.
    fn named(&self, name: &str) -> String {
        format!("{}: {name}", self.family)
    }

    fn samples(&self) -> Vec<Example> {
        self.batches.concat()
    }

    fn gap(&self) -> f64 {
        self.meta["lora_sb"]["min_rel_gap_within_top_r_plus_1"].as_f64().unwrap()
    }

    /// The stored A, B and R as an adapter.
    fn stored(&self) -> Tuned {
        self.stored_with(&self.config())
    }

    /// The same, with a head's modules as the settings name them.
    fn stored_with(&self, config: &AdapterConfig) -> Tuned {
        let model = golden_model(&self.dir, Storage::Mapped);
        let kernels = model.kernels().clone();
        let parts = [("A", "lora_A"), ("B", "lora_B"), ("R", "lora_R")];
        let mut tensors = named_tensors(&self.sb, &parts, kernels.as_ref());
        for parameter in head::resolve(&config.modules_to_save, model.config()).unwrap() {
            let own = kernels.to_owned_f32(model.weight(parameter).unwrap()).unwrap();
            tensors.insert(model.name(parameter), own);
        }
        Tuned::restore(model, config, tensors).unwrap()
    }

    /// Our own initialisation.
    fn adapted(&self) -> Tuned {
        let model = golden_model(&self.dir, Storage::Mapped);
        Tuned::adapt(model, &self.config(), &self.samples(), &mut |_| ()).unwrap()
    }
}

/// All summed gradients under the reference's convention, by module.
fn summed(fixture: &Fixture) -> BTreeMap<String, Vec<f32>> {
    let model = golden_model(&fixture.dir, Storage::Mapped);
    let mut all = BTreeMap::new();
    let mut take = |gradients: BTreeMap<Site, Tensor>| {
        for (site, gradient) in gradients {
            all.insert(model.module(site), model.kernels().to_f32(&gradient)?);
        }
        Ok(())
    };
    let init = fixture.config().init;
    let sites = fixture.config().target_modules.resolve(model.config()).unwrap();
    stream_gradients(&model, &sites, &fixture.samples(), &init, 2, &mut |_| (), &mut take).unwrap();
    all
}

#[test]
fn golden_gradient_sum_and_sign() {
    on_each_device(|| {
        for fixture in Fixture::all() {
            let noise = fixture.meta["f32_vs_f64"]["grad_max_rel_to_tensor_max"].as_f64().unwrap();
            let gradients = summed(&fixture);
            assert_eq!(gradients.keys().cloned().collect::<Vec<_>>(), fixture.sb.after("grad_sum."));
            for (module, gradient) in &gradients {
                let expected = fixture.sb.f32(&format!("grad_sum.{module}")).1;
                assert_near(&fixture.named(module), gradient, &expected, 10.0 * noise);
                let signs = fixture.sb.i8(&format!("sign.{module}"));
                let flipped =
                    gradient.iter().zip(signs).filter(|(g, sign)| f32::from(*sign) != g.signum()).count();
                assert_eq!(
                    flipped,
                    0,
                    "{}: {flipped} of {} signs differ",
                    fixture.named(module),
                    gradient.len()
                );
            }
        }
    });
}

#[test]
fn golden_initial_update_is_the_best_of_its_rank() {
    on_each_device(|| {
        for fixture in Fixture::all() {
            let tuned = fixture.adapted();
            let kernels = tuned.model.kernels();
            let adapter = tuned.adapter().unwrap();
            let modules = fixture.sb.after("bra.");
            assert_eq!(modules.len(), adapter.sites().len());
            for site in adapter.sites() {
                let weight = tuned.model.weight(Parameter::Weight(site)).unwrap();
                let module = tuned.model.module(site);
                let (out, input) = tuned.model.shape(site);
                // Davis-Kahan: the rounding of the products turns the subspace by that much over the relative gap.
                let tolerance = rounding(out.max(input)) / fixture.gap();
                let delta =
                    kernels.to_f32(&adapter.delta(kernels.as_ref(), site, weight).unwrap().unwrap()).unwrap();
                assert_near(
                    &fixture.named(&format!("bra.{module}")),
                    &delta,
                    &fixture.sb.f32(&format!("bra.{module}")).1,
                    tolerance,
                );

                let r = tensor(&tuned, &format!("{module}.lora_R"));
                let expected = fixture.sb.f64(&format!("svals.{module}"));
                for index in 0..fixture.rank {
                    let (found, expected) = (f64::from(r[index * (fixture.rank + 1)]), expected[index]);
                    let bound = rounding(out.max(input)) * expected;
                    assert!(
                        (found - expected).abs() <= bound,
                        "{module}: value {index}: {found} for {expected}"
                    );
                }

                let b = tensor(&tuned, &format!("{module}.lora_B")); // [out, r]
                let a = tensor(&tuned, &format!("{module}.lora_A")); // [r, in]
                let a = transpose(&a, fixture.rank, input);
                for (basis, rows, side) in [(&b, out, ["UUt", "left"]), (&a, input, ["VVt", "right"])] {
                    let name = format!("{}_probe_{}.{module}", side[0], side[1]);
                    let probe = fixture.sb.f32(&format!("probe_{}.{module}", side[1])).1;
                    let found = project(basis, &probe, rows, fixture.rank);
                    assert_near(&fixture.named(&name), &found, &fixture.sb.f32(&name).1, tolerance);
                }
            }
        }
    });
}

fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..rows * columns).map(|at| values[at % rows * columns + at / rows]).collect()
}

/// `basis basis^T probe`; basis `[rows, rank]`, probe `[rows, 3]`.
fn project(basis: &[f32], probe: &[f32], rows: usize, rank: usize) -> Vec<f32> {
    let kernels = device();
    let basis = kernels.from_f32(basis, &[rows, rank]).unwrap();
    let probe = kernels.from_f32(probe, &[rows, 3]).unwrap();
    let mut inner = kernels.empty(&[rank, 3]).unwrap();
    kernels.linear_weight_gradient(&basis, &probe, 1.0, Accum::Replace, &mut inner).unwrap();
    let mut projected = kernels.empty(&[rows, 3]).unwrap();
    kernels.linear_input_gradient(&basis, &inner, 1.0, Accum::Replace, &mut projected).unwrap();
    kernels.to_f32(&projected).unwrap()
}

#[test]
fn golden_gradient_of_r() {
    on_each_device(|| {
        for fixture in Fixture::all() {
            let noise = fixture.meta["f32_vs_f64"]["grad_max_rel_to_tensor_max"].as_f64().unwrap();
            let mut tuned = fixture.stored();
            let batch = mean_batch(tuned.model.kernels().as_ref(), &fixture.batches[0]);
            for recompute in [Recompute::None, Recompute::Block] {
                tuned.zero_gradients().unwrap();
                tuned.loss_and_gradients(&batch, recompute).unwrap();
                for (name, gradient) in gradients(&mut tuned) {
                    let module = name.strip_suffix(".lora_R").unwrap();
                    let expected = fixture.sb.f32(&format!("R_grad_step0.{module}")).1;
                    assert_near(&fixture.named(&name), &gradient, &expected, 10.0 * noise);
                }
            }
        }
    });
}

#[test]
fn golden_twenty_steps_from_the_stored_factors() {
    on_each_device(|| {
        for fixture in Fixture::all() {
            let mut tuned = fixture.stored();
            check_run(&fixture, &mut tuned);
            for module in fixture.sb.after("R_final.") {
                let found = tensor(&tuned, &format!("{module}.lora_R"));
                // AdamW's first steps are the learning rate times a sign: an element whose gradient is rounding noise
                // may go either way, so each is held to the distance of a step.
                let distance = distance(&found, &fixture.sb.f32(&format!("R_final.{module}")).1);
                assert!(distance <= 1e-3, "R_final.{module}: {distance:.3e}");
            }
        }
    });
}

#[test]
fn golden_twenty_steps_from_our_own_factors() {
    on_each_device(|| {
        for fixture in Fixture::all() {
            check_run(&fixture, &mut fixture.adapted());
        }
    });
}

fn check_run(fixture: &Fixture, tuned: &mut Tuned) {
    check_losses(fixture, tuned, "losses");
}

#[track_caller]
fn check_losses(fixture: &Fixture, tuned: &mut Tuned, name: &str) {
    let batches = mean_batches(tuned.model.kernels().as_ref(), &fixture.batches);
    let losses = adamw_losses(tuned, &batches, 20, 1e-3);
    println!("{}", fixture.named(name)); // shown where the next line fails
    assert_losses(&losses, &fixture.sb, name);
}

/// The classifier trained beside R, as PEFT's task type SEQ_CLS has it; and kept in the native directory.
#[test]
fn golden_twenty_steps_with_the_classifier_trained() {
    on_each_device(|| {
        let name = "losses_with_classifier_trained";
        for fixture in Fixture::all().into_iter().filter(|fixture| fixture.sb.has(name)) {
            let model = golden_model(&fixture.dir, Storage::Mapped);
            let modules_to_save = head::default_modules(model.config());
            assert_eq!(modules_to_save, ["classifier"], "{}", fixture.family);
            let config = AdapterConfig { modules_to_save, ..fixture.config() };
            check_losses(&fixture, &mut fixture.stored_with(&config), name);
            let mut own = Tuned::adapt(model, &config, &fixture.samples(), &mut |_| ()).unwrap();
            check_losses(&fixture, &mut own, name);

            let dir = tempfile::tempdir().unwrap();
            lora_sb_tune::export::native::save(dir.path(), &own, "base").unwrap();
            let model = golden_model(&fixture.dir, Storage::Mapped);
            let loaded = lora_sb_tune::export::native::load(dir.path(), model).unwrap();
            let batch = mean_batch(own.model.kernels().as_ref(), &fixture.batches[0]);
            assert_eq!(loaded.loss(&batch).unwrap(), own.loss(&batch).unwrap(), "{}", fixture.family);
            assert_eq!(loaded.head_parameters(), own.head_parameters());
            assert!(own.head_parameters() > 0);
        }
    });
}

#[test]
fn golden_native_directory_keeps_the_run() {
    on_each_device(|| {
        for fixture in Fixture::all() {
            let dir = tempfile::tempdir().unwrap();
            lora_sb_tune::export::native::save(dir.path(), &fixture.stored(), "base").unwrap();
            let model = golden_model(&fixture.dir, Storage::Mapped);
            let mut tuned = lora_sb_tune::export::native::load(dir.path(), model).unwrap();
            check_run(&fixture, &mut tuned);
        }
    });
}
