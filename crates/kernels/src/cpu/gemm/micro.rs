//! The innermost loop: one tile of C from a panel of A and a panel of B.

use crate::Accum;

/// Elements of the largest tile.
pub(super) const TILE: usize = 14 * 32;

/// `tile (+)= alpha sum_k a[k, i] b[k, j]`: depth, a `[depth, rows]`, b `[depth, columns]`, alpha, accum,
/// the tile's first element, and the distance of its rows.
type Run = unsafe fn(usize, *const f32, *const f32, f32, Accum, *mut f32, usize);

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
        {
            if is_x86_feature_detected!("avx512f") {
                return Micro { rows: 14, columns: 32, run: x86::avx512 };
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Micro { rows: 6, columns: 16, run: x86::avx2 };
            }
        }
        Micro { rows: 8, columns: 8, run: portable }
    }
}

/// Eight rows of eight columns in plain code, which compilers turn into vector code of any width.
///
/// # Safety
/// `a` and `b` must be valid for `8 depth` reads, `c` for a tile of 8 x 8 with rows `stride` apart.
#[expect(unsafe_code, reason = "the contract of a micro-kernel is in pointers")]
unsafe fn portable(
    depth: usize,
    a: *const f32,
    b: *const f32,
    alpha: f32,
    accum: Accum,
    c: *mut f32,
    stride: usize,
) {
    let mut sums = [[0.0f32; 8]; 8];
    // SAFETY: the caller vouches for 8 depth values behind each pointer.
    let (a, b) =
        unsafe { (std::slice::from_raw_parts(a, 8 * depth), std::slice::from_raw_parts(b, 8 * depth)) };
    for (a, b) in a.chunks_exact(8).zip(b.chunks_exact(8)) {
        for (sums, &a) in sums.iter_mut().zip(a) {
            for (sum, &b) in sums.iter_mut().zip(b) {
                *sum += a * b;
            }
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        // SAFETY: the caller vouches for a row of 8 elements at every stride.
        let out = unsafe { std::slice::from_raw_parts_mut(c.add(i * stride), 8) };
        for (out, &sum) in out.iter_mut().zip(sums) {
            *out = match accum {
                Accum::Replace => alpha * sum,
                Accum::Add => *out + alpha * sum,
            };
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "vector loads and stores through pointers")]
mod x86 {
    use std::arch::x86_64::*;

    use crate::Accum;

    /// 14 x 32: 28 accumulators, two registers of B and one broadcast element of A fill the register file.
    ///
    /// # Safety
    /// The processor must have AVX-512F; `a` must be valid for `14 depth` reads, `b` for `32 depth`, `c` for a
    /// tile of 14 x 32 with rows `stride` apart.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn avx512(
        depth: usize,
        mut a: *const f32,
        mut b: *const f32,
        alpha: f32,
        accum: Accum,
        c: *mut f32,
        stride: usize,
    ) {
        // SAFETY: every access is inside the ranges the caller vouches for; prefetches cannot fault.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); 2]; 14];
            for _ in 0..depth {
                _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(8 * 32).cast());
                _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(8 * 32 + 16).cast());
                let (b0, b1) = (_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(16)));
                for (i, sums) in sums.iter_mut().enumerate() {
                    let a = _mm512_set1_ps(*a.add(i));
                    sums[0] = _mm512_fmadd_ps(a, b0, sums[0]);
                    sums[1] = _mm512_fmadd_ps(a, b1, sums[1]);
                }
                a = a.add(14);
                b = b.add(32);
            }
            let alpha = _mm512_set1_ps(alpha);
            for (i, sums) in sums.iter().enumerate() {
                for (j, &sum) in sums.iter().enumerate() {
                    let out = c.add(i * stride + 16 * j);
                    let value = match accum {
                        Accum::Replace => _mm512_mul_ps(alpha, sum),
                        Accum::Add => _mm512_fmadd_ps(alpha, sum, _mm512_loadu_ps(out)),
                    };
                    _mm512_storeu_ps(out, value);
                }
            }
        }
    }

    /// 6 x 16: 12 accumulators, two registers of B and one broadcast element of A.
    ///
    /// # Safety
    /// The processor must have AVX2 and FMA; `a` must be valid for `6 depth` reads, `b` for `16 depth`, `c` for
    /// a tile of 6 x 16 with rows `stride` apart.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2(
        depth: usize,
        mut a: *const f32,
        mut b: *const f32,
        alpha: f32,
        accum: Accum,
        c: *mut f32,
        stride: usize,
    ) {
        // SAFETY: every access is inside the ranges the caller vouches for.
        unsafe {
            let mut sums = [[_mm256_setzero_ps(); 2]; 6];
            for _ in 0..depth {
                let (b0, b1) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8)));
                for (i, sums) in sums.iter_mut().enumerate() {
                    let a = _mm256_set1_ps(*a.add(i));
                    sums[0] = _mm256_fmadd_ps(a, b0, sums[0]);
                    sums[1] = _mm256_fmadd_ps(a, b1, sums[1]);
                }
                a = a.add(6);
                b = b.add(16);
            }
            let alpha = _mm256_set1_ps(alpha);
            for (i, sums) in sums.iter().enumerate() {
                for (j, &sum) in sums.iter().enumerate() {
                    let out = c.add(i * stride + 8 * j);
                    let value = match accum {
                        Accum::Replace => _mm256_mul_ps(alpha, sum),
                        Accum::Add => _mm256_fmadd_ps(alpha, sum, _mm256_loadu_ps(out)),
                    };
                    _mm256_storeu_ps(out, value);
                }
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::super::{Micro, portable};
        use crate::Accum;

        /// Every micro-kernel against plain sums, whichever of them this processor would choose.
        #[test]
        fn every_kernel_of_this_processor_sums_its_panels() {
            let mut kernels = vec![Micro { rows: 8, columns: 8, run: portable }, Micro::detect()];
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                kernels.push(Micro { rows: 6, columns: 16, run: super::avx2 });
            }
            for micro in kernels {
                let depth = 37;
                let a: Vec<f32> = (0..depth * micro.rows).map(|i| (i % 11) as f32 - 5.0).collect();
                let b: Vec<f32> = (0..depth * micro.columns).map(|i| (i % 7) as f32 - 3.0).collect();
                let mut c = vec![1.0; micro.rows * micro.columns];
                // SAFETY: the panels and the tile have the sizes that the kernel's contract asks for.
                unsafe {
                    (micro.run)(depth, a.as_ptr(), b.as_ptr(), 2.0, Accum::Add, c.as_mut_ptr(), micro.columns)
                };
                for (i, c) in c.chunks_exact(micro.columns).enumerate() {
                    for (j, &c) in c.iter().enumerate() {
                        let dot = |k: usize| a[k * micro.rows + i] * b[k * micro.columns + j];
                        assert_eq!(c, 1.0 + 2.0 * (0..depth).map(dot).sum::<f32>());
                    }
                }
            }
        }
    }
}
