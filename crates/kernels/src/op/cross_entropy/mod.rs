//! Softmax cross-entropy fused with the vocabulary projection.
//!
//! `z = x W^T`, `loss = sum_i weight_i (ln sum_v exp(z_iv) - z_i,label_i)`. Since the loss is the last
//! operation, its gradient is known at once: `dz_iv = weight_i (softmax(z_i)_v - [v = label_i])`,
//! `dx = dz W`, `dW += dz^T x`. Rows and columns are taken some at a time, so the logits of a batch never exist.
//! With a soft cap c (Gemma 2, arXiv 2408.00118, section 2), `z = c tanh(x W^T / c)` and `dz` is multiplied
//! by its derivative, `1 - (z / c)^2`.
//! Same idea: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009.

pub(crate) mod cpu;
pub(crate) mod cuda;
pub mod naive;

use crate::{Error, Result, Tensor, shape};

/// The gradients that a loss is asked for, which decide what it takes beside its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LossGradients {
    /// The loss alone.
    None,
    /// That of x.
    Input,
    /// Those of x and w.
    InputAndWeight,
}

/// The loss of labelled tokens under a vocabulary projection.
pub trait CrossEntropy {
    /// The weighted sum of the rows' losses, and the gradients that are asked for.
    ///
    /// x `[N, D]`, w `[V, D]` in any floating type, labels `[N]` of u32, weights `[N]` (1 over the number of
    /// labelled tokens for a mean), dx `[N, D]` (replaced), dw `[V, D]` (added to). `soft_cap`, a positive
    /// number, bounds the logits. At most `chunk_rows` rows
    /// are computed together: the loss and dx do not depend on it, dw by no more than its rounding.
    ///
    /// x and dx are `f32` or `bf16`, dw is `f32`. Where x is `bf16`, the products are those of `bf16`
    /// ([`Linear`](crate::Linear)), the logits and the loss are `f32`, and what multiplies w or x behind the softmax is
    /// rounded to `bf16`.
    ///
    /// # Errors
    /// Where a label is not below V, or the cap is not positive.
    fn cross_entropy(
        &self,
        x: &Tensor,
        w: &Tensor,
        labels: &Tensor,
        weights: &Tensor,
        soft_cap: Option<f32>,
        chunk_rows: usize,
        dx: Option<&mut Tensor>,
        dw: Option<&mut Tensor>,
    ) -> Result<f64>;

    /// The weighted sum of the rows' losses where the logits are at hand, as a classifier's.
    ///
    /// logits `[N, C]` become their own gradient; labels `[N]` of u32, weights `[N]`.
    ///
    /// # Errors
    /// Where a label is not below C.
    fn cross_entropy_of_logits(&self, logits: &mut Tensor, labels: &Tensor, weights: &Tensor) -> Result<f64>;
}

/// Checks all operands; returns (D, V).
pub(crate) fn dims(
    x: &Tensor,
    w: &Tensor,
    labels: &Tensor,
    weights: &Tensor,
    dx: Option<&Tensor>,
    dw: Option<&Tensor>,
) -> Result<(usize, usize)> {
    let op = "cross_entropy";
    let (n, d) = shape::matrix(op, "x", x)?;
    let (v, _) = shape::matrix(op, "w", w)?;
    shape::expect(op, "w", w, &[("V", v), ("D", d)])?;
    shape::expect(op, "labels", labels, &[("N", n)])?;
    shape::expect(op, "weights", weights, &[("N", n)])?;
    if let Some(dx) = dx {
        shape::expect(op, "dx", dx, &[("N", n), ("D", d)])?;
    }
    if let Some(dw) = dw {
        shape::expect(op, "dw", dw, &[("V", v), ("D", d)])?;
    }
    match labels.u32(op, "labels")?.iter().find(|&&label| label as usize >= v) {
        None => Ok((d, v)),
        Some(label) => Err(Error::Value { op, message: format!("label {label} in a vocabulary of V={v}") }),
    }
}

/// Checks the operands of the loss of logits; returns C.
pub(crate) fn classes(logits: &Tensor, labels: &Tensor, weights: &Tensor) -> Result<usize> {
    let op = "cross_entropy_of_logits";
    let (n, c) = shape::matrix(op, "logits", logits)?;
    shape::expect(op, "labels", labels, &[("N", n)])?;
    shape::expect(op, "weights", weights, &[("N", n)])?;
    match labels.u32(op, "labels")?.iter().find(|&&label| label as usize >= c) {
        None => Ok(c),
        Some(label) => Err(Error::Value { op, message: format!("label {label} among C={c} classes") }),
    }
}
