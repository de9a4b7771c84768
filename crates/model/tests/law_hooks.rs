//! Laws of hooks at linear layers: what a method of fine-tuning sees of a model.

mod support;

use std::collections::BTreeMap;

use lora_sb_kernels::{Accum, Kernels, Tensor};
use lora_sb_model::{
    Frozen, Layer, LinearHook, Model, NoGradients, Parameter, Projection, Recompute, Site, SiteSaved,
};
use support::{Texts, families, host, largest, largest_difference, normal, values, zeros};

/// A second weight beside some of the model's own: `y += x M^T`.
struct Beside {
    matrices: BTreeMap<Site, (Tensor, Tensor)>,
}

impl LinearHook for Beside {
    fn forward(
        &self,
        kernels: &dyn Kernels,
        layer: Layer<'_>,
        x: &Tensor,
        accum: Accum,
        y: &mut Tensor,
    ) -> lora_sb_kernels::Result<SiteSaved> {
        layer.forward(kernels, x, None, accum, y)?;
        if let Some((m, _)) = self.matrices.get(&layer.site) {
            kernels.linear(x, m, 1.0, Accum::Add, y)?;
            return Ok(SiteSaved(vec![kernels.from_f32(&[layer.site.layer as f32], &[1])?]));
        }
        Ok(SiteSaved::default())
    }

    fn needs_input(&self, site: Site) -> bool {
        self.matrices.contains_key(&site)
    }

    fn backward(
        &mut self,
        kernels: &dyn Kernels,
        layer: Layer<'_>,
        saved: SiteSaved,
        x: Option<&Tensor>,
        dy: &Tensor,
        mut dx: Option<(&mut Tensor, Accum)>,
    ) -> lora_sb_kernels::Result<()> {
        if let Some((dx, accum)) = &mut dx {
            layer.input_gradient(kernels, dy, None, *accum, dx)?;
        }
        if let Some((m, dm)) = self.matrices.get_mut(&layer.site) {
            assert_eq!(kernels.to_f32(&saved.0[0])?, [layer.site.layer as f32], "what was saved comes back");
            kernels.linear_weight_gradient(dy, x.expect("x was asked for"), 1.0, Accum::Add, dm)?;
            if let Some((dx, _)) = dx {
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
    for family in families::all() {
        let model = family.model();
        let kernels = model.kernels().clone();
        let batch = Texts::new().batch(&model);
        let mut hook = Beside::new(&model);
        let mut own = zeros(&model);
        let loss = model.loss_and_gradients(&batch, &mut hook, &mut own, Recompute::Block).unwrap();
        let logits = values(&kernels, &model.logits(&batch, &hook).unwrap());
        assert_eq!(model.loss(&batch, &hook).unwrap(), loss);

        let mut merged = family.model();
        for (&site, (m, _)) in &hook.matrices {
            kernels.add(1.0, m, merged.weight_mut(Parameter::Weight(site)).unwrap()).unwrap();
        }
        let mut expected = zeros(&merged);
        let merged_loss =
            merged.loss_and_gradients(&batch, &mut Frozen, &mut expected, Recompute::None).unwrap();
        let expected = host(&merged, &expected);
        let merged_logits = values(&kernels, &merged.logits(&batch, &Frozen).unwrap());
        // (x W + x M) against x (W + M): a rounding per product, through three blocks.
        let tolerance = 256.0 * f32::EPSILON;
        let name = family.name;
        assert!((loss - merged_loss).abs() <= f64::from(tolerance) * loss, "{name}");
        assert!(largest_difference(&logits, &merged_logits) <= tolerance * largest(&logits), "{name}");
        let of_all = expected.values().map(|gradient| largest(gradient)).fold(0.0, f32::max);
        for (parameter, own) in host(&model, &own) {
            let flat = families::without_effect(&model, parameter);
            let scale = if flat { of_all } else { largest(&expected[&parameter]) };
            let difference = largest_difference(&own, &expected[&parameter]);
            assert!(difference <= tolerance * scale, "{name}: {parameter:?}: {difference:e} of {scale:e}");
        }
        for (site, (_, dm)) in &hook.matrices {
            let expected = &expected[&Parameter::Weight(*site)];
            let difference = largest_difference(&values(&kernels, dm), expected);
            assert!(difference <= tolerance * largest(expected), "{name}: {site}");
        }
    }
}

#[test]
fn a_hook_learns_the_same_beside_a_frozen_model() {
    for family in families::all() {
        let model = family.model();
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
                assert!(values(model.kernels(), dm) == same, "{}: {site}", family.name);
            }
        }
    }
}
