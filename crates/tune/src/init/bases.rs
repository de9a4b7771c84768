//! Where B, R and A of the r x r family start: the choices of [`Bases`](crate::Bases), for LoRA-SB and LoRA-XS alike.
//!
//! | bases | of | B | A | R |
//! |---|---|---|---|---|
//! | `sb` | `-eta sign(G)` | U | V^T | S / s |
//! | `sb-gradient` | `-eta G` | U | V^T | S / s |
//! | `sb-zero` | `-eta sign(G)` | U | V^T | 0 |
//! | `xs` | W0 | U | S V^T | N(0, 1e-5^2) |
//! | `w0-orthonormal` | W0 | U | V^T | 0 |
//! | `random-orthonormal` | Gaussian numbers | orthonormal | orthonormal | 0 |
//!
//! The first three and `xs` are the two methods' own starts and variants of them; the last two are the controls that
//! tell what the bases themselves are worth: orthonormal as LoRA-SB's are, without a gradient.

use lora_sb_kernels::linalg::{SvdOptions, TruncatedSvd, random_orthonormal, truncated_svd};
use lora_sb_kernels::{Generator, Kernels, Result, Tensor};

use crate::adapter::latent::LatentSite;

/// The truncated SVD of a `weight [out, in]` of any floating type.
///
/// # Errors
/// A rank larger than a side of the weight, or a device that fails.
pub fn weight_svd(
    kernels: &dyn Kernels,
    weight: &Tensor,
    rank: usize,
    generator: &mut Generator,
) -> Result<TruncatedSvd> {
    truncated_svd(kernels, &kernels.to_owned_f32(weight)?, rank, generator, &SvdOptions::default())
}

/// `W0 ~ U S V^T`, `B = U`, `A = V^T`, `R = 0`, and whether the factorisation came to its tolerance.
///
/// # Errors
/// A rank larger than a side of the weight, or a device that fails.
pub fn of_weight(
    kernels: &dyn Kernels,
    weight: &Tensor,
    rank: usize,
    generator: &mut Generator,
) -> Result<(LatentSite, bool)> {
    let TruncatedSvd { u, v_transposed, converged, .. } = weight_svd(kernels, weight, rank, generator)?;
    Ok((LatentSite::new(v_transposed, u, kernels.zeros(&[rank, rank])?), converged))
}

/// Random orthonormal B and A of a weight `[out, input]`, `R = 0`.
///
/// # Errors
/// A rank larger than a side of the weight, or a device that fails.
pub fn random(
    kernels: &dyn Kernels,
    (out, input): (usize, usize),
    rank: usize,
    draw: &mut Generator,
) -> Result<LatentSite> {
    let a = random_orthonormal(kernels, rank, input, draw)?; // [r, in]
    let rows = kernels.to_f32(&random_orthonormal(kernels, rank, out, draw)?)?; // [r, out]
    let columns: Vec<f32> = (0..out * rank).map(|at| rows[at % rank * out + at / rank]).collect();
    let b = kernels.from_f32(&columns, &[out, rank])?;
    Ok(LatentSite::new(a, b, kernels.zeros(&[rank, rank])?))
}

/// A `[r, n]` matrix with its rows multiplied by `factors`.
pub(crate) fn scale_rows(kernels: &dyn Kernels, factors: &[f32], rows: &Tensor) -> Result<Tensor> {
    let mut values = kernels.to_f32(rows)?;
    for (row, factor) in values.chunks_exact_mut(rows.shape()[1].max(1)).zip(factors) {
        row.iter_mut().for_each(|value| *value *= factor);
    }
    kernels.from_f32(&values, rows.shape())
}
