//! Copying an operand into panels of pairs, rounded to `bf16`.
//!
//! A word of a panel holds two neighbours along the sum. Lines that are contiguous along the sum give such words
//! as they lie, and a panel is their transpose; lines that are contiguous across give them by interleaving two
//! steps, for several panels at once, since rows of a weight lie a page apart. Both cost a fraction of a cycle an element, so a weight needs no layout of its own for either
//! orientation: what is stored is what is read, and another storage is another packer here.

use std::ops::Range;

use crate::cpu::gemm::pack::{Side, View};
use crate::cpu::vector::lanes;

/// The lines of a view that some panels take, and how to walk them.
struct Lines {
    /// The first element.
    start: usize,
    line_stride: usize,
    step_stride: usize,
    /// Lines that are there; the rest of the last panel's is zero.
    present: usize,
    depth: usize,
}

impl Lines {
    /// The part of them that belongs to one panel.
    fn of_panel(&self, panel: usize, width: usize) -> Lines {
        let first = panel * width;
        let present = width.min(self.present - first);
        Lines { start: self.start + first * self.line_stride, present, ..*self }
    }
}

/// Where the panels are written.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// Lines of a panel.
    pub(super) width: usize,
    /// From a panel's first word to the next one's.
    pub(super) panel_words: usize,
    /// Where the operand begins inside its panel.
    pub(super) first_word: usize,
}

/// Packs `panels` into `out [panels, pairs, width]`, the operand's pairs at its own place inside each panel; lines
/// behind the operand's edge and the second half of a last odd pair are zero.
pub(super) fn pack_panels(view: &View<'_>, side: Side, panels: Range<usize>, place: Place, out: &mut [u32]) {
    let (lines, line_stride, step_stride, depth) = match side {
        Side::A => (view.rows, view.row_stride, view.column_stride, view.columns),
        Side::B => (view.columns, view.column_stride, view.row_stride, view.rows),
    };
    let Place { width, panel_words, first_word } = place;
    let first = panels.start * width;
    let present = (panels.len() * width).min(lines - first);
    let lines = Lines { start: view.offset + first * line_stride, line_stride, step_stride, present, depth };
    let words = depth.div_ceil(2) * width;
    if words == 0 {
        return;
    }
    assert!(first_word + words <= panel_words && out.len() == panels.len() * panel_words);
    #[cfg(target_arch = "x86_64")]
    if super::super::has_bf16_dot_products() && x86::pack(view.data, &lines, place, out) {
        return;
    }
    for (panel, out) in out.chunks_exact_mut(panel_words).enumerate() {
        pack_portable(view, &lines.of_panel(panel, width), width, &mut out[first_word..first_word + words]);
    }
}

/// The pair of two numbers, each rounded.
pub(super) fn pair_of(low: f32, high: f32) -> u32 {
    u32::from(lanes::round(low).to_bits()) | u32::from(lanes::round(high).to_bits()) << 16
}

