//! Laws of forward and backward on small random models.

mod support;

use std::collections::BTreeMap;

use lora_sb_kernels::Tensor;
use lora_sb_model::{
    Batch, Frozen, Gradients, InputGradient, Model, NoGradients, Norm, Parameter, Recompute, Sequence,
};
use serde_json::json;
use support::{Texts, families, host, largest, largest_difference, model, normal, values, zeros};

fn gradients(model: &Model, batch: &Batch, recompute: Recompute) -> (f64, BTreeMap<Parameter, Vec<f32>>) {
    let mut gradients = zeros(model);
    let loss = model.loss_and_gradients(batch, &mut Frozen, &mut gradients, recompute).unwrap();
    (loss, host(model, &gradients))
}

#[test]
fn every_gradient_is_the_slope_of_the_loss() {
    for family in families::all() {
        let mut model = family.model();
        let batch = Texts::new().batch(&model);
        let (_, gradients) = gradients(&model, &batch, Recompute::None);
        assert_eq!(gradients.len(), model.parameters().len());
        for (index, (&parameter, gradient)) in gradients.iter().enumerate() {
            let name = format!("{}: {parameter:?}", family.name);
            // Half along the gradient, where a slope is largest, and half at random, where a part that is
            // missing from the gradient shows.
            let (along, random) = (unit(gradient), unit(&normal(1000 + index as u64, gradient.len())));
            let sign = along.iter().zip(&random).map(|(g, d)| g * d).sum::<f32>().signum();
            let direction = unit(&along.iter().zip(&random).map(|(g, d)| g + sign * d).collect::<Vec<_>>());
            let expected: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
            let (slope, tolerance) = slope(&mut model, &batch, parameter, &direction);
            let flat = families::without_effect(&model, parameter);
            assert!(flat || expected > 3.0 * tolerance, "{name}: {expected} is too flat, {tolerance}");
            assert!(
                (slope - expected).abs() < tolerance,
                "{name}: slope {slope}, gradient {expected}, {tolerance}"
            );
        }
    }
}

/// The loss's slope along a direction of length 1, and how wrong it may be.
fn slope(model: &mut Model, batch: &Batch, parameter: Parameter, direction: &[f32]) -> (f64, f64) {
    let kernels = model.kernels().clone();
    let before = values(&kernels, model.weight(parameter).unwrap());
    let mut loss_at = |step: f32| {
        let moved: Vec<f32> = before.iter().zip(direction).map(|(w, d)| w + step * d).collect();
        kernels.write_f32(model.weight_mut(parameter).unwrap(), &moved).unwrap();
        model.loss(batch, &Frozen).unwrap()
    };
    let mut central = |step: f32| (loss_at(step) - loss_at(-step)) / f64::from(2.0 * step);
    let step = 4e-3;
    let (near, far) = (central(step), central(2.0 * step));
    let loss = loss_at(0.0);
    // Richardson: the third derivative cancels. What is left is the fifth, which the third bounds here, and the
    // rounding of losses over the step.
    let slope = (4.0 * near - far) / 3.0;
    (slope, 4.0 * f64::from(f32::EPSILON / step) * loss.max(1.0) + 0.1 * (far - near).abs())
}

fn unit(values: &[f32]) -> Vec<f32> {
    let length = length(values).max(f32::MIN_POSITIVE);
    values.iter().map(|value| value / length).collect()
}

fn length(values: &[f32]) -> f32 {
    values.iter().map(|value| value * value).sum::<f32>().sqrt()
}

