//! The bias on the CPU.

use super::{Bias, width};
use crate::cpu::blocks::{COLUMNS, rows_per_block};
use crate::cpu::vector;
use crate::{Cpu, Memory, Result, Tensor};

impl Bias for Cpu {
    fn bias(&self, b: &Tensor, y: &mut Tensor) -> Result<()> {
        let op = "bias";
        let n = width(op, y, b)?;
        let (b, y) = (self.to_f32(b)?, y.f32_mut(op, "y")?);
        if y.is_empty() {
            return Ok(());
        }
        self.each(y.len(), y.chunks_mut(rows_per_block(n) * n), |y| {
            y.chunks_exact_mut(n).for_each(|y| vector::axpy(1.0, &b, y));
        });
        Ok(())
    }

    fn bias_gradient(&self, dy: &Tensor, db: &mut Tensor) -> Result<()> {
        let op = "bias_gradient";
        let n = width(op, dy, db)?;
        let (dy, db) = (dy.f32(op, "dy")?, db.f32_mut(op, "db")?);
        if dy.is_empty() {
            return Ok(());
        }
        self.each(dy.len(), db.chunks_mut(COLUMNS).enumerate(), |(block, db)| {
            for dy in dy.chunks_exact(n) {
                vector::axpy(1.0, &dy[block * COLUMNS..][..db.len()], db);
            }
        });
        Ok(())
    }
}
