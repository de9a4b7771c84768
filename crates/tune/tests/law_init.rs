//! Laws of the initialisation: the streamed gradient, and the factors made of it.

mod common;

use std::collections::BTreeMap;

use common::*;
use lora_sb_data::{Example, Label};
use lora_sb_kernels::{DType, Tensor};
use lora_sb_model::{Batch, Frozen, Model, Parameter, Projection, Recompute, Sequence, Site};
use lora_sb_tune::adapter::full;
use lora_sb_tune::eval::sequence;
use lora_sb_tune::init::{Estimate, InitProgress, factorise, stream_gradients};
use lora_sb_tune::{AdapterConfig, Bases, Convention, InitConfig, Method, Targets, Tuned};
use nalgebra::DMatrix;

const CONVENTIONS: [Convention; 2] = [Convention::PerSample, Convention::Reference { batch_size: 3 }];

fn init(convention: Convention, max_tokens: usize) -> InitConfig {
    InitConfig { bases: Bases::Sb, samples: 7, convention, eta: 1e-2, max_tokens, blocks_at_once: None }
}

fn streamed(examples: &[Example], init: &InitConfig, sites: &[Site]) -> (BTreeMap<Site, Vec<f32>>, Estimate) {
    streamed_in(&tiny_model(2), examples, init, sites, 1)
}

fn streamed_in(
    model: &Model,
    examples: &[Example],
    init: &InitConfig,
    sites: &[Site],
    blocks: usize,
) -> (BTreeMap<Site, Vec<f32>>, Estimate) {
    let mut all = BTreeMap::new();
    let mut take = |gradients: BTreeMap<Site, Tensor>| {
        for (site, gradient) in gradients {
            all.insert(site, model.kernels().to_f32(&gradient)?);
        }
        Ok(())
    };
    let estimate = stream_gradients(model, sites, examples, init, blocks, &mut |_| (), &mut take).unwrap();
    (all, estimate)
}

/// One batch of everything through the ordinary gradients of all weights, with the weights of `token_weight`.
fn at_once(examples: &[Example], token_weight: &[f64]) -> BTreeMap<Site, Vec<f32>> {
    let model = tiny_model(2);
    let kernels = model.kernels().as_ref();
    let mut sequences = Vec::new();
    for (Example { ids, trained, .. }, weight) in examples.iter().zip(token_weight) {
        sequences.push(Sequence::text(ids, trained, *weight as f32));
    }
    let batch = Batch::pack(kernels, &sequences).unwrap();
    let mut gradients = full::gradients(&model).unwrap();
    model.loss_and_gradients(&batch, &mut Frozen, &mut gradients, Recompute::None).unwrap();
    let sites = model.sites().into_iter();
    sites.map(|site| (site, kernels.to_f32(&gradients[&Parameter::Weight(site)]).unwrap())).collect()
}

fn assert_all_near(found: &BTreeMap<Site, Vec<f32>>, expected: &BTreeMap<Site, Vec<f32>>) {
    assert_eq!(found.len(), expected.len());
    for (site, expected) in expected {
        assert!(largest(expected) > 0.0, "{site}");
        // Sums over 80 tokens of products that went through two blocks.
        assert_near(&site.to_string(), &found[site], expected, rounding(80 * 23));
    }
}

#[test]
fn law_streamed_gradient_is_the_full_gradient() {
    let sites = tiny_model(2).sites();
    let examples = tiny_examples(7);
    let labelled: Vec<f64> = examples.iter().map(|example| example.trained_tokens() as f64).collect();
    // Every sample's own mean, summed.
    let weights: Vec<f64> = labelled.iter().map(|labelled| 1.0 / labelled).collect();
    let (found, estimate) = streamed(&examples, &init(Convention::PerSample, 1000), &sites);
    assert_all_near(&found, &at_once(&examples, &weights));
    assert_eq!(estimate.labelled_tokens as f64, labelled.iter().sum::<f64>());

    // Batches of 3, 3 and 1: the batch's mean, divided by its samples.
    let batch = |index: usize| &labelled[index / 3 * 3..(index / 3 * 3 + 3).min(7)];
    let weight = |index| 1.0 / (batch(index).iter().sum::<f64>() * batch(index).len() as f64);
    let weights: Vec<f64> = (0..7).map(weight).collect();
    let (found, _) = streamed(&examples, &init(Convention::Reference { batch_size: 3 }, 1000), &sites);
    assert_all_near(&found, &at_once(&examples, &weights));
}

