//! Layers of one input, with and without latent parts, against the specification of the linear layer.

use lora_sb_kernels::op::linear::naive;
use lora_sb_kernels::{Accum, DType, GroupLayer, Kernels, LatentBackward, LatentPart, Tensor};

use crate::common::{BF16_EPS, Draw, activation, close, devices, magnitudes, rounded, sum_error, widen};

/// N, and r: 0 for a layer without a latent part.
type Sizes = (usize, usize);

/// T, K, and the layers. Few tokens, tiles and their edges, more rows than are packed at a time, ranks beyond a panel and
/// beyond what registers hold.
const CASES: [(usize, usize, &[Sizes]); 7] = [
    (1, 7, &[(5, 2)]),
    (3, 33, &[(17, 3), (4, 0)]),
    (5, 65, &[(33, 7), (70, 0), (8, 16)]),
    (14, 32, &[(32, 32), (64, 64)]),
    (67, 131, &[(30, 24), (31, 1)]),
    (131, 40, &[(300, 70), (5, 33)]),
    (2701, 9, &[(11, 4), (6, 5)]),
];

const OLD: f32 = 0.75;

/// One layer's operands: as tensors, and as what a product of the activations' type reads.
struct Drawn {
    n: usize,
    r: usize,
    weight: Tensor,
    bias: Option<Tensor>,
    a: Tensor,
    square: Tensor,
    b: Tensor,
    held: Held,
}

struct Held {
    weight: Vec<f64>,
    bias: Vec<f64>,
    a: Vec<f64>,
    square: Vec<f64>,
    b: Vec<f64>,
}

const SCALE: f32 = 0.6;

impl Drawn {
    fn new(kernels: &dyn Kernels, dtype: DType, draw: &mut Draw, (k, n, r): (usize, usize, usize)) -> Self {
        let mut tensor = |shape: [usize; 2]| {
            let values = draw.normal(shape[0] * shape[1]);
            (kernels.from_f32(&values, &shape).unwrap(), values)
        };
        let ((weight, w), (a, av), (b, bv)) = (tensor([n, k]), tensor([r, k]), tensor([n, r]));
        let ((square, m), (bias, c)) = (tensor([r, r]), tensor([1, n]));
        let read = |values: &[f32]| widen(&rounded(dtype, values));
        // Every other layer has a bias.
        let biased = n % 2 == 1;
        let held = Held {
            weight: read(&w),
            bias: if biased { widen(&c) } else { vec![0.0; n] },
            a: read(&av),
            square: widen(&m),
            b: read(&bv),
        };
        let bias = biased.then(|| bias.reshape(&[n]).unwrap());
        Drawn { n, r, weight, bias, a, square, b, held }
    }

    fn layer(&self) -> GroupLayer<'_> {
        let part = LatentPart { a: &self.a, r: &self.square, b: &self.b, scale: SCALE };
        let latent = (self.r > 0).then_some(part);
        GroupLayer { weight: &self.weight, bias: self.bias.as_ref(), latent }
    }
}

/// `x w^T` and the same of the magnitudes; x `[T, k]`, w `[n, k]`.
fn product(x: &[f64], w: &[f64], k: usize) -> (Vec<f64>, Vec<f64>) {
    let made = |x: &[f64], w: &[f64]| {
        let mut y = vec![0.0; x.len() / k * (w.len() / k)];
        naive::forward(x, w, 1.0, Accum::Replace, &mut y, k);
        y
    };
    (made(x, w), made(&magnitudes(x), &magnitudes(w)))
}

/// `dy w` and the same of the magnitudes; dy `[T, n]`, w `[n, k]`.
fn back_product(dy: &[f64], w: &[f64], n: usize) -> (Vec<f64>, Vec<f64>) {
    let k = w.len() / n;
    let made = |dy: &[f64], w: &[f64]| {
        let mut dx = vec![0.0; dy.len() / n * k];
        naive::input_gradient(dy, w, 1.0, Accum::Replace, &mut dx, k);
        dx
    };
    (made(dy, w), made(&magnitudes(dy), &magnitudes(w)))
}

