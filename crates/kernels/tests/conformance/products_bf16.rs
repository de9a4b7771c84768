//! Products whose activations are `bf16`, and several products into one result, in either type.

use lora_sb_kernels::op::{cross_entropy, linear};
use lora_sb_kernels::{Accum, DType, Extra, Kernels, Tensor};

use crate::common::{Draw, SOURCES, Source, close, devices, magnitudes, sum_error, weight, widen};

/// Unit roundoff of `bf16`, which has 8 bits of significand.
const HALF: f64 = 1.0 / 256.0;

/// (T, N, K): few tokens, around the tiles, odd depths, longer than a task.
const SHAPES: [(usize, usize, usize); 9] = [
    (1, 1, 1),
    (1, 67, 300),
    (3, 33, 17),
    (5, 31, 16),
    (14, 32, 64),
    (15, 33, 65),
    (131, 8, 257),
    (67, 300, 131),
    (1061, 70, 33),
];

const BEFORE: f32 = 0.75;

/// A tensor of a type, and what it holds.
fn tensor(kernels: &dyn Kernels, dtype: DType, values: &[f32], shape: &[usize]) -> (Tensor, Vec<f64>) {
    let mut tensor = kernels.empty_of(dtype, shape).unwrap();
    kernels.write_f32(&mut tensor, values).unwrap();
    let held = widen(&kernels.to_f32(&tensor).unwrap());
    (tensor, held)
}

/// As the product reads a weight beside `bf16` activations.
fn rounded(values: &[f64]) -> Vec<f64> {
    values.iter().map(|&value| half::bf16::from_f32(value as f32).to_f64()).collect()
}

/// `|found - truth|` is at most the sum's error, and half a unit where the result is `bf16`.
fn check(case: &str, found: &Tensor, kernels: &dyn Kernels, terms: usize, truth: &[f64], magnitude: &[f64]) {
    let half = if found.dtype() == DType::Bf16 { HALF } else { 0.0 };
    let allowed: Vec<f64> = truth
        .iter()
        .zip(magnitude)
        .map(|(t, m)| half * t.abs() + (1.0 + half) * sum_error(terms) * m)
        .collect();
    close(&format!("{case} into {}", found.dtype()), &kernels.to_f32(found).unwrap(), truth, 1.0, &allowed);
}

fn before(accum: Accum) -> f32 {
    if accum == Accum::Add { BEFORE } else { f32::NAN }
}

/// (activations, result).
const TYPES: [(DType, DType); 4] = [
    (DType::F32, DType::F32),
    (DType::F32, DType::Bf16),
    (DType::Bf16, DType::F32),
    (DType::Bf16, DType::Bf16),
];

