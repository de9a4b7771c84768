//! Operations on each element alone.

mod cpu;
mod cuda;
pub mod naive;

use crate::{Error, Result, Tensor, shape};

/// Operations on each element alone; what is written is `f32` or `bf16`.
pub trait Elementwise {
    /// `y = x`, rounded where y is `bf16`; one shape, any floating x, y `f32` or `bf16`.
    fn cast(&self, x: &Tensor, y: &mut Tensor) -> Result<()>;

    /// `y += alpha x`; one shape, each `f32` or `bf16`.
    fn add(&self, alpha: f32, x: &Tensor, y: &mut Tensor) -> Result<()>;

    /// `x = value`.
    fn fill(&self, value: f32, x: &mut Tensor) -> Result<()>;

    /// `x = alpha sign(x)`, with sign(0) = 0: AdamW's first step from zero moments, for `alpha = -lr`.
    fn scaled_sign(&self, alpha: f32, x: &mut Tensor) -> Result<()>;

    /// `x = alpha x`.
    fn scale(&self, alpha: f32, x: &mut Tensor) -> Result<()>;

    /// `x = cap tanh(x / cap)`: keeps scores and logits within `-cap..cap`. Source: Gemma 2, arXiv 2408.00118,
    /// section 2. Its derivative, `1 - (x / cap)^2` of the result, is taken by the operations that have a
    /// backward: attention and the loss.
    ///
    /// # Errors
    /// Where the cap is not a positive number.
    fn soft_cap(&self, cap: f32, x: &mut Tensor) -> Result<()>;
}

/// Checks that a cap bounds something.
pub(crate) fn check_cap(op: &'static str, cap: f32) -> Result<()> {
    if cap.is_finite() && cap > 0.0 {
        return Ok(());
    }
    Err(Error::Value { op, message: format!("a soft cap of {cap}; a positive number is needed") })
}

/// Checks that both have one shape.
pub(crate) fn check(op: &'static str, x: &Tensor, y: &Tensor) -> Result<()> {
    let axes: Vec<_> = y.shape().iter().map(|&size| ("y", size)).collect();
    shape::expect(op, "x", x, &axes)
}
