//! The bias of a linear layer: `y += b` for every token; `db += sum over tokens of dy`.

mod cpu;
mod cuda;
pub mod naive;

use crate::{Result, Tensor, shape};

/// Adding a bias to every token.
pub trait Bias {
    /// `y[t] += b`; b `[N]` in any floating type, y `[T, N]` in `f32` or `bf16`.
    fn bias(&self, b: &Tensor, y: &mut Tensor) -> Result<()>;

    /// `db += sum_t dy[t]`; dy `[T, N]` in `f32` or `bf16`, db `[N]` in `f32`.
    fn bias_gradient(&self, dy: &Tensor, db: &mut Tensor) -> Result<()>;
}

/// Checks `y [T, N]` and `b [N]`; returns N.
pub(crate) fn width(op: &'static str, y: &Tensor, b: &Tensor) -> Result<usize> {
    let (_, n) = shape::matrix(op, "y", y)?;
    shape::expect(op, "b", b, &[("N", n)])?;
    Ok(n)
}
