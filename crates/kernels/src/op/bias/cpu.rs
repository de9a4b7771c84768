//! The bias on the CPU.

use super::{Bias, width};
use crate::cpu::blocks::{Room, rows_per_block, rows_per_tile};
use crate::cpu::vector;
use crate::{Cpu, Memory, Result, Tensor};

impl Bias for Cpu {
    fn bias(&self, b: &Tensor, y: &mut Tensor) -> Result<()> {
        let op = "bias";
        let n = width(op, y, b)?;
        let (b, length, y) = (self.to_f32(b)?, y.len(), y.floats_mut(op, "y")?);
        if length == 0 {
            return Ok(());
        }
        self.each(length, y.chunks(rows_per_block(n) * n), |y| {
            let mut room = Room::default();
            for y in y.chunks(rows_per_tile(n) * n) {
                room.update(y, |y| y.chunks_exact_mut(n).for_each(|y| vector::axpy(1.0, &b, y)));
            }
        });
        Ok(())
    }

    fn bias_gradient(&self, dy: &Tensor, db: &mut Tensor) -> Result<()> {
        let op = "bias_gradient";
        let n = width(op, dy, db)?;
        let (dy, db) = (dy.floats(op, "dy")?, db.f32_mut(op, "db")?);
        if dy.len() > 0 {
            self.add_rows(dy, n, db);
        }
        Ok(())
    }
}
