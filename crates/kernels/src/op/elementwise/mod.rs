//! Operations on each element alone.

mod cpu;
pub mod naive;

use crate::{Result, Tensor, shape};

/// Operations on each element alone.
pub trait Elementwise {
    /// `y += alpha x`; one shape.
    fn add(&self, alpha: f32, x: &Tensor, y: &mut Tensor) -> Result<()>;

    /// `x = value`.
    fn fill(&self, value: f32, x: &mut Tensor) -> Result<()>;

    /// `x = alpha sign(x)`, with sign(0) = 0: AdamW's first step from zero moments, for `alpha = -lr`.
    fn scaled_sign(&self, alpha: f32, x: &mut Tensor) -> Result<()>;
}

/// Checks that both have one shape.
pub(crate) fn check(op: &'static str, x: &Tensor, y: &Tensor) -> Result<()> {
    let axes: Vec<_> = y.shape().iter().map(|&size| ("y", size)).collect();
    shape::expect(op, "x", x, &axes)
}
