//! LoRA-SB (arXiv 2411.19557, section 3.3 and algorithm 1).
//!
//! Update: `W0 + s B R A`, only R `[r, r]` trained. Start:
//!
//! ```text
//! dW = -eta sign(G)            what AdamW's first step from zero moments would do
//! U S V^T ~ dW                 truncated at rank r
//! B = U   A = V^T   R = S / s
//! ```
//!
//! So `B^T B = A A^T = I`, and training begins one small simulated step away from W0 at the rank-r matrix that
//! is nearest to it. eta scales R alone. The authors' code takes a randomised SVD without oversampling, which
//! loses up to 3 % of a sign matrix's flat spectrum, and rounds to bf16; here it is converged and f32. [Other
//! bases](crate::init::bases) can be asked for; those that read G are made here too.
//!
//! Trained: r^2 values of an `[out, in]` weight. Stored: r (out + in) more, since B and A cannot be had from the base.

use lora_sb_kernels::linalg::{SvdOptions, TruncatedSvd, truncated_svd};
use lora_sb_kernels::{DType, Generator, Kernels, Result, Tensor};

use crate::Bases;
use crate::adapter::latent::LatentSite;

/// The adapter of one weight from its summed gradient `[out, in]`, which it uses up, and whether the
/// factorisation came to its tolerance. Of the bases, [`Bases::SbGradient`] takes G for its sign and
/// [`Bases::SbZero`] 0 for R.
///
/// # Errors
/// A rank larger than a side of the gradient, or a device that fails.
pub fn start(
    kernels: &dyn Kernels,
    mut gradient: Tensor,
    bases: Bases,
    eta: f64,
    rank: usize,
    scale: f32,
    generator: &mut Generator,
) -> Result<(LatentSite, bool)> {
    let update = match bases {
        Bases::SbGradient => {
            kernels.scale(-1.0, &mut gradient)?;
            gradient
        }
        _ => signs(kernels, gradient)?,
    };
    let TruncatedSvd { u, singular_values, v_transposed, converged, .. } =
        truncated_svd(kernels, &update, rank, generator, &SvdOptions::default())?;
    drop(update);
    let mut r = vec![0.0; rank * rank];
    if bases != Bases::SbZero {
        let diagonal = r.iter_mut().step_by(rank + 1);
        let size = |value: f32| (eta * f64::from(value) / f64::from(scale)) as f32;
        diagonal.zip(singular_values).for_each(|(entry, value)| *entry = size(value));
    }
    let r = kernels.from_f32(&r, &[rank, rank])?;
    Ok((LatentSite::new(v_transposed, u, r), converged))
}

/// `-sign(G)` `[out, in]`, which `bf16` holds exactly.
fn signs(kernels: &dyn Kernels, mut gradient: Tensor) -> Result<Tensor> {
    kernels.scaled_sign(-1.0, &mut gradient)?;
    let mut signs = kernels.empty_of(DType::Bf16, gradient.shape())?;
    kernels.cast(&gradient, &mut signs)?;
    Ok(signs)
}
