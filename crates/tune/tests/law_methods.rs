//! Laws of the methods: where each starts, and what each does that its neighbours do not.

mod common;

use std::collections::BTreeMap;

use common::*;
use lora_sb_kernels::{Generator, Stream, Tensor};
use lora_sb_model::{Batch, Frozen, Recompute, Site};
use lora_sb_tune::init::stream_gradients;
use lora_sb_tune::method::lora_ga::STABLE_GAMMA;
use lora_sb_tune::method::lora_pro;
use lora_sb_tune::{AdapterConfig, Bases, Error, InitConfig, Method, Tuned};
use nalgebra::DMatrix;

fn adapt(config: &AdapterConfig) -> Tuned {
    Tuned::adapt(tiny_model(2), config, &tiny_examples(6), &mut |_| ()).unwrap()
}

fn dense(values: &[f32], (rows, columns): (usize, usize)) -> DMatrix<f64> {
    DMatrix::from_row_iterator(rows, columns, values.iter().map(|value| f64::from(*value)))
}

/// A trained or frozen tensor of a site as a matrix.
fn part(tuned: &Tuned, site: Site, name: &str) -> DMatrix<f64> {
    let (out, input) = tuned.model.shape(site);
    let rank = tuned.config().unwrap().rank;
    let shape = if name.starts_with("lora_A") { (rank, input) } else { (out, rank) };
    dense(&tensor(tuned, &format!("{}.{name}", tuned.model.module(site))), shape)
}

fn logits(tuned: &Tuned, batch: &Batch) -> Vec<f32> {
    tuned.model.kernels().to_f32(&tuned.model.logits(batch, tuned.hook()).unwrap()).unwrap()
}

/// Methods, and choices of bases, that begin at the base itself.
fn that_start_at_the_base() -> Vec<AdapterConfig> {
    let own = [Method::Lora, Method::RsLora, Method::Pissa, Method::Dora, Method::LoraPro, Method::LoraGa];
    let mut configs: Vec<_> = own.into_iter().map(config).collect();
    for bases in [Bases::SbZero, Bases::W0Orthonormal, Bases::RandomOrthonormal] {
        let config = config(Method::LoraSb);
        configs.push(AdapterConfig { init: InitConfig { bases, ..config.init }, ..config });
    }
    configs
}

#[test]
fn law_a_start_at_the_base_is_the_base_to_the_bit() {
    for config in that_start_at_the_base() {
        for lora_alpha in [config.lora_alpha, 0.3 * config.lora_alpha] {
            let tuned = adapt(&AdapterConfig { lora_alpha, ..config.clone() });
            let what = format!("{} {}", config.method, config.init.bases);
            let batch = mean_batch(tuned.model.kernels().as_ref(), &tiny_examples(5));
            let base = tuned.model.logits(&batch, &Frozen).unwrap();
            assert_eq!(logits(&tuned, &batch), tuned.model.kernels().to_f32(&base).unwrap(), "{what}");
            for site in tuned.model.sites() {
                assert_eq!(largest(&delta(&tuned, site)), 0.0, "{what} {site}");
            }
        }
    }
}

#[test]
fn law_every_adapter_learns_and_comes_back_from_its_tensors() {
    for method in adapters() {
        let config = AdapterConfig { lora_dropout: 0.1, ..config(method) };
        let mut tuned = adapt(&config);
        let kernels = tuned.model.kernels().clone();
        let batch = mean_batch(kernels.as_ref(), &tiny_examples(6));
        let losses = adamw_losses(&mut tuned, std::slice::from_ref(&batch), 12, 1e-2);
        assert!(losses[12] < losses[0] - 0.01, "{method}: {losses:?}");
        let saved: BTreeMap<String, Tensor> = tuned
            .trained_tensors()
            .into_iter()
            .chain(tuned.frozen_tensors())
            .map(|(name, tensor)| (name, kernels.to_owned_f32(tensor).unwrap()))
            .collect();
        let restored = Tuned::restore(tiny_model(2), &config, saved).unwrap();
        assert_eq!(logits(&restored, &batch), logits(&tuned, &batch), "{method}");
    }
}

#[test]
fn law_rslora_is_lora_with_a_larger_scale() {
    let step = |method, lora_alpha: f64| {
        let mut tuned = adapt(&AdapterConfig { lora_alpha, ..config(method) });
        let batch = mean_batch(tuned.model.kernels().as_ref(), &tiny_examples(4));
        tuned.loss_and_gradients(&batch, Recompute::None).unwrap();
        gradients(&mut tuned)
    };
    let (lora, rslora) = (step(Method::Lora, 6.0), step(Method::RsLora, 6.0));
    for (name, found) in &rslora {
        // At B = 0 the layers' outputs are alike, and the gradient of B is `s dy^T u`.
        let expected: Vec<f32> = lora[name].iter().map(|value| 5f32.sqrt() * value).collect();
        assert_near(name, found, &expected, rounding(64));
        assert_eq!(largest(found) > 0.0, name.ends_with("lora_B"), "{name}");
    }
    assert_eq!(adapt(&config(Method::RsLora)).config().unwrap().scale(), 1.0);
    assert_eq!(step(Method::RsLora, 5f64.sqrt()), step(Method::Lora, 5.0), "s = 1 either way");
}

