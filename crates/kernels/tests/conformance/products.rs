//! Products with weights: the linear layer and the loss under a vocabulary projection.

use lora_sb_kernels::op::elementwise::naive::soft_capped;
use lora_sb_kernels::op::{cross_entropy, linear};
use lora_sb_kernels::{Accum, DType, Kernels, Tensor};

use crate::common::{Draw, EPS, SOURCES, Source, close, devices, magnitudes, sum_error, weight, widen};

/// (T, N, K): no token, one token (a product of a matrix and a vector), one row or column of the weight,
/// around the tiles of a blocked product, longer than a block of each axis.
const SHAPES: [(usize, usize, usize); 14] = [
    (0, 3, 5),
    (1, 1, 1),
    (1, 7, 3),
    (1, 517, 300),
    (2, 1, 9),
    (3, 5, 1),
    (5, 31, 17),
    (13, 16, 64),
    (16, 48, 32),
    (33, 97, 129),
    (7, 1031, 65),
    (131, 8, 257),
    (193, 67, 521),
    (67, 300, 1031),
];

/// What an output holds before; `Replace` must not read it.
fn before(accum: Accum) -> f32 {
    match accum {
        Accum::Replace => f32::NAN,
        Accum::Add => 0.75,
    }
}

fn filled(kernels: &dyn Kernels, accum: Accum, shape: &[usize]) -> Tensor {
    kernels.from_f32(&vec![before(accum); shape.iter().product()], shape).unwrap()
}

/// A product `(a, b, alpha, accum, out)` by the specification.
type Specification<'a> = &'a dyn Fn(&[f64], &[f64], f64, Accum, &mut [f64]);

/// One product on the device and by the specification.
///
/// The specification also yields the magnitudes, when run on operands without signs.
fn check(
    case: &str,
    terms: usize,
    (a, b): (&[f64], &[f64]),
    (alpha, accum): (f64, Accum),
    found: &[f32],
    specification: Specification,
) {
    let mut truth = vec![f64::from(before(accum)); found.len()];
    specification(a, b, alpha, accum, &mut truth);
    let mut magnitude = vec![0.75; found.len()];
    specification(&magnitudes(a), &magnitudes(b), alpha.abs(), Accum::Add, &mut magnitude);
    close(&format!("{case} {accum:?}"), found, &truth, sum_error(terms), &magnitude);
}

#[test]
fn linear_layers_in_three_orientations() {
    for kernels in devices() {
        for (shape, &(t, n, k)) in SHAPES.iter().enumerate() {
            let mut draw = Draw::new((t * 10_000 + n * 100 + k) as u64);
            let [x, w, dy] = [draw.normal(t * k), draw.normal(n * k), draw.normal(t * n)];
            let x_tensor = kernels.from_f32(&x, &[t, k]).unwrap();
            let dy_tensor = kernels.from_f32(&dy, &[t, n]).unwrap();
            let (x, dy) = (widen(&x), widen(&dy));
            for accum in [Accum::Replace, Accum::Add] {
                let alpha = [1.0f32, -0.3][shape % 2];
                let numbers = (f64::from(alpha), accum);
                for source in SOURCES {
                    let case = format!("T={t} N={n} K={k} {source:?}");
                    let (w_tensor, w) = weight(&*kernels, source, &w, &[n, k]);
                    let w = widen(&w);
                    let mut y = filled(&*kernels, accum, &[t, n]);
                    kernels.linear(&x_tensor, &w_tensor, alpha, accum, &mut y).unwrap();
                    let found = kernels.to_f32(&y).unwrap();
                    check(&format!("y {case}"), k, (&x, &w), numbers, &found, &|x, w, alpha, accum, y| {
                        linear::naive::forward(x, w, alpha, accum, y, k);
                    });
                    let mut dx = filled(&*kernels, accum, &[t, k]);
                    kernels.linear_input_gradient(&dy_tensor, &w_tensor, alpha, accum, &mut dx).unwrap();
                    let found = kernels.to_f32(&dx).unwrap();
                    check(
                        &format!("dx {case}"),
                        n,
                        (&dy, &w),
                        numbers,
                        &found,
                        &|dy, w, alpha, accum, dx| {
                            linear::naive::input_gradient(dy, w, alpha, accum, dx, k);
                        },
                    );
                }
                let mut dw = filled(&*kernels, accum, &[n, k]);
                kernels.linear_weight_gradient(&dy_tensor, &x_tensor, alpha, accum, &mut dw).unwrap();
                let found = kernels.to_f32(&dw).unwrap();
                let case = format!("dw T={t} N={n} K={k}");
                check(&case, t, (&dy, &x), numbers, &found, &|dy, x, alpha, accum, dw| {
                    linear::naive::weight_gradient(dy, x, alpha, accum, dw, k);
                });
            }
        }
    }
}