/// Any type, any processor.
fn pack_portable(view: &View<'_>, lines: &Lines, width: usize, out: &mut [u32]) {
    let &Lines { start, line_stride, step_stride, present, depth } = lines;
    out.fill(0);
    if line_stride == 1 {
        let (mut low, mut high) = (vec![0.0; present], vec![0.0; present]);
        for (pair, out) in out.chunks_exact_mut(width).enumerate() {
            view.data.widen(start + 2 * pair * step_stride, &mut low);
            match 2 * pair + 1 < depth {
                true => view.data.widen(start + (2 * pair + 1) * step_stride, &mut high),
                false => high.fill(0.0),
            }
            for (out, (&low, &high)) in out.iter_mut().zip(low.iter().zip(&high)) {
                *out = pair_of(low, high);
            }
        }
    } else {
        let mut steps = vec![0.0; depth.next_multiple_of(2)];
        for line in 0..present {
            view.data.widen(start + line * line_stride, &mut steps[..depth]);
            for (pair, out) in steps.chunks_exact(2).zip(out.chunks_exact_mut(width)) {
                out[line] = pair_of(pair[0], pair[1]);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "vector loads and stores through pointers")]
mod x86 {
    use std::arch::x86_64::*;

    use half::bf16;

    use super::{Lines, Place};
    use crate::buffer::Floats;

    /// Packs where there is a loader for the type, and says whether there is. The caller has checked that the
    /// processor has AVX-512 with BF16.
    pub(super) fn pack(data: Floats<'_>, lines: &Lines, place: Place, out: &mut [u32]) -> bool {
        // The last element that is read: lines and steps have strides, one of them 1.
        let last = |lines: &Lines| {
            lines.start + (lines.present - 1) * lines.line_stride + (lines.depth - 1) * lines.step_stride
        };
        if lines.depth == 0 {
            return true;
        }
        match data {
            Floats::F32(values) => {
                assert!(last(lines) < values.len());
                // SAFETY: all elements of the lines are inside `values`, and `out` has been measured.
                unsafe { pack_from(values.as_ptr(), lines, place, out) }
            }
            Floats::Bf16(values) => {
                assert!(last(lines) < values.len());
                // SAFETY: as above.
                unsafe { pack_from(values.as_ptr(), lines, place, out) }
            }
            Floats::F16(_) => return false,
        }
        true
    }

    /// An element type that can be read as `bf16`.
    trait Load: Copy {
        /// 32 elements along a line, of which `count` are read; the rest are 0.
        ///
        /// # Safety
        /// `count` elements can be read; AVX-512 with BF16.
        unsafe fn pairs(at: *const Self, count: usize) -> __m512i;

        /// 16 elements in the lower halves of words, of which those of `mask` are read; the rest are 0.
        ///
        /// # Safety
        /// The elements of `mask` can be read; AVX-512 with BF16.
        unsafe fn words(at: *const Self, mask: __mmask16) -> __m512i;
    }

    impl Load for bf16 {
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
        unsafe fn pairs(at: *const Self, count: usize) -> __m512i {
            // SAFETY: masked-out elements are not read; the caller vouches for the others.
            unsafe {
                if count >= 32 {
                    return _mm512_loadu_si512(at.cast());
                }
                _mm512_maskz_loadu_epi16((1u32 << count) - 1, at.cast())
            }
        }

        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
        unsafe fn words(at: *const Self, mask: __mmask16) -> __m512i {
            // SAFETY: as above.
            unsafe { _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at.cast())) }
        }
    }

    impl Load for f32 {
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
        unsafe fn pairs(at: *const Self, count: usize) -> __m512i {
            let mask = |count: usize| if count >= 16 { 0xffff } else { (1u16 << count) - 1 };
            // SAFETY: masked-out elements are not read; the caller vouches for the others. 32 bf16 and 16 words
            // are the same bits.
            unsafe {
                let low = _mm512_maskz_loadu_ps(mask(count), at);
                let high = _mm512_maskz_loadu_ps(mask(count.saturating_sub(16)), at.wrapping_add(16));
                std::mem::transmute(_mm512_cvtne2ps_pbh(high, low))
            }
        }

        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
        unsafe fn words(at: *const Self, mask: __mmask16) -> __m512i {
            // SAFETY: as above; 16 bf16 and 256 bits are the same.
            unsafe {
                let rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, at));
                _mm512_cvtepu16_epi32(std::mem::transmute::<__m256bh, __m256i>(rounded))
            }
        }
    }

    /// # Safety
    /// The lines' elements can be read from `values` on; `out` holds the panels as `place` says; AVX-512 with BF16.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn pack_from<T: Load>(values: *const T, lines: &Lines, place: Place, out: &mut [u32]) {
        let to = out.as_mut_ptr().wrapping_add(place.first_word);
        // SAFETY: passed on; a panel's words are inside `out`.
        unsafe {
            if lines.line_stride == 1 {
                return interleave(values, lines, place, to);
            }
            for panel in 0..out.len() / place.panel_words {
                let lines = lines.of_panel(panel, place.width);
                transpose(values, &lines, place.width, to.add(panel * place.panel_words));
            }
        }
    }

    /// The mask of the panel's lines `base..base + 16`.
    fn lanes(width: usize, base: usize) -> __mmask16 {
        let count = width.saturating_sub(base).min(16);
        ((1u32 << count) - 1) as u16
    }

    /// Steps from the one that is packed to the one that is fetched: rows a page apart are found by no processor's own
    /// looking ahead.
    const AHEAD: usize = 16;
    /// Bytes that a processor fetches together.
    const LINE: usize = 64;

    /// Lines that are contiguous across: steps 2p and 2p + 1 side by side.
    ///
    /// # Safety
    /// As [`pack_from`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn interleave<T: Load>(values: *const T, lines: &Lines, place: Place, out: *mut u32) {
        let &Lines { start, step_stride, present, depth, .. } = lines;
        let Place { width, panel_words, .. } = place;
        for pair in 0..depth.div_ceil(2) {
            let row = values.wrapping_add(start + 2 * pair * step_stride);
            for step in [AHEAD, AHEAD + 1] {
                let ahead = row.wrapping_add(step * step_stride);
                for line in (0..present).step_by(LINE / size_of::<T>()).chain([present - 1]) {
                    _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line).cast());
                }
            }
            for panel in 0..present.div_ceil(width) {
                for base in (0..width).step_by(16) {
                    // SAFETY: the mask holds present lines alone, and the second step is read where it is there;
                    // the store stays inside row `pair` of the panel.
                    unsafe {
                        let mask = lanes(width.min(present - panel * width), base);
                        let at = row.wrapping_add(panel * width + base);
                        let second = if 2 * pair + 1 < depth { mask } else { 0 };
                        let low = T::words(at, mask);
                        let high = T::words(at.wrapping_add(step_stride), second);
                        let words = _mm512_or_si512(low, _mm512_slli_epi32::<16>(high));
                        let to = out.add(panel * panel_words + pair * width + base);
                        _mm512_mask_storeu_epi32(to.cast(), lanes(width, base), words);
                    }
                }
            }
        }
    }

    /// Lines that are contiguous along the sum: 16 lines of 16 pairs at a time.
    ///
    /// # Safety
    /// As [`pack_from`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn transpose<T: Load>(values: *const T, lines: &Lines, width: usize, out: *mut u32) {
        let &Lines { start, line_stride, present, depth, .. } = lines;
        for base in (0..width).step_by(16) {
            let mask = lanes(width, base);
            for step in (0..depth).step_by(32) {
                let count = (depth - step).min(32);
                // SAFETY: lines below `present` and steps below `depth` are read; the stores stay inside the
                // rows `step / 2` and on of the panel, of which there are `depth / 2`, rounded up.
                unsafe {
                    let mut rows = [_mm512_setzero_si512(); 16];
                    for (line, row) in rows.iter_mut().enumerate() {
                        if base + line < present {
                            *row = T::pairs(values.add(start + (base + line) * line_stride + step), count);
                        }
                    }
                    let columns = transpose_16x16(rows);
                    for (pair, &column) in columns.iter().take(count.div_ceil(2)).enumerate() {
                        let to = out.add((step / 2 + pair) * width + base);
                        _mm512_mask_storeu_epi32(to.cast(), mask, column);
                    }
                }
            }
        }
    }

    /// Words `[16, 16]` with rows and columns exchanged: within pairs of rows, within fours, then whole quarters.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn transpose_16x16(rows: [__m512i; 16]) -> [__m512i; 16] {
        let zero = _mm512_setzero_si512();
        let (mut a, mut b, mut out) = ([zero; 16], [zero; 16], [zero; 16]);
        for i in 0..8 {
            a[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
            a[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
        }
        for i in 0..4 {
            b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
            b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
            b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
            b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
        }
        // Quarter q of b[4 i + c] is column 4 q + c of rows 4 i to 4 i + 3.
        for c in 0..4 {
            let even = |i: usize| _mm512_shuffle_i32x4::<0x88>(b[i + c], b[i + 4 + c]);
            let odd = |i: usize| _mm512_shuffle_i32x4::<0xdd>(b[i + c], b[i + 4 + c]);
            let (x0, y0, x1, y1) = (even(0), even(8), odd(0), odd(8));
            out[c] = _mm512_shuffle_i32x4::<0x88>(x0, y0);
            out[4 + c] = _mm512_shuffle_i32x4::<0x88>(x1, y1);
            out[8 + c] = _mm512_shuffle_i32x4::<0xdd>(x0, y0);
            out[12 + c] = _mm512_shuffle_i32x4::<0xdd>(x1, y1);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::buffer::Floats;

    #[test]
    fn every_orientation_and_type_packs_the_same_pairs() {
        for (lines, depth) in [(1, 1), (3, 2), (14, 31), (15, 33), (40, 64), (33, 65), (70, 97)] {
            let stride = depth + 3;
            let values: Vec<f32> =
                (0..lines * stride).map(|i| (i * 37 % 1009) as f32 * 0.37 - 100.0).collect();
            let rounded: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
            // The same matrix with lines contiguous across.
            let across: Vec<bf16> =
                (0..depth * lines).map(|i| rounded[i % lines * stride + i / lines]).collect();
            for width in [6, 14, 16, 32] {
                for panel in 0..lines.div_ceil(width) {
                    let truth: Vec<u32> = (0..depth.div_ceil(2) * width)
                        .map(|at| {
                            let (pair, line) = (at / width, panel * width + at % width);
                            let half = |step: usize| match line < lines && step < depth {
                                true => u32::from(rounded[line * stride + step].to_bits()),
                                false => 0,
                            };
                            half(2 * pair) | half(2 * pair + 1) << 16
                        })
                        .collect();
                    let along = |data| View::rows(data, 0, lines, depth, stride);
                    let crosswise = View::rows(Floats::Bf16(&across), 0, depth, lines, lines);
                    for (view, side) in [
                        (along(Floats::F32(&values)), Side::A),
                        (along(Floats::Bf16(&rounded)), Side::A),
                        (along(Floats::F32(&values)).transposed(), Side::B),
                        (crosswise, Side::B),
                        (crosswise.transposed(), Side::A),
                    ] {
                        let mut out = vec![0xdead_beef; truth.len()];
                        let place = Place { width, panel_words: truth.len(), first_word: 0 };
                        pack_panels(&view, side, panel..panel + 1, place, &mut out);
                        assert_eq!(out, truth, "{lines} x {depth}, width {width}, panel {panel}");
                    }
                }
            }
        }
    }
}
