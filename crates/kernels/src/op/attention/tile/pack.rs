//! Copying operands into the layouts that products read.

use half::bf16;

use super::{LANES, PANEL};
use crate::buffer::Floats;
use crate::cpu::vector::vectorised;
#[cfg(target_arch = "x86_64")]
use crate::cpu::vector::{Simd, simd};

/// Rows in a tensor: the first element of each and their number.
#[derive(Clone, Copy)]
pub(in super::super) struct Place {
    pub(in super::super) start: usize,
    pub(in super::super) stride: usize,
    pub(in super::super) rows: usize,
}

/// Copies rows of `e` elements into words, the rest of every row zero; `out [rows, width]`.
///
/// A row's words are its elements as they lie (`f32`, or pairs of `bf16`), or `bf16` widened to `f32`.
pub(super) fn rows(x: Floats<'_>, place: Place, e: usize, pair: usize, width: usize, out: &mut [f32]) {
    let Place { start, stride, rows } = place;
    if rows == 0 {
        return;
    }
    let all = start..start + (rows - 1) * stride + e;
    let out = &mut out[..rows * width];
    match x {
        Floats::F32(x) => copy_rows(bytemuck::cast_slice(&x[all]), 4 * stride, 4 * e, 4 * width, out),
        Floats::Bf16(x) if pair == 2 => {
            copy_rows(bytemuck::cast_slice(&x[all]), 2 * stride, 2 * e, 4 * width, out);
        }
        _ => {
            for (row, out) in out.chunks_exact_mut(width).enumerate() {
                x.widen(start + row * stride, &mut out[..e]);
                out[e..].fill(0.0);
            }
        }
    }
}

/// Copies `row` bytes at every `stride` of x to every `width` bytes of `out`, with zeros behind them.
fn copy_rows(x: &[u8], stride: usize, row: usize, width: usize, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if simd() == Simd::Avx512 {
        return x86::copy_rows(x, stride, row, width, out);
    }
    let out: &mut [u8] = bytemuck::cast_slice_mut(out);
    for (i, out) in out.chunks_exact_mut(width).enumerate() {
        out[..row].copy_from_slice(&x[i * stride..][..row]);
        out[row..].fill(0);
    }
}

/// Words `[rows, width]` with rows and words exchanged, into panels of PANEL rows: `out [panels][width, PANEL]`;
/// columns behind the last row, up to a whole register, are zero.
pub(super) fn transposed(words: &[f32], rows: usize, width: usize, out: &mut [f32]) {
    for first in (0..rows).step_by(LANES) {
        let present = LANES.min(rows - first);
        let panel = &mut out[first / PANEL * PANEL * width..][..PANEL * width];
        for step in (0..width).step_by(LANES) {
            let block = &words[first * width + step..];
            let out = &mut panel[step * PANEL + first % PANEL..];
            #[cfg(target_arch = "x86_64")]
            if present == LANES && simd() == Simd::Avx512 {
                x86::transpose_block(block, width, out);
                continue;
            }
            for lane in 0..LANES {
                for word in 0..LANES {
                    out[word * PANEL + lane] = if lane < present { block[lane * width + word] } else { 0.0 };
                }
            }
        }
    }
}

/// Rows of words `[rows, width]` as steps of a sum over the rows: `out [panels][steps, PANEL]` of the first
/// `columns` elements, `length` words a panel. Pairs of rows share a step where words are pairs; what is missing up
/// to a multiple of LANES rows is zero.
pub(super) fn columns(
    words: &[f32],
    (rows, width): (usize, usize),
    columns: usize,
    pair: usize,
    (out, length): (&mut [f32], usize),
) {
    let steps = rows.next_multiple_of(LANES) / pair;
    for (first, out) in (0..columns).step_by(PANEL).zip(out.chunks_mut(length)) {
        let part = PANEL.min(columns - first);
        let out = &mut out[..steps * PANEL];
        if pair == 2 {
            let words: &[u16] = bytemuck::cast_slice(words);
            interleave(words, (rows, 2 * width, first), part, bytemuck::cast_slice_mut(out));
        } else {
            copy_columns(words, (rows, width, first), part, out);
        }
    }
}

vectorised! {
    /// Step r of `out [steps, PANEL]` gets columns `first..first + part` of rows 2r and 2r + 1 of `x`.
    fn interleave<L>(x: &[u16], shape: (usize, usize, usize), part: usize, out: &mut [u32]) {
        let (rows, width, first) = shape;
        for (step, out) in out.chunks_exact_mut(PANEL).enumerate() {
            let (low, high) = (2 * step, 2 * step + 1);
            for (column, out) in out[..part].as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                let at = first + column * LANES;
                if high < rows {
                    let (low, high) = (&x[low * width + at..][..LANES], &x[high * width + at..][..LANES]);
                    for lane in 0..LANES {
                        out[lane] = u32::from(low[lane]) | u32::from(high[lane]) << 16;
                    }
                } else if low < rows {
                    let low = &x[low * width + at..][..LANES];
                    for lane in 0..LANES {
                        out[lane] = u32::from(low[lane]);
                    }
                } else {
                    *out = [0; LANES];
                }
            }
        }
    }
}