#[test]
fn linear_layers_in_three_orientations() {
    for kernels in devices() {
        let kernels = &*kernels;
        for (index, &(t, n, k)) in SHAPES.iter().enumerate() {
            let mut draw = Draw::new((t * 1000 + n * 10 + k) as u64);
            let [x, w, dy] = [draw.normal(t * k), draw.normal(n * k), draw.normal(t * n)];
            let alpha = [1.0f32, -0.3][index % 2];
            for (dtype, result) in TYPES {
                let (x, x_held) = tensor(kernels, dtype, &x, &[t, k]);
                let (dy, dy_held) = tensor(kernels, dtype, &dy, &[t, n]);
                for (accum, source) in [Accum::Replace, Accum::Add]
                    .into_iter()
                    .flat_map(|accum| SOURCES.map(|source| (accum, source)))
                {
                    let case = format!("T={t} N={n} K={k} {dtype} {source:?} {accum:?}");
                    let (w, held) = weight(kernels, source, &w, &[n, k]);
                    let held = if dtype == DType::Bf16 { rounded(&widen(&held)) } else { widen(&held) };
                    let (a, sizes) = (f64::from(alpha), magnitudes(&held));
                    let old = f64::from(before(accum));
                    let outcome = |shape: [usize; 2]| {
                        let filled = vec![before(accum); shape[0] * shape[1]];
                        (
                            tensor(kernels, result, &filled, &shape).0,
                            vec![old; filled.len()],
                            vec![0.75; filled.len()],
                        )
                    };
                    let (mut y, mut truth, mut size) = outcome([t, n]);
                    kernels.linear(&x, &w, alpha, accum, &mut y).unwrap();
                    linear::naive::forward(&x_held, &held, a, accum, &mut truth, k);
                    linear::naive::forward(&magnitudes(&x_held), &sizes, a.abs(), Accum::Add, &mut size, k);
                    check(&format!("y {case}"), &y, kernels, k, &truth, &size);
                    let (mut dx, mut truth, mut size) = outcome([t, k]);
                    kernels.linear_input_gradient(&dy, &w, alpha, accum, &mut dx).unwrap();
                    linear::naive::input_gradient(&dy_held, &held, a, accum, &mut truth, k);
                    linear::naive::input_gradient(
                        &magnitudes(&dy_held),
                        &sizes,
                        a.abs(),
                        Accum::Add,
                        &mut size,
                        k,
                    );
                    check(&format!("dx {case}"), &dx, kernels, n, &truth, &size);
                }
                let mut dw = kernels.from_f32(&vec![BEFORE; n * k], &[n, k]).unwrap();
                kernels.linear_weight_gradient(&dy, &x, alpha, Accum::Add, &mut dw).unwrap();
                let (mut truth, mut size) = (vec![f64::from(BEFORE); n * k], vec![0.75; n * k]);
                let (a, accum) = (f64::from(alpha), Accum::Add);
                linear::naive::weight_gradient(&dy_held, &x_held, a, accum, &mut truth, k);
                let sizes = (magnitudes(&dy_held), magnitudes(&x_held));
                linear::naive::weight_gradient(&sizes.0, &sizes.1, a.abs(), accum, &mut size, k);
                check(&format!("dw T={t} N={n} K={k} {dtype}"), &dw, kernels, t, &truth, &size);
            }
        }
    }
}

