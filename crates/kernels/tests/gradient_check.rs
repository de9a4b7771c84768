//! Every backward of the specifications against central differences of its forward, in `f64`.
//!
//! The loss is a random projection of the output. With `D(h) = (L(x+h) - L(x-h)) / 2h`, the error of `D(h)`
//! is a third of `D(2h) - D(h)` to leading order, plus the rounding of L divided by h: both are computed, so
//! no tolerance is guessed. That the tolerance stays far below the gradient is asserted as well.

mod common;

use common::Draw;
use lora_sb_kernels::op::{
    attention, bias, cross_entropy, embedding, gated_activation, linear, rms_norm, rope, rows,
};
use lora_sb_kernels::{Accum, Activation, AttentionShape, Mask, Segments};

const STEP: f64 = 1e-5;

/// The output as a function of all differentiable inputs.
type Forward<'a> = &'a dyn Fn(&[Vec<f64>]) -> Vec<f64>;
/// The gradients of all inputs, from the inputs and the output's gradient.
type Backward<'a> = &'a dyn Fn(&[Vec<f64>], &[f64]) -> Vec<Vec<f64>>;

#[track_caller]
fn check(case: &str, inputs: &[Vec<f64>], forward: Forward, backward: Backward) {
    let output = forward(inputs);
    let projection = Draw::new(99).normal_f64(output.len());
    let gradients = backward(inputs, &projection);
    assert_eq!(gradients.len(), inputs.len(), "{case}: a gradient for every input");
    let project = |output: Vec<f64>| output.iter().zip(&projection).map(|(y, w)| y * w).sum::<f64>();
    let rounding = 16.0 * f64::EPSILON / STEP
        * (1.0 + output.iter().zip(&projection).map(|(y, w)| (y * w).abs()).sum::<f64>());
    for (which, gradient) in gradients.iter().enumerate() {
        assert_eq!(gradient.len(), inputs[which].len(), "{case}: size of gradient {which}");
        let largest = gradient.iter().fold(0.0f64, |largest, g| largest.max(g.abs()));
        for (i, &found) in gradient.iter().enumerate() {
            let difference = |h: f64| {
                let moved = |by: f64| {
                    let mut inputs = inputs.to_vec();
                    inputs[which][i] += by;
                    project(forward(&inputs))
                };
                (moved(h) - moved(-h)) / (2.0 * h)
            };
            let (near, far) = (difference(STEP), difference(2.0 * STEP));
            let tolerance = (far - near).abs() + rounding;
            assert!(tolerance <= 1e-5 * (1.0 + largest), "{case}: tolerance {tolerance} says nothing");
            let error = (near - found).abs();
            assert!(error <= tolerance, "{case}: input {which}[{i}]: {found}, differences say {near}");
        }
    }
}

/// A gradient buffer that already holds something, for backward passes that add.
const BEFORE: f64 = 3.0;

fn added(size: usize, add: impl FnOnce(&mut [f64])) -> Vec<f64> {
    let mut gradient = vec![BEFORE; size];
    add(&mut gradient);
    gradient.iter_mut().for_each(|g| *g -= BEFORE);
    gradient
}

fn replaced(size: usize, write: impl FnOnce(&mut [f64])) -> Vec<f64> {
    let mut gradient = vec![f64::NAN; size];
    write(&mut gradient);
    gradient
}

#[test]
fn linear_layer() {
    for (t, n, k) in [(1, 1, 1), (1, 7, 3), (5, 1, 4), (5, 3, 1), (7, 5, 11)] {
        let mut draw = Draw::new((t * 100 + n * 10 + k) as u64);
        let (alpha, inputs) = (-1.7, [draw.normal_f64(t * k), draw.normal_f64(n * k)]);
        let forward = |i: &[Vec<f64>]| {
            replaced(t * n, |y| linear::naive::forward(&i[0], &i[1], alpha, Accum::Replace, y, k))
        };
        check(&format!("linear T={t} N={n} K={k}, replaced"), &inputs, &forward, &|i, dy| {
            let dx = |dx: &mut [f64]| linear::naive::input_gradient(dy, &i[1], alpha, Accum::Replace, dx, k);
            let dw = |dw: &mut [f64]| linear::naive::weight_gradient(dy, &i[0], alpha, Accum::Replace, dw, k);
            vec![replaced(t * k, dx), replaced(n * k, dw)]
        });
        check(&format!("linear T={t} N={n} K={k}, added"), &inputs, &forward, &|i, dy| {
            let dx = |dx: &mut [f64]| linear::naive::input_gradient(dy, &i[1], alpha, Accum::Add, dx, k);
            let dw = |dw: &mut [f64]| linear::naive::weight_gradient(dy, &i[0], alpha, Accum::Add, dw, k);
            vec![added(t * k, dx), added(n * k, dw)]
        });
    }
}