/// The gradient of an encoder comes through its classification head, one label a sample.
#[test]
fn law_gradient_of_an_encoder_is_the_full_gradient() {
    let label: [fn(u32) -> Label; 2] = [Label::Class, |class| Label::Value(class as f32)];
    for (model_type, labels, label) in
        [("bert", 3, label[0]), ("roberta", 3, label[0]), ("roberta", 1, label[1])]
    {
        let examples = labelled_examples(7, 2, label);
        let model = tiny_encoder(model_type, labels);
        let kernels = model.kernels().as_ref();
        for convention in CONVENTIONS {
            // Of each sample one prediction; of the batches of 3, 3 and 1 the mean, divided by their samples.
            let size = |index| if index < 6 { 9.0 } else { 1.0 };
            let weight = |index| if convention == Convention::PerSample { 1.0 } else { 1.0 / size(index) };
            let sequences: Vec<_> = examples
                .iter()
                .enumerate()
                .map(|(index, example)| sequence(example, weight(index)))
                .collect();
            let batch = Batch::pack(kernels, &sequences).unwrap();
            let mut gradients = full::gradients(&model).unwrap();
            let loss =
                model.loss_and_gradients(&batch, &mut Frozen, &mut gradients, Recompute::None).unwrap();
            let mut take = |found: BTreeMap<Site, Tensor>| {
                for (site, found) in found {
                    let expected = kernels.to_f32(&gradients[&Parameter::Weight(site)])?;
                    assert!(largest(&expected) > 0.0, "{model_type} {site}");
                    let what = format!("{model_type} {labels} {site}");
                    assert_near(&what, &kernels.to_f32(&found)?, &expected, rounding(80 * 23));
                }
                Ok(())
            };
            let init = init(convention, 16);
            let estimate =
                stream_gradients(&model, &model.sites(), &examples, &init, 2, &mut |_| (), &mut take)
                    .unwrap();
            assert_eq!((estimate.samples, estimate.labelled_tokens, estimate.skipped), (7, 7, 0));
            assert!((estimate.loss - loss).abs() <= 1e-5 * loss);
        }
    }
}

#[test]
fn law_micro_batches_of_the_estimate_do_not_matter() {
    let sites = tiny_model(2).sites();
    let examples = tiny_examples(7);
    for convention in CONVENTIONS {
        let (whole, one) = streamed(&examples, &init(convention, 1000), &sites);
        for max_tokens in [1, 13, 31] {
            let (found, other) = streamed(&examples, &init(convention, max_tokens), &sites);
            assert_all_near(&found, &whole);
            assert!((one.loss - other.loss).abs() <= 1e-5 * one.loss);
            assert_eq!((one.samples, one.tokens), (other.samples, other.tokens));
        }
    }
}

/// However many blocks go backward together, a gradient is added up over the same micro-batches in the same order.
#[test]
fn law_blocks_at_once_do_not_change_a_bit() {
    let examples = tiny_examples(7);
    let init = init(Convention::PerSample, 20);
    for dtype in [DType::F32, DType::Bf16] {
        let mut model = tiny_model(5);
        model.set_dtype(dtype).unwrap();
        let above = model.sites().into_iter().filter(|site| site.layer >= 2).collect();
        for sites in [model.sites(), above, vec![Projection::Up.of(1), Projection::Query.of(3)]] {
            let (one, estimate) = streamed_in(&model, &examples, &init, &sites, 1);
            assert_eq!(one.keys().copied().collect::<Vec<_>>(), sites);
            assert!(one.values().all(|gradient| largest(gradient) > 0.0));
            for blocks in [2, 3, 4, 5, 17] {
                let (some, other) = streamed_in(&model, &examples, &init, &sites, blocks);
                assert_eq!(some, one, "{blocks} blocks at once, {dtype:?}");
                assert_eq!(Estimate { blocks_at_once: 1, ..other }, estimate);
            }
        }
    }
}

#[test]
fn law_one_sample_makes_both_conventions_alike() {
    let sites = tiny_model(2).sites();
    let examples = tiny_examples(1);
    let (per_sample, _) = streamed(&examples, &init(Convention::PerSample, 100), &sites);
    let (reference, _) = streamed(&examples, &init(Convention::Reference { batch_size: 1 }, 100), &sites);
    assert_eq!(per_sample, reference);
}

