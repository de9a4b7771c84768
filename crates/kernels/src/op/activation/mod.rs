//! The nonlinearities of feed-forward layers and poolers: `y = f(x)`, `dx = dy f'(x)`, element by element.
//!
//! | activation | `f(z)` | `f'(z)` |
//! |---|---|---|
//! | SiLU | `z s` with `s = sigmoid(z)` | `s (1 + z (1 - s))` |
//! | GELU | `z Phi(z)`, Phi the normal distribution's `(1 + erf(z / sqrt 2)) / 2` | `Phi(z) + z exp(-z^2 / 2) / sqrt(2 pi)` |
//! | GELU by tanh | `z (1 + tanh u) / 2` with `u = sqrt(2 / pi) (z + 0.044715 z^3)` | `s + 2 z s (1 - s) du/dz` with `s = (1 + tanh u) / 2` |
//! | tanh | `tanh z` | `1 - tanh^2 z` |
//!
//! Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv 1606.08415, section 2; for SiLU
//! Elfwing et al., arXiv 1702.03118, equations 3 and 5.

pub(crate) mod cpu;
mod cuda;
pub mod naive;

use crate::{Result, Tensor, shape};

/// A nonlinearity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `z * sigmoid(z)`; `silu` or `swish` in configuration files.
    Silu,
    /// `z * Phi(z)` with the exact error function; `gelu` in configuration files.
    Gelu,
    /// GELU with Phi approximated by tanh; `gelu_new` or `gelu_pytorch_tanh` in configuration files.
    GeluTanh,
    /// The hyperbolic tangent; BERT's pooler.
    Tanh,
}

/// An activation by itself, without a gate; each operand is `f32` or `bf16`.
pub trait Activate {
    /// `y = f(x)`; one shape.
    fn activation(&self, activation: Activation, x: &Tensor, y: &mut Tensor) -> Result<()>;

    /// `dx = dy f'(x)` over `x`, which is not needed again; one shape.
    fn activation_backward(&self, activation: Activation, x: &mut Tensor, dy: &Tensor) -> Result<()>;
}

/// Checks that `other` has the shape of `x`.
pub(crate) fn check(op: &'static str, x: &Tensor, operand: &'static str, other: &Tensor) -> Result<()> {
    let axes: Vec<_> = x.shape().iter().map(|&size| ("x", size)).collect();
    shape::expect(op, operand, other, &axes)
}
