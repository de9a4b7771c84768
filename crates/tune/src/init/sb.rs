//! LoRA-SB's start (arXiv 2411.19557, section 3.3 and algorithm 1).
//!
//! ```text
//! dW = -eta sign(G)            what AdamW's first step from zero moments would do
//! U S V^T ~ dW                 truncated at rank r
//! B = U   A = V^T   R = S / s
//! ```
//!
//! So `B^T B = A A^T = I`, and training begins one small simulated step away from W0 at the rank-r matrix that
//! is nearest to it. eta scales R alone. The authors' code takes a randomised SVD without oversampling, which
//! loses up to 3 % of a sign matrix's flat spectrum, and rounds to bf16; here it is converged and f32.

use lora_sb_kernels::linalg::{SvdOptions, TruncatedSvd, truncated_svd};
use lora_sb_kernels::{Generator, Kernels, Result, Tensor};

use crate::adapter::latent::LatentSite;

/// The adapter of one weight from its summed gradient `[out, in]`, which it uses up, and whether the
/// factorisation came to its tolerance.
///
/// # Errors
/// A rank larger than a side of the gradient, or a device that fails.
pub fn start(
    kernels: &dyn Kernels,
    mut gradient: Tensor,
    eta: f64,
    rank: usize,
    scale: f32,
    generator: &mut Generator,
) -> Result<(LatentSite, bool)> {
    kernels.scaled_sign(-eta as f32, &mut gradient)?;
    let TruncatedSvd { u, singular_values, v_transposed, converged, .. } =
        truncated_svd(kernels, &gradient, rank, generator, &SvdOptions::default())?;
    drop(gradient);
    let mut diagonal = vec![0.0; rank * rank];
    for (index, value) in singular_values.iter().enumerate() {
        diagonal[index * (rank + 1)] = value / scale;
    }
    let r = kernels.from_f32(&diagonal, &[rank, rank])?;
    Ok((LatentSite::new(kernels, v_transposed, u, r)?, converged))
}
