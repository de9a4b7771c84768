//! LoRA's start as PEFT makes it: A from `kaiming_uniform_(a = sqrt(5))`, B zero, so that nothing changes yet.
//!
//! That call draws from U(-b, b) with `b = sqrt(6 / ((1 + a^2) in)) = 1 / sqrt(in)`.

use lora_sb_kernels::{Generator, Kernels, Result};

use crate::adapter::lora::LoraSite;

/// The adapter of one weight `[out, input]`.
///
/// # Errors
/// Where the device fails.
pub fn start(
    kernels: &dyn Kernels,
    (out, input): (usize, usize),
    rank: usize,
    draw: &mut Generator,
) -> Result<LoraSite> {
    let mut a = vec![0.0; rank * input];
    draw.uniform((input as f32).sqrt().recip(), &mut a);
    LoraSite::new(kernels, kernels.from_f32(&a, &[rank, input])?, kernels.zeros(&[out, rank])?)
}