#[test]
fn law_samples_without_labels_are_skipped_and_counted() {
    let sites = tiny_model(2).sites();
    let examples = tiny_examples(4);
    let (expected, _) = streamed(&examples, &init(Convention::PerSample, 50), &sites);
    let mut mixed = examples.clone();
    mixed.insert(1, example(&[3, 1, 4], &[false; 3]));
    // The first token is predicted by nothing.
    mixed.push(example(&[7], &[true]));
    let (found, estimate) = streamed(&mixed, &init(Convention::PerSample, 50), &sites);
    assert_eq!(found, expected);
    assert_eq!((estimate.samples, estimate.skipped), (4, 2));
}

#[test]
fn law_only_the_targets_are_estimated() {
    let examples = tiny_examples(5);
    let (all, _) = streamed(&examples, &init(Convention::PerSample, 50), &tiny_model(2).sites());
    // Nothing in the first block: the backward pass ends above it.
    for some in [vec![Projection::Down.of(1)], vec![Projection::Query.of(0), Projection::Up.of(1)]] {
        let (found, _) = streamed(&examples, &init(Convention::PerSample, 50), &some);
        assert_eq!(found.keys().copied().collect::<Vec<_>>(), some);
        for (site, gradient) in &found {
            assert_eq!(gradient, &all[site], "{site}");
        }
    }
}

fn with_bases(method: Method, bases: Bases, seed: u64) -> Tuned {
    let config = config(method);
    let config = AdapterConfig { init: InitConfig { bases, ..config.init }, seed, ..config };
    Tuned::adapt(tiny_model(2), &config, &tiny_examples(6), &mut |_| ()).unwrap()
}

#[test]
fn law_bases_are_orthonormal() {
    for bases in Bases::ALL {
        let tuned = with_bases(Method::LoraSb, bases, 3);
        for (name, frozen) in tuned.frozen_tensors() {
            let values = tuned.model.kernels().to_f32(frozen).unwrap();
            let matrix = dense(&values, frozen.shape());
            // A has orthonormal rows, B orthonormal columns.
            let product = if name.ends_with("lora_A") {
                &matrix * matrix.transpose()
            } else {
                matrix.transpose() * &matrix
            };
            // LoRA-XS gives A the singular values: orthogonal, but not of length 1.
            let expected = match bases {
                Bases::Xs if name.ends_with("lora_A") => DMatrix::from_diagonal(&product.diagonal()),
                _ => DMatrix::identity(5, 5),
            };
            let off = (&product - expected).amax() / product.amax();
            assert!(off <= 1e-5, "{bases} {name}: {off:.2e}");
        }
        let at_zero = !matches!(bases, Bases::Sb | Bases::SbGradient | Bases::Xs);
        for (name, r) in tuned.trained_tensors() {
            let r = tuned.model.kernels().to_f32(r).unwrap();
            assert_eq!(largest(&r) == 0.0, at_zero, "{bases} {name}");
        }
    }
}

#[test]
fn law_bases_belong_to_both_methods() {
    for bases in Bases::ALL {
        let (sb, xs) = (with_bases(Method::LoraSb, bases, 3), with_bases(Method::LoraXs, bases, 3));
        for (name, _) in sb.trained_tensors().into_iter().chain(sb.frozen_tensors()) {
            assert_eq!(tensor(&sb, &name), tensor(&xs, &name), "{bases} {name}");
        }
    }
    // The bases of an update do not depend on where R starts.
    let (sb, zero) = (with_bases(Method::LoraSb, Bases::Sb, 3), with_bases(Method::LoraSb, Bases::SbZero, 3));
    for (name, _) in sb.frozen_tensors() {
        assert_eq!(tensor(&sb, &name), tensor(&zero, &name), "{name}");
    }
}

#[test]
fn law_random_bases_differ_by_seed_and_site() {
    let make = |seed| with_bases(Method::LoraSb, Bases::RandomOrthonormal, seed);
    let (first, again, other) = (make(3), make(3), make(4));
    let mut seen: Vec<Vec<f32>> = Vec::new();
    for (name, _) in first.frozen_tensors() {
        let values = tensor(&first, &name);
        assert_eq!(values, tensor(&again, &name), "{name}");
        assert!(distance(&values, &tensor(&other, &name)) > 0.1, "{name}");
        assert!(!seen.contains(&values), "{name} is another site's");
        seen.push(values);
    }
}