#[test]
fn nan_and_infinity_reach_the_output() {
    for kernels in devices() {
        let (t, n, k) = (5, 35, 67);
        let mut draw = Draw::new(1);
        let (mut x, w) = (draw.normal(t * k), draw.normal(n * k));
        (x[3 * k + 66], x[4 * k]) = (f32::NAN, f32::INFINITY);
        let (x, w) = (kernels.from_f32(&x, &[t, k]).unwrap(), kernels.from_f32(&w, &[n, k]).unwrap());
        let mut y = kernels.empty(&[t, n]).unwrap();
        kernels.linear(&x, &w, 1.0, Accum::Replace, &mut y).unwrap();
        let y = kernels.to_f32(&y).unwrap();
        assert!(y[..3 * n].iter().all(|y| y.is_finite()), "other tokens are not touched");
        assert!(y[3 * n..4 * n].iter().all(|y| y.is_nan()));
        assert!(y[4 * n..].iter().all(|y| y.is_infinite()));
    }
}

/// The loss's operands, and by the specification its value, gradients and the errors allowed to them.
struct Loss {
    soft_cap: Option<f32>,
    x: Vec<f32>,
    labels: Vec<u32>,
    weights: Vec<f32>,
    loss: f64,
    loss_error: f64,
    dx: Vec<f64>,
    dx_magnitude: Vec<f64>,
    dw: Vec<f64>,
    dw_magnitude: Vec<f64>,
    /// Relative to the magnitudes.
    gradient_error: f64,
}

/// What dw holds before the call, which adds to it.
const DW_BEFORE: f32 = 0.25;

