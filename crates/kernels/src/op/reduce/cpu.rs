//! The reductions on the CPU.

use super::Reduce;
use crate::cpu::blocks::BLOCK;
use crate::cpu::vector;
use crate::{Cpu, Result, Tensor};

impl Reduce for Cpu {
    fn sum_of_squares(&self, x: &Tensor) -> Result<f64> {
        let x = x.f32("sum_of_squares", "x")?;
        Ok(self.map(x.len(), x.chunks(BLOCK), vector::sum_of_squares).into_iter().sum())
    }
}
