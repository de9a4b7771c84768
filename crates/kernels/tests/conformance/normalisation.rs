//! Normalisation of rows.

use lora_sb_kernels::op::layer_norm::naive;
use lora_sb_kernels::op::rms_norm;
use lora_sb_kernels::{Accum, RmsGain};

use crate::common::{Draw, SOURCES, close, devices, magnitudes, sum_error, weight, widen};
use crate::rows::SHAPES;

const ACCUMS: [Accum; 2] = [Accum::Replace, Accum::Add];
const KINDS: [RmsGain; 2] = [RmsGain::Weight, RmsGain::OnePlusWeight];

#[test]
fn rms_norm_and_its_gradients() {
    for kernels in devices() {
        for (t, d) in SHAPES {
            for ((source, accum), kind) in SOURCES
                .into_iter()
                .zip(ACCUMS.into_iter().cycle())
                .flat_map(|case| KINDS.map(|kind| (case, kind)))
            {
                let case = format!("rms_norm T={t} D={d} {source:?} {accum:?} {kind:?}");
                let (eps, mut draw) = (1e-5f32, Draw::new((t * 31 + d) as u64));
                let [x, dy, gain] = [draw.normal(t * d), draw.normal(t * d), draw.normal(d)];
                let (gain_tensor, gain) = weight(&*kernels, source, &gain, &[d]);
                let x_tensor = kernels.from_f32(&x, &[t, d]).unwrap();
                let dy_tensor = kernels.from_f32(&dy, &[t, d]).unwrap();
                let (x, dy, gain) = (widen(&x), widen(&dy), widen(&gain));

                let (mut y, mut rstd) = (vec![f64::NAN; t * d], vec![f64::NAN; t]);
                rms_norm::naive::forward(&x, &gain, kind, f64::from(eps), &mut y, &mut rstd);
                let mut y_tensor = kernels.empty(&[t, d]).unwrap();
                let mut rstd_tensor = kernels.empty(&[t]).unwrap();
                kernels
                    .rms_norm(&x_tensor, &gain_tensor, kind, eps, &mut y_tensor, &mut rstd_tensor)
                    .unwrap();
                close(&case, &kernels.to_f32(&y_tensor).unwrap(), &y, sum_error(d), &magnitudes(&y));
                close(&case, &kernels.to_f32(&rstd_tensor).unwrap(), &rstd, sum_error(d), &rstd);

                let before = match accum {
                    Accum::Replace => f32::NAN,
                    Accum::Add => 0.5,
                };
                let mut dx_tensor = kernels.from_f32(&vec![before; t * d], &[t, d]).unwrap();
                let mut dgain_tensor = kernels.from_f32(&vec![2.0; d], &[d]).unwrap();
                let dgain = Some(&mut dgain_tensor);
                kernels
                    .rms_norm_backward(
                        &x_tensor,
                        &gain_tensor,
                        kind,
                        &rstd_tensor,
                        &dy_tensor,
                        accum,
                        &mut dx_tensor,
                        dgain,
                    )
                    .unwrap();
                let mut dx = vec![f64::from(before); t * d];
                let mut dgain = vec![2.0; d];
                rms_norm::naive::backward(&x, &gain, kind, &rstd, &dy, accum, &mut dx, Some(&mut dgain));
                let (dx_size, dgain_size) =
                    gradient_magnitudes(&x, &rms_norm::naive::factors(&gain, kind), &rstd, &dy);
                let found = kernels.to_f32(&dx_tensor).unwrap();
                close(&format!("{case}: dx"), &found, &dx, 3.0 * sum_error(d), &dx_size);
                let found = kernels.to_f32(&dgain_tensor).unwrap();
                close(&format!("{case}: dgain"), &found, &dgain, sum_error(d) + sum_error(t), &dgain_size);
            }
        }
    }
}