fn add(to: &mut [f64], from: &[f64], factor: f64) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += factor * from);
}

/// h or w as a product reads it, in truth, and its error's bound: that of its sums, and half a unit in `bf16`.
fn thin(dtype: DType, exact: &[f64], size: &[f64], terms: usize) -> Vec<f64> {
    let half = if dtype == DType::Bf16 { BF16_EPS } else { 0.0 };
    exact.iter().zip(size).map(|(h, size)| half * h.abs() + 2.0 * sum_error(terms) * size).collect()
}

/// (activations, results), old contents.
fn variants() -> impl Iterator<Item = (DType, DType, Accum)> {
    let types = [DType::F32, DType::Bf16];
    let pairs = types.into_iter().flat_map(move |dtype| types.map(|result| (dtype, result)));
    pairs.flat_map(|(dtype, result)| [Accum::Replace, Accum::Add].map(|accum| (dtype, result, accum)))
}

fn outcome(kernels: &dyn Kernels, dtype: DType, accum: Accum, shape: [usize; 2]) -> (Tensor, f64) {
    let old = if accum == Accum::Add { OLD } else { f32::NAN };
    let tensor = activation(kernels, dtype, &vec![old; shape[0] * shape[1]], &shape).0;
    (tensor, if accum == Accum::Add { f64::from(OLD) } else { 0.0 })
}

/// What rounding to a result's type allows: once, or where layers go one after another, once for each of `steps`.
fn stored(dtype: DType, result: DType, t: usize, steps: usize) -> f64 {
    let one_by_one = dtype == DType::F32 || t <= 4;
    match result {
        DType::F32 => 0.0,
        _ => BF16_EPS * if one_by_one { steps as f64 } else { 1.0 },
    }
}

#[test]
fn every_layer_of_a_group_is_its_own_product_and_its_latent_part() {
    for kernels in devices() {
        let kernels = &*kernels;
        for (t, k, layers) in CASES {
            for (dtype, result, accum) in variants() {
                let mut draw = Draw::new((t * 1000 + k) as u64);
                let (x, held) = activation(kernels, dtype, &draw.normal(t * k), &[t, k]);
                let held = widen(&held);
                let drawn: Vec<Drawn> =
                    layers.iter().map(|&(n, r)| Drawn::new(kernels, dtype, &mut draw, (k, n, r))).collect();
                let group: Vec<GroupLayer<'_>> = drawn.iter().map(Drawn::layer).collect();
                let mut ys: Vec<Tensor> =
                    layers.iter().map(|&(n, _)| outcome(kernels, result, accum, [t, n]).0).collect();
                let mut out: Vec<&mut Tensor> = ys.iter_mut().collect();
                let us = kernels.linear_group(&x, &group, accum, &mut out).unwrap();
                for ((layer, y), u) in drawn.iter().zip(&ys).zip(us) {
                    let case =
                        format!("T={t} K={k} N={} r={} {dtype} to {result} {accum:?}", layer.n, layer.r);
                    let (n, r, held_of) = (layer.n, layer.r, &layer.held);
                    let (mut truth, mut size) = product(&held, &held_of.weight, k);
                    let mut error = vec![0.0; t * n];
                    assert_eq!(u.is_some(), r > 0, "{case}");
                    if let Some(u) = u {
                        let (exact, u_size) = product(&held, &held_of.a, k);
                        let found = kernels.to_f32(&u).unwrap();
                        close(&format!("u {case}"), &found, &exact, sum_error(k), &u_size);
                        // From u as it was found: its error is judged above.
                        let (mut h, mut h_size) = product(&widen(&found), &held_of.square, r);
                        h.iter_mut().chain(&mut h_size).for_each(|h| *h *= f64::from(SCALE));
                        let (of_h, of_h_size) = product(&h, &held_of.b, r);
                        add(&mut truth, &of_h, 1.0);
                        add(&mut size, &of_h_size, 1.0);
                        error = product(&thin(dtype, &h, &h_size, r), &held_of.b, r).1;
                    }
                    let (_, old) = outcome(kernels, result, accum, [0, 0]);
                    for (i, (truth, size)) in truth.iter_mut().zip(&mut size).enumerate() {
                        *truth += old + held_of.bias[i % n];
                        *size += old + held_of.bias[i % n].abs();
                    }
                    let half = stored(dtype, result, t, 3);
                    let allowed: Vec<f64> = size
                        .iter()
                        .zip(&error)
                        .map(|(size, error)| (sum_error(k + r) + half) * size + (1.0 + half) * error)
                        .collect();
                    close(&format!("y {case}"), &kernels.to_f32(y).unwrap(), &truth, 1.0, &allowed);
                }
            }
        }
    }
}

