//! Cutting work into blocks for the threads of a [`Cpu`].
//!
//! Blocks depend on the problem's size alone and every output element belongs to one block, so a result does
//! not depend on the number of threads.
//!
//! The loops over elements are written for `f32`. Elements of another type are widened and narrowed a tile at a
//! time in a [`Room`] that a core's first cache holds: memory moves the stored type and nothing else.

use std::ops::Range;

use crate::buffer::{Floats, FloatsMut};
use crate::cpu::vector;
use crate::{Accum, Cpu};

/// Elements of one block: 64 KiB of `f32`, which a core's second cache holds for several operands.
pub(crate) const BLOCK: usize = 1 << 14;

/// Columns of one block of a sum over rows: long enough for the memory's prefetcher, few enough that the
/// narrowest layers still have work for several threads.
pub(crate) const COLUMNS: usize = 256;

/// Rows of `width` elements in one block; at least 1.
pub(crate) fn rows_per_block(width: usize) -> usize {
    (BLOCK / width.max(1)).max(1)
}

/// Elements of one tile: 4 KiB of `f32`, so that a core's first cache holds the widened copies of several operands.
pub(crate) const TILE: usize = 1 << 10;

/// Rows of `width` elements in one tile; at least 1.
pub(crate) fn rows_per_tile(width: usize) -> usize {
    (TILE / width.max(1)).max(1)
}

/// Room for one operand's tile in `f32`; `f32` operands are worked on where they lie and need none.
#[derive(Default)]
pub(crate) struct Room(Vec<f32>);

impl Room {
    /// The elements of a tile.
    pub(crate) fn read<'s>(&'s mut self, x: Floats<'s>) -> &'s [f32] {
        x.widened(&mut self.0)
    }

    /// Columns `columns` of the rows `rows` of `x [T, d]`, one row after another.
    pub(crate) fn read_columns(
        &mut self,
        x: Floats<'_>,
        d: usize,
        rows: Range<usize>,
        columns: Range<usize>,
    ) -> &[f32] {
        let width = columns.len();
        self.0.resize(rows.len() * width, 0.0);
        for (row, out) in rows.zip(self.0.chunks_exact_mut(width)) {
            x.widen(row * d + columns.start, out);
        }
        &self.0
    }

    /// Overwrites a tile with what `work` writes; what stands in its slice before is unspecified.
    pub(crate) fn replace<R>(&mut self, y: FloatsMut<'_>, work: impl FnOnce(&mut [f32]) -> R) -> R {
        match y {
            FloatsMut::F32(values) => work(values),
            FloatsMut::Bf16(values) => {
                self.0.resize(values.len(), 0.0);
                let result = work(&mut self.0);
                vector::narrow(&self.0, values);
                result
            }
        }
    }

    /// Changes a tile by `work`.
    pub(crate) fn update<R>(&mut self, y: FloatsMut<'_>, work: impl FnOnce(&mut [f32]) -> R) -> R {
        match y {
            FloatsMut::F32(values) => work(values),
            FloatsMut::Bf16(values) => {
                self.0.resize(values.len(), 0.0);
                vector::widen(values, &mut self.0);
                let result = work(&mut self.0);
                vector::narrow(&self.0, values);
                result
            }
        }
    }

    /// Has `work` write a tile or add to it.
    pub(crate) fn write<R>(
        &mut self,
        accum: Accum,
        y: FloatsMut<'_>,
        work: impl FnOnce(&mut [f32]) -> R,
    ) -> R {
        match accum {
            Accum::Replace => self.replace(y, work),
            Accum::Add => self.update(y, work),
        }
    }

    /// `x += f` over a tile; the sum as it is stored.
    pub(crate) fn sum<'s>(&'s mut self, f: &[f32], x: FloatsMut<'s>) -> &'s [f32] {
        match x {
            FloatsMut::F32(values) => {
                vector::axpy(1.0, f, values);
                values
            }
            FloatsMut::Bf16(values) => {
                self.update(FloatsMut::Bf16(&mut *values), |x| vector::axpy(1.0, f, x));
                vector::widen(values, &mut self.0);
                &self.0
            }
        }
    }
}

/// Hands `add` the operands' columns from `column` on, as many as `out` has elements, a few rows `[rows, columns]` at a
/// time with their range, first rows first; each of `operands` is `[T, d]`.
pub(crate) fn sum_rows<const N: usize>(
    operands: [Floats<'_>; N],
    d: usize,
    column: usize,
    out: &mut [f32],
    add: impl Fn(Range<usize>, [&[f32]; N], &mut [f32]),
) {
    let (t, columns) = (operands[0].len() / d, column..column + out.len());
    let mut operands = operands.map(|x| (x, Room::default()));
    let step = rows_per_tile(out.len());
    for first in (0..t).step_by(step) {
        let rows = first..t.min(first + step);
        let tiles =
            operands.each_mut().map(|(x, room)| room.read_columns(*x, d, rows.clone(), columns.clone()));
        add(rows, tiles, out);
    }
}

impl Cpu {
    /// Does `work` on every block; on the calling thread where all `elements` together fit in one block,
    /// since waking another thread takes longer than touching them.
    pub(crate) fn each<T: Send>(
        &self,
        elements: usize,
        blocks: impl Iterator<Item = T>,
        work: impl Fn(T) + Send + Sync,
    ) {
        self.map(elements, blocks, work);
    }

    /// The results of `work` on every block, in the order of the blocks; threads as in [`Cpu::each`].
    pub(crate) fn map<T: Send, R: Send>(
        &self,
        elements: usize,
        blocks: impl Iterator<Item = T>,
        work: impl Fn(T) -> R + Send + Sync,
    ) -> Vec<R> {
        if elements < BLOCK || self.threads() == 1 {
            return blocks.map(work).collect();
        }
        self.team.map(blocks.collect(), work)
    }

    /// `out += sum over t of x[t]`, row after row; x `[T, d]`, out `[d]`.
    pub(crate) fn add_rows(&self, x: Floats<'_>, d: usize, out: &mut [f32]) {
        self.each(x.len(), out.chunks_mut(COLUMNS).enumerate(), |(block, out)| {
            sum_rows([x], d, block * COLUMNS, out, |_, [x], out| {
                x.chunks_exact(out.len()).for_each(|x| vector::axpy(1.0, x, out));
            });
        });
    }
}
