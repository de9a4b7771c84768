//! LoRA-XS's start (Bałazy et al., arXiv 2405.17604): the bases are the weight's own.
//!
//! ```text
//! P S Q^T ~ W0                 truncated at rank r
//! B = P   A = S Q^T   R ~ N(0, 1e-5^2)
//! ```

use lora_sb_kernels::linalg::{SvdOptions, TruncatedSvd, truncated_svd};
use lora_sb_kernels::{Generator, Kernels, Result, Tensor};

use crate::adapter::latent::LatentSite;

/// The standard deviation of R at the start, the authors' value.
pub const DEVIATION: f32 = 1e-5;

/// The adapter of one `weight [out, in]` of any floating type. `factorisation` seeds the SVD's range finder and
/// `draw` gives R.
///
/// # Errors
/// A rank larger than a side of the weight, or a device that fails.
pub fn start(
    kernels: &dyn Kernels,
    weight: &Tensor,
    rank: usize,
    factorisation: &mut Generator,
    draw: &mut Generator,
) -> Result<LatentSite> {
    let owned = kernels.to_owned_f32(weight)?;
    let TruncatedSvd { u, singular_values, v_transposed, .. } =
        truncated_svd(kernels, &owned, rank, factorisation, &SvdOptions::default())?;
    drop(owned);
    let columns = weight.shape()[1];
    let mut a = kernels.to_f32(&v_transposed)?; // [r, in]
    for (row, value) in a.chunks_exact_mut(columns).zip(&singular_values) {
        row.iter_mut().for_each(|entry| *entry *= value);
    }
    let mut r = vec![0.0; rank * rank];
    draw.normal(DEVIATION, &mut r);
    let (a, r) = (kernels.from_f32(&a, v_transposed.shape())?, kernels.from_f32(&r, &[rank, rank])?);
    LatentSite::new(kernels, a, u, r)
}
