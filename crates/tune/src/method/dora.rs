//! DoRA (Liu et al., arXiv 2402.09353), as PEFT computes it.
//!
//! Update: `m (W0 + s B A) / |W0 + s B A|`, the norm that of each row; m, A and B trained. Start: A and B as
//! [LoRA's](super::lora::start), m the norms of W0's rows, so that nothing changes yet.
//!
//! Trained and stored: r (out + in) + out values of an `[out, in]` weight.

use lora_sb_kernels::{Generator, Kernels, Result, Tensor};

use super::lora;
use crate::adapter::dora::{DoraSite, weight_norms};

/// The adapter of one `weight [out, in]` of any floating type.
///
/// # Errors
/// Where the device fails.
pub fn start(kernels: &dyn Kernels, weight: &Tensor, rank: usize, draw: &mut Generator) -> Result<DoraSite> {
    let (a, b) = lora::factors(kernels, (weight.shape()[0], weight.shape()[1]), rank, draw)?;
    DoraSite::new(kernels, weight, a, b, weight_norms(kernels, weight)?)
}
