//! The thin products of an adapter, which read the panels that the layer's own product reads.
//!
//! `u = a F`, `h = s u M`: a `[T, K]` in panels, F `[K, r]`, M `[r, r]`. u and h are `f32`; h is rounded into panels, to
//! be a term of a sum. A panel's rows are done at once, while they are in a cache.

use std::ops::Range;
use std::sync::Arc;

use super::micro::{Micro, Segment, TILE};
use super::pack::{Place, pack_panels, pair_of};
use super::rows::{OpenRows, PackedRows};
use crate::buffer::{Recycled, Recycler};
use crate::cpu::gemm::pack::{Side, View};
use crate::cpu::gemm::{Output, SharedRows};
use crate::cpu::vector::{LANES, Level, lanes, vectorised};

/// M `[r, r]`.
#[derive(Clone, Copy)]
pub(crate) enum Square<'a> {
    /// As it lies.
    AsIs(&'a [f32]),
    /// What lies is its transpose.
    Transposed(&'a [f32]),
}

/// An adapter's part of a layer, forward or backward.
pub(crate) struct Latent<'a> {
    /// The operand a `[T, K]`, by its place in the group.
    pub(crate) operand: usize,
    /// F `[K, r]`.
    pub(crate) factor: View<'a>,
    pub(crate) square: Square<'a>,
    pub(crate) scale: f32,
    /// u `[T, r]`, replaced.
    pub(crate) u: &'a mut [f32],
    pub(crate) gradient: Option<SquareGradient<'a>>,
}

/// `dM += scale u^T other`; other `[T, r]`, dM `[r, r]`.
pub(crate) struct SquareGradient<'a> {
    pub(crate) other: &'a [f32],
    pub(crate) scale: f32,
    pub(crate) gradient: &'a mut [f32],
}

impl Latent<'_> {
    /// r.
    pub(super) fn rank(&self) -> usize {
        self.factor.columns
    }

    /// Room for F and M as the panels' products read them.
    pub(super) fn room(&self, recycler: &Arc<Recycler>, micro: Micro) -> Factors {
        let (r, pairs) = (self.rank(), self.factor.rows.div_ceil(2));
        let panels = r.div_ceil(micro.columns);
        Factors {
            factor: recycler.take(panels * pairs * micro.columns),
            square: recycler.take(r * padded(r)),
            pairs,
            rank: r,
        }
    }
}

/// Columns of M's rows, so that vectors need no edge.
fn padded(r: usize) -> usize {
    r.next_multiple_of(LANES)
}

/// F in panels `[panels, pairs, columns]`, and M `[r, padded r]`.
pub(super) struct Factors {
    factor: Recycled,
    square: Recycled,
    pairs: usize,
    rank: usize,
}

/// [`Factors`] while tasks write them.
pub(super) struct OpenFactors<'a> {
    factor: SharedRows<'a, u32>,
    square: SharedRows<'a, f32>,
    factor_words: usize,
}

impl Factors {
    pub(super) fn open(&mut self) -> OpenFactors<'_> {
        let factor: &mut [u32] = bytemuck::cast_slice_mut(self.factor.as_mut_slice());
        let factor_words = factor.len();
        let square = Output::rows(self.square.as_mut_slice(), padded(self.rank)).share();
        OpenFactors { factor: Output::rows(factor, factor_words).share(), square, factor_words }
    }

    /// u of one panel a `[pairs, rows]`, into `u [rows, r]`.
    #[expect(unsafe_code, reason = "calls the micro-kernel, which works on pointers")]
    fn first(&self, micro: Micro, a: &[u32], u: &mut [f32]) {
        let Micro { rows, columns, run } = micro;
        assert!(a.len() == self.pairs * rows && u.len() == rows * self.rank);
        let factor: &[u32] = bytemuck::cast_slice(self.factor.as_slice());
        let mut tile = [0.0f32; TILE];
        for panel in 0..self.rank.div_ceil(columns) {
            let b = &factor[panel * self.pairs * columns..][..self.pairs * columns];
            let segment = Segment { pairs: self.pairs, a: a.as_ptr(), b: b.as_ptr() };
            // SAFETY: both panels hold `pairs` steps of `rows` and `columns` words.
            unsafe { run(&[segment], &mut tile) };
            let first = panel * columns;
            let width = columns.min(self.rank - first);
            for (u, sums) in u.chunks_exact_mut(self.rank).zip(tile.chunks_exact(columns)) {
                u[first..first + width].copy_from_slice(&sums[..width]);
            }
        }
    }

    /// u and h of panel `panel` of the operand: u `[T, r]`, h in panels where it is wanted.
    ///
    /// # Safety
    /// No other task may have this panel's rows of u, nor its panel of h.
    #[expect(unsafe_code, reason = "passes its caller's promise on")]
    pub(super) unsafe fn panel(
        &self,
        micro: Micro,
        scale: f32,
        operand: &PackedRows,
        panel: usize,
        u: &SharedRows<'_, f32>,
        h: Option<&OpenRows<'_>>,
    ) {
        let (r, wide) = (self.rank, padded(self.rank));
        let mut own = vec![0.0; micro.rows * (r + wide)];
        let (own_u, own_h) = own.split_at_mut(micro.rows * r);
        self.first(micro, operand.panel(panel), own_u);
        let (first, height) = (panel * micro.rows, micro.rows.min(operand.rows - panel * micro.rows));
        // SAFETY: the rows of this panel, which are this task's.
        unsafe { u.slice(first * r, height * r) }.copy_from_slice(&own_u[..height * r]);
        if let Some(h) = h {
            times_square(own_u, self.square.as_slice(), r, scale, own_h);
            // SAFETY: this task's panel.
            let words = unsafe { h.panel(panel) };
            for (pair, words) in words.chunks_exact_mut(micro.rows).enumerate() {
                for (word, h) in words.iter_mut().zip(own_h.chunks_exact(wide)) {
                    // Behind an odd r, M's padding has made it 0.
                    *word = pair_of(h[2 * pair], h[2 * pair + 1]);
                }
            }
        }
    }
}