#[test]
fn several_products_into_one_result() {
    for kernels in devices() {
        let kernels = &*kernels;
        for (&(t, n, k), r) in SHAPES.iter().zip([1, 3, 8, 16, 5, 33, 64, 2, 7]) {
            let mut draw = Draw::new((t * 1000 + n * 10 + k + r) as u64);
            let [x, w, h, b] = [t * k, n * k, t * r, n * r].map(|count| draw.normal(count));
            let [v, a, dy, bias] = [t * r, r * k, t * n, n].map(|count| draw.normal(count));
            for ((dtype, result), accum) in
                TYPES.into_iter().flat_map(|types| [Accum::Replace, Accum::Add].map(|accum| (types, accum)))
            {
                let case = format!("T={t} N={n} K={k} r={r} {dtype} {accum:?}");
                let held = |values: &[f32]| match dtype {
                    DType::Bf16 => rounded(&widen(values)),
                    _ => widen(values),
                };
                let of = |values: &[f32], shape: [usize; 2]| tensor(kernels, dtype, values, &shape);
                let weight = |values: &[f32], shape: &[usize]| kernels.from_f32(values, shape).unwrap();
                let (x, x_held) = of(&x, [t, k]);
                let (h, h_held) = of(&h, [t, r]);
                let (v, v_held) = of(&v, [t, r]);
                let (dy, dy_held) = of(&dy, [t, n]);
                let (w_tensor, b_tensor, a_tensor) =
                    (weight(&w, &[n, k]), weight(&b, &[n, r]), weight(&a, &[r, k]));
                let bias_tensor = weight(&bias, &[n]);
                let old = f64::from(before(accum));

                let sum = |x: &[f64], w: &[f64], h: &[f64], b: &[f64], bias: &[f64], (accum, old)| {
                    let mut y = vec![old; t * n];
                    linear::naive::forward(x, w, 1.0, accum, &mut y, k);
                    linear::naive::forward(h, b, 1.0, Accum::Add, &mut y, r);
                    y.chunks_exact_mut(n).for_each(|y| y.iter_mut().zip(bias).for_each(|(y, b)| *y += b));
                    y
                };
                let (w_held, b_held, bias) = (held(&w), held(&b), widen(&bias));
                let truth = sum(&x_held, &w_held, &h_held, &b_held, &bias, (accum, old));
                let m = |values: &[f64]| magnitudes(values);
                let size =
                    sum(&m(&x_held), &m(&w_held), &m(&h_held), &m(&b_held), &m(&bias), (Accum::Add, 0.75));
                let mut y = tensor(kernels, result, &vec![before(accum); t * n], &[t, n]).0;
                let extra = Extra { bias: Some(&bias_tensor), term: Some((&h, &b_tensor)) };
                kernels.linear_fused(&x, &w_tensor, extra, accum, &mut y).unwrap();
                // Few tokens go in three steps, each rounded to the result's type.
                let steps = if result == DType::Bf16 { m(&size) } else { vec![0.0; t * n] };
                let size: Vec<f64> = size
                    .iter()
                    .zip(steps)
                    .map(|(s, step)| s + 2.0 * HALF / sum_error(k + r) * step)
                    .collect();
                check(&format!("y {case}"), &y, kernels, k + r, &truth, &size);

                let a_held = held(&a);
                let sum = |dy: &[f64], w: &[f64], v: &[f64], a: &[f64], (accum, old)| {
                    let mut dx = vec![old; t * k];
                    linear::naive::input_gradient(dy, w, 1.0, accum, &mut dx, k);
                    linear::naive::input_gradient(v, a, 1.0, Accum::Add, &mut dx, k);
                    dx
                };
                let truth = sum(&dy_held, &w_held, &v_held, &a_held, (accum, old));
                let size = sum(&m(&dy_held), &m(&w_held), &m(&v_held), &m(&a_held), (Accum::Add, 0.75));
                let mut dx = tensor(kernels, result, &vec![before(accum); t * k], &[t, k]).0;
                let term = Some((&v, &a_tensor));
                kernels.linear_input_gradient_fused(&dy, &w_tensor, term, accum, &mut dx).unwrap();
                check(&format!("dx {case}"), &dx, kernels, n + r, &truth, &size);
            }
        }
    }
}

#[test]
fn a_thin_product_of_another_shape_or_type_is_refused() {
    for kernels in devices() {
        let [x, w, mut y] = [[2, 3], [4, 3], [2, 4]].map(|shape| kernels.zeros(&shape).unwrap());
        let (h, b) = (kernels.zeros(&[2, 5]).unwrap(), kernels.zeros(&[4, 6]).unwrap());
        let extra = Extra { bias: None, term: Some((&h, &b)) };
        let message = kernels.linear_fused(&x, &w, extra, Accum::Replace, &mut y).unwrap_err().to_string();
        assert!(message.contains("b") && message.contains("r=5"), "{message}");
        let (h, b) = (kernels.empty_of(DType::Bf16, &[2, 5]).unwrap(), kernels.zeros(&[4, 5]).unwrap());
        let extra = Extra { bias: None, term: Some((&h, &b)) };
        let message = kernels.linear_fused(&x, &w, extra, Accum::Replace, &mut y).unwrap_err().to_string();
        assert!(message.contains("bf16") && message.contains("f32"), "{message}");
        let bias = kernels.zeros(&[3]).unwrap();
        let extra = Extra { bias: Some(&bias), term: None };
        let message = kernels.linear_fused(&x, &w, extra, Accum::Replace, &mut y).unwrap_err().to_string();
        assert!(message.contains("bias") && message.contains("N=4"), "{message}");
    }
}

