//! LoRA-XS (Bałazy et al., arXiv 2405.17604).
//!
//! Update: `W0 + s B R A`, only R `[r, r]` trained. Start: the bases are the weight's own,
//!
//! ```text
//! P S Q^T ~ W0                 truncated at rank r
//! B = P   A = S Q^T   R ~ N(0, 1e-5^2)
//! ```
//!
//! unless [other bases](crate::init::bases) are asked for.
//!
//! Trained: r^2 values of an `[out, in]` weight. Stored: r (out + in) more, since an SVD is not the same to the bit
//! on every machine.

use lora_sb_kernels::linalg::TruncatedSvd;
use lora_sb_kernels::{Generator, Kernels, Result, Tensor};

use crate::adapter::latent::LatentSite;
use crate::init::bases::{scale_rows, weight_svd};

/// The standard deviation of R at the start, the authors' value.
pub const DEVIATION: f32 = 1e-5;

/// The adapter of one `weight [out, in]` of any floating type, and whether the factorisation came to its tolerance.
/// `factorisation` seeds the SVD's range finder and `draw` gives R.
///
/// # Errors
/// A rank larger than a side of the weight, or a device that fails.
pub fn start(
    kernels: &dyn Kernels,
    weight: &Tensor,
    rank: usize,
    factorisation: &mut Generator,
    draw: &mut Generator,
) -> Result<(LatentSite, bool)> {
    let TruncatedSvd { u, singular_values, v_transposed, converged, .. } =
        weight_svd(kernels, weight, rank, factorisation)?;
    let a = scale_rows(kernels, &singular_values, &v_transposed)?; // [r, in]
    let mut r = vec![0.0; rank * rank];
    draw.normal(DEVIATION, &mut r);
    let r = kernels.from_f32(&r, &[rank, rank])?;
    Ok((LatentSite::new(a, u, r), converged))
}
