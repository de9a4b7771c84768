//! Gated activations of the feed-forward layer: `h = act(gate) * up`.
//!
//! With SiLU, `act(z) = z * sigmoid(z)`, this is SwiGLU.
//! Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202, equation 5.
//! Backward: `dgate = dh * up * act'(gate)`, `dup = dh * act(gate)`, and for SiLU with `s = sigmoid(z)`,
//! `act'(z) = s * (1 + z * (1 - s))`.

mod cpu;
pub mod naive;

use crate::{Result, Tensor, shape};

/// The nonlinearity of the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `z * sigmoid(z)`; `silu` or `swish` in configuration files.
    Silu,
}

/// Gated activation, element by element.
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
