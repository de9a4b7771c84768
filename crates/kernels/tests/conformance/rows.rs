//! Operations on whole rows and ranges of columns: embedding, bias, rotation, selection, copies.

use lora_sb_kernels::op::{bias, columns, embedding, rope, rows};
use lora_sb_kernels::{DType, RopeScaling, RopeTable, Tensor};

use crate::common::{
    BF16_EPS, DTYPES, Draw, EPS, SOURCES, activation, close, close_in, devices, magnitudes, rounded,
    sum_error, type_triples, weight, widen,
};

/// (T, D): no rows, one row, one column, less and more than a block of work, nothing that divides a tile.
pub(crate) const SHAPES: [(usize, usize); 8] =
    [(0, 3), (1, 1), (1, 517), (7, 1), (5, 33), (131, 257), (3, 20_011), (400, 64)];

#[test]
fn embedding_and_its_gradient() {
    for kernels in devices() {
        for ((t, d), dtype) in SHAPES.into_iter().flat_map(|shape| DTYPES.map(|dtype| (shape, dtype))) {
            let (v, mut draw) = (11, Draw::new((t * 31 + d) as u64));
            let (ids, before) = (draw.indices(t, v), draw.normal(v * d));
            let ids_tensor = kernels.from_u32(&ids, &[t]).unwrap();
            for source in SOURCES {
                let (table, values) = weight(&*kernels, source, &before, &[v, d]);
                let mut x = kernels.empty_of(dtype, &[t, d]).unwrap();
                kernels.embedding(&ids_tensor, &table, &mut x).unwrap();
                let mut truth = vec![f32::NAN; t * d];
                embedding::naive::forward(&ids, &values, &mut truth, d);
                let truth = rounded(dtype, &truth);
                assert_eq!(kernels.to_f32(&x).unwrap(), truth, "T={t} D={d} {source:?} to {dtype}");
            }
            let mut dtable = kernels.from_f32(&before, &[v, d]).unwrap();
            let (dx_tensor, dx) = activation(&*kernels, dtype, &draw.normal(t * d), &[t, d]);
            kernels.embedding_gradient(&ids_tensor, &dx_tensor, &mut dtable).unwrap();
            // Added in the order of t, as the specification promises: the same bits.
            let mut truth = before;
            embedding::naive::backward(&ids, &dx, &mut truth, d);
            assert_eq!(kernels.to_f32(&dtable).unwrap(), truth, "gradient T={t} D={d} {dtype}");
        }
    }
}