/// The terms of dx (and the 0.5 it may start from) and of dgain (and its 2), without their signs.
fn gradient_magnitudes(x: &[f64], gain: &[f64], rstd: &[f64], dy: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let d = gain.len();
    let (mut dx, mut dgain) = (vec![0.5; x.len()], vec![2.0; d]);
    for (t, &rstd) in rstd.iter().enumerate() {
        let terms = |i: usize| (gain[i] * dy[t * d + i], x[t * d + i] * rstd);
        let mean = (0..d).map(terms).map(|(g, n)| (g * n).abs()).sum::<f64>() / d as f64;
        for i in 0..d {
            let (g, n) = terms(i);
            dx[t * d + i] += rstd * (g.abs() + n.abs() * mean);
            dgain[i] += (dy[t * d + i] * n).abs();
        }
    }
    (dx, dgain)
}

#[test]
fn rms_norm_without_a_gain_gradient_gives_the_same_dx() {
    for kernels in devices() {
        let (t, d, kind) = (37, 517, RmsGain::Weight);
        let mut draw = Draw::new(5);
        let mut tensor =
            |shape: &[usize]| kernels.from_f32(&draw.normal(shape.iter().product()), shape).unwrap();
        let (x, dy, gain, rstd) = (tensor(&[t, d]), tensor(&[t, d]), tensor(&[d]), tensor(&[t]));
        let run = |dgain| {
            let mut dx = kernels.empty(&[t, d]).unwrap();
            kernels.rms_norm_backward(&x, &gain, kind, &rstd, &dy, Accum::Replace, &mut dx, dgain).unwrap();
            kernels.to_f32(&dx).unwrap()
        };
        let mut dgain = kernels.zeros(&[d]).unwrap();
        assert_eq!(run(Some(&mut dgain)), run(None));
    }
}

#[test]
fn a_gain_of_one_plus_zero_is_one() {
    for kernels in devices() {
        let x = kernels.from_f32(&Draw::new(6).normal(3 * 17), &[3, 17]).unwrap();
        let run = |kind, gain: f32| {
            let gain = kernels.from_f32(&[gain; 17], &[17]).unwrap();
            let (mut y, mut rstd) = (kernels.empty(&[3, 17]).unwrap(), kernels.empty(&[3]).unwrap());
            kernels.rms_norm(&x, &gain, kind, 1e-6, &mut y, &mut rstd).unwrap();
            kernels.to_f32(&y).unwrap()
        };
        assert_eq!(run(RmsGain::OnePlusWeight, 0.0), run(RmsGain::Weight, 1.0));
        assert_eq!(run(RmsGain::OnePlusWeight, -0.75), run(RmsGain::Weight, 0.25));
    }
}

/// Rows whose means are far from 0, in either direction: the variance must not come from a difference of squares.
fn offset_rows(draw: &mut Draw, t: usize, d: usize) -> Vec<f32> {
    let mut x = draw.normal(t * d);
    x.iter_mut().enumerate().for_each(|(i, x)| *x += (i / d) as f32 * 7.0 - 30.0);
    x
}

#[test]
fn layer_norm() {
    for kernels in devices() {
        for ((t, d), source) in SHAPES.into_iter().flat_map(|shape| SOURCES.map(|source| (shape, source))) {
            let case = format!("layer_norm T={t} D={d} {source:?}");
            let (eps, mut draw) = (1e-5f32, Draw::new((t * 31 + d) as u64));
            let [x, gain, shift] = [offset_rows(&mut draw, t, d), draw.normal(d), draw.normal(d)];
            let (gain_tensor, gain) = weight(&*kernels, source, &gain, &[d]);
            let (shift_tensor, shift) = weight(&*kernels, source, &shift, &[d]);
            let x_tensor = kernels.from_f32(&x, &[t, d]).unwrap();
            let mut y_tensor = kernels.empty(&[t, d]).unwrap();
            let [mut mean_tensor, mut rstd_tensor] = [(); 2].map(|()| kernels.empty(&[t]).unwrap());
            let outputs = (&mut y_tensor, &mut mean_tensor, &mut rstd_tensor);
            kernels
                .layer_norm(&x_tensor, &gain_tensor, &shift_tensor, eps, outputs.0, outputs.1, outputs.2)
                .unwrap();

            let (x, gain, shift) = (widen(&x), widen(&gain), widen(&shift));
            let [mut y, mut mean, mut rstd] = [t * d, t, t].map(|size| vec![f64::NAN; size]);
            naive::forward(&x, &gain, &shift, f64::from(eps), &mut y, &mut mean, &mut rstd);
            let sizes = Sizes::new(&x, &gain, &shift, &mean, &rstd);
            let found = |tensor| kernels.to_f32(tensor).unwrap();
            close(&format!("{case}: mean"), &found(&mean_tensor), &mean, sum_error(d), &sizes.mean);
            close(&format!("{case}: rstd"), &found(&rstd_tensor), &rstd, 2.0 * sum_error(d), &sizes.rstd);
            close(&case, &found(&y_tensor), &y, 2.0 * sum_error(d), &sizes.y);
        }
    }
}

