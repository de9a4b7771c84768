//! Where heads lie in the operands, and results that tasks on several threads write.

use std::ops::Range;

use super::AttentionShape;
use super::tile::{LANES, Place};
use crate::buffer::FloatsMut;
use crate::cpu::gemm::{Output, SharedRows};
use crate::cpu::vector::{lanes, vectorised};

/// Where heads lie in the rows of the operands.
#[derive(Clone, Copy)]
pub(super) struct Heads<'a> {
    pub(super) geometry: &'a AttentionShape,
}

impl Heads<'_> {
    /// H*E.
    fn query_width(&self) -> usize {
        self.geometry.heads * self.geometry.head_size
    }

    /// G*E.
    fn key_width(&self) -> usize {
        self.geometry.kv_heads * self.geometry.head_size
    }

    /// The first element of query head `head` in row `row`.
    pub(super) fn query_offset(&self, row: usize, head: usize) -> usize {
        row * self.query_width() + head * self.geometry.head_size
    }

    /// The first element of key/value head `head` in row `row`.
    pub(super) fn key_offset(&self, row: usize, head: usize) -> usize {
        row * self.key_width() + head * self.geometry.head_size
    }

    /// One query head of `rows`.
    pub(super) fn queries(&self, rows: &Range<usize>, head: usize) -> Place {
        Place { start: self.query_offset(rows.start, head), stride: self.query_width(), rows: rows.len() }
    }

    /// One key/value head of `rows`.
    pub(super) fn keys(&self, rows: &Range<usize>, head: usize) -> Place {
        Place { start: self.key_offset(rows.start, head), stride: self.key_width(), rows: rows.len() }
    }

    /// The rows of a result for so many queries and heads that read a key/value head, query by query.
    pub(super) fn group_rows(&self, query: usize, kv_head: usize, count: usize) -> Rows {
        let (group, e) = (self.geometry.group(), self.geometry.head_size);
        Rows { start: self.query_offset(query, kv_head * group), stride: self.query_width(), group, count, e }
    }

    /// The rows of a result for one query head, or of one key/value head.
    pub(super) fn head_rows(&self, place: Place) -> Rows {
        let Place { start, stride, rows } = place;
        Rows { start, stride, group: 1, count: rows, e: self.geometry.head_size }
    }

    /// The query heads of one row that read a key/value head, one after another.
    pub(super) fn group(&self, row: usize, kv_head: usize) -> Place {
        let (group, e) = (self.geometry.group(), self.geometry.head_size);
        Place { start: self.query_offset(row, kv_head * group), stride: e, rows: group }
    }
}

/// A result of either type, written by several tasks.
pub(super) enum Target<'a> {
    F32(SharedRows<'a, f32>),
    Bf16(SharedRows<'a, half::bf16>),
}

impl<'a> Target<'a> {
    pub(super) fn new(x: FloatsMut<'a>) -> Self {
        match x {
            FloatsMut::F32(x) => Target::F32(Output::rows(x, 1).share()),
            FloatsMut::Bf16(x) => Target::Bf16(Output::rows(x, 1).share()),
        }
    }

    /// Writes rows of `x`, `e` in whole registers apart, each times its factor or all times the only one, rounded to
    /// the result's type.
    ///
    /// # Safety
    /// No other task may reach these rows at the time.
    #[allow(unsafe_code, reason = "several tasks write one array")]
    pub(super) unsafe fn write(&self, rows: Rows, x: &[f32], factors: &[f32]) {
        match self {
            Target::F32(out) => scaled(rows, x, factors, out),
            Target::Bf16(out) => scaled_and_rounded(rows, x, factors, out),
        }
    }
}

/// Rows of `e` elements in a result: `group` of them one after another at every `stride`.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) start: usize,
    pub(super) stride: usize,
    pub(super) group: usize,
    pub(super) count: usize,
    pub(super) e: usize,
}

impl Rows {
    /// A row's values and its factor.
    #[inline(always)]
    fn row<'x>(&self, x: &'x [f32], factors: &[f32], row: usize) -> (&'x [f32], f32) {
        (&x[row * self.e.next_multiple_of(LANES)..][..self.e], factors[row.min(factors.len() - 1)])
    }

    /// The first element of every row.
    #[inline(always)]
    fn offsets(self) -> impl Iterator<Item = usize> {
        let Rows { start, stride, group, count, e } = self;
        (0..count.div_ceil(group))
            .flat_map(move |i| (0..group).map(move |j| start + i * stride + j * e))
            .take(count)
    }
}

vectorised! {
    /// `out = factor x`; called by [`Target::write`] alone, whose caller makes the promise.
    fn scaled<L>(rows: Rows, x: &[f32], factors: &[f32], out: &SharedRows<'_, f32>) {
        for (row, offset) in rows.offsets().enumerate() {
            let (x, factor) = rows.row(x, factors, row);
            // SAFETY: no other task may reach these elements, as promised to `Target::write`.
            let out = unsafe { out.slice(offset, rows.e) };
            out.iter_mut().zip(x).for_each(|(out, x)| *out = factor * x);
        }
    }
}

vectorised! {
    /// The same, rounded.
    fn scaled_and_rounded<L>(rows: Rows, x: &[f32], factors: &[f32], out: &SharedRows<'_, half::bf16>) {
        for (row, offset) in rows.offsets().enumerate() {
            let (x, factor) = rows.row(x, factors, row);
            // SAFETY: as above.
            let out = unsafe { out.slice(offset, rows.e) };
            out.iter_mut().zip(x).for_each(|(out, x)| *out = lanes::round(factor * x));
        }
    }
}

/// Parts of one task's working space, each at an address that registers are loaded from in one piece.
pub(super) struct Space<'a>(&'a mut [f32]);

impl<'a> Space<'a> {
    /// Words to ask for so that parts of so many words can be taken.
    pub(super) fn words(parts: &[usize]) -> usize {
        parts.iter().map(|part| part.next_multiple_of(LANES)).sum::<usize>() + LANES
    }

    /// `words` as [`Space::words`] counts them.
    pub(super) fn new(words: &'a mut [f32]) -> Self {
        let first = words.as_ptr().align_offset(LANES * size_of::<f32>()).min(LANES);
        Space(&mut words[first..])
    }

    /// The next part; what stands in it is unspecified.
    pub(super) fn take(&mut self, words: usize) -> &'a mut [f32] {
        let (part, rest) = std::mem::take(&mut self.0).split_at_mut(words.next_multiple_of(LANES));
        self.0 = rest;
        &mut part[..words]
    }
}
