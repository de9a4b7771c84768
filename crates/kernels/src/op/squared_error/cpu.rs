//! The squared error on the CPU: one number per example, so one thread in their order.

use super::{SquaredError, check};
use crate::{Cpu, Result, Tensor};

impl SquaredError for Cpu {
    fn squared_error(&self, z: &mut Tensor, targets: &Tensor, weights: &Tensor) -> Result<f64> {
        let op = "squared_error";
        check(op, z, targets, weights)?;
        let (targets, weights) = (targets.f32(op, "targets")?, weights.f32(op, "weights")?);
        let mut loss = 0.0;
        for ((z, &target), &weight) in z.f32_mut(op, "z")?.iter_mut().zip(targets).zip(weights) {
            // The difference is exact in f64: its rounding would be squared into the loss.
            let error = f64::from(*z) - f64::from(target);
            loss += f64::from(weight) * error * error;
            *z = 2.0 * weight * error as f32;
        }
        Ok(loss)
    }
}