#[test]
fn layer_norm_gradients() {
    for kernels in devices() {
        for (t, d) in SHAPES {
            for (source, accum) in SOURCES.into_iter().zip(ACCUMS.into_iter().cycle()) {
                let case = format!("layer_norm_backward T={t} D={d} {source:?} {accum:?}");
                let mut draw = Draw::new((t * 31 + d) as u64);
                let [x, dy] = [offset_rows(&mut draw, t, d), draw.normal(t * d)];
                let (gain_tensor, gain) = weight(&*kernels, source, &draw.normal(d), &[d]);
                let mean: Vec<f32> = (0..t).map(|t| t as f32 * 7.0 - 29.9).collect();
                let rstd: Vec<f32> = draw.normal(t).iter().map(|x| x.abs() + 0.1).collect();
                let tensor = |values: &[f32], shape: &[usize]| kernels.from_f32(values, shape).unwrap();
                let [x_tensor, dy_tensor] = [&x, &dy].map(|values| tensor(values, &[t, d]));
                let [mean_tensor, rstd_tensor] = [&mean, &rstd].map(|values| tensor(values, &[t]));
                let before = match accum {
                    Accum::Replace => f32::NAN,
                    Accum::Add => 0.5,
                };
                let mut dx_tensor = tensor(&vec![before; t * d], &[t, d]);
                let [mut dgain_tensor, mut dshift_tensor] = [(); 2].map(|()| tensor(&vec![2.0; d], &[d]));
                let statistics = (&mean_tensor, &rstd_tensor);
                let (dx, dgain, dshift) = (&mut dx_tensor, Some(&mut dgain_tensor), Some(&mut dshift_tensor));
                kernels
                    .layer_norm_backward(
                        &x_tensor,
                        &gain_tensor,
                        statistics,
                        &dy_tensor,
                        accum,
                        dx,
                        dgain,
                        dshift,
                    )
                    .unwrap();

                let (x, dy, gain, mean, rstd) =
                    (widen(&x), widen(&dy), widen(&gain), widen(&mean), widen(&rstd));
                let statistics = (&mean[..], &rstd[..]);
                let [mut dx, mut dgain, mut dshift] =
                    [vec![f64::from(before); t * d], vec![2.0; d], vec![2.0; d]];
                let (gain_wanted, shift_wanted) = (Some(&mut dgain[..]), Some(&mut dshift[..]));
                naive::backward(&x, &gain, statistics, &dy, accum, &mut dx, gain_wanted, shift_wanted);
                let [dx_size, dgain_size, dshift_size] =
                    layer_norm_gradient_sizes(&x, &gain, statistics, &dy);
                let found = |tensor| kernels.to_f32(tensor).unwrap();
                close(&format!("{case}: dx"), &found(&dx_tensor), &dx, 2.0 * sum_error(d), &dx_size);
                close(&format!("{case}: dgain"), &found(&dgain_tensor), &dgain, sum_error(t), &dgain_size);
                close(
                    &format!("{case}: dshift"),
                    &found(&dshift_tensor),
                    &dshift,
                    sum_error(t),
                    &dshift_size,
                );
            }
        }
    }
}

/// What the errors of layer normalisation's outputs are measured by.
struct Sizes {
    y: Vec<f64>,
    mean: Vec<f64>,
    rstd: Vec<f64>,
}

