//! Dropout: the mask's definition, its statistics, and its independence of everything but rate, seed and index.

use lora_sb_kernels::op::dropout;
use lora_sb_kernels::{Accum, Cpu, Dropout, DropoutMask, Memory};

use crate::common::{Draw, EPS, activation, close_in, devices, magnitudes, type_triples, widen};

/// None, one, around the chunks of words and the blocks of work.
const LENGTHS: [usize; 8] = [0, 1, 2, 255, 257, 1009, 16_384, 50_021];

/// The definition, written out once more from the operation's documentation.
fn draw(seed: u64, index: u64) -> u32 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58476d1ce4e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d049bb133111eb);
        z ^ (z >> 31)
    };
    let word = mix(mix(seed).wrapping_add((index / 2 + 1).wrapping_mul(0x9e3779b97f4a7c15)));
    if index.is_multiple_of(2) { word as u32 } else { (word >> 32) as u32 }
}

/// Draws that every device must reproduce: the first two are the halves of SplitMix64's published first output
/// for the seed 0, the others come from integers without bounds in another language.
const GOLDEN: [(u64, u64, u32); 6] = [
    (0, 0, 0x7b1d_cdaf),
    (0, 1, 0xe220_a839),
    (1, 0, 0xddc2_d772),
    (42, 7, 0x0c4b_6b24),
    (u64::MAX, 1_000_000, 0x64ed_c7d1),
    (7, (1 << 33) + 1, 0x3190_435b),
];

/// A draw is kept at every rate up to `draw / 2^32` and at none above.
#[test]
fn golden_draws() {
    for (seed, index, expected) in GOLDEN {
        assert_eq!(draw(seed, index), expected, "seed {seed}, index {index}");
        let rate = (f64::from(expected) / 4_294_967_296.0) as f32;
        for (rate, kept) in [(rate * 0.999_999, true), (rate * 1.000_001, false)] {
            let mask = DropoutMask::new(rate, seed).unwrap();
            assert_eq!(mask.keeps(index as usize), kept, "seed {seed}, index {index}, rate {rate}");
        }
    }
}

#[test]
fn masked_elements() {
    for kernels in devices() {
        for length in LENGTHS {
            for (rate, seed) in [(0.0, 1), (0.05, 2), (0.5, u64::MAX), (1.0 - f32::EPSILON / 2.0, 0)] {
                let mut draws = Draw::new(length as u64);
                let [x, before] = [(); 2].map(|()| draws.normal(length));
                let (mask, scale) = (DropoutMask::new(rate, seed).unwrap(), 1.0 / (1.0 - f64::from(rate)));
                let threshold = (f64::from(rate) * 4_294_967_296.0).floor();
                for index in 0..length {
                    let kept = f64::from(draw(seed, index as u64)) >= threshold;
                    assert_eq!(mask.keeps(index), kept, "rate {rate}, seed {seed}, index {index}");
                }
                for ([x_type, y_type, _], accum) in
                    type_triples().zip([Accum::Replace, Accum::Add].into_iter().cycle())
                {
                    let (x_tensor, x) = activation(&*kernels, x_type, &x, &[length]);
                    let held = if accum == Accum::Add { before.clone() } else { vec![f32::NAN; length] };
                    let (mut y, held) = activation(&*kernels, y_type, &held, &[length]);
                    kernels.dropout(rate, seed, &x_tensor, accum, &mut y).unwrap();
                    let mut truth = widen(&held);
                    dropout::naive::dropout(mask, scale, &widen(&x), accum, &mut truth);
                    let mut sizes = magnitudes(&widen(&before));
                    dropout::naive::dropout(mask, scale, &magnitudes(&widen(&x)), Accum::Add, &mut sizes);
                    let case = format!("{length}, rate {rate}, {accum:?}, {x_type} to {y_type}");
                    close_in(y_type, &case, &kernels.to_f32(&y).unwrap(), &truth, 3.0 * EPS, &sizes);
                }
            }
        }
    }
}

#[test]
fn a_rate_of_zero_is_the_identity() {
    for kernels in devices() {
        let values = Draw::new(1).normal(1009);
        let mut y = kernels.empty(&[1009]).unwrap();
        kernels
            .dropout(0.0, 5, &kernels.from_f32(&values, &[1009]).unwrap(), Accum::Replace, &mut y)
            .unwrap();
        assert_eq!(kernels.to_f32(&y).unwrap(), values);
    }
}

