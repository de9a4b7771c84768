//! Dropout: every element is dropped with probability `rate`, the others are multiplied by `1 / (1 - rate)`.
//!
//! Source: Srivastava et al., "Dropout", JMLR 15 (2014), in the inverted form that keeps the expectation.
//! The operation is linear and diagonal, hence its own transpose: the backward is the same call, with the same
//! rate and seed, on the gradient. So the mask is never stored.
//!
//! # The mask
//!
//! An element's fate is a function of (rate, seed, index) alone, with `index` its place in the row-major
//! tensor, whatever the device or the number of threads. All numbers are unsigned 64-bit integers modulo 2^64:
//!
//! ```text
//! mix(z):   z = (z xor (z >> 30)) * 0xbf58476d1ce4e5b9
//!           z = (z xor (z >> 27)) * 0x94d049bb133111eb
//!           z xor (z >> 31)
//! key     = mix(seed)
//! word(j) = mix(key + (j + 1) * 0x9e3779b97f4a7c15)
//! draw(i) = the low 32 bits of word(i / 2) where i is even, the high 32 bits where it is odd
//! kept(i) = draw(i) >= floor(rate * 2^32)
//! ```
//!
//! `word(j)` is output j of the SplitMix64 generator with state `key` (Steele, Lea and Flood, "Fast splittable
//! pseudorandom number generators", OOPSLA 2014). Mixing the seed first keeps neighbouring seeds' sequences
//! from being shifts of each other.

mod cpu;
mod cuda;
pub mod naive;

use crate::{Accum, Error, Result, Tensor, op::elementwise};

/// Random zeros.
pub trait Dropout {
    /// `y (+)= x mask / (1 - rate)`; one shape, each `f32` or `bf16`. A dropped element is 0 even where x is infinite
    /// or NaN.
    ///
    /// # Errors
    /// Where the rate is not in `[0, 1)`.
    fn dropout(&self, rate: f32, seed: u64, x: &Tensor, accum: Accum, y: &mut Tensor) -> Result<()>;
}

/// The mask of one call: see the module's text.
#[derive(Clone, Copy, Debug)]
pub struct DropoutMask {
    key: u64,
    threshold: u32,
    /// The factor of kept elements, `1 / (1 - rate)`.
    pub scale: f32,
}

impl DropoutMask {
    /// # Errors
    /// Where the rate is not in `[0, 1)`.
    pub fn new(rate: f32, seed: u64) -> Result<Self> {
        if !(0.0..1.0).contains(&rate) {
            let message = format!("a rate of {rate}; it must be at least 0 and below 1");
            return Err(Error::Value { op: "dropout", message });
        }
        let threshold = (f64::from(rate) * 4_294_967_296.0) as u32;
        Ok(DropoutMask { key: mix(seed), threshold, scale: (1.0 / (1.0 - f64::from(rate))) as f32 })
    }

    /// Whether the element at `index` is kept.
    pub fn keeps(&self, index: usize) -> bool {
        let word = self.word(index as u64 / 2);
        self.kept((word >> (32 * (index % 2))) as u32)
    }

    /// The draws of elements `2 j` (low half) and `2 j + 1` (high half).
    #[inline(always)]
    pub(crate) fn word(&self, j: u64) -> u64 {
        mix(self.key.wrapping_add(j.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }

    #[inline(always)]
    pub(crate) fn kept(&self, draw: u32) -> bool {
        draw >= self.threshold
    }
}

/// The output function of SplitMix64: a bijection of 64 bits.
#[inline(always)]
fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Checks both operands and the rate.
pub(crate) fn check(rate: f32, seed: u64, x: &Tensor, y: &Tensor) -> Result<DropoutMask> {
    elementwise::check("dropout", x, y)?;
    DropoutMask::new(rate, seed)
}
