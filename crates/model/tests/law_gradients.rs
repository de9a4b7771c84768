//! Laws of forward and backward on small random models.

mod support;

use std::collections::BTreeMap;

use lora_sb_kernels::{Accum, Kernels, Tensor};
use lora_sb_model::{
    Batch, Frozen, InputGradient, LinearHook, Model, NoGradients, Parameter, Projection, Recompute, Sequence,
    Site, SiteSaved,
};
use serde_json::json;
use support::{Texts, host, largest, largest_difference, model, normal, values, zeros};

/// Every kind of parameter at once: biases everywhere and one tensor for embedding and head.
fn tied_and_biased() -> Model {
    let mut model = model(json!({ "tie_word_embeddings": true, "attention_bias": true, "mlp_bias": true }));
    for (index, parameter) in model.parameters().into_iter().enumerate() {
        if let Parameter::Bias(_) = parameter {
            let shape = model.config().parameter_shape(parameter);
            let kernels = model.kernels().clone();
            kernels.write_f32(model.weight_mut(parameter).unwrap(), &normal(index as u64, shape[0])).unwrap();
        }
    }
    model
}

fn gradients(model: &Model, batch: &Batch, recompute: Recompute) -> (f64, BTreeMap<Parameter, Vec<f32>>) {
    let mut gradients = zeros(model);
    let loss = model.loss_and_gradients(batch, &mut Frozen, &mut gradients, recompute).unwrap();
    (loss, host(model, &gradients))
}

#[test]
fn every_gradient_is_the_slope_of_the_loss() {
    let mut model = tied_and_biased();
    let batch = Texts::new().batch(&model);
    let (_, gradients) = gradients(&model, &batch, Recompute::None);
    assert_eq!(gradients.len(), 1 + 3 * 16 + 1);
    let kernels = model.kernels().clone();
    for (index, (&parameter, gradient)) in gradients.iter().enumerate() {
        let before = values(&kernels, model.weight(parameter).unwrap());
        // Half along the gradient, where a slope is largest, and half at random, where a part that is
        // missing from the gradient shows.
        let of_gradient = length(gradient);
        let random = normal(1000 + index as u64, before.len());
        let of_random = length(&random);
        let pairs = gradient.iter().zip(&random);
        let mut direction: Vec<f32> = pairs.map(|(g, d)| g / of_gradient + d / of_random).collect();
        let of_direction = length(&direction);
        direction.iter_mut().for_each(|d| *d /= of_direction);
        let step = 1e-2f32;
        let mut loss_at = |step: f32| {
            let moved: Vec<f32> = before.iter().zip(&direction).map(|(w, d)| w + step * d).collect();
            kernels.write_f32(model.weight_mut(parameter).unwrap(), &moved).unwrap();
            model.loss(&batch, &Frozen).unwrap()
        };
        let slope = (loss_at(step) - loss_at(-step)) / f64::from(2.0 * step);
        loss_at(0.0);
        let expected: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
        // Rounding of the two losses over the step, and the third derivative times its square.
        let tolerance = 4.0 * f64::from(f32::EPSILON / step) + f64::from(step * step) * 2.0;
        assert!(expected > 3.0 * tolerance, "{parameter:?}: {expected} is too flat to tell");
        assert!((slope - expected).abs() < tolerance, "{parameter:?}: slope {slope}, gradient {expected}");
    }
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
    let model = tied_and_biased();
    let batch = Texts::new().batch(&model);
    assert_eq!(gradients(&model, &batch, Recompute::None), gradients(&model, &batch, Recompute::Block));
}

