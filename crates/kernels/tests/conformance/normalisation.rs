//! Normalisation of rows.

use lora_sb_kernels::op::layer_norm::naive;
use lora_sb_kernels::op::rms_norm;
use lora_sb_kernels::{Accum, DType, RmsGain, Tensor};

use crate::common::{
    Draw, EPS, SOURCES, Source, activation, close, close_in, devices, magnitudes, sum_error, type_triples,
    weight, widen,
};
use crate::rows::SHAPES;

const ACCUMS: [Accum; 2] = [Accum::Replace, Accum::Add];
const KINDS: [RmsGain; 2] = [RmsGain::Weight, RmsGain::OnePlusWeight];

/// What an output holds before; `Replace` must not read it.
fn before(accum: Accum) -> f32 {
    match accum {
        Accum::Replace => f32::NAN,
        Accum::Add => 0.5,
    }
}

/// Every combination of three operands' types with every way to write, each with a gain from another source.
fn cases() -> impl Iterator<Item = ([DType; 3], Accum, Source)> {
    let types = type_triples().flat_map(|types| ACCUMS.map(|accum| (types, accum)));
    types.zip(SOURCES.into_iter().cycle()).map(|((types, accum), source)| (types, accum, source))
}

#[test]
fn rms_norm_and_its_gradients() {
    for kernels in devices() {
        for ((t, d), kind) in SHAPES.into_iter().flat_map(|shape| KINDS.map(|kind| (shape, kind))) {
            for ([x_type, y_type, dx_type], accum, source) in cases() {
                let case = format!(
                    "rms_norm T={t} D={d} {source:?} {accum:?} {kind:?} x {x_type} y {y_type} dx {dx_type}"
                );
                let (eps, mut draw) = (1e-5f32, Draw::new((t * 31 + d) as u64));
                let (x_tensor, x) = activation(&*kernels, x_type, &draw.normal(t * d), &[t, d]);
                let (dy_tensor, dy) = activation(&*kernels, y_type, &draw.normal(t * d), &[t, d]);
                let (gain_tensor, gain) = weight(&*kernels, source, &draw.normal(d), &[d]);
                let (x, dy, gain) = (widen(&x), widen(&dy), widen(&gain));

                let (mut y, mut rstd) = (vec![f64::NAN; t * d], vec![f64::NAN; t]);
                rms_norm::naive::forward(&x, &gain, kind, f64::from(eps), &mut y, &mut rstd);
                let mut y_tensor = kernels.empty_of(y_type, &[t, d]).unwrap();
                let mut rstd_tensor = kernels.empty(&[t]).unwrap();
                kernels
                    .rms_norm(&x_tensor, &gain_tensor, kind, eps, &mut y_tensor, &mut rstd_tensor)
                    .unwrap();
                let found = |tensor| kernels.to_f32(tensor).unwrap();
                close_in(y_type, &case, &found(&y_tensor), &y, sum_error(d), &magnitudes(&y));
                close(&case, &found(&rstd_tensor), &rstd, sum_error(d), &rstd);

                let (mut dx_tensor, dx) =
                    activation(&*kernels, dx_type, &vec![before(accum); t * d], &[t, d]);
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
                let (mut dx, mut dgain) = (widen(&dx), vec![2.0; d]);
                rms_norm::naive::backward(&x, &gain, kind, &rstd, &dy, accum, &mut dx, Some(&mut dgain));
                let (dx_size, dgain_size) =
                    gradient_magnitudes(&x, &rms_norm::naive::factors(&gain, kind), &rstd, &dy);
                close_in(
                    dx_type,
                    &format!("{case}: dx"),
                    &found(&dx_tensor),
                    &dx,
                    3.0 * sum_error(d),
                    &dx_size,
                );
                let error = sum_error(d) + sum_error(t);
                close(&format!("{case}: dgain"), &found(&dgain_tensor), &dgain, error, &dgain_size);
            }
        }
    }
}

