//! PiSSA (Meng et al., arXiv 2404.02948).
//!
//! Update: `W0 + s (B A - B0 A0)`, A and B trained: the first r singular vectors of the weight are taken out of it
//! and trained, the rest of it stays. Start:
//!
//! ```text
//! U S V^T ~ W0                 truncated at rank r
//! A = A0 = sqrt(S / s) V^T     B = B0 = U sqrt(S / s)
//! ```
//!
//! so that `s B0 A0` is W0's best part of rank r. The division by s is PEFT's. The SVD is a converged one, not the
//! few iterations of the paper's fast variant; how W0 is left unchanged stands in
//! [`adapter::lora`](crate::adapter::lora).
//!
//! Trained: r (out + in) values of an `[out, in]` weight. Stored: twice that, since A0 and B0 are needed as well.

use lora_sb_kernels::linalg::TruncatedSvd;
use lora_sb_kernels::{Generator, Kernels, Result, Tensor};

use crate::adapter::lora::LoraSite;
use crate::init::bases::{scale_rows, weight_svd};

/// The adapter of one `weight [out, in]` of any floating type, and whether the factorisation came to its tolerance.
///
/// # Errors
/// A rank larger than a side of the weight, or a device that fails.
pub fn start(
    kernels: &dyn Kernels,
    weight: &Tensor,
    rank: usize,
    scale: f32,
    factorisation: &mut Generator,
) -> Result<(LoraSite, bool)> {
    let TruncatedSvd { u: mut b, singular_values, v_transposed, converged, .. } =
        weight_svd(kernels, weight, rank, factorisation)?;
    let roots: Vec<f32> = singular_values.iter().map(|value| (value / scale).sqrt()).collect();
    let a = scale_rows(kernels, &roots, &v_transposed)?;
    kernels.scale_channels(&kernels.from_f32(&roots, &[rank])?, &mut b)?;
    Ok((LoraSite::relative_to_itself(kernels, a, b)?, converged))
}
