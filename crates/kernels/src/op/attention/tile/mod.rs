//! Arithmetic on tiles in cache, in one of two kinds of words.
//!
//! Where the processor has dot products of `bf16` pairs with `f32` sums, `bf16` operands are held as pairs of
//! neighbours along the sum, and the probabilities are rounded to `bf16` as well. Everything else is held as `f32`.
//! A word has 4 bytes either way, so layouts and loops are the same: the left operand is read word by word where it
//! lies, the right one in panels of 32 columns, `[steps, 32]`.

mod pack;
mod product;
mod scores;

pub(super) use pack::Place;
pub(super) use product::{Lines, Start};
pub(super) use scores::{Slopes, Softmax};

use half::bf16;

use crate::DType;
use crate::buffer::Floats;
use crate::cpu::vector;
#[cfg(target_arch = "x86_64")]
use crate::cpu::{gemm::has_bf16_dot_products, vector::Simd};

/// Words of a register.
pub(super) const LANES: usize = 16;
/// Columns of a panel.
pub(super) const PANEL: usize = 2 * LANES;
/// Rows of the largest product at a time.
pub(super) const ROWS: usize = 12;

/// The tile operations that this processor has for a type of operands.
#[derive(Clone, Copy)]
pub(super) struct Tiles {
    /// Elements of a word: 1 or 2.
    pub(super) pair: usize,
    product: product::Run,
    softmax: unsafe fn(&mut Softmax<'_>),
    slopes: unsafe fn(&mut Slopes<'_>),
}

impl Tiles {
    /// The best ones for operands of a type.
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables, reason = "both types are held as f32"))]
    pub(super) fn of(dtype: DType) -> Self {
        #[cfg(target_arch = "x86_64")]
        if dtype == DType::Bf16 && has_bf16_dot_products() && vector::simd() == Simd::Avx512 {
            return Tiles {
                pair: 2,
                product: product::x86::bf16_avx512,
                softmax: scores::x86::softmax_bf16,
                slopes: scores::x86::slopes_bf16,
            };
        }
        #[cfg(target_arch = "x86_64")]
        let product: product::Run = match vector::simd() {
            Simd::Avx512 => product::x86::f32_avx512,
            Simd::Avx2 => product::x86::f32_avx2,
            Simd::Baseline => product::portable,
        };
        #[cfg(not(target_arch = "x86_64"))]
        let product: product::Run = product::portable;
        Tiles { pair: 1, product, softmax: scores::softmax_f32, slopes: scores::slopes_f32 }
    }

    /// Steps of a sum over `elements` elements.
    pub(super) fn steps(&self, elements: usize) -> usize {
        elements.div_ceil(self.pair)
    }

    /// Words that a row of `e` elements takes in [`Tiles::rows`]: whole registers.
    pub(super) fn width(&self, e: usize) -> usize {
        self.steps(e).next_multiple_of(LANES)
    }

    /// Words of [`Tiles::transposed`] of up to `rows` rows.
    pub(super) fn transposed_length(&self, rows: usize, e: usize) -> usize {
        rows.next_multiple_of(PANEL) * self.width(e)
    }

    /// Words of one panel of [`Tiles::columns`] of up to `rows` rows.
    pub(super) fn panel_length(&self, rows: usize) -> usize {
        rows.next_multiple_of(LANES) / self.pair * PANEL
    }

    /// Words of [`Tiles::columns`] of up to `rows` rows.
    pub(super) fn columns_length(&self, rows: usize, e: usize) -> usize {
        self.panel_length(rows) * e.div_ceil(PANEL)
    }

    /// Copies rows of `e` elements of a tensor into words, `out [rows, width(e)]`: for the left operand.
    pub(super) fn rows(&self, x: Floats<'_>, place: Place, e: usize, out: &mut [f32]) {
        pack::rows(x, place, e, self.pair, self.width(e), out);
    }

    /// The right operand of a sum over the elements of rows: `words [rows, width(e)]` to panels of 32 rows.
    pub(super) fn transposed(&self, words: &[f32], rows: usize, e: usize, out: &mut [f32]) {
        pack::transposed(words, rows, self.width(e), out);
    }

    /// The right operand of a sum over rows: `words [rows, width(e)]` to panels of 32 columns, of
    /// `panel_length(capacity)` words each.
    pub(super) fn columns(&self, words: &[f32], rows: usize, e: usize, capacity: usize, out: &mut [f32]) {
        let shape = (rows, self.width(e));
        let out = (out, self.panel_length(capacity));
        pack::columns(words, shape, e.next_multiple_of(LANES), self.pair, out);
    }

    /// Two rows of results as the steps of a sum over them; for words of pairs.
    pub(super) fn zip_rows(&self, low: &[f32], high: &[f32], out: &mut [f32]) {
        let halves = |words| bytemuck::cast_slice::<f32, bf16>(words);
        pack::zip_rows(halves(low), halves(high), out);
    }

    /// True where no element of the words is infinite or NaN.
    pub(super) fn all_finite(&self, words: &[f32]) -> bool {
        if self.pair == 2 { pack::pairs_are_finite(words) } else { vector::all_finite(words) }
    }

    /// Element `index` of a row of words.
    pub(super) fn element(&self, words: &[f32], index: usize) -> f32 {
        match self.pair {
            1 => words[index],
            _ => bytemuck::cast_slice::<f32, bf16>(words)[index].to_f32(),
        }
    }

    /// Columns `columns`, multiples of [`LANES`], of rows of `c`, `c_stride` apart, from `steps` steps of `a` and of
    /// panels `b`, of `length` words each and starting at the sum's first step.
    pub(super) fn product(
        &self,
        (a, rows, steps): (Lines<'_>, usize, usize),
        (b, length): (&[f32], usize),
        columns: std::ops::Range<usize>,
        (c, c_stride): (&mut [f32], usize),
        start: Start<'_>,
    ) {
        let mut column = columns.start;
        while column < columns.end {
            let within = column % PANEL;
            let vectors = ((columns.end - column) / LANES).min((PANEL - within) / LANES);
            let b = &b[column / PANEL * length + within..];
            product::run(self.product, (a, rows, steps), (b, vectors), (&mut c[column..], c_stride), start);
            column += vectors * LANES;
        }
    }

    /// See [`Softmax`].
    #[expect(unsafe_code, reason = "calls code for instructions that the processor was asked for")]
    pub(super) fn softmax(&self, mut rows: Softmax<'_>) {
        // SAFETY: `of` chose it for this processor.
        unsafe { (self.softmax)(&mut rows) };
    }

    /// See [`Slopes`].
    #[expect(unsafe_code, reason = "calls code for instructions that the processor was asked for")]
    pub(super) fn slopes(&self, mut rows: Slopes<'_>) {
        // SAFETY: `of` chose it for this processor.
        unsafe { (self.slopes)(&mut rows) };
    }
}
