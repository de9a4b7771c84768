//! Linear layers that read one input, each with an adapter's latent part, done together.
//!
//! Forward, for each layer: `u = x A^T`, `h = s u R^T`, `y = x W^T + h B^T + b`. Backward: `v = dy B`,
//! `dR += s v^T u`, `w = s v R`, and over all layers `dx = sum of dy W + w A`. The gradient of R is
//! `s B^T (dy^T x) A^T` (LoRA-SB, arXiv 2411.19557, Lemma 2) without `dy^T x`.
//!
//! What an operation for one layer at a time would do once a layer is done once: x and each dy are read once for all
//! products, and dx is written once. Layers without a latent part are plain. Types are those of [`Linear`]: with `bf16`
//! activations A and B are rounded and u, v, R and the products with R are `f32`; h and w are rounded, as operands are.

mod composed;
pub(crate) mod cpu;
mod cuda;

use crate::{Accum, Error, Linear, Memory, Result, Tensor, shape};

/// One of the layers.
#[derive(Clone, Copy, Debug)]
pub struct GroupLayer<'a> {
    /// W `[N, K]`, in any floating type.
    pub weight: &'a Tensor,
    /// b `[N]`, in any floating type.
    pub bias: Option<&'a Tensor>,
    /// What an adapter adds.
    pub latent: Option<LatentPart<'a>>,
}

/// `s B R A` beside a weight.
#[derive(Clone, Copy, Debug)]
pub struct LatentPart<'a> {
    /// A `[r, K]`, in any floating type.
    pub a: &'a Tensor,
    /// R `[r, r]`, `f32`.
    pub r: &'a Tensor,
    /// B `[N, r]`, in any floating type.
    pub b: &'a Tensor,
    /// s.
    pub scale: f32,
}

/// What the backward of a latent part reads and makes.
#[derive(Debug)]
pub struct LatentBackward<'a> {
    /// u `[T, r]`, as the forward gave it.
    pub u: &'a Tensor,
    /// dR `[r, r]`, added to; `f32`.
    pub gradient: &'a mut Tensor,
}

/// Several linear layers of one input.
pub trait LinearGroup: Linear + Memory {
    /// `y_i (+)= x W_i^T + b_i + s ((x A_i^T) R_i^T) B_i^T`; gives u_i `[T, r]` of the layers with a latent part, `f32`.
    ///
    /// x `[T, K]`, ys `[T, N_i]`, each `f32` or `bf16`.
    ///
    /// # Errors
    /// Where shapes or types do not match, or the device fails.
    fn linear_group(
        &self,
        x: &Tensor,
        layers: &[GroupLayer<'_>],
        accum: Accum,
        ys: &mut [&mut Tensor],
    ) -> Result<Vec<Option<Tensor>>> {
        check(x, layers, ys)?;
        composed::forward(self, x, layers, accum, ys)
    }

    /// `dx (+)= sum over i of dy_i W_i + s (dy_i B_i) R_i A_i`, and `dR_i += s (dy_i B_i)^T u_i`.
    ///
    /// dys `[T, N_i]`, all of one type; dx `[T, K]`, absent where it is not wanted; `latents` has an entry for each
    /// layer, present where its latent part is.
    ///
    /// # Errors
    /// As [`LinearGroup::linear_group`].
    fn linear_group_backward(
        &self,
        dys: &[&Tensor],
        layers: &[GroupLayer<'_>],
        latents: &mut [Option<LatentBackward<'_>>],
        dx: Option<(&mut Tensor, Accum)>,
    ) -> Result<()> {
        check_backward(dys, layers, latents, dx.as_ref().map(|(dx, _)| &**dx))?;
        composed::backward(self, dys, layers, latents, dx)
    }
}

/// Checks the operands of the forward.
fn check(x: &Tensor, layers: &[GroupLayer<'_>], ys: &[&mut Tensor]) -> Result<()> {
    let op = "linear_group";
    let (t, k) = shape::matrix(op, "x", x)?;
    check_count(op, "ys", ys.len(), layers.len())?;
    for (layer, y) in layers.iter().zip(ys) {
        let n = check_layer(op, layer, k)?;
        shape::expect(op, "y", y, &[("T", t), ("N", n)])?;
    }
    Ok(())
}

/// Checks the operands of the backward.
fn check_backward(
    dys: &[&Tensor],
    layers: &[GroupLayer<'_>],
    latents: &[Option<LatentBackward<'_>>],
    dx: Option<&Tensor>,
) -> Result<()> {
    let op = "linear_group_backward";
    check_count(op, "dys", dys.len(), layers.len())?;
    check_count(op, "latents", latents.len(), layers.len())?;
    let Some((first, layer)) = dys.first().zip(layers.first()) else { return Ok(()) };
    let ((t, _), (_, k)) = (shape::matrix(op, "dy", first)?, shape::matrix(op, "w", layer.weight)?);
    for ((dy, layer), latent) in dys.iter().zip(layers).zip(latents) {
        let n = check_layer(op, layer, k)?;
        shape::expect(op, "dy", dy, &[("T", t), ("N", n)])?;
        if layer.latent.is_some() != latent.is_some() {
            let message = "u and dR are given where a layer has a latent part, and nowhere else".into();
            return Err(Error::Value { op, message });
        }
        if let (Some(part), Some(latent)) = (&layer.latent, latent) {
            let r = part.r.shape()[0];
            shape::expect(op, "u", latent.u, &[("T", t), ("r", r)])?;
            shape::expect(op, "gradient", latent.gradient, &[("r", r), ("r", r)])?;
        }
    }
    match dx {
        Some(dx) => shape::expect(op, "dx", dx, &[("T", t), ("K", k)]),
        None => Ok(()),
    }
}

fn check_count(op: &'static str, operands: &str, found: usize, layers: usize) -> Result<()> {
    match found == layers {
        true => Ok(()),
        false => Err(Error::Value { op, message: format!("{found} {operands} for {layers} layers") }),
    }
}

/// Checks one layer's own tensors; N.
fn check_layer(op: &'static str, layer: &GroupLayer<'_>, k: usize) -> Result<usize> {
    let (n, _) = shape::matrix(op, "w", layer.weight)?;
    shape::expect(op, "w", layer.weight, &[("N", n), ("K", k)])?;
    if let Some(bias) = layer.bias {
        shape::expect(op, "bias", bias, &[("N", n)])?;
    }
    if let Some(LatentPart { a, r: square, b, .. }) = layer.latent {
        let (r, _) = shape::matrix(op, "r", square)?;
        if r == 0 {
            return Err(Error::Value { op, message: "a latent part of rank 0".into() });
        }
        shape::expect(op, "r", square, &[("r", r), ("r", r)])?;
        shape::expect(op, "a", a, &[("r", r), ("K", k)])?;
        shape::expect(op, "b", b, &[("N", n), ("r", r)])?;
    }
    Ok(n)
}
