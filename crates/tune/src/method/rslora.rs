//! rsLoRA (Kalajdzievski, arXiv 2312.03732).
//!
//! Update: `W0 + (alpha/sqrt r) B A`, A and B trained: LoRA with the scale under which neither the output nor the
//! gradients shrink as the rank grows (theorem 3.2 there). Start: [LoRA's](super::lora::start).
//!
//! Trained and stored: r (out + in) values of an `[out, in]` weight.

/// The scale `alpha / sqrt(r)`.
pub fn scale(lora_alpha: f64, rank: usize) -> f64 {
    lora_alpha / (rank as f64).sqrt()
}