/// The share of kept elements and the mean lie within five standard deviations, for every seed.
#[test]
fn kept_share_and_expectation() {
    for kernels in devices() {
        let length = 200_003;
        let ones = kernels.from_f32(&vec![1.0; length], &[length]).unwrap();
        let mut y = kernels.empty(&[length]).unwrap();
        for rate in [0.01f32, 0.1, 0.5, 0.9] {
            for seed in [0, 1, 2, 1 << 63, u64::MAX] {
                kernels.dropout(rate, seed, &ones, Accum::Replace, &mut y).unwrap();
                let y = kernels.to_f32(&y).unwrap();
                let kept = y.iter().filter(|&&y| y != 0.0).count() as f64;
                let (mean, rate) = (widen(&y).iter().sum::<f64>() / length as f64, f64::from(rate));
                let deviation = (rate * (1.0 - rate) / length as f64).sqrt();
                let share = kept / length as f64;
                assert!((share - (1.0 - rate)).abs() < 5.0 * deviation, "rate {rate}, seed {seed}: {share}");
                assert!((mean - 1.0).abs() < 5.0 * deviation / (1.0 - rate) + EPS, "rate {rate}: {mean}");
            }
        }
    }
}

/// Neighbours, whole rows and neighbouring seeds share no more fates than chance allows.
#[test]
fn fates_are_independent() {
    let (length, rate) = (1usize << 16, 0.5);
    let kept = |seed: u64| {
        let mask = DropoutMask::new(rate, seed).unwrap();
        (0..length + 4096).map(|index| mask.keeps(index)).collect::<Vec<bool>>()
    };
    let same = |a: &[bool], b: &[bool]| {
        let equal = a.iter().zip(b).filter(|(a, b)| a == b).count() as f64;
        (equal - 0.5 * a.len() as f64) / (0.25 * a.len() as f64).sqrt()
    };
    for seed in [0, 1, 7_000_000_007, u64::MAX] {
        let mask = kept(seed);
        for lag in [1, 2, 3, 64, 127, 768, 4096] {
            let score = same(&mask[..length], &mask[lag..][..length]);
            assert!(score.abs() < 5.0, "seed {seed}, lag {lag}: {score} standard deviations");
        }
        for other in [seed.wrapping_add(1), seed ^ (1 << 40), seed.wrapping_add(0x9e37_79b9_7f4a_7c15)] {
            let other = kept(other);
            for lag in [0, 1, 2] {
                let score = same(&mask[..length], &other[lag..][..length]);
                assert!(score.abs() < 5.0, "seed {seed}, another's lag {lag}: {score}");
            }
        }
    }
}

/// Forward and backward drop the same elements, on any number of threads and under any shape.
#[test]
fn one_mask_for_all_threads_and_both_directions() {
    let (rows, width, rate, seed) = (131, 389, 0.3, 42);
    let mut draws = Draw::new(3);
    let (x, dy) = (draws.normal(rows * width), draws.normal(rows * width));
    let masked = |threads: usize, values: &[f32], shape: &[usize]| {
        let cpu = Cpu::new(threads).unwrap();
        let (x, mut y) = (cpu.from_f32(values, shape).unwrap(), cpu.empty(shape).unwrap());
        cpu.dropout(rate, seed, &x, Accum::Replace, &mut y).unwrap();
        cpu.to_f32(&y).unwrap()
    };
    let (y, dx) = (masked(1, &x, &[rows, width]), masked(1, &dy, &[rows, width]));
    assert!(y.iter().zip(&dx).all(|(y, dx)| (*y == 0.0) == (*dx == 0.0)), "one mask both ways");
    for threads in [2, 3, 5] {
        assert_eq!(masked(threads, &x, &[rows * width]), y, "{threads} threads");
    }
}

#[test]
fn dropped_elements_are_zero_whatever_they_were() {
    for kernels in devices() {
        let x = kernels.from_f32(&[f32::NAN; 300], &[300]).unwrap();
        let mut y = kernels.empty(&[300]).unwrap();
        kernels.dropout(0.5, 9, &x, Accum::Replace, &mut y).unwrap();
        let mask = DropoutMask::new(0.5, 9).unwrap();
        for (index, y) in kernels.to_f32(&y).unwrap().into_iter().enumerate() {
            assert!(if mask.keeps(index) { y.is_nan() } else { y == 0.0 }, "{index}: {y}");
        }
    }
}
