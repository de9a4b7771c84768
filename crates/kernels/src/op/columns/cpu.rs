//! The column ranges on the CPU: copies, bound by memory.

use super::{Columns, widths};
use crate::cpu::blocks::rows_per_block;
use crate::{Cpu, Result, Tensor};

impl Columns for Cpu {
    fn take_columns(&self, x: &Tensor, from: usize, y: &mut Tensor) -> Result<()> {
        let op = "take_columns";
        let (whole, part) = widths(op, x, from, y)?;
        let (length, x, y) = (y.len(), x.floats(op, "x")?, y.floats_mut(op, "y")?);
        if length == 0 {
            return Ok(());
        }
        let rows = rows_per_block(part);
        self.each(length, x.chunks(rows * whole).zip(y.chunks(rows * part)), |(x, y)| {
            for (x, y) in x.chunks(whole).zip(y.chunks(part)) {
                y.copy(x.slice(from..from + part));
            }
        });
        Ok(())
    }

    fn put_columns(&self, y: &Tensor, from: usize, x: &mut Tensor) -> Result<()> {
        let op = "put_columns";
        let (whole, part) = widths(op, x, from, y)?;
        let (length, y, x) = (y.len(), y.floats(op, "y")?, x.floats_mut(op, "x")?);
        if length == 0 {
            return Ok(());
        }
        let rows = rows_per_block(part);
        self.each(length, x.chunks(rows * whole).zip(y.chunks(rows * part)), |(x, y)| {
            for (x, y) in x.chunks(whole).zip(y.chunks(part)) {
                x.slice(from..from + part).copy(y);
            }
        });
        Ok(())
    }
}
