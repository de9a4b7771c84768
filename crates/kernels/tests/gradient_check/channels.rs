//! Factors of channels, norms of rows, dropout, and the derivative of the soft cap.

use lora_sb_kernels::op::{channel, dropout, elementwise};
use lora_sb_kernels::{Accum, DropoutMask};

use crate::common::Draw;
use crate::{added, check, replaced};

#[test]
fn factors_of_channels() {
    for (t, n) in [(1, 5), (7, 1), (5, 3)] {
        let mut draw = Draw::new((t * 10 + n) as u64);
        let inputs = [draw.normal_f64(n), draw.normal_f64(t * n)];
        let scaled = |c: &[f64], y: &[f64]| {
            let mut y = y.to_vec();
            channel::naive::scale(c, &mut y);
            y
        };
        for accum in [Accum::Replace, Accum::Add] {
            let case = format!("scale_channels T={t} N={n}, {accum:?}");
            check(&case, &inputs, &|i| scaled(&i[0], &i[1]), &|i, dy| {
                let products = |dc: &mut [f64]| channel::naive::channel_products(&i[1], dy, accum, dc);
                let dc = match accum {
                    Accum::Replace => replaced(n, products),
                    Accum::Add => added(n, products),
                };
                vec![dc, scaled(&i[0], dy)]
            });
        }
    }
}

/// `f_n = alpha sum_k w_nk w_nk` has the gradient `2 alpha w_nk df_n`, so the products carry through.
#[test]
fn squared_norms_of_rows() {
    for (n, k) in [(1, 1), (5, 3), (3, 7)] {
        let alpha = -0.7;
        let inputs = [Draw::new((n * 10 + k) as u64).normal_f64(n * k)];
        let forward = |i: &[Vec<f64>]| {
            replaced(n, |out| channel::naive::row_products(&i[0], &i[0], alpha, Accum::Replace, out))
        };
        check(&format!("row_products N={n} K={k}"), &inputs, &forward, &|i, df| {
            vec![i[0].iter().enumerate().map(|(at, w)| 2.0 * alpha * w * df[at / k]).collect()]
        });
    }
}

/// The backward is the operation itself, with the same rate and seed.
#[test]
fn dropout_is_its_own_transpose() {
    for (rate, accum) in [(0.0, Accum::Replace), (0.3, Accum::Replace), (0.9, Accum::Add)] {
        let (mask, scale) = (DropoutMask::new(rate, 11).unwrap(), 1.0 / (1.0 - f64::from(rate)));
        let apply = |x: &[f64]| {
            let write = |y: &mut [f64]| dropout::naive::dropout(mask, scale, x, accum, y);
            match accum {
                Accum::Replace => replaced(x.len(), write),
                Accum::Add => added(x.len(), write),
            }
        };
        let inputs = [Draw::new(12).normal_f64(37)];
        check(&format!("dropout of {rate}"), &inputs, &|i| apply(&i[0]), &|_, dy| vec![apply(dy)]);
    }
}

#[test]
fn slope_of_the_soft_cap() {
    for cap in [Some(0.5), Some(30.0), None] {
        let inputs = [Draw::new(13).normal_f64(29)];
        let value = |x: &f64| elementwise::naive::soft_capped(cap, *x).0;
        let slope = |x: &f64| elementwise::naive::soft_capped(cap, *x).1;
        check(&format!("soft cap {cap:?}"), &inputs, &|i| i[0].iter().map(value).collect(), &|i, dy| {
            vec![i[0].iter().zip(dy).map(|(x, dy)| dy * slope(x)).collect()]
        });
    }
}