impl Loss {
    fn new(
        (n, v, d): (usize, usize, usize),
        soft_cap: Option<f32>,
        x: Vec<f32>,
        w: &[f64],
        draw: &mut Draw,
    ) -> Self {
        let labels = draw.indices(n, v);
        let weights: Vec<f32> = (0..n).map(|i| [1.0, 0.0, 0.3][i % 3] / n as f32).collect();
        let (wide_x, wide_weights) = (widen(&x), widen(&weights));
        let (mut dx, mut dw) = (vec![f64::NAN; n * d], vec![f64::from(DW_BEFORE); v * d]);
        let loss = cross_entropy::naive::forward_backward(
            &wide_x,
            w,
            &labels,
            &wide_weights,
            soft_cap,
            &mut dx,
            &mut dw,
            d,
        );

        // An error e of every logit moves a log-sum-exp by at most e and a probability by a factor exp(2 e).
        let mut sizes = vec![0.0; n * v];
        linear::naive::forward(&magnitudes(&wide_x), &magnitudes(w), 1.0, Accum::Replace, &mut sizes, d);
        let largest = sizes.iter().fold(0.0f64, |largest, &size| largest.max(size));
        // A cap's derivative is at most 1; its own roundings count against its result. The error of a logit
        // moves the derivative 1 - t^2 by a relative 2 |t| / cap of it.
        let cap = soft_cap.map_or(f64::INFINITY, f64::from);
        let bend = if cap.is_finite() { 8.0 * EPS * largest.min(cap) } else { 0.0 };
        let logit_error = sum_error(d) * largest + bend;
        let row_error = 2.0 * logit_error + sum_error(v) + 4.0 * EPS * largest;
        let loss_error = wide_weights.iter().sum::<f64>() * row_error;

        // |dz| = weight (softmax + [v = label]), the two terms before one cancels the other, behind the cap's
        // derivative. That is off by up to 8 EPS however small it is; the error allowed is more than 32 EPS.
        let mut dz = vec![0.0; n * v];
        linear::naive::forward(&wide_x, w, 1.0, Accum::Replace, &mut dz, d);
        let (capped, slopes): (Vec<f64>, Vec<f64>) = dz.iter().map(|&z| soft_capped(soft_cap, z)).unzip();
        dz = capped;
        cross_entropy::naive::loss_and_gradient(&mut dz, &labels, &wide_weights, v);
        for (i, (&label, &weight)) in labels.iter().zip(&wide_weights).enumerate() {
            dz[i * v + label as usize] += 2.0 * weight;
        }
        if soft_cap.is_some() {
            dz.iter_mut().zip(slopes).for_each(|(dz, slope)| *dz *= slope + 0.25);
        }
        let (mut dx_magnitude, mut dw_magnitude) = (vec![0.0; n * d], vec![f64::from(DW_BEFORE); v * d]);
        linear::naive::input_gradient(&dz, &magnitudes(w), 1.0, Accum::Replace, &mut dx_magnitude, d);
        linear::naive::weight_gradient(&dz, &magnitudes(&wide_x), 1.0, Accum::Add, &mut dw_magnitude, d);
        let gradient_error = 2.0 * row_error + sum_error(v) + sum_error(n) + 2.0 * logit_error / cap;
        Loss {
            soft_cap,
            x,
            labels,
            weights,
            loss,
            loss_error,
            dx,
            dx_magnitude,
            dw,
            dw_magnitude,
            gradient_error,
        }
    }

    fn check(&self, case: &str, kernels: &dyn Kernels, w: &Tensor, chunk_rows: usize, wanted: (bool, bool)) {
        let (n, d) = (self.labels.len(), w.shape()[1]);
        let x = kernels.from_f32(&self.x, &[n, d]).unwrap();
        let labels = kernels.from_u32(&self.labels, &[n]).unwrap();
        let weights = kernels.from_f32(&self.weights, &[n]).unwrap();
        let mut dx = kernels.empty(&[n, d]).unwrap();
        let mut dw = kernels.from_f32(&vec![DW_BEFORE; w.len()], w.shape()).unwrap();
        let gradients = (wanted.0.then_some(&mut dx), wanted.1.then_some(&mut dw));
        let loss = kernels
            .cross_entropy(&x, w, &labels, &weights, self.soft_cap, chunk_rows, gradients.0, gradients.1)
            .unwrap();
        let error = (loss - self.loss).abs();
        assert!(error <= self.loss_error, "{case}: {loss}, truth {}, allowed {}", self.loss, self.loss_error);
        if wanted.0 {
            let found = kernels.to_f32(&dx).unwrap();
            close(&format!("{case}: dx"), &found, &self.dx, self.gradient_error, &self.dx_magnitude);
        }
        if wanted.1 {
            let found = kernels.to_f32(&dw).unwrap();
            close(&format!("{case}: dw"), &found, &self.dw, self.gradient_error, &self.dw_magnitude);
        }
    }
}

/// Whether a case of a large vocabulary is left to faster devices: the emulator takes some seconds for one.
fn too_slow(kernels: &dyn Kernels, v: usize) -> bool {
    v > 10_000 && kernels.name().contains("emulator")
}