#[test]
fn the_backward_of_a_group_is_the_sum_of_its_layers() {
    for kernels in devices() {
        let kernels = &*kernels;
        for (t, k, layers) in CASES {
            for (dtype, result, accum) in variants() {
                let mut draw = Draw::new((t * 1000 + k + 1) as u64);
                let drawn: Vec<Drawn> =
                    layers.iter().map(|&(n, r)| Drawn::new(kernels, dtype, &mut draw, (k, n, r))).collect();
                let group: Vec<GroupLayer<'_>> = drawn.iter().map(Drawn::layer).collect();
                let dys: Vec<(Tensor, Vec<f32>)> = layers
                    .iter()
                    .map(|&(n, _)| activation(kernels, dtype, &draw.normal(t * n), &[t, n]))
                    .collect();
                let us: Vec<Tensor> = layers
                    .iter()
                    .map(|&(_, r)| kernels.from_f32(&draw.normal(t * r), &[t, r]).unwrap())
                    .collect();
                let case = format!("T={t} K={k} {layers:?} {dtype} to {result} {accum:?}");
                let (_, old) = outcome(kernels, result, accum, [0, 0]);
                let (mut truth, mut size) = (vec![old; t * k], vec![old; t * k]);
                let mut error = vec![0.0; t * k];
                let mut gradients: Vec<Vec<f64>> = Vec::new();
                let mut gradient_sizes: Vec<Vec<f64>> = Vec::new();
                let mut terms = 0;
                for ((layer, (_, dy)), u) in drawn.iter().zip(&dys).zip(&us) {
                    let (n, r, held) = (layer.n, layer.r, &layer.held);
                    let (dy, u) = (widen(dy), widen(&kernels.to_f32(u).unwrap()));
                    let (of_weight, of_weight_size) = back_product(&dy, &held.weight, n);
                    add(&mut truth, &of_weight, 1.0);
                    add(&mut size, &of_weight_size, 1.0);
                    terms += n + r;
                    let (mut gradient, mut gradient_size) = (vec![f64::from(OLD); r * r], vec![0.75; r * r]);
                    if r > 0 {
                        let (v, v_size) = back_product(&dy, &held.b, n);
                        let s = f64::from(SCALE);
                        naive::weight_gradient(&v, &u, s, Accum::Add, &mut gradient, r);
                        naive::weight_gradient(
                            &v_size,
                            &magnitudes(&u),
                            s,
                            Accum::Add,
                            &mut gradient_size,
                            r,
                        );
                        let (mut w, _) = back_product(&v, &held.square, r);
                        let (_, mut w_size) = back_product(&v_size, &held.square, r);
                        w.iter_mut().chain(&mut w_size).for_each(|w| *w *= s);
                        let (of_w, of_w_size) = back_product(&w, &held.a, r);
                        add(&mut truth, &of_w, 1.0);
                        add(&mut size, &of_w_size, 1.0);
                        add(&mut error, &back_product(&thin(dtype, &w, &w_size, n + r), &held.a, r).1, 1.0);
                    }
                    gradients.push(gradient);
                    gradient_sizes.push(gradient_size);
                }

                let ranks = layers.iter().map(|&(_, r)| r);
                let mut found: Vec<Tensor> =
                    ranks.map(|r| kernels.from_f32(&vec![OLD; r * r], &[r, r]).unwrap()).collect();
                let mut alone: Vec<Tensor> =
                    found.iter().map(|gradient| kernels.to_owned_f32(gradient).unwrap()).collect();
                let mut dx = outcome(kernels, result, accum, [t, k]).0;
                let dys: Vec<&Tensor> = dys.iter().map(|(dy, _)| dy).collect();
                let run = |gradients: &mut [Tensor], dx: Option<(&mut Tensor, Accum)>| {
                    let parts = us.iter().zip(gradients).zip(layers);
                    let part = |((u, gradient), &(_, r))| (r > 0).then_some(LatentBackward { u, gradient });
                    let mut latents: Vec<Option<LatentBackward<'_>>> = parts.map(part).collect();
                    kernels.linear_group_backward(&dys, &group, &mut latents, dx).unwrap();
                };
                run(&mut found, Some((&mut dx, accum)));
                run(&mut alone, None);

                let half = stored(dtype, result, t, 2 * layers.len());
                let allowed: Vec<f64> = size
                    .iter()
                    .zip(&error)
                    .map(|(size, error)| (sum_error(terms) + half) * size + (1.0 + half) * error)
                    .collect();
                close(&format!("dx {case}"), &kernels.to_f32(&dx).unwrap(), &truth, 1.0, &allowed);
                for (index, (truth, size)) in gradients.iter().zip(&gradient_sizes).enumerate() {
                    let found = kernels.to_f32(&found[index]).unwrap();
                    let error = sum_error(drawn[index].n) + sum_error(t);
                    close(&format!("dR {index} {case}"), &found, truth, error, size);
                    assert_eq!(
                        kernels.to_f32(&alone[index]).unwrap(),
                        found,
                        "dR {index} without dx, {case}"
                    );
                }
            }
        }
    }
}