#[test]
fn the_loss_and_its_gradients() {
    for kernels in devices() {
        let kernels = &*kernels;
        for (n, v, d) in [(1, 1, 1), (1, 2, 7), (5, 8209, 17), (33, 97, 65), (67, 257, 31)] {
            let mut draw = Draw::new((n * 10_000 + v * 10 + d) as u64);
            let (x, w) = (draw.normal(n * d), draw.normal(v * d));
            let labels = draw.indices(n, v);
            let weights: Vec<f32> = (0..n).map(|i| [1.0, 0.0, 0.3][i % 3] / n as f32).collect();
            let (x, x_held) = tensor(kernels, DType::Bf16, &x, &[n, d]);
            for (source, result) in
                [Source::Owned, Source::File(DType::Bf16)].into_iter().zip([DType::Bf16, DType::F32])
            {
                let (w, held) = weight(kernels, source, &w, &[v, d]);
                let (held, wide_weights) = (rounded(&widen(&held)), widen(&weights));
                let (mut dx, mut dw) = (vec![f64::NAN; n * d], vec![0.0; v * d]);
                let truth = cross_entropy::naive::forward_backward(
                    &x_held,
                    &held,
                    &labels,
                    &wide_weights,
                    None,
                    &mut dx,
                    &mut dw,
                    d,
                );
                // The logits are as exact as in f32; dz is rounded once more, to bf16.
                let mut sizes = vec![0.0; n * v];
                linear::naive::forward(
                    &magnitudes(&x_held),
                    &magnitudes(&held),
                    1.0,
                    Accum::Replace,
                    &mut sizes,
                    d,
                );
                let largest = sizes.iter().fold(0.0f64, |largest, &size| largest.max(size));
                let row_error = 2.0 * sum_error(d) * largest + sum_error(v) + sum_error(1) * largest;
                let mut dz = vec![0.0; n * v];
                linear::naive::forward(&x_held, &held, 1.0, Accum::Replace, &mut dz, d);
                cross_entropy::naive::loss_and_gradient(&mut dz, &labels, &wide_weights, v);
                for (i, (&label, &weight)) in labels.iter().zip(&wide_weights).enumerate() {
                    dz[i * v + label as usize] =
                        dz[i * v + label as usize].abs() + 2.0 * weight * row_error / HALF;
                }
                let (mut dx_size, mut dw_size) = (vec![0.0; n * d], vec![0.0; v * d]);
                linear::naive::input_gradient(&dz, &magnitudes(&held), 1.0, Accum::Replace, &mut dx_size, d);
                linear::naive::weight_gradient(
                    &dz,
                    &magnitudes(&x_held),
                    1.0,
                    Accum::Replace,
                    &mut dw_size,
                    d,
                );
                let gradient_error = HALF + 2.0 * row_error + sum_error(v) + sum_error(n);

                for chunk_rows in [7, 1000] {
                    let case =
                        format!("N={n} V={v} D={d} {source:?} into {result}, {chunk_rows} rows at a time");
                    let mut found_dx = kernels.empty_of(result, &[n, d]).unwrap();
                    let mut found_dw = kernels.zeros(&[v, d]).unwrap();
                    let loss = kernels
                        .cross_entropy(
                            &x,
                            &w,
                            &kernels.from_u32(&labels, &[n]).unwrap(),
                            &kernels.from_f32(&weights, &[n]).unwrap(),
                            None,
                            chunk_rows,
                            Some(&mut found_dx),
                            Some(&mut found_dw),
                        )
                        .unwrap();
                    let allowed = wide_weights.iter().sum::<f64>() * row_error;
                    assert!(
                        (loss - truth).abs() <= allowed,
                        "{case}: {loss}, truth {truth}, allowed {allowed}"
                    );
                    let half = if result == DType::Bf16 { HALF } else { 0.0 };
                    let size: Vec<f64> = dx
                        .iter()
                        .zip(&dx_size)
                        .map(|(t, s)| half * t.abs() + (1.0 + half) * gradient_error * s)
                        .collect();
                    close(&format!("{case}: dx"), &kernels.to_f32(&found_dx).unwrap(), &dx, 1.0, &size);
                    close(
                        &format!("{case}: dw"),
                        &kernels.to_f32(&found_dw).unwrap(),
                        &dw,
                        gradient_error,
                        &dw_size,
                    );
                }
            }
        }
    }
}
