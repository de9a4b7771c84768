//! One optimizer step: its loss and gradient do not depend on how it is split.

mod common;
mod training;

use lora_sb_data::Example;
use lora_sb_kernels::Tensor;
use lora_sb_model::Recompute;
use lora_sb_tune::eval::held_out_loss;
use lora_sb_tune::optim::{AdamW, global_norm};
use lora_sb_tune::train::gradients_of_step;
use lora_sb_tune::{Method, TrainConfig, Tuned};

use common::{assert_near, gradients, rounding, tiny_tuned};
use training::micro_batches;

#[test]
fn any_split_into_micro_batches_gives_the_same_loss_and_gradient() {
    let examples = training::examples(8, 29, 3);
    let examples: Vec<&Example> = examples.iter().collect();
    let tokens: usize = examples.iter().map(|example| example.ids.len()).sum();
    for method in Method::ALL {
        let mut tuned = tiny_tuned(method);
        let whole = gradients_of_step(&mut tuned, &examples, &micro_batches(8, Recompute::None)).unwrap();
        let expected = gradients(&mut tuned);
        assert_eq!(whole.tokens, tokens);
        for (micro_batch, recompute) in
            [(4, Recompute::None), (2, Recompute::Block), (1, Recompute::None), (3, Recompute::Block)]
        {
            let split =
                gradients_of_step(&mut tuned, &examples, &micro_batches(micro_batch, recompute)).unwrap();
            assert!(
                (split.loss / whole.loss - 1.0).abs() < rounding(tokens),
                "{method}: {split:?} {whole:?}"
            );
            assert!(
                (split.grad_norm / whole.grad_norm - 1.0).abs() < rounding(tokens),
                "{split:?} {whole:?}"
            );
            assert_eq!((split.tokens, split.trained_tokens), (whole.tokens, whole.trained_tokens));
            for (name, found) in gradients(&mut tuned) {
                assert_near(
                    &format!("{method} {micro_batch} {name}"),
                    &found,
                    &expected[&name],
                    rounding(tokens),
                );
            }
        }
    }
}

#[test]
fn the_loss_of_a_step_is_the_mean_over_its_tokens() {
    let examples = training::examples(5, 29, 4);
    let mut tuned = tiny_tuned(Method::Lora);
    let (mut sum, mut count) = (0.0, 0);
    for example in &examples {
        let alone = held_out_loss(&tuned, std::slice::from_ref(example), 1).unwrap();
        sum += alone.value().unwrap() * alone.weight() as f64;
        count += alone.weight();
    }
    let mean = sum / count as f64;
    for batch_size in [1, 2, 3, 5, 9] {
        let together = held_out_loss(&tuned, &examples, batch_size).unwrap();
        assert_eq!(together.weight(), count);
        assert!((together.value().unwrap() / mean - 1.0).abs() < rounding(count as usize));
    }
    let examples: Vec<&Example> = examples.iter().collect();
    let step = gradients_of_step(&mut tuned, &examples, &micro_batches(2, Recompute::None)).unwrap();
    assert!((step.loss / mean - 1.0).abs() < rounding(count as usize), "{} {mean}", step.loss);
}

/// Clipping in the optimizer's own pass is the same as clipping first.
#[test]
fn a_scaled_step_is_the_step_of_the_scaled_gradient() {
    let examples = training::examples(4, 29, 5);
    let examples: Vec<&Example> = examples.iter().collect();
    let config = training::settings();
    let step = |before: f32, scale: f64| {
        let mut tuned = tiny_tuned(Method::LoraSb);
        let mut optimizer = AdamW::new(&mut tuned).unwrap();
        gradients_of_step(&mut tuned, &examples, &micro_batches(4, Recompute::None)).unwrap();
        let kernels = training::kernels(&tuned);
        let halve =
            &mut |_: &str, _: &mut lora_sb_kernels::Tensor, gradient: &mut lora_sb_kernels::Tensor| {
                let values: Vec<f32> = kernels.to_f32(gradient)?.iter().map(|value| value * before).collect();
                Ok(kernels.write_f32(gradient, &values)?)
            };
        tuned.visit(halve).unwrap();
        let norm = global_norm(&tuned).unwrap();
        optimizer.step(&mut tuned, &config, 1e-2, scale).unwrap();
        let moments: Vec<Vec<f32>> =
            optimizer.tensors().iter().map(|(_, tensor)| kernels.to_f32(tensor).unwrap()).collect();
        (norm, moments)
    };
    // A power of two: scaling rounds nothing.
    let (whole, scaled_in_step) = step(1.0, 0.25);
    let (quarter, scaled_before) = step(0.25, 1.0);
    assert_eq!(whole * 0.25, quarter);
    assert_eq!(scaled_in_step, scaled_before);
}

