//! Laws of the adapters in a model: their gradients, the theorems of the paper, and that merging changes nothing.
//! Those of one layer stand in `law_hook.rs`.

mod common;

use std::collections::BTreeMap;

use common::*;
use lora_sb_kernels::{Accum, Generator, Kernels, Stream, Tensor};
use lora_sb_model::{Frozen, Layer, LinearHook, Model, NoGradients, Parameter, Projection, Recompute, Site};
use lora_sb_tune::adapter::{Pass, full};
use lora_sb_tune::{AdapterConfig, Method, Tuned};

fn random(kernels: &dyn Kernels, generator: &mut Generator, shape: &[usize]) -> Tensor {
    let mut values = vec![0.0; shape.iter().product()];
    generator.normal(1.0, &mut values);
    kernels.from_f32(&values, shape).unwrap()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

#[test]
fn law_other_sites_are_untouched() {
    let kernels = device();
    for method in adapters() {
        let mut tuned = tiny_tuned(method);
        let outside = Projection::Query.of(7);
        let x = random(kernels.as_ref(), &mut Generator::new(1, Stream::Adapter, 0), &[3, 18]);
        let weight = random(kernels.as_ref(), &mut Generator::new(1, Stream::Adapter, 1), &[18, 18]);
        let layer = Layer { site: outside, weight: &weight, bias: None };
        let computed = |hook: &dyn LinearHook| {
            let mut y = kernels.zeros(&[3, 18]).unwrap();
            let saved = hook.forward(kernels.as_ref(), layer, &x, Accum::Replace, &mut y).unwrap();
            assert!(saved.0.is_empty());
            kernels.to_f32(&y).unwrap()
        };
        assert_eq!(computed(tuned.hook()), computed(&Frozen));
        let adapter = tuned.adapter().unwrap();
        assert!(adapter.delta(kernels.as_ref(), outside, &weight).unwrap().is_none());
        assert!(adapter.fold(kernels.as_ref(), outside).unwrap().is_none());
        tuned.zero_gradients().unwrap();
        assert!(gradients(&mut tuned).values().all(|gradient| largest(gradient) == 0.0));
    }
}

#[test]
fn law_gradients_of_the_loss_are_directional_derivatives() {
    // DoRA's gradient leaves out how the norms change; `law_hook.rs` holds it to that.
    for method in adapters().filter(|&method| method != Method::Dora) {
        let mut tuned = tiny_tuned(method);
        let kernels = tuned.model.kernels().clone();
        let batch = mean_batch(kernels.as_ref(), &tiny_examples(4));
        tuned.loss_and_gradients(&batch, Recompute::None).unwrap();
        let found = gradients(&mut tuned);
        let square: f64 = found.values().map(|gradient| dot(gradient, gradient)).sum();
        // Along the gradient itself, where the derivative is its length.
        let length = square.sqrt();
        let mut moved = |step: f64| {
            let mut visitor = |name: &str, value: &mut Tensor, _: &mut Tensor| {
                let gradient = kernels.from_f32(&found[name], value.shape())?;
                Ok(kernels.add((step / length) as f32, &gradient, value)?)
            };
            tuned.visit(&mut visitor).unwrap();
            tuned.loss(&batch).unwrap()
        };
        let mut quotient = |step: f64| {
            let (plus, minus) = (moved(step), moved(-2.0 * step));
            moved(step);
            (plus - minus) / (2.0 * step)
        };
        let (wide, narrow) = (quotient(8e-3), quotient(4e-3));
        // Richardson: halving the step quarters the error of the cubic term, so a third of the difference is
        // left; what is left after it is smaller than the term itself.
        let cubic = (narrow - wide) / 3.0;
        let tolerance = 16.0 * f64::from(f32::EPSILON) / 4e-3 * found.len() as f64 + cubic.abs();
        let best = narrow + cubic;
        assert!((best - length).abs() <= tolerance, "{method}: quotient {best}, gradient {length}");
        assert!(length > 30.0 * tolerance, "{method}: the gradient {length} is no test");
    }
}

/// The model with what the adapter makes of its weights.
fn merged(tuned: &Tuned) -> Model {
    let mut model = tiny_model(tuned.model.config().num_hidden_layers);
    let kernels = model.kernels().clone();
    for site in tuned.adapter().unwrap().sites() {
        let weight = model.weight_mut(Parameter::Weight(site)).unwrap();
        let delta = kernels.from_f32(&delta(tuned, site), weight.shape()).unwrap();
        kernels.add(1.0, &delta, weight).unwrap();
    }
    model
}

#[test]
fn law_merged_equals_hooked() {
    for method in adapters() {
        let tuned = tiny_tuned(method);
        let kernels = tuned.model.kernels();
        let batch = mean_batch(kernels.as_ref(), &tiny_examples(5));
        let logits = |model: &Model, hook: &dyn LinearHook| {
            kernels.to_f32(&model.logits(&batch, hook).unwrap()).unwrap()
        };
        let hooked = logits(&tuned.model, tuned.hook());
        // Two layers of some thirty products each, whose roundings add up.
        let tolerance = rounding(4 * 23 * 14);
        assert_near(method.name(), &logits(&merged(&tuned), &Frozen), &hooked, tolerance);
        assert!(
            distance(&logits(&tuned.model, &Frozen), &hooked) > 100.0 * tolerance,
            "{method} changes nothing"
        );
    }
}

#[test]
fn law_gradient_of_r_is_the_projected_weight_gradient() {
    for method in [Method::LoraSb, Method::LoraXs] {
        let mut tuned = tiny_tuned(method);
        let kernels = tuned.model.kernels().clone();
        let batch = mean_batch(kernels.as_ref(), &tiny_examples(5));
        tuned.loss_and_gradients(&batch, Recompute::Block).unwrap();
        let found = gradients(&mut tuned);

        let model = merged(&tuned);
        let mut weights = full::gradients(&model).unwrap();
        model.loss_and_gradients(&batch, &mut Frozen, &mut weights, Recompute::None).unwrap();
        let scale = tuned.config().unwrap().scale();
        for site in tuned.adapter().unwrap().sites() {
            let module = tuned.model.module(site);
            let (out, input) = tuned.model.shape(site);
            let rank = tuned.config().unwrap().rank;
            let b = kernels.from_f32(&tensor(&tuned, &format!("{module}.lora_B")), &[out, rank]).unwrap();
            let a = kernels.from_f32(&tensor(&tuned, &format!("{module}.lora_A")), &[rank, input]).unwrap();
            let mut left = kernels.empty(&[rank, input]).unwrap(); // B^T dW
            let dw = &weights[&Parameter::Weight(site)];
            kernels.linear_weight_gradient(&b, dw, scale, Accum::Replace, &mut left).unwrap();
            let mut expected = kernels.empty(&[rank, rank]).unwrap(); // s B^T dW A^T
            kernels.linear(&left, &a, 1.0, Accum::Replace, &mut expected).unwrap();
            let expected = kernels.to_f32(&expected).unwrap();
            assert_near(&module, &found[&format!("{module}.lora_R")], &expected, rounding(8 * out * input));
        }
    }
}

/// The change of all weights by one plain gradient step with the paper's factor `1 / s^2`, and the losses
/// before and after it.
fn plain_step(scale: f64, learning_rate: f64) -> (BTreeMap<Site, Vec<f32>>, f64, f64) {
    let config = config(Method::LoraSb);
    let config = AdapterConfig { lora_alpha: scale * config.rank as f64, ..config };
    let mut tuned = Tuned::adapt(tiny_model(2), &config, &tiny_examples(6), &mut |_| ()).unwrap();
    let kernels = tuned.model.kernels().clone();
    let batch = mean_batch(kernels.as_ref(), &tiny_examples(6));
    let deltas = |tuned: &Tuned| -> BTreeMap<Site, Vec<f32>> {
        let sites = tuned.adapter().unwrap().sites().into_iter();
        sites.map(|site| (site, delta(tuned, site))).collect()
    };
    let start = deltas(&tuned);
    let before = tuned.loss_and_gradients(&batch, Recompute::None).unwrap();
    let factor = (-learning_rate / (scale * scale)) as f32;
    let mut step = |_: &str, r: &mut Tensor, gradient: &mut Tensor| Ok(kernels.add(factor, gradient, r)?);
    tuned.visit(&mut step).unwrap();
    let mut moved = deltas(&tuned);
    for (site, after) in &mut moved {
        after.iter_mut().zip(&start[site]).for_each(|(after, before)| *after -= before);
    }
    (moved, before, tuned.loss(&batch).unwrap())
}

#[test]
fn law_theorem_5_a_step_does_not_depend_on_the_scale() {
    let (one, ..) = plain_step(1.0, 1.0);
    for scale in [0.5, 4.0] {
        let (other, ..) = plain_step(scale, 1.0);
        for (site, moved) in &other {
            // B and A are orthonormal to 1e-5 only, and the step is a difference of larger numbers.
            assert_near(&format!("{site:?} at s = {scale}"), moved, &one[site], 2e-5);
            assert!(largest(moved) > 1e-4, "{site:?} does not move");
        }
    }
}

#[test]
fn law_theorem_4_a_small_step_lowers_the_loss() {
    for scale in [1.0, 3.0] {
        for learning_rate in [1e-2, 1e-1] {
            let (_, before, after) = plain_step(scale, learning_rate);
            // A full ten times above the rounding of a loss near 4.
            assert!(after < before - 1e-5, "s = {scale}, step {learning_rate}: {before} to {after}");
        }
    }
}

#[test]
fn law_gradients_add_up_until_they_are_zeroed() {
    for method in Method::ALL {
        let mut tuned = match method {
            Method::Full => Tuned::full(tiny_model(2)).unwrap(),
            _ => tiny_tuned(method),
        };
        let batch = mean_batch(tuned.model.kernels().as_ref(), &tiny_examples(3));
        tuned.loss_and_gradients(&batch, Recompute::None).unwrap();
        let once = gradients(&mut tuned);
        tuned.loss_and_gradients(&batch, Recompute::None).unwrap();
        for (name, twice) in gradients(&mut tuned) {
            let expected: Vec<f32> = once[&name].iter().map(|value| 2.0 * value).collect();
            assert_near(&name, &twice, &expected, rounding(64));
        }
        tuned.zero_gradients().unwrap();
        tuned.loss_and_gradients(&batch, Recompute::Block).unwrap();
        assert_eq!(gradients(&mut tuned), once, "{method}: the same bits, recomputed or not");
    }
}

#[test]
fn law_an_adapter_leaves_the_model_alone() {
    for method in adapters() {
        let mut tuned = tiny_tuned(method);
        let batch = mean_batch(tuned.model.kernels().as_ref(), &tiny_examples(3));
        adamw_losses(&mut tuned, std::slice::from_ref(&batch), 3, 1e-2);
        let fresh = tiny_model(2);
        for parameter in fresh.parameters() {
            let values = |model: &Model| fresh.kernels().to_f32(model.weight(parameter).unwrap()).unwrap();
            assert_eq!(values(&tuned.model), values(&fresh), "{method}: {parameter:?}");
        }
        let loss =
            tuned.model.loss_and_gradients(&batch, &mut Frozen, &mut NoGradients, Recompute::None).unwrap();
        assert_eq!(loss, fresh.loss(&batch, &Frozen).unwrap(), "{method}");
    }
}

/// What is dropped follows from the pass: a block that is run again drops the same, an evaluation drops nothing.
#[test]
fn law_dropout_belongs_to_the_pass() {
    for method in adapters() {
        let make = |lora_dropout| {
            let config = AdapterConfig { lora_dropout, ..config(method) };
            let mut tuned = Tuned::adapt(tiny_model(2), &config, &tiny_examples(6), &mut |_| ()).unwrap();
            shake(&mut tuned, 0.1);
            tuned
        };
        let (mut plain, mut dropping) = (make(0.0), make(0.25));
        let batch = mean_batch(plain.model.kernels().as_ref(), &tiny_examples(3));
        let run = |tuned: &mut Tuned, pass, recompute| {
            tuned.begin(pass);
            tuned.zero_gradients().unwrap();
            let loss = tuned.loss_and_gradients(&batch, recompute).unwrap();
            (loss, gradients(tuned))
        };
        let pass = |seed| Pass::Training { seed };
        let without = run(&mut plain, pass(1), Recompute::None);
        let first = run(&mut dropping, pass(1), Recompute::None);
        assert_eq!(run(&mut dropping, Pass::Evaluation, Recompute::None), without, "{method}");
        assert_eq!(run(&mut plain, Pass::Evaluation, Recompute::None), without, "{method}");
        assert_eq!(run(&mut dropping, pass(1), Recompute::Block), first, "{method}: recomputed");
        assert_ne!(first, without, "{method}: nothing is dropped");
        assert_ne!(run(&mut dropping, pass(2), Recompute::None), first, "{method}: the seed does not matter");
        let merged = |tuned: &Tuned| delta(tuned, Projection::Up.of(1));
        assert_eq!(merged(&dropping), merged(&plain), "{method}: what is merged is what is trained");
    }
}

#[test]
fn law_parameter_counts_are_those_of_the_paper() {
    // (out, in) of q, k, v, o, gate, up, down and the number of layers: method.md's table of configurations.
    let mistral = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)];
    let mistral: Vec<_> = mistral.into_iter().chain([(14336, 4096), (14336, 4096), (4096, 14336)]).collect();
    let llama = [(3072, 3072), (1024, 3072), (1024, 3072), (3072, 3072)];
    let llama: Vec<_> = llama.into_iter().chain([(8192, 3072), (8192, 3072), (3072, 8192)]).collect();
    let total = |method: Method, rank, shapes: &[(usize, usize)], layers| {
        layers * shapes.iter().map(|&shape| method.trained_values(rank, shape)).sum::<usize>()
    };
    assert_eq!(total(Method::Lora, 32, &mistral, 32), 83_886_080);
    assert_eq!(total(Method::Lora, 32, &llama, 28), 48_627_712);
    assert_eq!(total(Method::Dora, 32, &mistral, 32), 85_262_336);
    assert_eq!(total(Method::Dora, 32, &llama, 28), 49_401_856);
    for method in [Method::RsLora, Method::Pissa, Method::LoraPro, Method::LoraGa] {
        assert_eq!(total(method, 32, &mistral, 32), 83_886_080, "{method}");
    }
    for method in [Method::LoraSb, Method::LoraXs] {
        let ranks = [32, 64, 96];
        assert_eq!(ranks.map(|rank| total(method, rank, &mistral, 32)), [229_376, 917_504, 2_064_384]);
        assert_eq!(ranks.map(|rank| total(method, rank, &llama, 28)), [200_704, 802_816, 1_806_336]);
    }
    for method in adapters() {
        let tuned = tiny_tuned(method);
        let rank = tuned.config().unwrap().rank;
        assert_eq!(tuned.trained_parameters(), tuned.trained_parameters_of(method, rank), "{method}");
        let stored = |site| method.stored_values(rank, tuned.model.shape(site));
        let expected: usize = tuned.model.sites().into_iter().map(stored).sum();
        let all = tuned.trained_tensors().into_iter().chain(tuned.frozen_tensors());
        assert_eq!(all.map(|(_, tensor)| tensor.len()).sum::<usize>(), expected, "{method}");
    }
    let full = Tuned::full(tiny_model(2)).unwrap();
    assert_eq!(full.trained_parameters(), full.model.config().parameter_count());
}
