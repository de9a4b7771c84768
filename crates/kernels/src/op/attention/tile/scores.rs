//! What happens to a few rows of scores between two products: the softmax and its derivative.
//!
//! Exponentials are powers of 2: scores come multiplied by log2 e, which costs nothing as it is part of the scale.

use std::ops::Range;

use super::{LANES, ROWS};
use crate::cpu::vector::Level;
use crate::cpu::vector::lanes::{self, fma};

/// Turns rows of scores into probabilities, tile after tile of keys (arXiv 1805.02867, algorithm 3).
pub(in super::super) struct Softmax<'a> {
    /// Scores times log2 e, `[rows, width]`; overwritten.
    pub(in super::super) scores: &'a mut [f32],
    pub(in super::super) width: usize,
    /// The columns that any row sees, in whole registers.
    pub(in super::super) columns: Range<usize>,
    /// For each row, the columns that it sees.
    pub(in super::super) visible: &'a [Range<usize>],
    /// With a soft cap, its value; the scores then come without the factor log2 e.
    pub(in super::super) soft_cap: Option<f32>,
    /// The largest score so far, of every row.
    pub(in super::super) largest: &'a mut [f32],
    /// The sum of `2^(score - largest)` so far, of every row, in one part for each lane: `[rows, LANES]`.
    pub(in super::super) total: &'a mut [f32],
    /// Out: what earlier sums have to be multiplied by, since `largest` may have grown.
    pub(in super::super) factors: &'a mut [f32; ROWS],
    /// Out: `2^(score - largest)` as words, 0 where the row does not see the column; `[rows, stride]`.
    pub(in super::super) words: &'a mut [f32],
    pub(in super::super) stride: usize,
}

/// Turns rows of transposed scores (a key, many queries) into probabilities and the scores' gradients.
pub(in super::super) struct Slopes<'a> {
    /// Scores times log2 e, `[rows, width]`; overwritten.
    pub(in super::super) scores: &'a mut [f32],
    /// `do . v`, `[rows, width]`; overwritten.
    pub(in super::super) products: &'a mut [f32],
    pub(in super::super) width: usize,
    /// The columns that any row is seen by, in whole registers.
    pub(in super::super) columns: Range<usize>,
    /// For each row, the columns that it is seen by.
    pub(in super::super) visible: &'a [Range<usize>],
    /// With a soft cap, its value; the scores then come without the factor log2 e.
    pub(in super::super) soft_cap: Option<f32>,
    /// `log2 e` times the log-sum-exp of every column.
    pub(in super::super) lse: &'a [f32],
    /// `do . o` of every column.
    pub(in super::super) delta: &'a [f32],
    /// Out: `p` as words, `[rows, stride]`, of `columns` alone.
    pub(in super::super) p: &'a mut [f32],
    /// Out: `p (products - delta)` as words, times the cap's slope; 0 outside `columns`.
    pub(in super::super) ds: &'a mut [f32],
    pub(in super::super) stride: usize,
}

/// How a register of results is stored.
pub(super) trait Words {
    /// Elements of a word.
    const PAIR: usize;

    /// `LANES / PAIR` words.
    fn put(values: &[f32; LANES], out: &mut [f32]);
}

/// `f32`.
pub(super) struct Single;

impl Words for Single {
    const PAIR: usize = 1;

    #[inline(always)]
    fn put(values: &[f32; LANES], out: &mut [f32]) {
        out[..LANES].copy_from_slice(values);
    }
}

/// 2 to the power of `x`, within 2 units in the last place for `-126 <= x <= 127` and bounded outside: 0 from -127
/// down; NaN of NaN. The polynomial is that of the Cephes library's `exp2f`.
#[inline(always)]
fn exp2<L: Level>(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    // Comparing this way round keeps a NaN.
    let x = if x > 127.0 { 127.0 } else { x };
    let x = if x < -127.0 { -127.0 } else { x };
    let shifted = x + ROUND;
    let r = x - (shifted - ROUND);
    let mut p = fma::<L>(r, 1.535_336_2e-4, 1.339_887_4e-3);
    p = fma::<L>(p, r, 9.618_437e-3);
    p = fma::<L>(p, r, 5.550_332_5e-2);
    p = fma::<L>(p, r, 2.402_265e-1);
    p = fma::<L>(p, r, 6.931_472e-1);
    p = fma::<L>(p, r, 1.0);
    // The bits of ROUND vanish in the shift; n = -127 gives the exponent of 0.
    p * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}

/// The larger of two numbers. A NaN may be lost: it makes NaN of its own power and so of the sum all the same.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// The largest of whole registers of scores.
#[inline(always)]
fn largest(scores: &[f32]) -> f32 {
    let mut parts = [f32::NEG_INFINITY; LANES];
    for scores in scores.as_chunks::<LANES>().0 {
        parts.iter_mut().zip(scores).for_each(|(part, &score)| *part = larger(*part, score));
    }
    lanes::combine(parts, larger)
}

/// Negative infinity, whose power is 0, in all columns but `visible`.
#[inline(always)]
fn hide(row: &mut [f32], columns: &Range<usize>, visible: &Range<usize>) {
    let within = |column: usize| column.clamp(columns.start, columns.end);
    row[columns.start..within(visible.start)].fill(f32::NEG_INFINITY);
    row[within(visible.end)..columns.end].fill(f32::NEG_INFINITY);
}

