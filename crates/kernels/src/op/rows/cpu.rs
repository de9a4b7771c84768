//! The row operations on the CPU: copies, bound by memory.

use super::{Rows, width};
use crate::cpu::blocks::rows_per_block;
use crate::{Cpu, Result, Tensor};

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
}