#[test]
fn bias_of_a_layer() {
    for (t, n) in [(1, 5), (7, 1), (5, 3)] {
        let mut draw = Draw::new(t as u64);
        let inputs = [draw.normal_f64(n), draw.normal_f64(t * n)];
        let forward = |i: &[Vec<f64>]| {
            let mut y = i[1].clone();
            bias::naive::forward(&i[0], &mut y);
            y
        };
        check(&format!("bias T={t} N={n}"), &inputs, &forward, &|_, dy| {
            vec![added(n, |db| bias::naive::backward(dy, db)), dy.to_vec()]
        });
    }
}

#[test]
fn embedding_table() {
    let (v, d, ids) = (7, 3, [2, 6, 2, 0, 2]);
    let table = Draw::new(1).normal_f64(v * d);
    let forward = |i: &[Vec<f64>]| replaced(ids.len() * d, |x| embedding::naive::forward(&ids, &i[0], x, d));
    check("embedding with repeated ids", &[table], &forward, &|_, dx| {
        vec![added(v * d, |dtable| embedding::naive::backward(&ids, dx, dtable, d))]
    });
}

#[test]
fn selected_rows() {
    let (t, d, selected) = (7, 3, [5, 0, 2]);
    let x = Draw::new(2).normal_f64(t * d);
    let forward =
        |i: &[Vec<f64>]| replaced(selected.len() * d, |y| rows::naive::gather(&selected, &i[0], y, d));
    check("gather and scatter of rows", &[x], &forward, &|_, dy| {
        vec![replaced(t * d, |dx| rows::naive::scatter(&selected, dy, dx, d))]
    });
}

#[test]
fn rms_norm_of_input_and_gain() {
    for (t, d, eps) in [(1, 1, 0.5), (1, 7, 1e-5), (5, 11, 1e-6), (3, 2, 1e-1)] {
        let mut draw = Draw::new((t * 10 + d) as u64);
        let inputs = [draw.normal_f64(t * d), draw.normal_f64(d)];
        let run = |i: &[Vec<f64>]| {
            let (mut y, mut rstd) = (vec![f64::NAN; t * d], vec![f64::NAN; t]);
            rms_norm::naive::forward(&i[0], &i[1], eps, &mut y, &mut rstd);
            (y, rstd)
        };
        check(&format!("rms_norm T={t} D={d} eps={eps}"), &inputs, &|i| run(i).0, &|i, dy| {
            let rstd = run(i).1;
            let mut dx = vec![f64::NAN; t * d];
            let dgain = added(d, |dgain| {
                rms_norm::naive::backward(&i[0], &i[1], &rstd, dy, Accum::Replace, &mut dx, Some(dgain));
            });
            let again = added(t * d, |dx| {
                rms_norm::naive::backward(&i[0], &i[1], &rstd, dy, Accum::Add, dx, None);
            });
            assert!(dx.iter().zip(&again).all(|(a, b)| (a - b).abs() < 1e-13), "replace and add agree");
            vec![dx, dgain]
        });
    }
}

#[test]
fn rotary_positions() {
    let (heads, half, positions) = (3, 2, [4, 0, 4, 1, 2]);
    let mut draw = Draw::new(3);
    let (sin, cos): (Vec<f64>, Vec<f64>) = draw.normal_f64(5 * half).iter().map(|a| a.sin_cos()).unzip();
    let width = heads * 2 * half;
    let x = draw.normal_f64(positions.len() * width);
    let forward = |i: &[Vec<f64>]| {
        let mut x = i[0].clone();
        rope::naive::forward(&cos, &sin, &positions, &mut x, width, half);
        x
    };
    check("rope", &[x], &forward, &|_, dy| {
        let mut dx = dy.to_vec();
        rope::naive::backward(&cos, &sin, &positions, &mut dx, width, half);
        vec![dx]
    });
}

#[test]
fn gated_activations() {
    let mut draw = Draw::new(4);
    let mut gate = draw.normal_f64(13);
    gate.extend([0.0, 30.0, -30.0, 5.0, -5.0]);
    let inputs = [gate, draw.normal_f64(18)];
    let silu = Activation::Silu;
    let forward = |i: &[Vec<f64>]| replaced(18, |h| gated_activation::naive::forward(silu, &i[0], &i[1], h));
    check("silu", &inputs, &forward, &|i, dh| {
        let (mut gate, mut up) = (i[0].clone(), i[1].clone());
        gated_activation::naive::backward(silu, &mut gate, &mut up, dh);
        vec![gate, up]
    });
}