/// Weight decay moves matrices and leaves norms alone, as transformers' Trainer has it.
#[test]
fn norms_are_not_decayed() {
    let mut config = training::settings();
    config.weight_decay = 0.1;
    let mut tuned = tiny_tuned(Method::Full);
    let mut optimizer = AdamW::new(&mut tuned).unwrap();
    tuned.zero_gradients().unwrap();
    let values = |tuned: &lora_sb_tune::Tuned| -> Vec<(String, usize, Vec<f32>)> {
        let read = |(name, tensor): (String, &lora_sb_kernels::Tensor)| {
            (name, tensor.shape().len(), tuned.model.kernels().to_f32(tensor).unwrap())
        };
        tuned.trained_tensors().into_iter().map(read).collect()
    };
    let before = values(&tuned);
    optimizer.step(&mut tuned, &config, 0.5, 1.0).unwrap();
    for ((name, axes, before), (_, _, after)) in before.into_iter().zip(values(&tuned)) {
        let factor = if axes > 1 { 0.95 } else { 1.0 };
        let expected: Vec<f32> = before.iter().map(|value| value * factor).collect();
        assert_near(&name, &after, &expected, 4.0 * f64::from(f32::EPSILON));
    }
}

/// LoRA+ moves B by the ratio times what A's learning rate would move it, and leaves A's steps alone.
#[test]
fn the_ratio_of_loraplus_is_bs_alone() {
    let examples = training::examples(3, 29, 6);
    let examples: Vec<&Example> = examples.iter().collect();
    let moved = |method: Method, ratio: Option<f64>| {
        let config = TrainConfig { loraplus_lr_ratio: ratio, weight_decay: 0.0, ..training::settings() };
        let mut tuned = tiny_tuned(method);
        let values = |tuned: &Tuned| -> Vec<(String, Vec<f32>)> {
            let read =
                |(name, tensor): (String, &Tensor)| (name, tuned.model.kernels().to_f32(tensor).unwrap());
            tuned.trained_tensors().into_iter().map(read).collect()
        };
        let before = values(&tuned);
        let mut optimizer = AdamW::new(&mut tuned).unwrap();
        gradients_of_step(&mut tuned, &examples, &micro_batches(3, Recompute::None)).unwrap();
        optimizer.step(&mut tuned, &config, 1e-3, 1.0).unwrap();
        let pairs = before.into_iter().zip(values(&tuned));
        let difference = |((name, before), (_, after)): ((String, Vec<f32>), (String, Vec<f32>))| {
            (name, after.iter().zip(before).map(|(after, before)| after - before).collect::<Vec<f32>>())
        };
        pairs.map(difference).collect::<Vec<_>>()
    };
    for method in [Method::Lora, Method::Dora, Method::Pissa] {
        for ((name, plain), (_, ratio)) in moved(method, None).iter().zip(&moved(method, Some(16.0))) {
            let factor = if name.ends_with("lora_B") { 16.0 } else { 1.0 };
            let expected: Vec<f32> = plain.iter().map(|step| step * factor).collect();
            // A step is the difference of two values, each of which is rounded.
            assert_near(&format!("{method} {name}"), ratio, &expected, 1e-3);
        }
    }
}