vectorised! {
    /// Step r of `out [steps, PANEL]` gets columns `first..first + part` of row r of `x`.
    fn copy_columns<L>(x: &[f32], shape: (usize, usize, usize), part: usize, out: &mut [f32]) {
        let (rows, width, first) = shape;
        for (row, out) in out.chunks_exact_mut(PANEL).enumerate() {
            for (column, out) in out[..part].as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                if row < rows {
                    out.copy_from_slice(&x[row * width + first + column * LANES..][..LANES]);
                } else {
                    *out = [0.0; LANES];
                }
            }
        }
    }
}

vectorised! {
    /// Two rows of `bf16`, element by element in the halves of one word.
    pub(super) fn zip_rows<L>(low: &[bf16], high: &[bf16], out: &mut [f32]) {
        for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
            *out = f32::from_bits(u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16);
        }
    }
}

vectorised! {
    /// True where no `bf16` is infinite or NaN.
    pub(super) fn pairs_are_finite<L>(x: &[f32]) -> bool {
        let special = |half: u32| half & 0x7f80 == 0x7f80;
        x.iter().fold(true, |all, x| all & !(special(x.to_bits()) | special(x.to_bits() >> 16)))
    }
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "vector loads and stores through pointers")]
mod x86 {
    use std::arch::x86_64::*;

    use super::super::{LANES, PANEL};

    /// The safe face of [`copy_rows_avx512`]; only for processors that [`Simd`](crate::cpu::vector::Simd) calls
    /// AVX-512.
    pub(super) fn copy_rows(x: &[u8], stride: usize, row: usize, width: usize, out: &mut [f32]) {
        let rows = 4 * out.len() / width;
        assert!(row <= width && width.is_multiple_of(64) && (rows - 1) * stride + row <= x.len());
        // SAFETY: the last byte read has just been checked, and `out` holds `rows` rows of `width` bytes.
        unsafe { copy_rows_avx512(x.as_ptr(), stride, row, width, rows, out.as_mut_ptr().cast()) };
    }

    /// # Safety
    /// The processor must have AVX-512F and BW; x must be valid for `row` bytes at every stride, out for `width`.
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn copy_rows_avx512(
        x: *const u8,
        stride: usize,
        row: usize,
        width: usize,
        rows: usize,
        out: *mut u8,
    ) {
        // Loads behind stores to addresses that are equal in their lower 12 bits wait for those stores, and with
        // them for the loads before. Prefetches do not.
        const AHEAD: usize = 16;
        let (whole, rest) = (row / 64 * 64, row % 64);
        let mask = (1u64 << rest) - 1;
        for i in 0..rows {
            // SAFETY: the caller vouches for the ranges; masked bytes are not read, and prefetches cannot fault.
            unsafe {
                for line in (0..row).step_by(64) {
                    _mm_prefetch::<_MM_HINT_T0>(x.wrapping_add((i + AHEAD) * stride + line).cast());
                }
                let (x, out) = (x.add(i * stride), out.add(i * width));
                let mut at = 0;
                while at < whole {
                    _mm512_storeu_si512(out.add(at).cast(), _mm512_loadu_si512(x.add(at).cast()));
                    at += 64;
                }
                if rest > 0 {
                    let part = _mm512_maskz_loadu_epi8(mask, x.add(at).cast());
                    _mm512_storeu_si512(out.add(at).cast(), part);
                    at += 64;
                }
                while at < width {
                    _mm512_storeu_si512(out.add(at).cast(), _mm512_setzero_si512());
                    at += 64;
                }
            }
        }
    }

    /// 16 rows of 16 words, `width` apart, to 16 lines of 16, PANEL apart; only for processors that
    /// [`Simd`](crate::cpu::vector::Simd) calls AVX-512.
    pub(super) fn transpose_block(x: &[f32], width: usize, out: &mut [f32]) {
        assert!(x.len() >= 15 * width + LANES && out.len() >= 15 * PANEL + LANES);
        // SAFETY: the last words have just been checked.
        unsafe { transpose_avx512(x.as_ptr(), width, out.as_mut_ptr()) };
    }