fn dense(values: &[f32], shape: &[usize]) -> DMatrix<f64> {
    DMatrix::from_row_iterator(shape[0], shape[1], values.iter().map(|value| f64::from(*value)))
}

#[test]
fn law_the_start_is_the_best_approximation_of_the_update() {
    for (scale, bases) in
        [(1.0, Bases::Sb), (0.25, Bases::Sb), (1.0, Bases::SbGradient), (3.0, Bases::SbGradient)]
    {
        let config = config(Method::LoraSb);
        let init = InitConfig { bases, ..config.init };
        let config = AdapterConfig { lora_alpha: 5.0 * scale, init, ..config };
        let examples = tiny_examples(6);
        let tuned = Tuned::adapt(tiny_model(2), &config, &examples, &mut |_| ()).unwrap();
        let (gradients, _) = streamed(&examples, &config.init, &tuned.model.sites());
        for (site, gradient) in gradients {
            let (out, input) = tuned.model.shape(site);
            let step = |g: &f32| if bases == Bases::Sb { g.signum() } else { *g };
            let update: Vec<f32> = gradient.iter().map(|g| -config.init.eta as f32 * step(g)).collect();
            let update = dense(&update, &[out, input]);
            let svd = update.clone().svd(true, true);
            let values = svd.singular_values.as_slice();
            let delta = dense(&delta(&tuned, site), &[out, input]);
            // Eckart and Young: no matrix of rank r is nearer than the root of the squares left over.
            let left: f64 = values[5..].iter().map(|value| value * value).sum();
            let distance = (&update - &delta).norm_squared();
            // f32 rounds what is captured, so nothing below its square is told from zero.
            let tolerance = 1e-4 * left + 1e-11 * update.norm_squared();
            assert!((distance - left).abs() <= tolerance, "{site} at s = {scale}: {distance} for {left}");
            let r = tensor(&tuned, &format!("{}.lora_R", tuned.model.module(site)));
            for (index, value) in r.iter().enumerate() {
                let expected = if index % 6 == 0 { values[index / 6] / scale } else { 0.0 };
                assert!(
                    (f64::from(*value) - expected).abs() <= 1e-4 * values[0] / scale,
                    "{site}: R[{index}]"
                );
            }
        }
    }
}

#[test]
fn law_xs_bases_are_the_weights_own() {
    let mut tuned = Tuned::adapt(tiny_model(2), &config(Method::LoraXs), &[], &mut |_| ()).unwrap();
    let kernels = tuned.model.kernels().clone();
    for site in tuned.model.sites() {
        let module = tuned.model.module(site);
        let r = tensor(&tuned, &format!("{module}.lora_R"));
        assert!(largest(&r) > 0.0 && largest(&r) < 1e-4, "{module}: R ~ N(0, 1e-5^2)");
        let one: Vec<f32> = (0..25).map(|at| f32::from(at % 6 == 0)).collect();
        set(&mut tuned, &format!("{module}.lora_R"), &one);
        let weight = weight(&tuned.model, site);
        let delta = dense(&delta(&tuned, site), weight.shape());
        let weight = dense(&kernels.to_f32(weight).unwrap(), weight.shape());
        let values = weight.clone().svd(false, false).singular_values;
        let left: f64 = values.as_slice()[5..].iter().map(|value| value * value).sum();
        let distance = (&weight - &delta).norm_squared();
        assert!((distance - left).abs() <= 1e-4 * left, "{module}: {distance} for {left}");
    }
}

#[test]
fn law_lora_draws_a_and_leaves_b_at_zero() {
    for method in [Method::Lora, Method::RsLora, Method::Dora, Method::LoraPro] {
        let tuned = Tuned::adapt(tiny_model(2), &config(method), &[], &mut |_| ()).unwrap();
        for (name, trained) in tuned.trained_tensors() {
            let values = tuned.model.kernels().to_f32(trained).unwrap();
            if name.ends_with("lora_B") {
                assert_eq!(largest(&values), 0.0, "{method} {name}");
            } else if name.ends_with("lora_A") {
                let bound = 1.0 / (trained.shape()[1] as f64).sqrt();
                assert!(largest(&values) <= bound && largest(&values) > 0.8 * bound, "{method} {name}");
            }
        }
    }
}

