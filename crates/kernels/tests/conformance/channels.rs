//! Factors of channels and the sums over them.

use lora_sb_kernels::op::channel;
use lora_sb_kernels::{Accum, DType};

use crate::common::{
    DTYPES, Draw, EPS, SOURCES, Source, activation, close, close_in, devices, magnitudes, sum_error,
    type_triples, weight, widen,
};

/// (T, N) or (N, K): nothing, one row, one column, around the blocks of work and of a register, whole fours over several
/// blocks, and so many rows that the sums of their blocks are themselves added up in blocks of blocks.
const SHAPES: [(usize, usize); 11] = [
    (0, 5),
    (1, 1),
    (1, 1009),
    (1009, 1),
    (7, 16),
    (31, 257),
    (131, 521),
    (3, 20_011),
    (2003, 17),
    (260, 132),
    (16_500, 3),
];

/// What an output holds before; `Replace` must not read it.
fn before(accum: Accum) -> f32 {
    match accum {
        Accum::Replace => f32::NAN,
        Accum::Add => 0.75,
    }
}

#[test]
fn scaled_channels() {
    for kernels in devices() {
        for (t, n) in SHAPES {
            for (source, dtype) in SOURCES.into_iter().flat_map(|source| DTYPES.map(|dtype| (source, dtype)))
            {
                let mut draw = Draw::new((t * 31 + n) as u64);
                let (c_tensor, c) = weight(&*kernels, source, &draw.normal(n), &[n]);
                let (mut y_tensor, y) = activation(&*kernels, dtype, &draw.normal(t * n), &[t, n]);
                kernels.scale_channels(&c_tensor, &mut y_tensor).unwrap();
                let mut truth = widen(&y);
                channel::naive::scale(&widen(&c), &mut truth);
                let (found, sizes) = (kernels.to_f32(&y_tensor).unwrap(), magnitudes(&truth));
                close_in(dtype, &format!("T={t} N={n} {source:?} {dtype}"), &found, &truth, EPS, &sizes);
            }
        }
    }
}

#[test]
fn products_of_channels() {
    for kernels in devices() {
        for (t, n) in SHAPES {
            for ([a_type, b_type, _], accum) in
                type_triples().zip([Accum::Replace, Accum::Add].into_iter().cycle())
            {
                let mut draw = Draw::new((t * 37 + n) as u64);
                let (a_tensor, a) = activation(&*kernels, a_type, &draw.normal(t * n), &[t, n]);
                let (b_tensor, b) = activation(&*kernels, b_type, &draw.normal(t * n), &[t, n]);
                let mut out = kernels.from_f32(&vec![before(accum); n], &[n]).unwrap();
                kernels.channel_products(&a_tensor, &b_tensor, accum, &mut out).unwrap();
                let (a, b) = (widen(&a), widen(&b));
                let mut truth = vec![f64::from(before(accum)); n];
                channel::naive::channel_products(&a, &b, accum, &mut truth);
                let mut sizes = vec![0.75; n];
                channel::naive::channel_products(&magnitudes(&a), &magnitudes(&b), Accum::Add, &mut sizes);
                // A channel's terms are added one after another.
                let error = sum_error(t).max(EPS * t as f64 / 4.0);
                let found = kernels.to_f32(&out).unwrap();
                let case = format!("T={t} N={n} {a_type} {b_type} {accum:?}");
                close(&case, &found, &truth, error, &sizes);
            }
        }
    }
}

#[test]
fn products_of_rows() {
    let pairs = [(Source::Owned, Source::Owned), (SOURCES[2], Source::Owned), (SOURCES[6], SOURCES[5])];
    for kernels in devices() {
        for (n, k) in SHAPES {
            for ((a_source, b_source), accum, alpha) in pairs
                .into_iter()
                .flat_map(|sources| [(sources, Accum::Replace, 1.0f32), (sources, Accum::Add, -0.3)])
            {
                let mut draw = Draw::new((n * 41 + k) as u64);
                let (a_tensor, a) = weight(&*kernels, a_source, &draw.normal(n * k), &[n, k]);
                let (b_tensor, b) = weight(&*kernels, b_source, &draw.normal(n * k), &[n, k]);
                let mut out = kernels.from_f32(&vec![before(accum); n], &[n]).unwrap();
                kernels.row_products(&a_tensor, &b_tensor, alpha, accum, &mut out).unwrap();
                let (a, b, alpha) = (widen(&a), widen(&b), f64::from(alpha));
                let mut truth = vec![f64::from(before(accum)); n];
                channel::naive::row_products(&a, &b, alpha, accum, &mut truth);
                let (a, b, mut sizes) = (magnitudes(&a), magnitudes(&b), vec![0.75; n]);
                channel::naive::row_products(&a, &b, alpha.abs(), Accum::Add, &mut sizes);
                let found = kernels.to_f32(&out).unwrap();
                let case = format!("N={n} K={k} {a_source:?} {b_source:?} {accum:?}");
                close(&case, &found, &truth, sum_error(k), &sizes);
            }
        }
    }
}

/// A row of no elements has the product 0, which replaces what was there.
#[test]
fn empty_sums_are_zero() {
    for kernels in devices() {
        let filled = || kernels.from_f32(&[f32::NAN; 3], &[3]).unwrap();
        let (none, mut out) = (kernels.zeros(&[3, 0]).unwrap(), filled());
        kernels.row_products(&none, &none, 2.0, Accum::Replace, &mut out).unwrap();
        assert_eq!(kernels.to_f32(&out).unwrap(), [0.0; 3]);
        let (none, mut out) = (kernels.zeros(&[0, 3]).unwrap(), filled());
        kernels.channel_products(&none, &none, Accum::Replace, &mut out).unwrap();
        assert_eq!(kernels.to_f32(&out).unwrap(), [0.0; 3]);
        let (c, _) = weight(&*kernels, Source::File(DType::F16), &[], &[0]);
        kernels.scale_channels(&c, &mut kernels.zeros(&[3, 0]).unwrap()).unwrap();
    }
}