    /// # Safety
    /// The processor must have AVX-512F; x must be valid for 16 words at every `width`, out at every PANEL.
    #[target_feature(enable = "avx512f")]
    unsafe fn transpose_avx512(x: *const f32, width: usize, out: *mut f32) {
        // SAFETY: the caller vouches for the ranges.
        unsafe {
            let mut a = [_mm512_setzero_ps(); 16];
            for (i, a) in a.iter_mut().enumerate() {
                *a = _mm512_loadu_ps(x.add(i * width));
            }
            // Exchanges words inside quarters: pairs of rows, then pairs of pairs.
            let mut b = [_mm512_setzero_ps(); 16];
            for i in 0..8 {
                b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
                b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
            }
            for i in 0..4 {
                let wide = |j: usize| _mm512_castps_pd(b[4 * i + j]);
                a[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(wide(0), wide(2)));
                a[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(wide(0), wide(2)));
                a[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(wide(1), wide(3)));
                a[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(wide(1), wide(3)));
            }
            // Now quarter q of a[4 i + j] holds column 4 q + j of rows 4 i..4 i + 4.
            for j in 0..4 {
                let low = _mm512_shuffle_f32x4::<0x44>(a[j], a[4 + j]);
                let high = _mm512_shuffle_f32x4::<0xee>(a[j], a[4 + j]);
                let low_end = _mm512_shuffle_f32x4::<0x44>(a[8 + j], a[12 + j]);
                let high_end = _mm512_shuffle_f32x4::<0xee>(a[8 + j], a[12 + j]);
                let line = |q: usize| out.add((4 * q + j) * PANEL);
                _mm512_storeu_ps(line(0), _mm512_shuffle_f32x4::<0x88>(low, low_end));
                _mm512_storeu_ps(line(1), _mm512_shuffle_f32x4::<0xdd>(low, low_end));
                _mm512_storeu_ps(line(2), _mm512_shuffle_f32x4::<0x88>(high, high_end));
                _mm512_storeu_ps(line(3), _mm512_shuffle_f32x4::<0xdd>(high, high_end));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows as words, by their definition.
    fn element(words: &[f32], width: usize, row: usize, column: usize, pair: usize) -> f32 {
        match pair {
            1 => words[row * width + column],
            _ => bytemuck::cast_slice::<f32, bf16>(words)[2 * row * width + column].to_f32(),
        }
    }

    #[test]
    fn layouts_hold_every_element_and_zeros_behind_the_edges() {
        for (e, pair) in [1usize, 7, 16, 33, 40, 64].into_iter().flat_map(|e| [(e, 1), (e, 2)]) {
            for count in [1usize, 2, 15, 16, 17, 33, 50] {
                let (stride, start) = (e + 5, 3);
                let values: Vec<f32> = (0..start + count * stride).map(|i| (i % 251) as f32).collect();
                let halves: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
                let x = if pair == 2 { Floats::Bf16(&halves) } else { Floats::F32(&values) };
                let width = e.div_ceil(pair).next_multiple_of(LANES);
                let mut words = vec![f32::NAN; count * width];
                rows(x, Place { start, stride, rows: count }, e, pair, width, &mut words);
                let truth = |row: usize, column: usize| match row < count && column < e {
                    true => values[start + row * stride + column],
                    false => 0.0,
                };
                let mut across = vec![f32::NAN; count.next_multiple_of(PANEL) * width];
                transposed(&words, count, width, &mut across);
                for (row, column) in (0..count).flat_map(|row| (0..width * pair).map(move |c| (row, c))) {
                    assert_eq!(element(&words, width, row, column, pair), truth(row, column));
                    let panel = &across[row / PANEL * PANEL * width..][column / pair * PANEL..][..PANEL];
                    let found = match pair {
                        1 => panel[row % PANEL],
                        _ => bytemuck::cast_slice::<f32, bf16>(panel)[row % PANEL * 2 + column % 2].to_f32(),
                    };
                    assert_eq!(found, truth(row, column), "transposed, row {row}, column {column}");
                }
                let steps = count.next_multiple_of(LANES) / pair;
                let mut down = vec![f32::NAN; e.div_ceil(PANEL) * steps * PANEL];
                columns(&words, (count, width), e.next_multiple_of(LANES), pair, (&mut down, steps * PANEL));
                for (row, column) in (0..steps * pair).flat_map(|row| (0..e).map(move |c| (row, c))) {
                    let panel = &down[column / PANEL * steps * PANEL..][row / pair * PANEL..][..PANEL];
                    let found = match pair {
                        1 => panel[column % PANEL],
                        _ => bytemuck::cast_slice::<f32, bf16>(panel)[column % PANEL * 2 + row % 2].to_f32(),
                    };
                    assert_eq!(found, truth(row, column), "columns, row {row}, column {column}");
                }
            }
        }
    }

    #[test]
    fn one_special_half_is_found_wherever_it_stands() {
        for (length, place) in
            [1, 16, 33].into_iter().flat_map(|length| (0..2 * length).map(move |p| (length, p)))
        {
            let mut words = vec![0.0f32; length];
            bytemuck::cast_slice_mut(&mut words).fill(bf16::MAX);
            assert!(pairs_are_finite(&words));
            let special = [bf16::INFINITY, bf16::NEG_INFINITY, bf16::NAN][place % 3];
            bytemuck::cast_slice_mut::<f32, bf16>(&mut words)[place] = special;
            assert!(!pairs_are_finite(&words), "{special} at {place} of {length} words");
        }
    }
}
