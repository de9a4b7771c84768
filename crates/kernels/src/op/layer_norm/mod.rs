//! Layer normalisation.
//!
//! `y = gain * n + shift` with `n = (x - mean) * rstd` and `rstd = 1 / sqrt(mean((x - mean)^2) + eps)` per token.
//! Source: Ba, Kiros and Hinton, "Layer Normalization", arXiv 1607.06450, equations 3 and 4.
//!
//! With `g = gain * dy`: `dx = rstd * (g - mean(g) - n * mean(g * n))`, `dgain = sum over t of dy * n`,
//! `dshift = sum over t of dy`.

mod cpu;
pub(crate) mod cuda;
pub mod naive;

use crate::{Accum, Result, Tensor, shape};

/// Layer normalisation of every token; x, f, y and their gradients are `f32` or `bf16`, each on its own.
pub trait LayerNorm {
    /// x `[T, D]`, gain and shift `[D]` in any floating type, y `[T, D]`; mean and rstd `[T]` in `f32` are
    /// kept for the backward.
    fn layer_norm(
        &self,
        x: &Tensor,
        gain: &Tensor,
        shift: &Tensor,
        eps: f32,
        y: &mut Tensor,
        mean: &mut Tensor,
        rstd: &mut Tensor,
    ) -> Result<()>;

    /// `x += f`, and y of the sum as [`LayerNorm::layer_norm`] has it: a residual sum and the norm behind it in one
    /// pass.
    ///
    /// f, x and y `[T, D]`, gain and shift `[D]`, mean and rstd `[T]`. Where x is `bf16`, y belongs to the rounded
    /// sum.
    fn add_layer_norm(
        &self,
        f: &Tensor,
        x: &mut Tensor,
        gain: &Tensor,
        shift: &Tensor,
        eps: f32,
        y: &mut Tensor,
        mean: &mut Tensor,
        rstd: &mut Tensor,
    ) -> Result<()>;

    /// `dx (+)= ...`, and `dgain += ...`, `dshift += ...` where they are wanted; statistics are mean and rstd
    /// `[T]`, dy `[T, D]`, dx `[T, D]`, dgain and dshift `[D]` in `f32`.
    fn layer_norm_backward(
        &self,
        x: &Tensor,
        gain: &Tensor,
        statistics: (&Tensor, &Tensor),
        dy: &Tensor,
        accum: Accum,
        dx: &mut Tensor,
        dgain: Option<&mut Tensor>,
        dshift: Option<&mut Tensor>,
    ) -> Result<()>;
}

/// Checks `x [T, D]`, `y [T, D]` (by its name), `gain [D]`, and `mean, rstd [T]`; returns D.
pub(crate) fn width(
    op: &'static str,
    x: &Tensor,
    gain: &Tensor,
    (name, y): (&'static str, &Tensor),
    (mean, rstd): (&Tensor, &Tensor),
) -> Result<usize> {
    let (t, d) = shape::matrix(op, "x", x)?;
    shape::expect(op, name, y, &[("T", t), ("D", d)])?;
    shape::expect(op, "gain", gain, &[("D", d)])?;
    shape::expect(op, "mean", mean, &[("T", t)])?;
    shape::expect(op, "rstd", rstd, &[("T", t)])?;
    Ok(d)
}
