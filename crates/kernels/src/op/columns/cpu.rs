//! The column ranges on the CPU: copies, bound by memory.

use super::{Columns, widths};
use crate::cpu::blocks::rows_per_block;
use crate::{Cpu, Result, Tensor};

impl Columns for Cpu {
    fn take_columns(&self, x: &Tensor, from: usize, y: &mut Tensor) -> Result<()> {
        let op = "take_columns";
        let (whole, part) = widths(op, x, from, y)?;
        let (x, y) = (x.f32(op, "x")?, y.f32_mut(op, "y")?);
        if y.is_empty() {
            return Ok(());
        }
        let rows = rows_per_block(part);
        self.each(y.len(), x.chunks(rows * whole).zip(y.chunks_mut(rows * part)), |(x, y)| {
            for (x, y) in x.chunks_exact(whole).zip(y.chunks_exact_mut(part)) {
                y.copy_from_slice(&x[from..from + part]);
            }
        });
        Ok(())
    }

    fn put_columns(&self, y: &Tensor, from: usize, x: &mut Tensor) -> Result<()> {
        let op = "put_columns";
        let (whole, part) = widths(op, x, from, y)?;
        let (y, x) = (y.f32(op, "y")?, x.f32_mut(op, "x")?);
        if y.is_empty() {
            return Ok(());
        }
        let rows = rows_per_block(part);
        self.each(y.len(), x.chunks_mut(rows * whole).zip(y.chunks(rows * part)), |(x, y)| {
            for (x, y) in x.chunks_exact_mut(whole).zip(y.chunks_exact(part)) {
                x[from..from + part].copy_from_slice(y);
            }
        });
        Ok(())
    }
}