#[test]
fn a_tied_embedding_receives_the_gradients_of_both_uses() {
    let tied = model(json!({ "tie_word_embeddings": true }));
    let mut untied = model(json!({}));
    let kernels = untied.kernels().clone();
    for parameter in untied.parameters() {
        let same = values(&kernels, tied.weight(parameter).unwrap());
        kernels.write_f32(untied.weight_mut(parameter).unwrap(), &same).unwrap();
    }
    let (loss, of_tied) = gradients(&tied, &Texts::new().batch(&tied), Recompute::None);
    let (same_loss, of_untied) = gradients(&untied, &Texts::new().batch(&untied), Recompute::None);
    assert_eq!(loss, same_loss);
    assert!(!of_tied.contains_key(&Parameter::Head) && !tied.parameters().contains(&Parameter::Head));
    let uses = of_untied[&Parameter::Embedding].iter().zip(&of_untied[&Parameter::Head]);
    let sum: Vec<f32> = uses.map(|(lookup, projection)| lookup + projection).collect();
    // Sums of at most 13 tokens, in another order.
    let tolerance = 16.0 * f32::EPSILON * largest(&sum);
    assert!(largest_difference(&of_tied[&Parameter::Embedding], &sum) <= tolerance);
}

#[test]
fn recompute_gives_the_same_bits() {
    for family in families::all() {
        let model = family.model();
        let batch = Texts::new().batch(&model);
        let kept = gradients(&model, &batch, Recompute::None);
        assert!(kept == gradients(&model, &batch, Recompute::Block), "{}", family.name);
    }
}

#[test]
fn packed_is_one_by_one() {
    for family in families::all() {
        let (model, texts) = (family.model(), Texts::new());
        let (loss, all) = gradients(&model, &texts.batch(&model), Recompute::None);
        let logits = values(model.kernels(), &model.logits(&texts.batch(&model), &Frozen).unwrap());
        let mut sum = zeros(&model);
        let (mut loss_sum, mut logits_alone) = (0.0, Vec::new());
        for sequence in texts.sequences_for(&model) {
            let batch = Batch::pack(&**model.kernels(), &[sequence]).unwrap();
            loss_sum += model.loss_and_gradients(&batch, &mut Frozen, &mut sum, Recompute::None).unwrap();
            logits_alone.extend(values(model.kernels(), &model.logits(&batch, &Frozen).unwrap()));
        }
        // A product's rows do not see one another, but its sums may be taken in another order for fewer rows:
        // a few units in the last place through three blocks; gradients add up their tokens in another order too.
        let tolerance = 64.0 * f32::EPSILON;
        assert!((loss - loss_sum).abs() <= f64::from(tolerance) * loss, "{}", family.name);
        assert!(
            largest_difference(&logits, &logits_alone) <= tolerance * largest(&logits),
            "{}",
            family.name
        );
        let of_all = all.values().map(|gradient| largest(gradient)).fold(0.0, f32::max);
        for (parameter, sum) in host(&model, &sum) {
            let scale = if families::without_effect(&model, parameter) { of_all } else { largest(&sum) };
            let difference = largest_difference(&all[&parameter], &sum) / scale;
            assert!(difference <= tolerance, "{}: {parameter:?}: {difference:e}", family.name);
        }
    }
}

#[test]
fn gradients_are_added_to_what_is_there() {
    let model = model(json!({}));
    let batch = Texts::new().batch(&model);
    let (_, once) = gradients(&model, &batch, Recompute::None);
    let mut twice = zeros(&model);
    for _ in 0..2 {
        model.loss_and_gradients(&batch, &mut Frozen, &mut twice, Recompute::None).unwrap();
    }
    for (parameter, twice) in host(&model, &twice) {
        let doubled: Vec<f32> = once[&parameter].iter().map(|g| 2.0 * g).collect();
        let tolerance = 64.0 * f32::EPSILON * largest(&doubled);
        assert!(largest_difference(&twice, &doubled) <= tolerance, "{parameter:?}");
    }
}