/// The sum and its norm have the bits of the two operations one after another, whatever the types.
#[test]
fn residual_sums_with_their_norms() {
    for kernels in devices() {
        for ((t, d), [f_type, x_type, y_type]) in
            SHAPES.into_iter().flat_map(|shape| type_triples().map(move |types| (shape, types)))
        {
            let case = format!("T={t} D={d} f {f_type} x {x_type} y {y_type}");
            let mut draw = Draw::new((t * 31 + d) as u64);
            let [f, x] = [draw.normal(t * d), draw.normal(t * d)];
            let (gain, _) = weight(&*kernels, SOURCES[2], &draw.normal(d), &[d]);
            let (shift, _) = weight(&*kernels, SOURCES[3], &draw.normal(d), &[d]);
            let (f, _) = activation(&*kernels, f_type, &f, &[t, d]);
            let operand = || activation(&*kernels, x_type, &x, &[t, d]).0;
            let output = || kernels.empty_of(y_type, &[t, d]).unwrap();
            let statistic = || kernels.empty(&[t]).unwrap();
            let kind = RmsGain::OnePlusWeight;
            let found = |tensors: [&Tensor; 4]| tensors.map(|tensor| kernels.to_f32(tensor).unwrap());

            let (mut sum, mut y, mut rstd) = (operand(), output(), statistic());
            kernels.add(1.0, &f, &mut sum).unwrap();
            kernels.rms_norm(&sum, &gain, kind, 1e-6, &mut y, &mut rstd).unwrap();
            let truth = found([&sum, &y, &rstd, &rstd]);
            let (mut sum, mut y, mut rstd) = (operand(), output(), statistic());
            kernels.add_rms_norm(&f, &mut sum, &gain, kind, 1e-6, &mut y, &mut rstd).unwrap();
            assert_eq!(found([&sum, &y, &rstd, &rstd]), truth, "add_rms_norm {case}");

            let (mut sum, mut y, mut mean, mut rstd) = (operand(), output(), statistic(), statistic());
            kernels.add(1.0, &f, &mut sum).unwrap();
            kernels.layer_norm(&sum, &gain, &shift, 1e-6, &mut y, &mut mean, &mut rstd).unwrap();
            let truth = found([&sum, &y, &mean, &rstd]);
            let (mut sum, mut y, mut mean, mut rstd) = (operand(), output(), statistic(), statistic());
            kernels.add_layer_norm(&f, &mut sum, &gain, &shift, 1e-6, &mut y, &mut mean, &mut rstd).unwrap();
            assert_eq!(found([&sum, &y, &mean, &rstd]), truth, "add_layer_norm {case}");
        }
    }
}