#[test]
fn cross_entropy_of_input_and_head() {
    for (n, v, d) in [(1, 2, 1), (1, 7, 3), (5, 11, 3), (3, 1, 2)] {
        let mut draw = Draw::new((n * 100 + v * 10 + d) as u64);
        let (labels, weights) = (draw.indices(n, v), draw.normal_f64(n));
        let inputs = [draw.normal_f64(n * d), draw.normal_f64(v * d)];
        let run = |i: &[Vec<f64>]| {
            let mut loss = 0.0;
            let mut dx = vec![f64::NAN; n * d];
            let dw = added(v * d, |dw| {
                loss =
                    cross_entropy::naive::forward_backward(&i[0], &i[1], &labels, &weights, &mut dx, dw, d);
            });
            (loss, dx, dw)
        };
        check(&format!("cross_entropy N={n} V={v} D={d}"), &inputs, &|i| vec![run(i).0], &|i, scale| {
            let (_, mut dx, mut dw) = run(i);
            dx.iter_mut().chain(&mut dw).for_each(|g| *g *= scale[0]);
            vec![dx, dw]
        });
    }
}

#[test]
fn attention_of_queries_keys_and_values() {
    let packed = |lengths: &[usize]| Segments::packed(lengths.iter().copied());
    let cached = |lengths: &[(usize, usize)]| Segments::cached(lengths).unwrap();
    let sliding = |window| Mask::Sliding { window };
    let cases = [
        ("one token", Mask::Causal, (1, 1, 2), packed(&[1])),
        ("full", Mask::Full, (2, 2, 3), packed(&[5])),
        ("causal", Mask::Causal, (2, 2, 3), packed(&[7])),
        ("sliding 1", sliding(1), (2, 1, 3), packed(&[5])),
        ("sliding 3", sliding(3), (2, 2, 1), packed(&[7])),
        ("grouped 2:1", Mask::Causal, (4, 2, 3), packed(&[5])),
        ("grouped 4:1", Mask::Full, (4, 1, 2), packed(&[4])),
        ("segments", Mask::Causal, (2, 1, 3), packed(&[3, 1, 5, 1])),
        ("segments, full", Mask::Full, (2, 2, 2), packed(&[1, 4, 2])),
        ("segments, sliding", sliding(2), (3, 1, 2), packed(&[4, 1, 3])),
        ("cached", Mask::Causal, (2, 1, 3), cached(&[(2, 5)])),
        ("cached segments", Mask::Causal, (2, 2, 2), cached(&[(1, 4), (3, 3), (2, 6)])),
        ("cached, sliding", sliding(3), (2, 1, 2), cached(&[(2, 6), (1, 2)])),
        ("cached, full", Mask::Full, (2, 1, 2), cached(&[(1, 3), (2, 4)])),
    ];
    for (name, mask, (heads, kv_heads, head_size), segments) in cases {
        let a = AttentionShape { heads, kv_heads, head_size, scale: 0.6, mask };
        let (q_size, kv_size) =
            (segments.queries() * heads * head_size, segments.keys() * kv_heads * head_size);
        let mut draw = Draw::new((q_size * 1000 + kv_size) as u64);
        let inputs = [draw.normal_f64(q_size), draw.normal_f64(kv_size), draw.normal_f64(kv_size)];
        let run = |i: &[Vec<f64>]| {
            let (mut o, mut lse) = (vec![f64::NAN; q_size], vec![f64::NAN; segments.queries() * heads]);
            attention::naive::forward(&a, &segments, (&i[0], &i[1], &i[2]), &mut o, &mut lse);
            (o, lse)
        };
        check(&format!("attention, {name}"), &inputs, &|i| run(i).0, &|i, d_o| {
            let (o, lse) = run(i);
            let [mut dq, mut dk, mut dv] =
                [vec![f64::NAN; q_size], vec![f64::NAN; kv_size], vec![f64::NAN; kv_size]];
            let gradients = (&mut dq[..], &mut dk[..], &mut dv[..]);
            attention::naive::backward(&a, &segments, (&i[0], &i[1], &i[2]), &o, &lse, d_o, gradients);
            vec![dq, dk, dv]
        });
    }
}
