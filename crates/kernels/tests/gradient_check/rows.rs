//! Operations on whole rows and on ranges of columns.

use lora_sb_kernels::op::{bias, columns, embedding, layer_norm, rms_norm, rope, rows};
use lora_sb_kernels::{Accum, RmsGain};

use crate::common::Draw;
use crate::{added, check, replaced};

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
fn ranges_of_columns() {
    for (t, whole, from, part) in [(1, 1, 0, 1), (3, 7, 0, 7), (5, 7, 2, 3), (2, 5, 4, 1)] {
        let x = Draw::new((whole * 10 + from) as u64).normal_f64(t * whole);
        let forward =
            |i: &[Vec<f64>]| replaced(t * part, |y| columns::naive::take(&i[0], from, y, whole, part));
        check(&format!("columns {from}+{part} of {whole}"), &[x], &forward, &|_, dy| {
            let mut dx = vec![0.0; t * whole];
            columns::naive::put(dy, from, &mut dx, whole, part);
            vec![dx]
        });
    }
}

#[test]
fn rms_norm_of_input_and_gain() {
    let shapes = [(1, 1, 0.5), (1, 7, 1e-5), (5, 11, 1e-6), (3, 2, 1e-1)];
    for (kind, (t, d, eps)) in [RmsGain::Weight, RmsGain::OnePlusWeight]
        .into_iter()
        .flat_map(|kind| shapes.map(|shape| (kind, shape)))
    {
        let mut draw = Draw::new((t * 10 + d) as u64);
        let inputs = [draw.normal_f64(t * d), draw.normal_f64(d)];
        let run = |i: &[Vec<f64>]| {
            let (mut y, mut rstd) = (vec![f64::NAN; t * d], vec![f64::NAN; t]);
            rms_norm::naive::forward(&i[0], &i[1], kind, eps, &mut y, &mut rstd);
            (y, rstd)
        };
        check(&format!("rms_norm T={t} D={d} eps={eps} {kind:?}"), &inputs, &|i| run(i).0, &|i, dy| {
            let rstd = run(i).1;
            let mut dx = vec![f64::NAN; t * d];
            let dgain = added(d, |dgain| {
                let accum = Accum::Replace;
                rms_norm::naive::backward(&i[0], &i[1], kind, &rstd, dy, accum, &mut dx, Some(dgain));
            });
            let again = added(t * d, |dx| {
                rms_norm::naive::backward(&i[0], &i[1], kind, &rstd, dy, Accum::Add, dx, None);
            });
            assert!(dx.iter().zip(&again).all(|(a, b)| (a - b).abs() < 1e-13), "replace and add agree");
            vec![dx, dgain]
        });
    }
}

#[test]
fn layer_norm_of_input_gain_and_shift() {
    for (t, d, eps) in [(1, 1, 0.5), (1, 7, 1e-5), (5, 11, 1e-6), (3, 2, 1e-1)] {
        let mut draw = Draw::new((t * 10 + d) as u64);
        let inputs = [draw.normal_f64(t * d), draw.normal_f64(d), draw.normal_f64(d)];
        let run = |i: &[Vec<f64>]| {
            let (mut y, mut mean, mut rstd) = (vec![f64::NAN; t * d], vec![f64::NAN; t], vec![f64::NAN; t]);
            layer_norm::naive::forward(&i[0], &i[1], &i[2], eps, &mut y, &mut mean, &mut rstd);
            (y, mean, rstd)
        };
        check(&format!("layer_norm T={t} D={d} eps={eps}"), &inputs, &|i| run(i).0, &|i, dy| {
            let (_, mean, rstd) = run(i);
            let statistics = (&mean[..], &rstd[..]);
            let (mut dx, mut dgain) = (vec![f64::NAN; t * d], Vec::new());
            let dshift = added(d, |dshift| {
                dgain = added(d, |dgain| {
                    let gradients = (Some(dgain), Some(dshift));
                    layer_norm::naive::backward(
                        &i[0],
                        &i[1],
                        statistics,
                        dy,
                        Accum::Replace,
                        &mut dx,
                        gradients.0,
                        gradients.1,
                    );
                });
            });
            let again = added(t * d, |dx| {
                layer_norm::naive::backward(&i[0], &i[1], statistics, dy, Accum::Add, dx, None, None);
            });
            assert!(dx.iter().zip(&again).all(|(a, b)| (a - b).abs() < 1e-12), "replace and add agree");
            vec![dx, dgain, dshift]
        });
    }
}

#[test]
fn rotary_positions() {
    let (heads, positions) = (3, [4, 0, 4, 1, 2]);
    for (head_size, half) in [(4, 2), (5, 1), (7, 3)] {
        let mut draw = Draw::new(3);
        let angles = draw.normal_f64(5 * half);
        let (sin, cos): (Vec<f64>, Vec<f64>) = angles.iter().map(|a| a.sin_cos()).unzip();
        let sizes = (heads * head_size, head_size, half);
        let x = draw.normal_f64(positions.len() * sizes.0);
        let forward = |i: &[Vec<f64>]| {
            let mut x = i[0].clone();
            rope::naive::forward(&cos, &sin, &positions, &mut x, sizes);
            x
        };
        check(&format!("rope E={head_size} U={}", 2 * half), &[x], &forward, &|_, dy| {
            let mut dx = dy.to_vec();
            rope::naive::backward(&cos, &sin, &positions, &mut dx, sizes);
            vec![dx]
        });
    }
}
