//! The reductions on the CPU.

use super::Reduce;
use crate::cpu::blocks::{BLOCK, Room};
use crate::cpu::vector;
use crate::{Cpu, Result, Tensor};

impl Reduce for Cpu {
    fn sum_of_squares(&self, x: &Tensor) -> Result<f64> {
        let x = x.floats("sum_of_squares", "x")?;
        let of_block = |x| vector::sum_of_squares(Room::default().read(x));
        Ok(self.map(x.len(), x.chunks(BLOCK), of_block).into_iter().sum())
    }
}