#[test]
fn bias_and_its_gradient() {
    for kernels in devices() {
        let shapes = SHAPES.into_iter().chain([(260, 132)]);
        for ((t, n), dtype) in shapes.flat_map(|shape| DTYPES.map(|dtype| (shape, dtype))) {
            let mut draw = Draw::new((t * 31 + n) as u64);
            let [b, values, before] = [draw.normal(n), draw.normal(t * n), draw.normal(n)];
            for source in SOURCES {
                let (b, b_values) = weight(&*kernels, source, &b, &[n]);
                let (mut y, mut truth) = activation(&*kernels, dtype, &values, &[t, n]);
                kernels.bias(&b, &mut y).unwrap();
                bias::naive::forward(&b_values, &mut truth);
                let truth = rounded(dtype, &truth);
                assert_eq!(kernels.to_f32(&y).unwrap(), truth, "T={t} N={n} {source:?} to {dtype}");
            }
            let (dy_tensor, dy) = activation(&*kernels, dtype, &values, &[t, n]);
            let mut db = kernels.from_f32(&before, &[n]).unwrap();
            kernels.bias_gradient(&dy_tensor, &mut db).unwrap();
            let (mut truth, mut magnitude) = (widen(&before), magnitudes(&widen(&before)));
            bias::naive::backward(&widen(&dy), &mut truth);
            bias::naive::backward(&magnitudes(&widen(&dy)), &mut magnitude);
            let found = kernels.to_f32(&db).unwrap();
            close(&format!("db T={t} N={n} {dtype}"), &found, &truth, sum_error(t), &magnitude);
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
        for ((t, heads, head_size, rotary_size), dtype) in
            ROTATIONS.into_iter().flat_map(|rotation| DTYPES.map(|dtype| (rotation, dtype)))
        {
            let case = format!("rope T={t} H={heads} E={head_size} U={rotary_size} {dtype}");
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
            let operand = || activation(&*kernels, dtype, &values, &[t, width]);
            let (mut x, values) = operand();
            let values = widen(&values);
            // A turn keeps a pair's length, which bounds each of its terms; what does not turn stays as it is.
            let pair = |i: usize| {
                if i % head_size >= rotary_size {
                    return 0.0;
                }
                let (head, place) = (i / head_size * head_size, i % head_size % half);
                values[head + place].abs() + values[head + half + place].abs()
            };
            let magnitude: Vec<f64> = (0..t * width).map(pair).collect();
            let check = |case: &str, tensor: &Tensor, truth: &[f64], relative: f64| {
                close_in(dtype, case, &kernels.to_f32(tensor).unwrap(), truth, relative, &magnitude);
            };
            kernels.rope(&table, &positions_tensor, &mut x).unwrap();
            let mut truth = values.clone();
            rope::naive::forward(&cos, &sin, &positions, &mut truth, sizes);
            check(&case, &x, &truth, 4.0 * EPS);

            let (mut dx, _) = operand();
            kernels.rope_backward(&table, &positions_tensor, &mut dx).unwrap();
            let mut truth = values.clone();
            rope::naive::backward(&cos, &sin, &positions, &mut truth, sizes);
            check(&format!("{case}, back"), &dx, &truth, 4.0 * EPS);

            kernels.rope_backward(&table, &positions_tensor, &mut x).unwrap();
            // What was stored between the two turns may be off by a rounding of each element of the pair.
            let between = if dtype == DType::Bf16 { 2.0 * BF16_EPS } else { 0.0 };
            check(&format!("{case}, there and back"), &x, &values, 12.0 * EPS + between);
        }
    }
}

#[test]
fn selected_rows_have_the_bits_of_the_specification() {
    for kernels in devices() {
        for ((t, d, selected), [x_type, y_type, dx_type]) in
            [(0, 3, 0), (5, 3, 0), (1, 1, 1), (7, 5, 3), (131, 257, 100), (400, 64, 400)]
                .into_iter()
                .flat_map(|shape| type_triples().map(move |types| (shape, types)))
        {
            let mut draw = Draw::new((t * 31 + d) as u64);
            let index = draw.distinct(selected, t);
            let (x_tensor, x) = activation(&*kernels, x_type, &draw.normal(t * d), &[t, d]);
            let index_tensor = kernels.from_u32(&index, &[selected]).unwrap();
            let mut y = kernels.empty_of(y_type, &[selected, d]).unwrap();
            kernels.gather_rows(&index_tensor, &x_tensor, &mut y).unwrap();
            let mut truth = vec![f32::NAN; selected * d];
            rows::naive::gather(&index, &x, &mut truth, d);
            let truth = rounded(y_type, &truth);
            assert_eq!(
                kernels.to_f32(&y).unwrap(),
                truth,
                "gather {selected} of T={t}, {x_type} to {y_type}"
            );

            let mut dx = kernels.empty_of(dx_type, &[t, d]).unwrap();
            let (dy_tensor, dy) = activation(&*kernels, y_type, &draw.normal(selected * d), &[selected, d]);
            kernels.scatter_rows(&index_tensor, &dy_tensor, &mut dx).unwrap();
            let mut truth = vec![f32::NAN; t * d];
            rows::naive::scatter(&index, &dy, &mut truth, d);
            let truth = rounded(dx_type, &truth);
            assert_eq!(
                kernels.to_f32(&dx).unwrap(),
                truth,
                "scatter {selected} to T={t}, {y_type} to {dx_type}"
            );
        }
    }
}

/// The types of an operand that is read and of one that is written.
fn type_pairs() -> [(DType, DType); 4] {
    let [f32, bf16] = DTYPES;
    [(f32, f32), (f32, bf16), (bf16, f32), (bf16, bf16)]
}

#[test]
fn copied_rows_have_the_bits_of_the_specification() {
    for kernels in devices() {
        for ((s, p, d, n), (x_type, y_type)) in
            [(0, 3, 5, 0), (3, 0, 5, 0), (1, 1, 1, 1), (3, 7, 5, 7), (5, 131, 257, 100), (400, 401, 64, 399)]
                .into_iter()
                .flat_map(|shape| type_pairs().map(|types| (shape, types)))
        {
            let mut draw = Draw::new((s * 31 + p) as u64);
            let (from, to) = (draw.indices(n, s), draw.distinct(n, p));
            let (x_tensor, x) = activation(&*kernels, x_type, &draw.normal(s * d), &[s, d]);
            let (mut y, mut truth) = activation(&*kernels, y_type, &draw.normal(p * d), &[p, d]);
            let [from_tensor, to_tensor] = [&from, &to].map(|rows| kernels.from_u32(rows, &[n]).unwrap());
            kernels.copy_rows(&from_tensor, &x_tensor, &to_tensor, &mut y).unwrap();
            rows::naive::copy(&from, &x, &to, &mut truth, d);
            let truth = rounded(y_type, &truth);
            assert_eq!(
                kernels.to_f32(&y).unwrap(),
                truth,
                "{n} rows of S={s} to P={p}, {x_type} to {y_type}"
            );
        }
    }
}

#[test]
fn ranges_of_columns_have_the_bits_of_the_specification() {
    for kernels in devices() {
        for ((t, whole), (x_type, y_type)) in
            SHAPES.into_iter().flat_map(|shape| type_pairs().map(|types| (shape, types)))
        {
            for (from, part) in [(0, whole), (0, 1), (whole - 1, 1), (whole / 3, whole / 2), (whole, 0)] {
                let case = format!("columns {from}+{part} of T={t} W={whole}, {x_type} and {y_type}");
                let mut draw = Draw::new((t * 31 + whole) as u64);
                let (mut x_tensor, x) = activation(&*kernels, x_type, &draw.normal(t * whole), &[t, whole]);
                let (y_tensor, y) = activation(&*kernels, y_type, &draw.normal(t * part), &[t, part]);
                let mut taken = kernels.empty_of(y_type, &[t, part]).unwrap();
                kernels.take_columns(&x_tensor, from, &mut taken).unwrap();
                kernels.put_columns(&y_tensor, from, &mut x_tensor).unwrap();
                let (mut taken_true, mut put_true) = (vec![f32::NAN; t * part], x.clone());
                if part > 0 {
                    columns::naive::take(&x, from, &mut taken_true, whole, part);
                    columns::naive::put(&y, from, &mut put_true, whole, part);
                }
                assert_eq!(kernels.to_f32(&taken).unwrap(), rounded(y_type, &taken_true), "take {case}");
                assert_eq!(kernels.to_f32(&x_tensor).unwrap(), rounded(x_type, &put_true), "put {case}");
            }
        }
    }
}