#[test]
fn law_pissa_starts_from_the_best_part_of_the_weight() {
    for scale in [1.0, 0.25, 3.0] {
        let config = config(Method::Pissa);
        let tuned = adapt(&AdapterConfig { lora_alpha: scale * config.lora_alpha, ..config });
        for site in tuned.model.sites() {
            let shape = tuned.model.shape(site);
            let (a, b) = (part(&tuned, site, "lora_A"), part(&tuned, site, "lora_B"));
            assert_eq!(a, part(&tuned, site, "lora_A_start"));
            assert_eq!(b, part(&tuned, site, "lora_B_start"));
            let kernels = tuned.model.kernels();
            let weight = dense(&kernels.to_f32(weight(&tuned.model, site)).unwrap(), shape);
            let values = weight.clone().svd(false, false).singular_values;
            let left: f64 = values.as_slice()[5..].iter().map(|value| value * value).sum();
            let distance = (&weight - scale * &b * &a).norm_squared();
            assert!((distance - left).abs() <= 1e-5 * weight.norm_squared(), "{site}: {distance} for {left}");
            // Both factors share the singular values alike: A A^T = B^T B = S / s.
            let expected = DMatrix::from_fn(5, 5, |i, j| if i == j { values[i] / scale } else { 0.0 });
            let tolerance = 1e-5 * values[0] / scale;
            assert!((&a * a.transpose() - &expected).amax() <= tolerance, "{site}");
            assert!((b.transpose() * &b - &expected).amax() <= tolerance, "{site}");
        }
    }
}

#[test]
fn law_lora_ga_starts_from_the_gradients_singular_vectors() {
    let config = config(Method::LoraGa);
    let tuned = adapt(&config);
    let model = &tuned.model;
    let check = |site, gradient: Tensor| {
        let shape = model.shape(site);
        let gradient = dense(&model.kernels().to_f32(&gradient).unwrap(), shape);
        let values = gradient.clone().svd(false, false).singular_values;
        let size = (shape.0 as f64).powf(0.25) / STABLE_GAMMA.sqrt();
        let (a, b) = (part(&tuned, site, "lora_A") / size, part(&tuned, site, "lora_B") / size);
        assert!((&a * a.transpose() - DMatrix::identity(3, 3)).amax() <= 1e-5, "{site}");
        assert!((b.transpose() * &b - DMatrix::identity(3, 3)).amax() <= 1e-5, "{site}");
        // A's rows hold the first r singular values, B's columns the next r.
        let rows = (&gradient * a.transpose()).column_iter().map(|column| column.norm()).collect::<Vec<_>>();
        let columns = (b.transpose() * &gradient).row_iter().map(|row| row.norm()).collect::<Vec<_>>();
        for (found, expected) in rows.iter().chain(&columns).zip(&values) {
            assert!((found - expected).abs() <= 1e-5 * values[0], "{site}: {found} for {expected}");
        }
        assert!(values[5] > 1e-3 * values[0], "{site} is no test");
    };
    let mut take = |gradients: BTreeMap<Site, Tensor>| {
        gradients.into_iter().for_each(|(site, gradient)| check(site, gradient));
        Ok(())
    };
    let (sites, examples) = (model.sites(), tiny_examples(6));
    stream_gradients(model, &sites, &examples, &config.init, 1, &mut |_| (), &mut take).unwrap();
    let report = tuned.init_report().unwrap();
    assert_eq!(report.estimate.as_ref().unwrap().samples, 6);
}

#[test]
fn law_lora_ga_takes_twice_its_rank() {
    // The smallest side of the tiny model is that of its key projection, 6.
    let config = AdapterConfig { rank: 4, ..config(Method::LoraGa) };
    let error = Tuned::adapt(tiny_model(2), &config, &tiny_examples(2), &mut |_| ()).unwrap_err();
    assert!(matches!(&error, Error::Config { name, .. } if name == "rank"), "{error}");
    assert!(error.to_string().contains("k_proj"), "{error}");
    let config = AdapterConfig { rank: 6, ..config };
    Tuned::adapt(tiny_model(2), &AdapterConfig { method: Method::Pissa, ..config }, &[], &mut |_| ())
        .unwrap();
}

