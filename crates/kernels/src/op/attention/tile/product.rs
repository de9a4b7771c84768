//! The innermost loop: up to 12 rows of sums against a panel's columns.

use super::{LANES, PANEL, ROWS};

/// What becomes of the sums.
#[derive(Clone, Copy)]
pub(in super::super) enum Start<'a> {
    /// `c = alpha sum`.
    Replace(f32),
    /// `c = c + sum`.
    Add,
    /// `c = factor of the row * c + sum`.
    Rescale(&'a [f32]),
}

/// The left operand: word `a[row * row_stride + step * step_stride]` is the one of a row at a step of the sum.
#[derive(Clone, Copy)]
pub(in super::super) struct Lines<'a> {
    pub(in super::super) words: &'a [f32],
    pub(in super::super) row_stride: usize,
    pub(in super::super) step_stride: usize,
}

/// A product of `rows` lines and the first `vectors * LANES` columns of a panel, over `steps` steps.
///
/// Words are `f32`, or pairs of `bf16` that are neighbours along the sum, the first in the lower half.
#[derive(Clone, Copy)]
pub(super) struct Product {
    rows: usize,
    steps: usize,
    vectors: usize,
    a: *const f32,
    row_stride: usize,
    step_stride: usize,
    b: *const f32,
    c: *mut f32,
    c_stride: usize,
    /// One factor for each row, or null.
    factors: *const f32,
    alpha: f32,
    replace: bool,
}

/// A product on some processor.
///
/// # Safety
/// The processor must have the kernel's instructions, and the pointers be valid for what [`Product`] says.
pub(super) type Run = unsafe fn(&Product);

