//! The row operations on the CPU: copies, bound by memory.

use super::{Rows, copy_width, width};
use crate::cpu::blocks::rows_per_block;
use crate::{Cpu, Error, Result, Tensor};

impl Rows for Cpu {
    fn gather_rows(&self, rows: &Tensor, x: &Tensor, y: &mut Tensor) -> Result<()> {
        let op = "gather_rows";
        let d = width(op, rows, y, x)?;
        let (rows, x, y) = (rows.u32(op, "rows")?, x.f32(op, "x")?, y.f32_mut(op, "y")?);
        if y.is_empty() {
            return Ok(());
        }
        let block = rows_per_block(d);
        self.each(y.len(), rows.chunks(block).zip(y.chunks_mut(block * d)), |(rows, y)| {
            for (&row, y) in rows.iter().zip(y.chunks_exact_mut(d)) {
                y.copy_from_slice(&x[row as usize * d..][..d]);
            }
        });
        Ok(())
    }

    fn scatter_rows(&self, rows: &Tensor, dy: &Tensor, dx: &mut Tensor) -> Result<()> {
        let op = "scatter_rows";
        let d = width(op, rows, dy, dx)?;
        let t = dx.shape()[0];
        let (rows, dy, dx) = (rows.u32(op, "rows")?, dy.f32(op, "dy")?, dx.f32_mut(op, "dx")?);
        if dx.is_empty() {
            return Ok(());
        }
        let mut sources: Vec<Option<&[f32]>> = vec![None; t];
        for (&row, dy) in rows.iter().zip(dy.chunks_exact(d)) {
            sources[row as usize] = Some(dy);
        }
        let block = rows_per_block(d);
        self.each(dx.len(), sources.chunks(block).zip(dx.chunks_mut(block * d)), |(sources, dx)| {
            for (source, dx) in sources.iter().zip(dx.chunks_exact_mut(d)) {
                match source {
                    Some(dy) => dx.copy_from_slice(dy),
                    None => dx.fill(0.0),
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
        if let Some(twice) = pairs.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            let message = format!("row {} of y would be written twice", twice[0].0);
            return Err(Error::Value { op, message });
        }
        let (x, y) = (x.f32(op, "x")?, y.f32_mut(op, "y")?);
        if x.is_empty() || y.is_empty() {
            return Ok(());
        }
        let copies = pairs.len() * d;
        let blocks = destinations(pairs.chunks(rows_per_block(d)), y, d);
        self.each(copies, blocks, |(pairs, first, y)| {
            for &(to, from) in pairs {
                y[(to as usize - first) * d..][..d].copy_from_slice(&x[from as usize * d..][..d]);
            }
        });
        Ok(())
    }
}

/// For every block of `(to, from)` pairs, sorted by `to`: the pairs, the first row they write, and the rows of
/// `y [P, D]` from it to the last one they write.
fn destinations<'a>(
    blocks: impl Iterator<Item = &'a [(u32, u32)]>,
    mut y: &'a mut [f32],
    d: usize,
) -> impl Iterator<Item = (&'a [(u32, u32)], usize, &'a mut [f32])> {
    let mut next = 0;
    blocks.map(move |pairs| {
        let (first, last) = (pairs[0].0 as usize, pairs[pairs.len() - 1].0 as usize);
        let from_first = std::mem::take(&mut y).split_at_mut((first - next) * d).1;
        let (rows, behind) = from_first.split_at_mut((last + 1 - first) * d);
        (y, next) = (behind, last + 1);
        (pairs, first, rows)
    })
}