#[test]
fn law_dora_separates_size_from_direction() {
    let mut tuned = adapt(&config(Method::Dora));
    shake(&mut tuned, 0.2);
    for site in tuned.model.sites() {
        let (out, input) = tuned.model.shape(site);
        let module = tuned.model.module(site);
        let magnitude = tensor(&tuned, &format!("{module}.lora_magnitude_vector"));
        let kernels = tuned.model.kernels();
        let base = kernels.to_f32(weight(&tuned.model, site)).unwrap();
        let merged: Vec<f32> =
            base.iter().zip(delta(&tuned, site)).map(|(base, delta)| base + delta).collect();
        assert_eq!(magnitude.len(), out);
        for (row, m) in merged.chunks_exact(input).zip(&magnitude) {
            let norm = row.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
            assert!((norm - f64::from(*m).abs()).abs() <= rounding(4 * input) * norm.max(1.0), "{module}");
        }
    }
}

/// One weight with LoRA's gradients of a full gradient.
struct Bent {
    scale: f64,
    full: DMatrix<f64>,
    a: DMatrix<f64>,
    b: DMatrix<f64>,
    a_gradient: DMatrix<f64>,
    b_gradient: DMatrix<f64>,
}

impl Bent {
    /// `hA = s B^T g` and `hB = s g A^T`, adjusted.
    fn new(full: DMatrix<f64>, a: DMatrix<f64>, b: DMatrix<f64>, scale: f64) -> Bent {
        let kernels = device();
        let upload = |matrix: &DMatrix<f64>| {
            let values: Vec<f32> = matrix.transpose().iter().map(|&value| value as f32).collect();
            kernels.from_f32(&values, &[matrix.nrows(), matrix.ncols()]).unwrap()
        };
        let mut a_gradient = upload(&(scale * b.transpose() * &full));
        let mut b_gradient = upload(&(scale * &full * a.transpose()));
        let factors = (upload(&a), upload(&b));
        let both = (&mut a_gradient, &mut b_gradient);
        lora_pro::adjust(kernels.as_ref(), scale as f32, (&factors.0, &factors.1), both).unwrap();
        let [a_gradient, b_gradient] = [a_gradient, b_gradient].map(|gradient| {
            let shape = (gradient.shape()[0], gradient.shape()[1]);
            dense(&kernels.to_f32(&gradient).unwrap(), shape)
        });
        Bent { scale, full, a, b, a_gradient, b_gradient }
    }

    /// How a step along these gradients of A and B moves W.
    fn moves(&self, a_gradient: &DMatrix<f64>, b_gradient: &DMatrix<f64>) -> DMatrix<f64> {
        self.scale * (&self.b * a_gradient + b_gradient * &self.a)
    }

    /// What is left of the full gradient.
    fn residual(&self) -> DMatrix<f64> {
        &self.full - self.moves(&self.a_gradient, &self.b_gradient)
    }

    /// The residual is orthogonal to all that A and B can do, hence no other step is nearer.
    fn check(&self, what: &str) {
        let residual = self.residual();
        let tolerance = 1e-5 * self.full.norm();
        let (along_a, along_b) = (self.b.transpose() * &residual, &residual * self.a.transpose());
        assert!(along_a.norm() <= tolerance * self.b.norm().max(1e-30), "{what}: {:.2e}", along_a.norm());
        assert!(along_b.norm() <= tolerance * self.a.norm(), "{what}: {:.2e}", along_b.norm());
        let generator = &mut Generator::new(3, Stream::Adapter, 4);
        for exponent in 0..60 {
            let size = 10f64.powi(-(exponent % 4));
            let a = &self.a_gradient + size * draw(generator, self.a.nrows(), self.a.ncols());
            let b = &self.b_gradient + size * draw(generator, self.b.nrows(), self.b.ncols());
            let other = (&self.full - self.moves(&a, &b)).norm();
            assert!(
                other >= residual.norm() * (1.0 - 1e-9),
                "{what}: {other} is nearer than {}",
                residual.norm()
            );
        }
    }
}

fn draw(generator: &mut Generator, rows: usize, columns: usize) -> DMatrix<f64> {
    let mut values = vec![0.0; rows * columns];
    generator.normal(1.0, &mut values);
    DMatrix::from_iterator(rows, columns, values.into_iter().map(f64::from))
}