/// In `f32`, where a sum is off by no more than its own rounding.
#[test]
fn residual_sums_against_the_specification() {
    for kernels in devices() {
        for (t, d) in SHAPES {
            let (case, mut draw) = (format!("T={t} D={d}"), Draw::new((t * 31 + d) as u64));
            let [f, x] = [draw.normal(t * d), draw.normal(t * d)];
            let [gain, shift] = [draw.normal(d), draw.normal(d)];
            let tensor = |values: &[f32]| kernels.from_f32(values, &[values.len() / d, d]).unwrap();
            let row = |values: &[f32]| kernels.from_f32(values, &[values.len()]).unwrap();
            let (f_tensor, mut sum, mut y) = (tensor(&f), tensor(&x), tensor(&x));
            let (mut mean, mut rstd) = (row(&vec![0.0; t]), row(&vec![0.0; t]));
            let (f, gain_values, shift_values) = (widen(&f), widen(&gain), widen(&shift));
            let (gain, shift, eps, kind) = (row(&gain), row(&shift), 1e-5f32, RmsGain::Weight);

            kernels.add_rms_norm(&f_tensor, &mut sum, &gain, kind, eps, &mut y, &mut rstd).unwrap();
            let found = [&sum, &y].map(|tensor| kernels.to_f32(tensor).unwrap());
            let [mut sum, mut y_true] = [widen(&x), vec![f64::NAN; t * d]];
            let [mut mean_true, mut rstd_true] = [(); 2].map(|()| vec![f64::NAN; t]);
            let eps_true = f64::from(eps);
            rms_norm::naive::add_forward(
                &f,
                &mut sum,
                &gain_values,
                kind,
                eps_true,
                &mut y_true,
                &mut rstd_true,
            );
            close(&format!("sum, {case}"), &found[0], &sum, EPS, &magnitudes(&sum));
            close(
                &format!("add_rms_norm {case}"),
                &found[1],
                &y_true,
                sum_error(d) + 2.0 * EPS,
                &magnitudes(&y_true),
            );

            let mut sum = tensor(&x);
            kernels
                .add_layer_norm(&f_tensor, &mut sum, &gain, &shift, eps, &mut y, &mut mean, &mut rstd)
                .unwrap();
            let found = [&sum, &y].map(|tensor| kernels.to_f32(tensor).unwrap());
            let mut sum = widen(&x);
            naive::add_forward(
                &f,
                &mut sum,
                &gain_values,
                &shift_values,
                eps_true,
                &mut y_true,
                &mut mean_true,
                &mut rstd_true,
            );
            close(&format!("sum, {case}"), &found[0], &sum, EPS, &magnitudes(&sum));
            let sizes = Sizes::new(&sum, &gain_values, &shift_values, &mean_true, &rstd_true);
            let error = 2.0 * sum_error(d) + 2.0 * EPS;
            close(&format!("add_layer_norm {case}"), &found[1], &y_true, error, &sizes.y);
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
        for ((t, d), ([x_type, y_type, _], accum, source)) in
            SHAPES.into_iter().flat_map(|shape| cases().map(move |case| (shape, case)))
        {
            let case = format!("layer_norm T={t} D={d} {source:?} x {x_type} y {y_type}, {accum:?}");
            let (eps, mut draw) = (1e-5f32, Draw::new((t * 31 + d) as u64));
            let (x_tensor, x) = activation(&*kernels, x_type, &offset_rows(&mut draw, t, d), &[t, d]);
            let (gain_tensor, gain) = weight(&*kernels, source, &draw.normal(d), &[d]);
            let (shift_tensor, shift) = weight(&*kernels, source, &draw.normal(d), &[d]);
            let mut y_tensor = kernels.empty_of(y_type, &[t, d]).unwrap();
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
            close_in(y_type, &case, &found(&y_tensor), &y, 2.0 * sum_error(d), &sizes.y);
        }
    }
}

#[test]
fn layer_norm_gradients() {
    for kernels in devices() {
        for ((t, d), (types, accum, source)) in
            SHAPES.into_iter().flat_map(|shape| cases().map(move |case| (shape, case)))
        {
            let case = format!("layer_norm_backward T={t} D={d} {source:?} {accum:?}, x, dy, dx {types:?}");
            let mut draw = Draw::new((t * 31 + d) as u64);
            let tensor = |dtype, values: &[f32]| activation(&*kernels, dtype, values, &[t, d]);
            let (x_tensor, x) = tensor(types[0], &offset_rows(&mut draw, t, d));
            let (dy_tensor, dy) = tensor(types[1], &draw.normal(t * d));
            let (mut dx_tensor, dx) = tensor(types[2], &vec![before(accum); t * d]);
            let (gain_tensor, gain) = weight(&*kernels, source, &draw.normal(d), &[d]);
            let mean: Vec<f32> = (0..t).map(|t| t as f32 * 7.0 - 29.9).collect();
            let rstd: Vec<f32> = draw.normal(t).iter().map(|x| x.abs() + 0.1).collect();
            let [mean_tensor, rstd_tensor] = [&mean, &rstd].map(|row| kernels.from_f32(row, &[t]).unwrap());
            let [mut dgain_tensor, mut dshift_tensor] =
                [(); 2].map(|()| kernels.from_f32(&vec![2.0; d], &[d]).unwrap());
            let statistics = (&mean_tensor, &rstd_tensor);
            let wanted = (Some(&mut dgain_tensor), Some(&mut dshift_tensor));
            kernels
                .layer_norm_backward(
                    &x_tensor,
                    &gain_tensor,
                    statistics,
                    &dy_tensor,
                    accum,
                    &mut dx_tensor,
                    wanted.0,
                    wanted.1,
                )
                .unwrap();

            let [x, dy, mut dx] = [&x, &dy, &dx].map(|values| widen(values));
            let (gain, mean, rstd) = (widen(&gain), widen(&mean), widen(&rstd));
            let statistics = (&mean[..], &rstd[..]);
            let [mut dgain, mut dshift] = [vec![2.0; d], vec![2.0; d]];
            let wanted = (Some(&mut dgain[..]), Some(&mut dshift[..]));
            naive::backward(&x, &gain, statistics, &dy, accum, &mut dx, wanted.0, wanted.1);
            let [dx_size, dgain_size, dshift_size] = layer_norm_gradient_sizes(&x, &gain, statistics, &dy);
            let found = |tensor| kernels.to_f32(tensor).unwrap();
            let error = 2.0 * sum_error(d);
            close_in(types[2], &format!("{case}: dx"), &found(&dx_tensor), &dx, error, &dx_size);
            let error = sum_error(t);
            close(&format!("{case}: dgain"), &found(&dgain_tensor), &dgain, error, &dgain_size);
            close(&format!("{case}: dshift"), &found(&dshift_tensor), &dshift, error, &dshift_size);
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
