//! The row operations on the CPU: copies, bound by memory.

use half::bf16;

use super::{Rows, check_once, copy_width, width};
use crate::buffer::{Floats, FloatsMut};
use crate::cpu::blocks::rows_per_block;
use crate::{Cpu, Result, Tensor};

impl Rows for Cpu {
    fn gather_rows(&self, rows: &Tensor, x: &Tensor, y: &mut Tensor) -> Result<()> {
        let op = "gather_rows";
        let d = width(op, rows, y, x)?;
        let (length, rows, x) = (y.len(), rows.u32(op, "rows")?, x.floats(op, "x")?);
        let y = y.floats_mut(op, "y")?;
        if length == 0 {
            return Ok(());
        }
        let block = rows_per_block(d);
        self.each(length, rows.chunks(block).zip(y.chunks(block * d)), |(rows, y)| {
            for (&row, y) in rows.iter().zip(y.chunks(d)) {
                y.copy(row_of(x, row, d));
            }
        });
        Ok(())
    }

    fn scatter_rows(&self, rows: &Tensor, dy: &Tensor, dx: &mut Tensor) -> Result<()> {
        let op = "scatter_rows";
        let d = width(op, rows, dy, dx)?;
        let t = dx.shape()[0];
        let (length, rows, dy) = (dx.len(), rows.u32(op, "rows")?, dy.floats(op, "dy")?);
        let dx = dx.floats_mut(op, "dx")?;
        if length == 0 {
            return Ok(());
        }
        let mut sources: Vec<Option<Floats<'_>>> = vec![None; t];
        for (i, &row) in rows.iter().enumerate() {
            sources[row as usize] = Some(row_of(dy, i as u32, d));
        }
        let block = rows_per_block(d);
        self.each(length, sources.chunks(block).zip(dx.chunks(block * d)), |(sources, dx)| {
            for (source, dx) in sources.iter().zip(dx.chunks(d)) {
                match (source, dx) {
                    (Some(dy), dx) => dx.copy(*dy),
                    (None, FloatsMut::F32(dx)) => dx.fill(0.0),
                    (None, FloatsMut::Bf16(dx)) => dx.fill(bf16::ZERO),
                }
            }
        });
        Ok(())
    }

    fn copy_rows(&self, from: &Tensor, x: &Tensor, to: &Tensor, y: &mut Tensor) -> Result<()> {
        let op = "copy_rows";
        let d = copy_width(op, (from, x), (to, y))?;
        let (from, to) = (from.u32(op, "from")?, to.u32(op, "to")?);
        let mut pairs: Vec<(u32, u32)> = to.iter().copied().zip(from.iter().copied()).collect();
        pairs.sort_unstable();
        check_once(op, pairs.iter().map(|pair| pair.0))?;
        let (empty, x) = (x.is_empty() || y.is_empty(), x.floats(op, "x")?);
        let y = y.floats_mut(op, "y")?;
        if empty {
            return Ok(());
        }
        let blocks = pairs.chunks(rows_per_block(d));
        let blocks: Vec<_> = match y {
            FloatsMut::F32(y) => {
                destinations(blocks, y, d).map(|(p, f, y)| (p, f, FloatsMut::F32(y))).collect()
            }
            FloatsMut::Bf16(y) => {
                destinations(blocks, y, d).map(|(p, f, y)| (p, f, FloatsMut::Bf16(y))).collect()
            }
        };
        self.each(pairs.len() * d, blocks.into_iter(), |(pairs, first, mut y)| {
            for &(to, from) in pairs {
                let start = (to as usize - first) * d;
                y.reborrow().slice(start..start + d).copy(row_of(x, from, d));
            }
        });
        Ok(())
    }
}

/// Row `row` of `x [T, D]`.
fn row_of(x: Floats<'_>, row: u32, d: usize) -> Floats<'_> {
    x.slice(row as usize * d..(row as usize + 1) * d)
}

/// For every block of `(to, from)` pairs, sorted by `to`: the pairs, the first row they write, and the rows of
/// `y [P, D]` from it to the last one they write.
fn destinations<'a, T>(
    blocks: impl Iterator<Item = &'a [(u32, u32)]>,
    mut y: &'a mut [T],
    d: usize,
) -> impl Iterator<Item = (&'a [(u32, u32)], usize, &'a mut [T])> {
    let mut next = 0;
    blocks.map(move |pairs| {
        let (first, last) = (pairs[0].0 as usize, pairs[pairs.len() - 1].0 as usize);
        let from_first = std::mem::take(&mut y).split_at_mut((first - next) * d).1;
        let (rows, behind) = from_first.split_at_mut((last + 1 - first) * d);
        (y, next) = (behind, last + 1);
        (pairs, first, rows)
    })
}
