//! The squared error of a regression: `loss = sum_i w_i (z_i - t_i)^2`.
//!
//! Since the loss is the last operation, its gradient is known at once: `dz_i = 2 w_i (z_i - t_i)`.

mod cpu;
mod cuda;
pub mod naive;

use crate::{Result, Tensor, shape};

/// The squared error of predictions.
pub trait SquaredError {
    /// The weighted sum of the squared errors; z `[N]` becomes its gradient.
    ///
    /// targets `[N]`, weights `[N]` (1 over the number of examples for a mean).
    fn squared_error(&self, z: &mut Tensor, targets: &Tensor, weights: &Tensor) -> Result<f64>;
}

/// Checks that all three are `[N]`.
pub(crate) fn check(op: &'static str, z: &Tensor, targets: &Tensor, weights: &Tensor) -> Result<()> {
    let n = z.len();
    shape::expect(op, "z", z, &[("N", n)])?;
    shape::expect(op, "targets", targets, &[("N", n)])?;
    shape::expect(op, "weights", weights, &[("N", n)])
}