#[test]
fn loss_and_its_gradients() {
    // (N, V, D); the fourth is a large vocabulary.
    let shapes = [(0, 5, 3), (1, 1, 1), (1, 2, 7), (5, 11_003, 17), (33, 97, 65), (67, 257, 31)];
    for kernels in devices() {
        for (n, v, d) in shapes {
            let mut draw = Draw::new((n * 10_000 + v * 10 + d) as u64);
            let (x, w) = (draw.normal(n * d), draw.normal(v * d));
            for source in [Source::Owned, SOURCES[2], SOURCES[3], SOURCES[5]] {
                if too_slow(&*kernels, v) && source != SOURCES[2] {
                    continue;
                }
                let (w_tensor, w) = weight(&*kernels, source, &w, &[v, d]);
                let truth = Loss::new((n, v, d), None, x.clone(), &widen(&w), &mut Draw::new(8));
                for chunk_rows in [1, 7, 64, 1000] {
                    let case = format!("N={n} V={v} D={d} {source:?}, {chunk_rows} rows at a time");
                    truth.check(&case, &*kernels, &w_tensor, chunk_rows, (true, true));
                }
                for wanted in [(false, false), (true, false), (false, true)] {
                    let case = format!("N={n} V={v} D={d} {source:?}, wanted {wanted:?}");
                    truth.check(&case, &*kernels, &w_tensor, 16, wanted);
                }
            }
        }
    }
}

#[test]
fn loss_of_capped_logits() {
    for kernels in devices() {
        for (n, v, d) in [(0, 5, 3), (1, 1, 1), (1, 2, 7), (5, 11_003, 17), (33, 97, 65), (67, 257, 31)] {
            for cap in [1.5, 30.0] {
                if too_slow(&*kernels, v) && cap < 30.0 {
                    continue;
                }
                let mut draw = Draw::new((n * 10_000 + v * 10 + d) as u64);
                let (x, w) = (draw.normal(n * d), draw.normal(v * d));
                let (w_tensor, w) = weight(&*kernels, Source::File(DType::Bf16), &w, &[v, d]);
                let truth = Loss::new((n, v, d), Some(cap), x, &widen(&w), &mut draw);
                for (chunk_rows, wanted) in [(1, (true, true)), (7, (true, false)), (1000, (false, true))] {
                    let case = format!("N={n} V={v} D={d}, cap {cap}, {chunk_rows} rows, {wanted:?}");
                    truth.check(&case, &*kernels, &w_tensor, chunk_rows, wanted);
                }
            }
        }
    }
}

#[test]
fn loss_of_large_logits_does_not_overflow() {
    for kernels in devices() {
        let (n, v, d) = (3, 35, 5);
        let mut draw = Draw::new(3);
        let x: Vec<f32> = draw.normal(n * d).iter().map(|x| x * 300.0).collect();
        let (w_tensor, w) = weight(&*kernels, Source::Owned, &draw.normal(v * d), &[v, d]);
        for soft_cap in [None, Some(20.0)] {
            let truth = Loss::new((n, v, d), soft_cap, x.clone(), &widen(&w), &mut draw);
            truth.check(&format!("large, {soft_cap:?}"), &*kernels, &w_tensor, 2, (true, true));
        }
    }
}

#[test]
fn a_nan_input_makes_the_loss_nan() {
    for kernels in devices() {
        let x = kernels.from_f32(&[1.0, 2.0, f32::NAN, 1.0], &[2, 2]).unwrap();
        let w = kernels.from_f32(&Draw::new(4).normal(14), &[7, 2]).unwrap();
        let labels = kernels.from_u32(&[3, 6], &[2]).unwrap();
        let weights = kernels.from_f32(&[0.5, 0.5], &[2]).unwrap();
        for cap in [None, Some(30.0)] {
            let loss = kernels.cross_entropy(&x, &w, &labels, &weights, cap, 8, None, None).unwrap();
            assert!(loss.is_nan(), "{cap:?}");
        }
    }
}
