//! The losses, whose gradient comes with their value.

use lora_sb_kernels::op::{cross_entropy, squared_error};

use crate::common::Draw;
use crate::{added, check};

#[test]
fn cross_entropy_of_input_and_head() {
    let shapes = [(1, 2, 1), (1, 7, 3), (5, 11, 3), (3, 1, 2)];
    for ((n, v, d), soft_cap) in shapes.into_iter().flat_map(|s| [None, Some(1.3)].map(|cap| (s, cap))) {
        let mut draw = Draw::new((n * 100 + v * 10 + d) as u64);
        let (labels, weights) = (draw.indices(n, v), draw.normal_f64(n));
        let inputs = [draw.normal_f64(n * d), draw.normal_f64(v * d)];
        let run = |i: &[Vec<f64>]| {
            let mut loss = 0.0;
            let mut dx = vec![f64::NAN; n * d];
            let dw = added(v * d, |dw| {
                let (x, w, dx) = (&i[0], &i[1], &mut dx);
                loss = cross_entropy::naive::forward_backward(x, w, &labels, &weights, soft_cap, dx, dw, d);
            });
            (loss, dx, dw)
        };
        let case = format!("cross_entropy N={n} V={v} D={d}, soft cap {soft_cap:?}");
        check(&case, &inputs, &|i| vec![run(i).0], &|i, scale| {
            let (_, mut dx, mut dw) = run(i);
            dx.iter_mut().chain(&mut dw).for_each(|g| *g *= scale[0]);
            vec![dx, dw]
        });
    }
}

#[test]
fn cross_entropy_of_given_logits() {
    for (n, c) in [(1, 1), (1, 2), (5, 3), (2, 11)] {
        let mut draw = Draw::new((n * 10 + c) as u64);
        let (labels, weights) = (draw.indices(n, c), draw.normal_f64(n));
        let run = |i: &[Vec<f64>]| {
            let mut logits = i[0].clone();
            (cross_entropy::naive::loss_and_gradient(&mut logits, &labels, &weights, c), logits)
        };
        let case = format!("cross_entropy_of_logits N={n} C={c}");
        check(&case, &[draw.normal_f64(n * c)], &|i| vec![run(i).0], &|i, scale| {
            vec![run(i).1.iter().map(|dz| dz * scale[0]).collect()]
        });
    }
}

#[test]
fn squared_error_of_predictions() {
    for n in [1, 7] {
        let mut draw = Draw::new(n as u64);
        let (targets, weights) = (draw.normal_f64(n), draw.normal_f64(n));
        let run = |i: &[Vec<f64>]| {
            let mut z = i[0].clone();
            (squared_error::naive::loss_and_gradient(&mut z, &targets, &weights), z)
        };
        let case = format!("squared_error N={n}");
        check(&case, &[draw.normal_f64(n)], &|i| vec![run(i).0], &|i, scale| {
            vec![run(i).1.iter().map(|dz| dz * scale[0]).collect()]
        });
    }
}
