//! Operations on whole rows: embedding, bias, normalisation, rotation, selection.

use lora_sb_kernels::op::{bias, embedding, rms_norm, rope, rows};
use lora_sb_kernels::{Accum, RopeScaling, RopeTable};

use crate::common::{Draw, EPS, SOURCES, close, devices, magnitudes, sum_error, weight, widen};

/// (T, D): no rows, one row, one column, less and more than a block of work, nothing that divides a tile.
const SHAPES: [(usize, usize); 8] =
    [(0, 3), (1, 1), (1, 517), (7, 1), (5, 33), (131, 257), (3, 20_011), (400, 64)];

#[test]
fn embedding_and_its_gradient() {
    for kernels in devices() {
        for (t, d) in SHAPES {
            let v = 11;
            let mut draw = Draw::new((t * 31 + d) as u64);
            let (ids, dx, before) = (draw.indices(t, v), draw.normal(t * d), draw.normal(v * d));
            let ids_tensor = kernels.from_u32(&ids, &[t]).unwrap();
            for source in SOURCES {
                let (table, values) = weight(&*kernels, source, &before, &[v, d]);
                let mut x = kernels.empty(&[t, d]).unwrap();
                kernels.embedding(&ids_tensor, &table, &mut x).unwrap();
                let mut truth = vec![f32::NAN; t * d];
                embedding::naive::forward(&ids, &values, &mut truth, d);
                assert_eq!(kernels.to_f32(&x).unwrap(), truth, "T={t} D={d} {source:?}");
            }
            let mut dtable = kernels.from_f32(&before, &[v, d]).unwrap();
            let dx_tensor = kernels.from_f32(&dx, &[t, d]).unwrap();
            kernels.embedding_gradient(&ids_tensor, &dx_tensor, &mut dtable).unwrap();
            // Added in the order of t, as the specification promises: the same bits.
            let mut truth = before;
            embedding::naive::backward(&ids, &dx, &mut truth, d);
            assert_eq!(kernels.to_f32(&dtable).unwrap(), truth, "gradient T={t} D={d}");
        }
    }
}

#[test]
fn bias_and_its_gradient() {
    for kernels in devices() {
        for (t, n) in SHAPES {
            let mut draw = Draw::new((t * 31 + n) as u64);
            let [b, y, before] = [draw.normal(n), draw.normal(t * n), draw.normal(n)];
            for source in SOURCES {
                let (b, values) = weight(&*kernels, source, &b, &[n]);
                let mut y_tensor = kernels.from_f32(&y, &[t, n]).unwrap();
                kernels.bias(&b, &mut y_tensor).unwrap();
                let mut truth = y.clone();
                bias::naive::forward(&values, &mut truth);
                assert_eq!(kernels.to_f32(&y_tensor).unwrap(), truth, "T={t} N={n} {source:?}");
            }
            let dy = kernels.from_f32(&y, &[t, n]).unwrap();
            let mut db = kernels.from_f32(&before, &[n]).unwrap();
            kernels.bias_gradient(&dy, &mut db).unwrap();
            let (mut truth, mut magnitude) = (widen(&before), magnitudes(&widen(&before)));
            bias::naive::backward(&widen(&y), &mut truth);
            bias::naive::backward(&magnitudes(&widen(&y)), &mut magnitude);
            let found = kernels.to_f32(&db).unwrap();
            close(&format!("db T={t} N={n}"), &found, &truth, sum_error(t), &magnitude);
        }
    }
}

