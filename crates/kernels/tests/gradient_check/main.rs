//! Every backward of the specifications against central differences of its forward, in `f64`.
//!
//! The loss is a random projection of the output. With `D(h) = (L(x+h) - L(x-h)) / 2h`, the error of `D(h)`
//! is a third of `D(2h) - D(h)` to leading order, plus the rounding of L divided by h: both are computed, so
//! no tolerance is guessed. That the tolerance stays far below the gradient is asserted as well.

#[path = "../common/mod.rs"]
mod common;

mod attention;
mod channels;
mod elements;
mod losses;
mod rows;

use common::Draw;
use lora_sb_kernels::Accum;
use lora_sb_kernels::op::linear;

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