impl Sizes {
    /// The mean is a sum of the x; a centred element has the errors of x and of the mean, and these are the
    /// variance's relative to the deviations.
    fn new(x: &[f64], gain: &[f64], shift: &[f64], mean: &[f64], rstd: &[f64]) -> Self {
        let d = gain.len();
        let mut sizes = Sizes { y: Vec::new(), mean: Vec::new(), rstd: Vec::new() };
        for (x, (&mean, &rstd)) in x.chunks_exact(d).zip(mean.iter().zip(rstd)) {
            let average = x.iter().map(|x| x.abs()).sum::<f64>() / d as f64;
            let centred = |i: usize| (x[i].abs() + mean.abs() + average) * rstd;
            let normed = |i: usize| ((x[i] - mean) * rstd).abs();
            let variance = (0..d).map(|i| normed(i) * centred(i)).sum::<f64>() / d as f64;
            sizes.mean.push(average);
            sizes.rstd.push(rstd * (1.0 + variance));
            sizes.y.extend(
                (0..d).map(|i| gain[i].abs() * (centred(i) + normed(i) * (1.0 + variance)) + shift[i].abs()),
            );
        }
        sizes
    }
}

/// The terms of dx (and the 0.5 it may start from), of dgain and of dshift (and their 2), without their signs.
fn layer_norm_gradient_sizes(
    x: &[f64],
    gain: &[f64],
    (mean, rstd): (&[f64], &[f64]),
    dy: &[f64],
) -> [Vec<f64>; 3] {
    let d = gain.len();
    let [mut dx, mut dgain, mut dshift] = [vec![0.5; x.len()], vec![2.0; d], vec![2.0; d]];
    for (t, (&mean, &rstd)) in mean.iter().zip(rstd).enumerate() {
        let terms = |i: usize| ((gain[i] * dy[t * d + i]).abs(), (x[t * d + i].abs() + mean.abs()) * rstd);
        let mean_g = (0..d).map(|i| terms(i).0).sum::<f64>() / d as f64;
        let mean_gn = (0..d).map(|i| terms(i).0 * terms(i).1).sum::<f64>() / d as f64;
        for i in 0..d {
            let (g, n) = terms(i);
            dx[t * d + i] += rstd * (g + mean_g + n * mean_gn);
            dgain[i] += dy[t * d + i].abs() * n;
            dshift[i] += dy[t * d + i].abs();
        }
    }
    [dx, dgain, dshift]
}

#[test]
fn layer_norm_gradients_do_not_depend_on_which_are_wanted() {
    for kernels in devices() {
        let (t, d) = (37, 517);
        let mut draw = Draw::new(5);
        let mut tensor =
            |shape: &[usize]| kernels.from_f32(&draw.normal(shape.iter().product()), shape).unwrap();
        let (x, dy, gain) = (tensor(&[t, d]), tensor(&[t, d]), tensor(&[d]));
        let (mean, rstd) = (tensor(&[t]), tensor(&[t]));
        let run = |gain_wanted: bool, shift_wanted: bool| {
            let [mut dgain, mut dshift] = [(); 2].map(|()| kernels.zeros(&[d]).unwrap());
            let mut dx = kernels.empty(&[t, d]).unwrap();
            let wanted = (gain_wanted.then_some(&mut dgain), shift_wanted.then_some(&mut dshift));
            kernels
                .layer_norm_backward(
                    &x,
                    &gain,
                    (&mean, &rstd),
                    &dy,
                    Accum::Replace,
                    &mut dx,
                    wanted.0,
                    wanted.1,
                )
                .unwrap();
            [dx, dgain, dshift].map(|tensor| kernels.to_f32(&tensor).unwrap())
        };
        let [dx, dgain, dshift] = run(true, true);
        let zeros = vec![0.0; d];
        assert_eq!(run(false, false), [dx.clone(), zeros.clone(), zeros.clone()]);
        assert_eq!(run(true, false), [dx.clone(), dgain, zeros.clone()]);
        assert_eq!(run(false, true), [dx, zeros, dshift]);
    }
}