#[test]
fn an_operand_of_another_shape_is_refused_by_name() {
    for kernels in devices() {
        let zeros = |shape: [usize; 2]| kernels.zeros(&shape).unwrap();
        let (x, weight, square) = (zeros([6, 3]), zeros([4, 3]), zeros([2, 2]));
        let (a, b, wrong) = (zeros([2, 3]), zeros([4, 2]), zeros([5, 2]));
        let message = |a: &Tensor, b: &Tensor, y: [usize; 2]| {
            let latent = Some(LatentPart { a, r: &square, b, scale: 1.0 });
            let layer = GroupLayer { weight: &weight, bias: None, latent };
            let result = kernels.linear_group(&x, &[layer], Accum::Replace, &mut [&mut zeros(y)]);
            result.map(|_| ()).unwrap_err().to_string()
        };
        for (message, named) in [
            (message(&a, &wrong, [6, 4]), "N=4"),
            (message(&wrong, &b, [6, 4]), "K=3"),
            (message(&a, &b, [6, 5]), "N=4"),
        ] {
            assert!(message.contains("linear_group") && message.contains(named), "{message}");
        }
        let plain = GroupLayer { weight: &weight, bias: None, latent: None };
        let (nothing, empty) = (zeros([0, 0]), [zeros([0, 3]), zeros([4, 0])]);
        let latent = Some(LatentPart { a: &empty[0], r: &nothing, b: &empty[1], scale: 1.0 });
        let ranked = GroupLayer { latent, ..plain };
        let (mut y, dy) = (zeros([6, 4]), zeros([6, 4]));
        let no_y = kernels.linear_group(&x, &[plain], Accum::Replace, &mut []);
        let no_rank = kernels.linear_group(&x, &[ranked], Accum::Replace, &mut [&mut y]);
        let no_entry = kernels.linear_group_backward(&[&dy], &[plain], &mut [], None);
        let latent = Some(LatentPart { a: &a, r: &square, b: &b, scale: 1.0 });
        let adapted = GroupLayer { latent, ..plain };
        let no_gradient = kernels.linear_group_backward(&[&dy], &[adapted], &mut [None], None);
        for (result, named) in [
            (no_y.map(|_| ()), "0 ys for 1 layers"),
            (no_rank.map(|_| ()), "rank 0"),
            (no_entry, "0 latents for 1 layers"),
            (no_gradient, "u and dR"),
        ] {
            let message = result.unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
    }
}