#[inline(always)]
pub(super) fn softmax<L: Level, W: Words>(x: &mut Softmax<'_>) {
    let (mut shifts, mut factors) = ([0.0f32; LANES], [0.0f32; LANES]);
    for (i, visible) in x.visible.iter().enumerate() {
        factors[i] = x.largest[i];
        if !visible.is_empty() {
            let row = &mut x.scores[i * x.width..][..x.width];
            if let Some(cap) = x.soft_cap {
                let (inverse, cap) = (cap.recip(), cap * std::f32::consts::LOG2_E);
                row[x.columns.clone()].iter_mut().for_each(|s| *s = cap * lanes::tanh::<L>(*s * inverse));
            }
            hide(row, &x.columns, visible);
            x.largest[i] = larger(factors[i], largest(&row[x.columns.clone()]));
        }
        shifts[i] = x.largest[i];
    }
    for (factor, shift) in factors.iter_mut().zip(&mut shifts) {
        // Scores that are all minus infinity are powers of 0 until a finite one comes.
        *shift = if *shift == f32::NEG_INFINITY { 0.0 } else { *shift };
        *factor = exp2::<L>(*factor - *shift);
    }
    x.factors.copy_from_slice(&factors[..ROWS]);
    let words = x.columns.start / W::PAIR..x.columns.end / W::PAIR;
    for (i, visible) in x.visible.iter().enumerate() {
        let out = &mut x.words[i * x.stride..][words.clone()];
        if visible.is_empty() {
            out.fill(0.0);
            continue;
        }
        let row = x.scores[i * x.width..][x.columns.clone()].as_chunks::<LANES>().0;
        let mut sums = [0.0f32; LANES];
        for (s, out) in row.iter().zip(out.chunks_exact_mut(LANES / W::PAIR)) {
            let mut p = [0.0f32; LANES];
            for lane in 0..LANES {
                p[lane] = exp2::<L>(s[lane] - shifts[i]);
                sums[lane] += p[lane];
            }
            W::put(&p, out);
        }
        for (total, sum) in x.total[i * LANES..][..LANES].iter_mut().zip(sums) {
            *total = fma::<L>(*total, factors[i], sum);
        }
    }
}

#[inline(always)]
pub(super) fn slopes<L: Level, W: Words>(x: &mut Slopes<'_>) {
    let words = x.columns.start / W::PAIR..x.columns.end / W::PAIR;
    let lse = x.lse[x.columns.clone()].as_chunks::<LANES>().0;
    let delta = x.delta[x.columns.clone()].as_chunks::<LANES>().0;
    for (i, visible) in x.visible.iter().enumerate() {
        let scores = &mut x.scores[i * x.width..][..x.width];
        let products = &mut x.products[i * x.width..][x.columns.clone()];
        if let Some(cap) = x.soft_cap {
            let (inverse, cap) = (cap.recip(), cap * std::f32::consts::LOG2_E);
            for ((s, dp), delta) in
                scores[x.columns.clone()].iter_mut().zip(&mut *products).zip(delta.as_flattened())
            {
                let t = lanes::tanh::<L>(*s * inverse);
                *s = cap * t;
                // So that the subtraction of delta below leaves the product with the cap's slope.
                *dp = fma::<L>(*dp - delta, 1.0 - t * t, *delta);
            }
        }
        hide(scores, &x.columns, visible);
        let scores = scores[x.columns.clone()].as_chunks::<LANES>().0;
        let products = products.as_chunks::<LANES>().0;
        let row = &mut x.ds[i * x.stride..][..x.stride];
        row[..words.start].fill(0.0);
        row[words.end..].fill(0.0);
        let ds_row = row[words.clone()].chunks_exact_mut(LANES / W::PAIR);
        let p_row = x.p[i * x.stride..][words.clone()].chunks_exact_mut(LANES / W::PAIR);
        for (((((s, dp), lse), delta), p_out), ds_out) in
            scores.iter().zip(products).zip(lse).zip(delta).zip(p_row).zip(ds_row)
        {
            let (mut p, mut ds) = ([0.0f32; LANES], [0.0f32; LANES]);
            for lane in 0..LANES {
                p[lane] = exp2::<L>(s[lane] - lse[lane]);
                ds[lane] = p[lane] * (dp[lane] - delta[lane]);
            }
            W::put(&p, p_out);
            W::put(&ds, ds_out);
        }
    }
}

crate::cpu::vector::vectorised! {
    /// [`softmax`] with words of `f32`.
    pub(super) fn softmax_f32<L>(x: &mut Softmax<'_>) {
        softmax::<L, Single>(x);
    }
}

crate::cpu::vector::vectorised! {
    /// [`slopes`] with words of `f32`.
    pub(super) fn slopes_f32<L>(x: &mut Slopes<'_>) {
        slopes::<L, Single>(x);
    }
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "vector instructions that the processor was asked for")]
pub(super) mod x86 {
    use std::arch::x86_64::*;

    use super::{LANES, Slopes, Softmax, Words, slopes, softmax};
    use crate::cpu::vector::Fused;

    /// Pairs of `bf16`, rounded by the processor.
    struct Pairs;

    impl Words for Pairs {
        const PAIR: usize = 2;

        #[inline(always)]
        fn put(values: &[f32; LANES], out: &mut [f32]) {
            let out: &mut [f32; LANES / 2] = out.as_mut_array().expect("half a register of pairs");
            // SAFETY: only the two functions below use this, which have the feature; both arrays are as long as
            // what is loaded and stored.
            unsafe {
                let rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(values.as_ptr()));
                _mm256_storeu_si256(
                    out.as_mut_ptr().cast(),
                    std::mem::transmute::<__m256bh, __m256i>(rounded),
                );
            }
        }
    }

    /// [`softmax`] with pairs of `bf16`.
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16")]
    pub(in super::super) fn softmax_bf16(x: &mut Softmax<'_>) {
        softmax::<Fused, Pairs>(x);
    }

    /// [`slopes`] with pairs of `bf16`.
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16")]
    pub(in super::super) fn slopes_bf16(x: &mut Slopes<'_>) {
        slopes::<Fused, Pairs>(x);
    }
}