#[test]
fn packed_is_one_by_one() {
    let model = model(json!({}));
    let texts = Texts::new();
    let (loss, all) = gradients(&model, &texts.batch(&model), Recompute::None);
    let logits = values(model.kernels(), &model.logits(&texts.batch(&model), &Frozen).unwrap());
    let mut sum = zeros(&model);
    let (mut loss_sum, mut logits_alone) = (0.0, Vec::new());
    for sequence in texts.sequences() {
        let batch = Batch::pack(&**model.kernels(), &[sequence]).unwrap();
        loss_sum += model.loss_and_gradients(&batch, &mut Frozen, &mut sum, Recompute::None).unwrap();
        logits_alone.extend(values(model.kernels(), &model.logits(&batch, &Frozen).unwrap()));
    }
    // A product's rows do not see one another, but its sums may be taken in another order for fewer rows:
    // a few units in the last place through three blocks; gradients add up their tokens in another order too.
    let tolerance = 64.0 * f32::EPSILON;
    assert!((loss - loss_sum).abs() <= f64::from(tolerance) * loss);
    assert!(largest_difference(&logits, &logits_alone) <= tolerance * largest(&logits));
    for (parameter, sum) in host(&model, &sum) {
        let difference = largest_difference(&all[&parameter], &sum) / largest(&sum);
        assert!(difference <= tolerance, "{parameter:?}: {difference:e}");
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
    let model = model(json!({}));
    let batch = Texts::new().batch(&model);
    let (loss, expected) = gradients(&model, &batch, Recompute::None);
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
    for (parameter, found) in host(&model, &found) {
        if parameter != Parameter::Embedding {
            assert_eq!(found, expected[&parameter], "{parameter:?}");
        }
    }
}

#[test]
fn without_labels_nothing_is_learned() {
    let model = model(json!({}));
    for trained in [[false; 3], [true, false, false]] {
        let sequence = Sequence { ids: &[3, 4, 5], trained: &trained, weight: 1.0 };
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

/// A second weight beside some of the model's own: `y += x M^T`.
struct Beside {
    matrices: BTreeMap<Site, (Tensor, Tensor)>,
}

impl LinearHook for Beside {
    fn forward(
        &self,
        kernels: &dyn Kernels,
        site: Site,
        x: &Tensor,
        y: &mut Tensor,
    ) -> lora_sb_kernels::Result<SiteSaved> {
        if let Some((m, _)) = self.matrices.get(&site) {
            kernels.linear(x, m, 1.0, Accum::Add, y)?;
            return Ok(SiteSaved(vec![kernels.from_f32(&[site.layer as f32], &[1])?]));
        }
        Ok(SiteSaved::default())
    }

    fn needs_input(&self, site: Site) -> bool {
        self.matrices.contains_key(&site)
    }

    fn backward(
        &mut self,
        kernels: &dyn Kernels,
        site: Site,
        saved: SiteSaved,
        x: Option<&Tensor>,
        dy: &Tensor,
        dx: Option<&mut Tensor>,
    ) -> lora_sb_kernels::Result<()> {
        if let Some((m, dm)) = self.matrices.get_mut(&site) {
            assert_eq!(kernels.to_f32(&saved.0[0])?, [site.layer as f32], "what was saved comes back");
            kernels.linear_weight_gradient(dy, x.expect("x was asked for"), 1.0, Accum::Add, dm)?;
            if let Some(dx) = dx {
                kernels.linear_input_gradient(dy, m, 1.0, Accum::Add, dx)?;
            }
        }
        Ok(())
    }
}

impl Beside {
    fn new(model: &Model) -> Self {
        let sites =
            model.sites().into_iter().filter(|site| site.layer != 1 || site.projection != Projection::Value);
        let matrices = sites.enumerate().map(|(index, site)| {
            let (n, k) = model.shape(site);
            let values: Vec<f32> = normal(index as u64, n * k).iter().map(|v| 0.1 * v).collect();
            let kernels = model.kernels();
            (site, (kernels.from_f32(&values, &[n, k]).unwrap(), kernels.zeros(&[n, k]).unwrap()))
        });
        Beside { matrices: matrices.collect() }
    }
}

#[test]
fn a_hook_is_a_second_weight() {
    let model = model(json!({}));
    let kernels = model.kernels().clone();
    let batch = Texts::new().batch(&model);
    let mut hook = Beside::new(&model);
    let mut own = zeros(&model);
    let loss = model.loss_and_gradients(&batch, &mut hook, &mut own, Recompute::Block).unwrap();
    let logits = values(&kernels, &model.logits(&batch, &hook).unwrap());
    assert_eq!(model.loss(&batch, &hook).unwrap(), loss);

    let mut merged = support::model(json!({}));
    for (&site, (m, _)) in &hook.matrices {
        kernels.add(1.0, m, merged.weight_mut(Parameter::Weight(site)).unwrap()).unwrap();
    }
    let (merged_loss, expected) = gradients(&merged, &batch, Recompute::None);
    let merged_logits = values(&kernels, &merged.logits(&batch, &Frozen).unwrap());
    // (x W + x M) against x (W + M): a rounding per product, through three blocks.
    let tolerance = 256.0 * f32::EPSILON;
    assert!((loss - merged_loss).abs() <= f64::from(tolerance) * loss);
    assert!(largest_difference(&logits, &merged_logits) <= tolerance * largest(&logits));
    for (parameter, own) in host(&model, &own) {
        let scale = largest(&expected[&parameter]);
        assert!(largest_difference(&own, &expected[&parameter]) <= tolerance * scale, "{parameter:?}");
    }
    for (site, (_, dm)) in &hook.matrices {
        let expected = &expected[&Parameter::Weight(*site)];
        assert!(
            largest_difference(&values(&kernels, dm), expected) <= tolerance * largest(expected),
            "{site}"
        );
    }
}

#[test]
fn a_hook_learns_the_same_beside_a_frozen_model() {
    let model = model(json!({}));
    let batch = Texts::new().batch(&model);
    let mut runs = Vec::new();
    for recompute in [Recompute::None, Recompute::Block] {
        let mut hook = Beside::new(&model);
        model.loss_and_gradients(&batch, &mut hook, &mut NoGradients, recompute).unwrap();
        runs.push(hook);
    }
    let mut beside_trained = Beside::new(&model);
    model.loss_and_gradients(&batch, &mut beside_trained, &mut zeros(&model), Recompute::None).unwrap();
    runs.push(beside_trained);
    for run in &runs[1..] {
        for (site, (_, dm)) in &runs[0].matrices {
            let same = values(model.kernels(), &run.matrices[site].1);
            assert_eq!(values(model.kernels(), dm), same, "{site}");
        }
    }
}
