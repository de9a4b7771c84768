//! Root mean square normalisation.
//!
//! `y = gain * x * rstd` with `rstd = 1 / sqrt(mean(x^2) + eps)` per token; what is stored is the gain w, or in
//! Gemma's family `gain - 1` ([`RmsGain`]).
//! Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467, equation 4.
//!
//! With `n = x * rstd` and `g = gain * dy`: `dx = rstd * (g - n * mean(g * n))`, `dgain = sum over t of dy * n`,
//! which is w's gradient in both cases.

mod cpu;
mod cuda;
pub mod naive;

use crate::{Accum, Result, Tensor, shape};

/// How the gain is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RmsGain {
    /// `y = w * x * rstd`.
    Weight,
    /// `y = (1 + w) * x * rstd`: Gemma, whose gains start at w = 0. The sum is taken in `f32`, as transformers
    /// does, and not in the weight's own type.
    OnePlusWeight,
}

/// Root mean square normalisation of every token; x, f, y and their gradients are `f32` or `bf16`, each on its own.
pub trait RmsNorm {
    /// x `[T, D]`, gain `[D]` in any floating type, y `[T, D]`, rstd `[T]` in `f32` (kept for the backward).
    fn rms_norm(
        &self,
        x: &Tensor,
        gain: &Tensor,
        kind: RmsGain,
        eps: f32,
        y: &mut Tensor,
        rstd: &mut Tensor,
    ) -> Result<()>;

    /// `x += f`, and y of the sum as [`RmsNorm::rms_norm`] has it: a residual sum and the norm behind it in one pass.
    ///
    /// f, x and y `[T, D]`, gain `[D]`, rstd `[T]`. Where x is `bf16`, y belongs to the rounded sum.
    fn add_rms_norm(
        &self,
        f: &Tensor,
        x: &mut Tensor,
        gain: &Tensor,
        kind: RmsGain,
        eps: f32,
        y: &mut Tensor,
        rstd: &mut Tensor,
    ) -> Result<()>;

    /// `dx (+)= ...`, and `dgain += ...` where it is wanted; dy `[T, D]`, dx `[T, D]`, dgain `[D]` in `f32`.
    fn rms_norm_backward(
        &self,
        x: &Tensor,
        gain: &Tensor,
        kind: RmsGain,
        rstd: &Tensor,
        dy: &Tensor,
        accum: Accum,
        dx: &mut Tensor,
        dgain: Option<&mut Tensor>,
    ) -> Result<()>;
}

/// Checks `x [T, D]`, `y [T, D]`, `gain [D]` and `rstd [T]`; returns D.
pub(crate) fn width(op: &'static str, x: &Tensor, gain: &Tensor, y: &Tensor, rstd: &Tensor) -> Result<usize> {
    let (t, d) = shape::matrix(op, "x", x)?;
    shape::expect(op, "y", y, &[("T", t), ("D", d)])?;
    shape::expect(op, "gain", gain, &[("D", d)])?;
    shape::expect(op, "rstd", rstd, &[("T", t)])?;
    Ok(d)
}
