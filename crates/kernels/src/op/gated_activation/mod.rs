//! Gated activations of the feed-forward layer: `h = act(gate) * up`.
//!
//! With SiLU this is SwiGLU, with GELU GEGLU; the activations and their derivatives are those of
//! [`activation`](super::activation).
//! Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202, equation 5.
//! Backward: `dgate = dh * up * act'(gate)`, `dup = dh * act(gate)`.

mod cpu;
mod cuda;
pub mod naive;

use crate::{Activation, Result, Tensor, shape};

/// Gated activation, element by element; each operand is `f32` or `bf16`.
pub trait GatedActivation {
    /// `h = act(gate) * up`; all `[T, F]`.
    fn gated_activation(
        &self,
        activation: Activation,
        gate: &Tensor,
        up: &Tensor,
        h: &mut Tensor,
    ) -> Result<()>;

    /// `dgate = dh * up * act'(gate)`, `dup = dh * act(gate)`; all `[T, F]`.
    ///
    /// `gate` and `up` are overwritten by their gradients: they are not needed again.
    fn gated_activation_backward(
        &self,
        activation: Activation,
        gate: &mut Tensor,
        up: &mut Tensor,
        dh: &Tensor,
    ) -> Result<()>;
}

/// Checks that all three are `[T, F]`.
pub(crate) fn check(op: &'static str, gate: &Tensor, up: &Tensor, h: &Tensor) -> Result<()> {
    let (t, f) = shape::matrix(op, "gate", gate)?;
    shape::expect(op, "up", up, &[("T", t), ("F", f)])?;
    shape::expect(op, "h", h, &[("T", t), ("F", f)])
}
