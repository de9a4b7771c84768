//! Operations on whole rows and ranges of columns: embedding, bias, rotation, selection, copies.

use lora_sb_kernels::op::{bias, columns, embedding, rope, rows};
use lora_sb_kernels::{RopeScaling, RopeTable};

use crate::common::{Draw, EPS, SOURCES, close, devices, magnitudes, sum_error, weight, widen};

/// (T, D): no rows, one row, one column, less and more than a block of work, nothing that divides a tile.
pub(crate) const SHAPES: [(usize, usize); 8] =
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

/// (T, H, E, U): whole heads, and heads of which a part turns.
const ROTATIONS: [(usize, usize, usize, usize); 10] = [
    (0, 1, 2, 2),
    (1, 1, 2, 2),
    (7, 3, 6, 6),
    (5, 2, 40, 40),
    (131, 4, 64, 64),
    (13, 31, 66, 66),
    (7, 3, 5, 2),
    (3, 1, 80, 32),
    (131, 4, 64, 48),
    (13, 31, 67, 66),
];

#[test]
fn rope_forward_and_back() {
    for kernels in devices() {
        for (t, heads, head_size, rotary_size) in ROTATIONS {
            let case = format!("rope T={t} H={heads} E={head_size} U={rotary_size}");
            let (width, half, places) = (heads * head_size, rotary_size / 2, 301);
            let sizes = (width, head_size, half);
            let mut draw = Draw::new((t * 31 + width) as u64);
            let (positions, values) = (draw.indices(t, places), draw.normal(t * width));
            let theta = 10_000.0f64;
            let scaling = RopeScaling::Default;
            let table = RopeTable::new(&*kernels, theta, &scaling, head_size, rotary_size, places).unwrap();
            // The angles as the table's definition rounds them: frequency and product to f32.
            let angles = (0..places).flat_map(|p| {
                let frequency = move |i: usize| theta.powf(-(2.0 * i as f64) / rotary_size as f64) as f32;
                (0..half).map(move |i| f64::from(p as f32 * frequency(i)))
            });
            let (sin, cos): (Vec<f64>, Vec<f64>) = angles.map(|angle| angle.sin_cos()).unzip();
            let positions_tensor = kernels.from_u32(&positions, &[t]).unwrap();
            // A turn keeps a pair's length, which bounds each of its terms; what does not turn stays as it is.
            let pair = |i: usize| {
                if i % head_size >= rotary_size {
                    return 0.0;
                }
                let (head, place) = (i / head_size * head_size, i % head_size % half);
                let (re, im) = (f64::from(values[head + place]), f64::from(values[head + half + place]));
                re.abs() + im.abs()
            };
            let magnitude: Vec<f64> = (0..t * width).map(pair).collect();
            let mut x = kernels.from_f32(&values, &[t, width]).unwrap();
            kernels.rope(&table, &positions_tensor, &mut x).unwrap();
            let mut truth = widen(&values);
            rope::naive::forward(&cos, &sin, &positions, &mut truth, sizes);
            close(&case, &kernels.to_f32(&x).unwrap(), &truth, 4.0 * EPS, &magnitude);

            let mut dx = kernels.from_f32(&values, &[t, width]).unwrap();
            kernels.rope_backward(&table, &positions_tensor, &mut dx).unwrap();
            let mut truth = widen(&values);
            rope::naive::backward(&cos, &sin, &positions, &mut truth, sizes);
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

#[test]
fn copied_rows_have_the_bits_of_the_specification() {
    for kernels in devices() {
        for (s, p, d, n) in
            [(0, 3, 5, 0), (3, 0, 5, 0), (1, 1, 1, 1), (3, 7, 5, 7), (5, 131, 257, 100), (400, 401, 64, 399)]
        {
            let mut draw = Draw::new((s * 31 + p) as u64);
            let (from, to) = (draw.indices(n, s), draw.distinct(n, p));
            let (x, before) = (draw.normal(s * d), draw.normal(p * d));
            let [from_tensor, to_tensor] = [&from, &to].map(|rows| kernels.from_u32(rows, &[n]).unwrap());
            let mut y = kernels.from_f32(&before, &[p, d]).unwrap();
            kernels
                .copy_rows(&from_tensor, &kernels.from_f32(&x, &[s, d]).unwrap(), &to_tensor, &mut y)
                .unwrap();
            let mut truth = before;
            rows::naive::copy(&from, &x, &to, &mut truth, d);
            assert_eq!(kernels.to_f32(&y).unwrap(), truth, "{n} rows of S={s} to P={p}");
        }
    }
}

#[test]
fn ranges_of_columns_have_the_bits_of_the_specification() {
    for kernels in devices() {
        for (t, whole) in SHAPES {
            for (from, part) in [(0, whole), (0, 1), (whole - 1, 1), (whole / 3, whole / 2), (whole, 0)] {
                let case = format!("columns {from}+{part} of T={t} W={whole}");
                let mut draw = Draw::new((t * 31 + whole) as u64);
                let (x, y) = (draw.normal(t * whole), draw.normal(t * part));
                let mut x_tensor = kernels.from_f32(&x, &[t, whole]).unwrap();
                let mut taken = kernels.empty(&[t, part]).unwrap();
                kernels.take_columns(&x_tensor, from, &mut taken).unwrap();
                kernels.put_columns(&kernels.from_f32(&y, &[t, part]).unwrap(), from, &mut x_tensor).unwrap();
                let (mut taken_true, mut put_true) = (vec![f32::NAN; t * part], x.clone());
                if part > 0 {
                    columns::naive::take(&x, from, &mut taken_true, whole, part);
                    columns::naive::put(&y, from, &mut put_true, whole, part);
                }
                assert_eq!(kernels.to_f32(&taken).unwrap(), taken_true, "take {case}");
                assert_eq!(kernels.to_f32(&x_tensor).unwrap(), put_true, "put {case}");
            }
        }
    }
}