#[test]
fn law_the_seed_decides_every_bit_and_targets_do_not_shift_each_other() {
    for method in adapters() {
        let make = |targets: Targets, seed| {
            let config = AdapterConfig { target_modules: targets, seed, ..config(method) };
            Tuned::adapt(tiny_model(2), &config, &tiny_examples(6), &mut |_| ()).unwrap()
        };
        let all = make(Targets::AllLinear, 3);
        let some = make(Targets::parse("down_proj, v_proj"), 3);
        assert_eq!(some.adapter().unwrap().sites().len(), 4);
        for (name, _) in some.trained_tensors().into_iter().chain(some.frozen_tensors()) {
            assert_eq!(tensor(&some, &name), tensor(&all, &name), "{method} {name}");
        }
        if matches!(method, Method::LoraXs | Method::Lora | Method::RsLora | Method::Dora | Method::LoraPro) {
            let other = make(Targets::AllLinear, 4);
            let (name, _) = &all.trained_tensors()[0];
            assert_ne!(tensor(&all, name), tensor(&other, name), "{method}");
        }
    }
}

#[test]
fn law_selected_samples_are_distinct_and_in_order() {
    let config = InitConfig { bases: Bases::Sb, samples: 5, ..init(Convention::PerSample, 1) };
    let chosen = config.select(17, 9);
    assert_eq!(chosen.len(), 5);
    assert!(chosen.windows(2).all(|pair| pair[0] < pair[1]) && chosen[4] < 17);
    assert_ne!(chosen, config.select(17, 10));
    assert_eq!(config.select(3, 9), [0, 1, 2]);
}

#[test]
fn law_progress_is_reported_to_the_end() {
    let mut seen = Vec::new();
    let tuned = Tuned::adapt(tiny_model(2), &config(Method::LoraSb), &tiny_examples(6), &mut |progress| {
        seen.push(progress)
    });
    let report = tuned.unwrap().init_report().cloned().unwrap();
    let estimate = report.estimate.unwrap();
    assert_eq!((estimate.samples, estimate.skipped), (6, 0));
    assert!(report.unconverged.is_empty());
    assert!(seen.contains(&InitProgress::Forward { samples: 6, of: 6 }));
    assert_eq!(seen.last(), Some(&InitProgress::Factorised { sites: 14, of: 14 }));
}

#[test]
fn law_every_site_is_factorised_once_and_a_failure_is_told() {
    let gradients: BTreeMap<Site, usize> = tiny_model(3).sites().into_iter().zip(0..).collect();
    let mut done = 0;
    let squares = factorise(gradients.clone(), &|_, number| Ok(number * number), &mut || done += 1).unwrap();
    assert_eq!(squares, gradients.iter().map(|(&site, number)| (site, number * number)).collect());
    assert_eq!(done, gradients.len());
    let refused = |_, number| match number {
        5 => Err(lora_sb_kernels::Error::Value { op: "a trial", message: "number 5".into() }),
        _ => Ok(()),
    };
    let error = factorise(gradients, &refused, &mut || ()).unwrap_err();
    assert!(error.to_string().contains("number 5"), "{error}");
}

/// One more block may cost its kept input, but no gradient that stays.
#[test]
fn law_memory_of_the_estimate_grows_by_block_inputs_alone() {
    let examples = tiny_examples(7);
    let peak = |layers: usize, blocks: usize| {
        let model = tiny_model(layers);
        let kernels = model.kernels();
        let before = kernels.usage().live_bytes;
        kernels.reset_peak();
        let init = init(Convention::PerSample, 16);
        let mut take = |_| Ok(());
        stream_gradients(&model, &model.sites(), &examples, &init, blocks, &mut |_| (), &mut take).unwrap();
        (kernels.usage().peak_bytes - before) as f64
    };
    // Two of them are more than a micro-batch has room for. A GPU keeps tables of a batch's attention from the first time on.
    let place = device().place();
    let input = examples.iter().map(|example| place.bytes(example.ids.len() * 18)).sum::<usize>() as f64;
    peak(6, 1);
    for (blocks, inputs) in [(1, 1.0), (2, 0.5), (3, 1.0 / 3.0)] {
        let grown = (peak(12, blocks) - peak(6, blocks)) / 6.0;
        assert!(
            grown <= 1.01 * inputs * input,
            "{blocks} at once: a block costs {grown} bytes, its inputs are {input}"
        );
    }
}