#[test]
fn law_lora_pro_is_nearest_to_the_full_gradient() {
    let generator = &mut Generator::new(1, Stream::Adapter, 0);
    for (out, input, rank) in [(7, 5, 2), (13, 11, 3), (3, 17, 1), (23, 29, 8)] {
        for scale in [1.0, 0.3, 2.0] {
            let full = draw(generator, out, input);
            let (a, b) = (draw(generator, rank, input), draw(generator, out, rank));
            let bent = Bent::new(full.clone(), a.clone(), b.clone(), scale);
            bent.check(&format!("{out} x {input}, rank {rank}, s = {scale}"));
            // LoRA's own gradients leave more.
            let (own_a, own_b) = (scale * b.transpose() * &full, scale * &full * a.transpose());
            assert!((&full - bent.moves(&own_a, &own_b)).norm() > bent.residual().norm());
            // Theorem 2.3: of all that give this step, those nearest to LoRA's own.
            let distance = |x: DMatrix<f64>| {
                let (a, b) = (&bent.a_gradient + &x * &a, &bent.b_gradient - &b * &x);
                (a - &own_a).norm_squared() + (b - &own_b).norm_squared()
            };
            let best = distance(DMatrix::zeros(rank, rank));
            for _ in 0..20 {
                let other = distance(1e-2 * draw(generator, rank, rank));
                assert!(other >= best * (1.0 - 1e-6), "{other} for {best}");
            }
        }
    }
}

#[test]
fn law_lora_pro_at_zero_and_at_lower_rank() {
    let generator = &mut Generator::new(2, Stream::Adapter, 0);
    let (full, a) = (draw(generator, 9, 12), draw(generator, 4, 12));
    // At the start B = 0: only B can move W, and only within the span of A's rows.
    let bent = Bent::new(full.clone(), a.clone(), DMatrix::zeros(9, 4), 0.5);
    bent.check("B = 0");
    assert_eq!(bent.a_gradient.amax(), 0.0);
    let gram = (&a * a.transpose()).try_inverse().unwrap();
    let projected = &full * a.transpose() * gram * &a;
    assert!((bent.moves(&bent.a_gradient, &bent.b_gradient) - projected).amax() <= 1e-5);
    // Columns of B that are combinations of others span less. What is not spanned must not be divided by: gA stays of
    // the size that the spanned part gives it.
    for _ in 0..10 {
        let mut b = draw(generator, 9, 4);
        let combined = 2.0 * b.column(0) - b.column(1);
        b.set_column(3, &combined);
        let gram = b.transpose() * &b;
        let inverse = gram.clone().pseudo_inverse(1e-6 * gram.norm()).unwrap();
        let bent = Bent::new(full.clone(), a.clone(), b, 1.0);
        bent.check("rank 3 of 4");
        let expected = inverse.norm() * (bent.b.transpose() * &full).norm();
        assert!(bent.a_gradient.norm() <= 3.0 * expected, "{} for {expected}", bent.a_gradient.norm());
    }
    let zero = Bent::new(DMatrix::zeros(9, 12), a, draw(generator, 9, 4), 1.0);
    assert_eq!(zero.a_gradient.amax().max(zero.b_gradient.amax()), 0.0);
}

/// In a model: the adjusted step is nearer to the full gradient than LoRA's, at every site.
#[test]
fn law_lora_pro_bends_the_gradients_of_a_step() {
    let mut pro = tiny_tuned(Method::LoraPro);
    let mut lora = tiny_tuned(Method::Lora);
    let batch = mean_batch(pro.model.kernels().as_ref(), &tiny_examples(5));
    for tuned in [&mut pro, &mut lora] {
        tuned.loss_and_gradients(&batch, Recompute::None).unwrap();
    }
    let own = gradients(&mut lora);
    assert_eq!(gradients(&mut pro), own, "nothing is adjusted yet");
    lora.adjust_gradients().unwrap();
    assert_eq!(gradients(&mut lora), own, "LoRA adjusts nothing");
    pro.adjust_gradients().unwrap();
    let bent = gradients(&mut pro);
    let scale = f64::from(pro.config().unwrap().scale());
    for site in pro.model.sites() {
        let (out, input) = pro.model.shape(site);
        let (a, b) = (part(&pro, site, "lora_A"), part(&pro, site, "lora_B"));
        let of = |gradients: &BTreeMap<String, Vec<f32>>| {
            let named = |name: &str| &gradients[&format!("{}.{name}", pro.model.module(site))];
            (dense(named("lora_A"), (5, input)), dense(named("lora_B"), (out, 5)))
        };
        let ((own_a, own_b), (bent_a, bent_b)) = (of(&own), of(&bent));
        let moved = scale * (&b * bent_a + bent_b * &a);
        // g~ satisfies `s B^T g~ = hA` and `s g~ A^T = hB`: what LoRA knows of g is kept.
        let (along_a, along_b) = (scale * b.transpose() * &moved, scale * &moved * a.transpose());
        assert!((along_a - &own_a).amax() <= 1e-3 * own_a.amax(), "{site}");
        assert!((along_b - &own_b).amax() <= 1e-3 * own_b.amax(), "{site}");
    }
}