#[test]
fn rms_norm_and_its_gradients() {
    for kernels in devices() {
        for (t, d) in SHAPES {
            for (source, accum) in SOURCES.into_iter().zip([Accum::Replace, Accum::Add].into_iter().cycle()) {
                let case = format!("rms_norm T={t} D={d} {source:?} {accum:?}");
                let (eps, mut draw) = (1e-5f32, Draw::new((t * 31 + d) as u64));
                let [x, dy, gain] = [draw.normal(t * d), draw.normal(t * d), draw.normal(d)];
                let (gain_tensor, gain) = weight(&*kernels, source, &gain, &[d]);
                let x_tensor = kernels.from_f32(&x, &[t, d]).unwrap();
                let dy_tensor = kernels.from_f32(&dy, &[t, d]).unwrap();
                let (x, dy, gain) = (widen(&x), widen(&dy), widen(&gain));

                let (mut y, mut rstd) = (vec![f64::NAN; t * d], vec![f64::NAN; t]);
                rms_norm::naive::forward(&x, &gain, f64::from(eps), &mut y, &mut rstd);
                let mut y_tensor = kernels.empty(&[t, d]).unwrap();
                let mut rstd_tensor = kernels.empty(&[t]).unwrap();
                kernels.rms_norm(&x_tensor, &gain_tensor, eps, &mut y_tensor, &mut rstd_tensor).unwrap();
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
                        &rstd_tensor,
                        &dy_tensor,
                        accum,
                        &mut dx_tensor,
                        dgain,
                    )
                    .unwrap();
                let mut dx = vec![f64::from(before); t * d];
                let mut dgain = vec![2.0; d];
                rms_norm::naive::backward(&x, &gain, &rstd, &dy, accum, &mut dx, Some(&mut dgain));
                let (dx_size, dgain_size) = gradient_magnitudes(&x, &gain, &rstd, &dy);
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
        let (t, d) = (37, 517);
        let mut draw = Draw::new(5);
        let mut tensor =
            |shape: &[usize]| kernels.from_f32(&draw.normal(shape.iter().product()), shape).unwrap();
        let (x, dy, gain, rstd) = (tensor(&[t, d]), tensor(&[t, d]), tensor(&[d]), tensor(&[t]));
        let run = |dgain| {
            let mut dx = kernels.empty(&[t, d]).unwrap();
            kernels.rms_norm_backward(&x, &gain, &rstd, &dy, Accum::Replace, &mut dx, dgain).unwrap();
            kernels.to_f32(&dx).unwrap()
        };
        let mut dgain = kernels.zeros(&[d]).unwrap();
        assert_eq!(run(Some(&mut dgain)), run(None));
    }
}

#[test]
fn rope_forward_and_back() {
    for kernels in devices() {
        for (t, heads, head_size) in [(0, 1, 2), (1, 1, 2), (7, 3, 6), (5, 2, 40), (131, 4, 64), (13, 31, 66)]
        {
            let case = format!("rope T={t} H={heads} E={head_size}");
            let (width, half, places) = (heads * head_size, head_size / 2, 301);
            let mut draw = Draw::new((t * 31 + width) as u64);
            let (positions, values) = (draw.indices(t, places), draw.normal(t * width));
            let theta = 10_000.0f64;
            let table = RopeTable::new(&*kernels, theta, &RopeScaling::Default, head_size, places).unwrap();
            // The angles as the table's definition rounds them: frequency and product to f32.
            let angles = (0..places).flat_map(|p| {
                let frequency = move |i: usize| theta.powf(-(2.0 * i as f64) / head_size as f64) as f32;
                (0..half).map(move |i| f64::from(p as f32 * frequency(i)))
            });
            let (sin, cos): (Vec<f64>, Vec<f64>) = angles.map(|angle| angle.sin_cos()).unzip();
            let positions_tensor = kernels.from_u32(&positions, &[t]).unwrap();
            // A turn keeps a pair's length, which bounds each of its terms.
            let pair = |i: usize| {
                let (head, place) = (i / head_size * head_size, i % half);
                let (re, im) = (f64::from(values[head + place]), f64::from(values[head + half + place]));
                re.abs() + im.abs()
            };
            let magnitude: Vec<f64> = (0..t * width).map(pair).collect();
            let mut x = kernels.from_f32(&values, &[t, width]).unwrap();
            kernels.rope(&table, &positions_tensor, &mut x).unwrap();
            let mut truth = widen(&values);
            rope::naive::forward(&cos, &sin, &positions, &mut truth, width, half);
            close(&case, &kernels.to_f32(&x).unwrap(), &truth, 4.0 * EPS, &magnitude);

            let mut dx = kernels.from_f32(&values, &[t, width]).unwrap();
            kernels.rope_backward(&table, &positions_tensor, &mut dx).unwrap();
            let mut truth = widen(&values);
            rope::naive::backward(&cos, &sin, &positions, &mut truth, width, half);
            close(&case, &kernels.to_f32(&dx).unwrap(), &truth, 4.0 * EPS, &magnitude);

            kernels.rope_backward(&table, &positions_tensor, &mut x).unwrap();
            let found = kernels.to_f32(&x).unwrap();
            close(&format!("{case}, there and back"), &found, &widen(&values), 12.0 * EPS, &magnitude);
        }
    }
}

#[test]
fn selected_rows_have_the_bits_of_the_specification() {
    for kernels in devices() {
        for (t, d, selected) in [(0, 3, 0), (5, 3, 0), (1, 1, 1), (7, 5, 3), (131, 257, 100), (400, 64, 400)]
        {
            let mut draw = Draw::new((t * 31 + d) as u64);
            let (index, x, dy) = (draw.distinct(selected, t), draw.normal(t * d), draw.normal(selected * d));
            let index_tensor = kernels.from_u32(&index, &[selected]).unwrap();
            let mut y = kernels.empty(&[selected, d]).unwrap();
            kernels.gather_rows(&index_tensor, &kernels.from_f32(&x, &[t, d]).unwrap(), &mut y).unwrap();
            let mut truth = vec![f32::NAN; selected * d];
            rows::naive::gather(&index, &x, &mut truth, d);
            assert_eq!(kernels.to_f32(&y).unwrap(), truth, "gather {selected} of T={t}");

            let mut dx = kernels.empty(&[t, d]).unwrap();
            let dy_tensor = kernels.from_f32(&dy, &[selected, d]).unwrap();
            kernels.scatter_rows(&index_tensor, &dy_tensor, &mut dx).unwrap();
            let mut truth = vec![f32::NAN; t * d];
            rows::naive::scatter(&index, &dy, &mut truth, d);
            assert_eq!(kernels.to_f32(&dx).unwrap(), truth, "scatter {selected} to T={t}");
        }
    }
}