/// Rows `0..rows` of `c`, `c_stride` apart, from `a` and the panel `b [steps, PANEL]`, which may start at a later
/// column of its panel. `vectors` is 1 or 2.
#[expect(unsafe_code, reason = "kernels work on pointers; every range is checked here")]
#[inline]
pub(super) fn run(
    run: Run,
    (a, rows, steps): (Lines<'_>, usize, usize),
    (b, vectors): (&[f32], usize),
    (c, c_stride): (&mut [f32], usize),
    start: Start<'_>,
) {
    let columns = vectors * LANES;
    assert!((1..=ROWS).contains(&rows) && (1..=PANEL / LANES).contains(&vectors));
    assert!(c.len() >= (rows - 1) * c_stride + columns);
    if steps > 0 {
        assert!(a.words.len() > (rows - 1) * a.row_stride + (steps - 1) * a.step_stride);
        assert!(b.len() >= (steps - 1) * PANEL + columns);
    }
    let (factors, alpha) = match start {
        Start::Replace(alpha) => (std::ptr::null(), alpha),
        Start::Add => (std::ptr::null(), 1.0),
        Start::Rescale(factors) => {
            assert!(factors.len() >= rows);
            (factors.as_ptr(), 1.0)
        }
    };
    let product = Product {
        rows,
        steps,
        vectors,
        a: a.words.as_ptr(),
        row_stride: a.row_stride,
        step_stride: a.step_stride,
        b: b.as_ptr(),
        c: c.as_mut_ptr(),
        c_stride,
        factors,
        alpha,
        replace: matches!(start, Start::Replace(_)),
    };
    // SAFETY: every word that the product reads or writes has been checked to lie in its slice, and kernels are
    // chosen after the processor was asked for their instructions.
    unsafe { run(&product) };
}

/// In plain code, four rows at a time, which compilers turn into vector code of any width.
///
/// # Safety
/// As for [`Run`]; needs no instructions.
#[expect(unsafe_code, reason = "the contract of a kernel is in pointers")]
pub(super) unsafe fn portable(p: &Product) {
    for first in (0..p.rows).step_by(4) {
        for vector in 0..p.vectors {
            let rows = 4.min(p.rows - first);
            let mut sums = [[0.0f32; LANES]; 4];
            for step in 0..p.steps {
                // SAFETY: the caller vouches for PANEL words at every step and for a word of every row and step.
                let (b, a) = unsafe {
                    let b = p.b.add(step * PANEL + vector * LANES).cast::<[f32; LANES]>();
                    (&*b, p.a.add(first * p.row_stride + step * p.step_stride))
                };
                for (row, sums) in sums[..rows].iter_mut().enumerate() {
                    // SAFETY: as above.
                    let a = unsafe { *a.add(row * p.row_stride) };
                    sums.iter_mut().zip(b).for_each(|(sum, &b)| *sum += a * b);
                }
            }
            for (row, sums) in sums[..rows].iter().enumerate() {
                // SAFETY: the caller vouches for the columns of every row of c, and for a factor for every row.
                let (c, factor) = unsafe {
                    let c = p.c.add((first + row) * p.c_stride + vector * LANES).cast::<[f32; LANES]>();
                    (&mut *c, if p.factors.is_null() { 1.0 } else { *p.factors.add(first + row) })
                };
                for (c, &sum) in c.iter_mut().zip(sums) {
                    *c = if p.replace { p.alpha * sum } else { factor * *c + sum };
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "vector loads and stores through pointers")]
pub(super) mod x86 {
    use std::arch::x86_64::*;

    use super::super::{LANES, PANEL};
    use super::Product;

    /// Kernels for AVX-512 of 1 to 12 rows: 24 accumulators, two registers of B, one broadcast word of A.
    macro_rules! kernels {
        ($name:ident, $tile:ident, $features:literal, |$sum:ident, $a:ident, $b:ident| $add:expr) => {
            /// # Safety
            /// As for [`Run`](super::Run), on a processor with the features named above it.
            #[target_feature(enable = $features)]
            pub(in super::super) unsafe fn $name(p: &Product) {
                // SAFETY: the caller's promises are those of the tile.
                unsafe {
                    match (p.rows, p.vectors) {
                        (1, 1) => $tile::<1, 1>(p),
                        (2, 1) => $tile::<2, 1>(p),
                        (3, 1) => $tile::<3, 1>(p),
                        (4, 1) => $tile::<4, 1>(p),
                        (5, 1) => $tile::<5, 1>(p),
                        (6, 1) => $tile::<6, 1>(p),
                        (7, 1) => $tile::<7, 1>(p),
                        (8, 1) => $tile::<8, 1>(p),
                        (9, 1) => $tile::<9, 1>(p),
                        (10, 1) => $tile::<10, 1>(p),
                        (11, 1) => $tile::<11, 1>(p),
                        (12, 1) => $tile::<12, 1>(p),
                        (1, _) => $tile::<1, 2>(p),
                        (2, _) => $tile::<2, 2>(p),
                        (3, _) => $tile::<3, 2>(p),
                        (4, _) => $tile::<4, 2>(p),
                        (5, _) => $tile::<5, 2>(p),
                        (6, _) => $tile::<6, 2>(p),
                        (7, _) => $tile::<7, 2>(p),
                        (8, _) => $tile::<8, 2>(p),
                        (9, _) => $tile::<9, 2>(p),
                        (10, _) => $tile::<10, 2>(p),
                        (11, _) => $tile::<11, 2>(p),
                        _ => $tile::<12, 2>(p),
                    }
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn $tile<const R: usize, const V: usize>(p: &Product) {
                // SAFETY: every access is inside the ranges the caller vouches for.
                unsafe {
                    let mut sums = [[_mm512_setzero_ps(); V]; R];
                    let (mut line, mut panel) = (p.a, p.b);
                    for _ in 0..p.steps {
                        let mut words = [_mm512_setzero_ps(); V];
                        for (v, word) in words.iter_mut().enumerate() {
                            *word = _mm512_loadu_ps(panel.add(v * LANES));
                        }
                        for (i, sums) in sums.iter_mut().enumerate() {
                            let $a = _mm512_set1_ps(*line.add(i * p.row_stride));
                            for ($sum, &$b) in sums.iter_mut().zip(&words) {
                                *$sum = $add;
                            }
                        }
                        line = line.wrapping_add(p.step_stride);
                        panel = panel.wrapping_add(PANEL);
                    }
                    // Kept in this function, so that the sums stay in registers.
                    let alpha = _mm512_set1_ps(p.alpha);
                    for (i, sums) in sums.iter().enumerate() {
                        let factor =
                            if p.factors.is_null() { alpha } else { _mm512_set1_ps(*p.factors.add(i)) };
                        for (v, &sum) in sums.iter().enumerate() {
                            let c = p.c.add(i * p.c_stride + v * LANES);
                            let value = match p.replace {
                                true => _mm512_mul_ps(alpha, sum),
                                false => _mm512_fmadd_ps(factor, _mm512_loadu_ps(c), sum),
                            };
                            _mm512_storeu_ps(c, value);
                        }
                    }
                }
            }
        };
    }

    kernels!(f32_avx512, f32_tile, "avx512f", |sum, a, b| _mm512_fmadd_ps(a, b, *sum));
    kernels!(bf16_avx512, bf16_tile, "avx512f,avx512bf16", |sum, a, b| _mm512_dpbf16_ps(
        *sum,
        // A register of 16 words and one of 32 bf16 are the same bits.
        std::mem::transmute::<__m512, __m512bh>(a),
        std::mem::transmute::<__m512, __m512bh>(b),
    ));

    /// Up to six rows and one vector of two registers at a time: 12 accumulators.
    ///
    /// # Safety
    /// As for [`Run`](super::Run), on a processor with AVX2 and FMA.
    #[target_feature(enable = "avx2,fma")]
    pub(in super::super) unsafe fn f32_avx2(p: &Product) {
        for first in (0..p.rows).step_by(6) {
            for vector in 0..p.vectors {
                let part = |rows: usize| Product {
                    rows,
                    a: p.a.wrapping_add(first * p.row_stride),
                    b: p.b.wrapping_add(vector * LANES),
                    c: p.c.wrapping_add(first * p.c_stride + vector * LANES),
                    factors: match p.factors.is_null() {
                        true => p.factors,
                        false => p.factors.wrapping_add(first),
                    },
                    ..*p
                };
                // SAFETY: the part lies inside what the caller vouches for.
                unsafe {
                    match p.rows - first {
                        1 => avx2_tile::<1>(&part(1)),
                        2 => avx2_tile::<2>(&part(2)),
                        3 => avx2_tile::<3>(&part(3)),
                        4 => avx2_tile::<4>(&part(4)),
                        5 => avx2_tile::<5>(&part(5)),
                        _ => avx2_tile::<6>(&part(6)),
                    }
                }
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2_tile<const R: usize>(p: &Product) {
        // SAFETY: every access is inside the ranges the caller vouches for.
        unsafe {
            let mut sums = [[_mm256_setzero_ps(); 2]; R];
            let (mut line, mut panel) = (p.a, p.b);
            for _ in 0..p.steps {
                let words = [_mm256_loadu_ps(panel), _mm256_loadu_ps(panel.add(8))];
                for (i, sums) in sums.iter_mut().enumerate() {
                    let a = _mm256_set1_ps(*line.add(i * p.row_stride));
                    for (sum, &b) in sums.iter_mut().zip(&words) {
                        *sum = _mm256_fmadd_ps(a, b, *sum);
                    }
                }
                line = line.wrapping_add(p.step_stride);
                panel = panel.wrapping_add(PANEL);
            }
            let alpha = _mm256_set1_ps(p.alpha);
            for (i, sums) in sums.iter().enumerate() {
                let factor = if p.factors.is_null() { alpha } else { _mm256_set1_ps(*p.factors.add(i)) };
                for (v, &sum) in sums.iter().enumerate() {
                    let c = p.c.add(i * p.c_stride + 8 * v);
                    let value = match p.replace {
                        true => _mm256_mul_ps(alpha, sum),
                        false => _mm256_fmadd_ps(factor, _mm256_loadu_ps(c), sum),
                    };
                    _mm256_storeu_ps(c, value);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    /// Steps of the sums, words of a row of A, and of a row of C.
    const STEPS: usize = 37;
    const STRIDES: (usize, usize) = (STEPS + 3, 41);

    fn kernels() -> Vec<(Run, usize)> {
        let mut kernels: Vec<(Run, usize)> = vec![(portable, 1)];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                kernels.push((x86::f32_avx2, 1));
            }
            if is_x86_feature_detected!("avx512f") {
                kernels.push((x86::f32_avx512, 1));
            }
            if crate::cpu::gemm::has_bf16_dot_products() {
                kernels.push((x86::bf16_avx512, 2));
            }
        }
        kernels
    }

    /// Small whole numbers, whose sums are exact in every order; `elements[pair]` of every word.
    fn words(count: usize, pair: usize, factor: usize) -> (Vec<f32>, Vec<f32>) {
        let elements: Vec<f32> = (0..count * pair).map(|i| (i * factor % 11) as f32 - 5.0).collect();
        let mut words = elements.clone();
        if pair == 2 {
            words.truncate(count);
            let halves = bytemuck::cast_slice_mut::<f32, bf16>(&mut words).iter_mut();
            halves.zip(&elements).for_each(|(half, &element)| *half = bf16::from_f32(element));
        }
        (words, elements)
    }

    #[test]
    fn every_kernel_of_this_processor_sums_its_words() {
        for (kernel, pair) in kernels() {
            let (a_words, a) = words(ROWS * STRIDES.0, pair, 7);
            let (b_words, b) = words(STEPS * PANEL, pair, 3);
            let a_lines = Lines { words: &a_words, row_stride: STRIDES.0, step_stride: 1 };
            let factors: Vec<f32> = (0..ROWS).map(|row| 0.5 + row as f32).collect();
            let starts = [Start::Replace(2.0), Start::Add, Start::Rescale(&factors)];
            for (rows, vectors, start) in (1..=ROWS)
                .flat_map(|rows| [(rows, 1), (rows, 2)])
                .flat_map(|(rows, vectors)| starts.map(|start| (rows, vectors, start)))
            {
                let mut c = vec![4.0; (rows - 1) * STRIDES.1 + vectors * LANES];
                run(kernel, (a_lines, rows, STEPS), (&b_words, vectors), (&mut c, STRIDES.1), start);
                for (place, &found) in c.iter().enumerate() {
                    let (row, column) = (place / STRIDES.1, place % STRIDES.1);
                    if column >= vectors * LANES {
                        assert_eq!(found, 4.0, "{rows} rows, {vectors} registers: behind row {row}");
                        continue;
                    }
                    let product = |step: usize, half: usize| {
                        let a = a[(row * STRIDES.0 + step) * pair + half];
                        a * b[(step * PANEL + column) * pair + half]
                    };
                    let sum: f32 = (0..STEPS)
                        .flat_map(|step| (0..pair).map(move |half| (step, half)))
                        .fold(0.0, |sum, (step, half)| sum + product(step, half));
                    let truth = match start {
                        Start::Replace(alpha) => alpha * sum,
                        Start::Add => 4.0 + sum,
                        Start::Rescale(factors) => factors[row] * 4.0 + sum,
                    };
                    assert_eq!(found, truth, "{rows} rows, {vectors} registers: row {row}, column {column}");
                }
            }
        }
    }
}
