//! LoRA (Hu et al., arXiv 2106.09685).
//!
//! Update: `W0 + (alpha/r) B A`, A and B trained. Start, as PEFT makes it: A from `kaiming_uniform_(a = sqrt(5))`, B
//! zero, so that nothing changes yet. That call draws from U(-b, b) with
//! `b = sqrt(6 / ((1 + a^2) in)) = 1 / sqrt(in)`.
//!
//! Trained and stored: r (out + in) values of an `[out, in]` weight.

use lora_sb_kernels::{Generator, Kernels, Result, Tensor};

use crate::adapter::lora::LoraSite;

/// The adapter of one weight `[out, input]`.
///
/// # Errors
/// Where the device fails.
pub fn start(
    kernels: &dyn Kernels,
    shape: (usize, usize),
    rank: usize,
    draw: &mut Generator,
) -> Result<LoraSite> {
    let (a, b) = factors(kernels, shape, rank, draw)?;
    LoraSite::new(kernels, a, b)
}

/// A `[r, input]` and B `[out, r]` at the start.
pub(super) fn factors(
    kernels: &dyn Kernels,
    (out, input): (usize, usize),
    rank: usize,
    draw: &mut Generator,
) -> Result<(Tensor, Tensor)> {
    let mut a = vec![0.0; rank * input];
    draw.uniform((input as f32).sqrt().recip(), &mut a);
    Ok((kernels.from_f32(&a, &[rank, input])?, kernels.zeros(&[out, rank])?))
}