impl OpenFactors<'_> {
    /// Packs F, and copies M with zeros behind its rows.
    ///
    /// # Safety
    /// No other task may write these factors at the time.
    #[expect(unsafe_code, reason = "writes what its caller promises to be its own")]
    pub(super) unsafe fn fill(&self, micro: Micro, latent: &Latent<'_>) {
        let (r, columns) = (latent.rank(), micro.columns);
        let panels = r.div_ceil(columns);
        let panel_words = self.factor_words / panels.max(1);
        // SAFETY: promised by the caller.
        let (factor, square) =
            unsafe { (self.factor.slice(0, self.factor_words), self.square.slice(0, r * padded(r))) };
        if panel_words > 0 {
            let place = Place { width: columns, panel_words, first_word: 0 };
            pack_panels(&latent.factor, Side::B, 0..panels, place, factor);
        }
        for (i, row) in square.chunks_exact_mut(padded(r)).enumerate() {
            match latent.square {
                Square::AsIs(m) => row[..r].copy_from_slice(&m[i * r..][..r]),
                Square::Transposed(m) => (0..r).for_each(|j| row[j] = m[j * r + i]),
            }
            row[r..].fill(0.0);
        }
    }
}

/// Rows of a block of h whose sums stay in registers: half a panel.
const BLOCK_ROWS: usize = 7;

vectorised! {
    /// `h = scale u M`; u `[rows, r]`, m `[r, padded r]`, h `[rows, padded r]`.
    fn times_square<L>(u: &[f32], m: &[f32], r: usize, scale: f32, h: &mut [f32]) {
        let wide = r.next_multiple_of(LANES);
        let rows = u.len() / r;
        for first in (0..rows).step_by(BLOCK_ROWS) {
            let height = BLOCK_ROWS.min(rows - first);
            for column in (0..wide).step_by(LANES) {
                let mut sums = [[0.0f32; LANES]; BLOCK_ROWS];
                // A last block of fewer rows multiplies its first row again, and drops the result.
                let row = |i: usize| &u[(first + if i < height { i } else { 0 }) * r..][..r];
                let rows: [&[f32]; BLOCK_ROWS] = std::array::from_fn(row);
                for j in 0..r {
                    let m: &[f32; LANES] = m[j * wide + column..][..LANES].try_into().expect("whole vectors");
                    for (sums, row) in sums.iter_mut().zip(&rows) {
                        let u = row[j];
                        for (sum, &m) in sums.iter_mut().zip(m) {
                            *sum = lanes::fma::<L>(u, m, *sum);
                        }
                    }
                }
                for (i, sums) in sums.iter().take(height).enumerate() {
                    let h = &mut h[(first + i) * wide + column..][..LANES];
                    h.iter_mut().zip(sums).for_each(|(h, &sum)| *h = scale * sum);
                }
            }
        }
    }
}

/// Rows of dM in one task.
pub(super) const GRADIENT_ROWS: usize = 16;

/// Columns of dM whose sums stay in registers while all tokens pass by.
const WIDE: usize = 4 * LANES;

/// Columns `column..column + W` of row `row` of `u^T other`; u and other `[T, r]`.
#[inline(always)]
fn row_of_product<L: Level, const W: usize>(
    u: &[f32],
    other: &[f32],
    r: usize,
    row: usize,
    column: usize,
) -> [f32; W] {
    let mut sums = [0.0f32; W];
    for (u, other) in u.chunks_exact(r).zip(other.chunks_exact(r)) {
        let u = u[row];
        for (sum, &other) in sums.iter_mut().zip(&other[column..column + W]) {
            *sum = lanes::fma::<L>(u, other, *sum);
        }
    }
    sums
}

vectorised! {
    /// Rows `rows` of `dM += scale u^T other`, into `out [rows, r]`: u and other `[T, r]`.
    pub(super) fn square_gradient<L>(
        u: &[f32],
        other: &[f32],
        r: usize,
        rows: Range<usize>,
        scale: f32,
        out: &mut [f32],
    ) {
        let add = |out: &mut [f32], sums: &[f32]| {
            out.iter_mut().zip(sums).for_each(|(out, &sum)| *out = lanes::fma::<L>(scale, sum, *out));
        };
        for (row, out) in rows.zip(out.chunks_exact_mut(r)) {
            let mut column = 0;
            while column + WIDE <= r {
                add(&mut out[column..], &row_of_product::<L, WIDE>(u, other, r, row, column));
                column += WIDE;
            }
            while column + LANES <= r {
                add(&mut out[column..], &row_of_product::<L, LANES>(u, other, r, row, column));
                column += LANES;
            }
            while column < r {
                add(&mut out[column..], &row_of_product::<L, 1>(u, other, r, row, column));
                column += 1;
            }
        }
    }
}
