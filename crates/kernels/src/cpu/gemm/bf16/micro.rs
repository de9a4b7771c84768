//! The innermost loop: one tile of sums from a panel of A and a panel of B, both in pairs of `bf16`.

/// Elements of the largest tile.
pub(super) const TILE: usize = 14 * 32;

/// Rows of the largest tile.
pub(super) const TILE_ROWS: usize = 14;

/// A part of a sum: a panel of A `[pairs, rows]` and a panel of B `[pairs, columns]`. A pair is two neighbours along the
/// sum, the first in the lower half of the word.
#[derive(Clone, Copy)]
pub(super) struct Segment {
    pub(super) pairs: usize,
    pub(super) a: *const u32,
    pub(super) b: *const u32,
}

/// `tile = sum over segments and their pairs p of a[p, i] . b[p, j]`; the tile `[rows, columns]`.
type Run = unsafe fn(&[Segment], &mut [f32; TILE]);

/// A micro-kernel and the size of its tile.
#[derive(Clone, Copy)]
pub(super) struct Micro {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) run: Run,
}

impl Micro {
    /// The best one that this processor can run.
    pub(super) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        if super::super::has_bf16_dot_products() {
            return Micro { rows: TILE_ROWS, columns: 32, run: x86::avx512 };
        }
        WIDENED
    }
}

/// For processors without such products: the pairs are widened to `f32`.
pub(super) const WIDENED: Micro = Micro { rows: 6, columns: 16, run: widened };

/// # Safety
/// Each segment's `a` must be valid for `6 pairs` reads and its `b` for `16 pairs`.
#[expect(unsafe_code, reason = "the contract of a micro-kernel is in pointers")]
unsafe fn widened(segments: &[Segment], tile: &mut [f32; TILE]) {
    let tile = &mut tile[..6 * 16];
    tile.fill(0.0);
    for &Segment { pairs, a, b } in segments {
        // SAFETY: the caller vouches for the ranges.
        let (a, b) =
            unsafe { (std::slice::from_raw_parts(a, 6 * pairs), std::slice::from_raw_parts(b, 16 * pairs)) };
        widened_sums(a, b, tile);
    }
}

crate::cpu::vector::vectorised! {
    /// The same on the slices of a segment, added to the tile.
    fn widened_sums<L>(a: &[u32], b: &[u32], tile: &mut [f32]) {
        use crate::cpu::vector::lanes::fma;
        let mut sums = [[0.0f32; 16]; 6];
        sums.as_flattened_mut().copy_from_slice(tile);
        let halves = |word: u32| (f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000));
        for (a, b) in a.chunks_exact(6).zip(b.chunks_exact(16)) {
            for (sums, &a) in sums.iter_mut().zip(a) {
                let (a0, a1) = halves(a);
                for (sum, &b) in sums.iter_mut().zip(b) {
                    let (b0, b1) = halves(b);
                    *sum = fma::<L>(a0, b0, fma::<L>(a1, b1, *sum));
                }
            }
        }
        tile.copy_from_slice(sums.as_flattened());
    }
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "vector loads and stores through pointers")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Segment, TILE};

    /// 14 x 32: 28 accumulators, two registers of B and one broadcast pair of A fill the register file.
    ///
    /// # Safety
    /// The processor must have AVX-512F and AVX-512BF16; each segment's `a` must be valid for `14 pairs` reads, its `b`
    /// for `32 pairs`.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn avx512(segments: &[Segment], tile: &mut [f32; TILE]) {
        // SAFETY: every access is inside the ranges the caller vouches for, the tile holds 14 rows of 32;
        // prefetches cannot fault. A register of 16 words and one of 32 bf16 are the same bits.
        unsafe {
            let pair = |word: __m512i| std::mem::transmute::<__m512i, __m512bh>(word);
            let mut sums = [[_mm512_setzero_ps(); 2]; 14];
            for &Segment { pairs, mut a, mut b } in segments {
                for _ in 0..pairs {
                    _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(8 * 32).cast());
                    _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(8 * 32 + 16).cast());
                    let b0 = pair(_mm512_loadu_si512(b.cast()));
                    let b1 = pair(_mm512_loadu_si512(b.add(16).cast()));
                    for (i, sums) in sums.iter_mut().enumerate() {
                        let a = pair(_mm512_set1_epi32(*a.add(i).cast()));
                        sums[0] = _mm512_dpbf16_ps(sums[0], a, b0);
                        sums[1] = _mm512_dpbf16_ps(sums[1], a, b1);
                    }
                    a = a.add(14);
                    b = b.add(32);
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                _mm512_storeu_ps(tile.as_mut_ptr().add(32 * i), sums[0]);
                _mm512_storeu_ps(tile.as_mut_ptr().add(32 * i + 16), sums[1]);
            }
        }
    }
}

#[cfg(test)]
#[expect(unsafe_code, reason = "micro-kernels are called through pointers")]
mod tests {
    use half::bf16;

    use super::*;

    /// Every micro-kernel against plain sums, whichever of them this processor would choose.
    #[test]
    fn every_kernel_of_this_processor_sums_its_panels() {
        for micro in [WIDENED, Micro::detect()] {
            let pairs = 37;
            let value = |i: usize, modulus: usize| (i % modulus) as f32 - (modulus / 2) as f32;
            let words = |count: usize, modulus: usize| -> Vec<u32> {
                let half = |i: usize| u32::from(bf16::from_f32(value(i, modulus)).to_bits());
                (0..count).map(|i| half(2 * i) | half(2 * i + 1) << 16).collect()
            };
            let (a, b) = (words(pairs * micro.rows, 11), words(pairs * micro.columns, 7));
            let mut tile = [f32::NAN; TILE];
            let first = 20;
            let halves = [
                Segment { pairs: first, a: a.as_ptr(), b: b.as_ptr() },
                Segment {
                    pairs: pairs - first,
                    a: a[first * micro.rows..].as_ptr(),
                    b: b[first * micro.columns..].as_ptr(),
                },
            ];
            // SAFETY: the panels have the sizes that the kernel's contract asks for.
            unsafe { (micro.run)(&halves, &mut tile) };
            for (i, row) in tile.chunks_exact(micro.columns).take(micro.rows).enumerate() {
                for (j, &found) in row.iter().enumerate() {
                    let dot = |p: usize| {
                        let (a, b) = (2 * (p * micro.rows + i), 2 * (p * micro.columns + j));
                        value(a, 11) * value(b, 7) + value(a + 1, 11) * value(b + 1, 7)
                    };
                    assert_eq!(found, (0..pairs).map(dot).sum::<f32>());
                }
            }
        }
    }
}