#[test]
fn parts_make_the_whole() {
    for family in families::all() {
        let model = family.model();
        let batch = Texts::new().batch(&model);
        let (loss, mut expected) = gradients(&model, &batch, Recompute::None);
        let mut found = zeros(&model);
        let (mut x, mut saved) = (model.embed(&batch).unwrap(), Vec::new());
        for layer in 0..3 {
            let (y, kept) = model.block_forward(layer, x, &batch, &Frozen).unwrap();
            saved.push(kept);
            x = y;
        }
        let (same, dx) = model.head(x, &batch, &mut found, InputGradient::Wanted).unwrap();
        assert_eq!(loss, same);
        let mut dx = dx;
        for (layer, saved) in saved.into_iter().enumerate().rev() {
            let wanted = if layer > 0 { InputGradient::Wanted } else { InputGradient::Unwanted };
            let dy = dx.take().unwrap();
            dx = model.block_backward(layer, saved, &batch, dy, &mut Frozen, &mut found, wanted).unwrap();
        }
        assert!(dx.is_none());
        // What comes before the blocks has a backward of its own, which is not public.
        expected.retain(|&parameter, _| !before_the_blocks(parameter));
        for (parameter, expected) in expected {
            assert_eq!(
                values(model.kernels(), &found[&parameter]),
                expected,
                "{}: {parameter:?}",
                family.name
            );
        }
    }
}

fn before_the_blocks(parameter: Parameter) -> bool {
    matches!(
        parameter,
        Parameter::Embedding
            | Parameter::PositionEmbedding
            | Parameter::TokenTypeEmbedding
            | Parameter::Gain(Norm::Embedding)
            | Parameter::Shift(Norm::Embedding)
    )
}

/// Asks for some gradients alone.
struct Only<'a>(&'a mut BTreeMap<Parameter, Tensor>, Parameter);

impl Gradients for Only<'_> {
    fn of(&mut self, parameter: Parameter) -> Option<&mut Tensor> {
        self.0.get_mut(&parameter).filter(|_| parameter == self.1)
    }
}

#[test]
fn a_gradient_asked_for_alone_is_the_same() {
    for family in families::all() {
        let model = family.model();
        let batch = Texts::new().batch(&model);
        let (loss, expected) = gradients(&model, &batch, Recompute::None);
        for (parameter, expected) in expected {
            let mut found = zeros(&model);
            let mut only = Only(&mut found, parameter);
            let same = model.loss_and_gradients(&batch, &mut Frozen, &mut only, Recompute::Block).unwrap();
            assert_eq!(loss, same);
            for (other, found) in host(&model, &found) {
                let expected = if other == parameter { expected.clone() } else { vec![0.0; found.len()] };
                assert!(found == expected, "{}: {other:?} where {parameter:?} is asked for", family.name);
            }
        }
    }
}

#[test]
fn without_labels_nothing_is_learned() {
    let model = model(json!({}));
    for trained in [[false; 3], [true, false, false]] {
        let sequence = Sequence::text(&[3, 4, 5], &trained, 1.0);
        let batch = Batch::pack(&**model.kernels(), &[sequence]).unwrap();
        assert_eq!((batch.tokens(), batch.labelled()), (3, 0));
        let (loss, gradients) = gradients(&model, &batch, Recompute::None);
        assert_eq!(loss, 0.0);
        assert_eq!(model.loss(&batch, &Frozen).unwrap(), 0.0);
        assert!(gradients.values().flatten().all(|&g| g == 0.0));
        let x = model.embed(&batch).unwrap();
        let (loss, dx) = model.head(x, &batch, &mut NoGradients, InputGradient::Wanted).unwrap();
        assert_eq!(loss, 0.0);
        assert_eq!(values(model.kernels(), &dx.unwrap()), [0.0; 3 * 13]);
    }
}

#[test]
fn the_token_of_padding_learns_nothing_from_being_looked_up() {
    let plain = model(json!({}));
    let padded = model(json!({ "pad_token_id": 5 }));
    let (_, of_plain) = gradients(&plain, &Texts::new().batch(&plain), Recompute::None);
    let (_, of_padded) = gradients(&padded, &Texts::new().batch(&padded), Recompute::None);
    for (parameter, found) in of_padded {
        let mut expected = of_plain[&parameter].clone();
        if parameter == Parameter::Embedding {
            assert!(largest(&expected[5 * 13..6 * 13]) > 0.0);
            expected[5 * 13..6 * 13].fill(0.0);
        }
        assert_eq!(found, expected, "{parameter:?}");
    }
}
