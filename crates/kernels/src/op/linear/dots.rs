//! Dot products of a weight's rows with a few tokens.
//!
//! What is added for a row and a token is the same whatever rows and tokens stand beside them.

use half::bf16;

use crate::cpu::vector::lanes::{self, Element};
use crate::cpu::vector::vectorised;

/// `sums[n, t] += w[n] . x[t]`, in `f32`; w `[N, k]`, x `[T, k]`, sums `[N, T]`.
pub(super) fn add<W: Element>(w: &[W], x: &[f32], k: usize, sums: &mut [f32]) {
    widened(w, x, k, sums);
}

/// The same of `bf16`: pairs of products added in `f32`, in one instruction where the processor has it.
pub(super) fn add_bf16(w: &[bf16], x: &[bf16], k: usize, sums: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if crate::cpu::gemm::has_bf16_dot_products() {
        return x86::add(w, x, k, sums);
    }
    widened(w, x, k, sums);
}

vectorised! {
    /// Both sides are widened as they are read.
    fn widened<L, W: Element, X: Element>(w: &[W], x: &[X], k: usize, sums: &mut [f32]) {
        let tokens = x.len() / k;
        for (w, sums) in w.chunks_exact(k).zip(sums.chunks_exact_mut(tokens)) {
            for (x, sum) in x.chunks_exact(k).zip(sums) {
                *sum += lanes::dot_of::<L, W, X>(w, x);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "instructions that the processor was asked for, and loads through pointers")]
mod x86 {
    use std::arch::x86_64::*;

    use half::bf16;

    /// Elements of one register.
    const WIDTH: usize = 32;
    /// Independent chains of additions, enough to hide the latency of one while memory delivers.
    const CHAINS: usize = 2;

    /// [`super::add_bf16`] on a processor that has AVX-512BF16.
    pub(super) fn add(w: &[bf16], x: &[bf16], k: usize, sums: &mut [f32]) {
        // SAFETY: the caller has asked the processor for these instructions.
        unsafe {
            match x.len() / k {
                1 => rows::<1>(w, x, k, sums),
                2 => rows::<2>(w, x, k, sums),
                3 => rows::<3>(w, x, k, sums),
                4 => rows::<4>(w, x, k, sums),
                tokens => unreachable!("{tokens} tokens are not few"),
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn rows<const T: usize>(w: &[bf16], x: &[bf16], k: usize, sums: &mut [f32]) {
        assert_eq!(x.len(), T * k);
        for (w, sums) in w.chunks_exact(k).zip(sums.as_chunks_mut::<T>().0) {
            for (sum, found) in sums.iter_mut().zip(row::<T>(w, x)) {
                *sum += found;
            }
        }
    }

    /// `w . x[t]` of every token; w `[k]`, x `[T, k]`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    #[inline]
    fn row<const T: usize>(w: &[bf16], x: &[bf16]) -> [f32; T] {
        let k = w.len();
        assert_eq!(x.len(), T * k);
        let mut sums = [[_mm512_setzero_ps(); CHAINS]; T];
        let whole = k / (CHAINS * WIDTH) * (CHAINS * WIDTH);
        for start in (0..whole).step_by(CHAINS * WIDTH) {
            for chain in 0..CHAINS {
                let at = start + chain * WIDTH;
                // SAFETY: a register's elements from `at` on are inside the row and inside each token's.
                unsafe {
                    let w = pairs(_mm512_loadu_si512(w.as_ptr().add(at).cast()));
                    for (token, sums) in sums.iter_mut().enumerate() {
                        let x = pairs(_mm512_loadu_si512(x.as_ptr().add(token * k + at).cast()));
                        sums[chain] = _mm512_dpbf16_ps(sums[chain], w, x);
                    }
                }
            }
        }
        for at in (whole..k).step_by(WIDTH) {
            let mask = u32::MAX >> (WIDTH - (k - at).min(WIDTH));
            // SAFETY: the mask leaves only elements inside the row and inside each token's.
            unsafe {
                let w = pairs(_mm512_maskz_loadu_epi16(mask, w.as_ptr().add(at).cast()));
                for (token, sums) in sums.iter_mut().enumerate() {
                    let x = pairs(_mm512_maskz_loadu_epi16(mask, x.as_ptr().add(token * k + at).cast()));
                    sums[0] = _mm512_dpbf16_ps(sums[0], w, x);
                }
            }
        }
        sums.map(|[first, second]| _mm512_reduce_add_ps(_mm512_add_ps(first, second)))
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    #[inline]
    fn pairs(words: __m512i) -> __m512bh {
        // SAFETY: a register of 16 words and one of 32 bf16 are the same bits.
        unsafe { std::mem::transmute::<__m512i, __m512bh>(words) }
    }
}
