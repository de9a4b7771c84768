//! LoRA-GA (Wang et al., arXiv 2407.05000).
//!
//! Update: `W0 + s (B A - B0 A0)`, A and B trained. Start, from the summed gradient G of the initialisation's samples:
//!
//! ```text
//! U S V^T ~ G                              truncated at rank 2r
//! A = A0 = g V[:r]^T    B = B0 = g U[r:2r]    g = out^(1/4) / sqrt(gamma)    gamma = 16
//! ```
//!
//! so that the first step of plain gradient descent moves W within the span of G's first 2r singular vectors, as
//! near to G as rank 2r can (theorem 3.1 there). g is the paper's "stable" scale, which keeps the output's size
//! independent of the dimensions (theorem 3.2). This is the paper and its authors' code; PEFT's `lora_ga` scales B
//! alone and multiplies it by `S[r:2r]`. The size of G, and with it how its samples are weighed against the learning
//! rate, has no effect here.
//!
//! Trained: r (out + in) values of an `[out, in]` weight. Stored: twice that, since A0 and B0 are needed as well.

use lora_sb_kernels::linalg::{SvdOptions, TruncatedSvd, truncated_svd};
use lora_sb_kernels::{Generator, Kernels, Result, Tensor};

use crate::adapter::lora::LoraSite;

/// The authors' stable gamma, which PEFT took over.
pub const STABLE_GAMMA: f64 = 16.0;

/// The adapter of one weight from its summed gradient `[out, in]`, which it uses up, and whether the
/// factorisation came to its tolerance.
///
/// # Errors
/// Twice the rank larger than a side of the gradient, or a device that fails.
pub fn start(
    kernels: &dyn Kernels,
    gradient: Tensor,
    rank: usize,
    generator: &mut Generator,
) -> Result<(LoraSite, bool)> {
    let (out, input) = (gradient.shape()[0], gradient.shape()[1]);
    let TruncatedSvd { u, v_transposed, converged, .. } =
        truncated_svd(kernels, &gradient, 2 * rank, generator, &SvdOptions::default())?;
    drop(gradient);
    let size = ((out as f64).powf(0.25) / STABLE_GAMMA.sqrt()) as f32;
    let mut a = kernels.from_f32(&kernels.to_f32(&v_transposed)?[..rank * input], &[rank, input])?;
    let mut b = kernels.empty(&[out, rank])?;
    kernels.take_columns(&u, rank, &mut b)?;
    kernels.scale(size, &mut a)?;
    kernels.scale(size, &mut b)?;
    Ok((LoraSite::relative_to_itself(kernels, a, b)?, converged))
}
