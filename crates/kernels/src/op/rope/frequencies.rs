//! The rotation frequencies and their published stretchings for longer contexts.

use std::f64::consts::PI;

/// How the frequencies of a model's configuration are changed for longer contexts (`rope_scaling`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    Default,
    /// Every frequency divided by the factor: position interpolation, arXiv 2306.15595.
    Linear {
        /// The stretch of the context.
        factor: f64,
    },
    /// Llama 3.1: long waves are stretched, short ones kept, those between blended.
    /// Source: the `llama3` type of transformers' rotary embedding utilities.
    Llama3 {
        /// The stretch of the long waves.
        factor: f64,
        /// Waves longer than `original_context / low` are stretched.
        low_frequency_factor: f64,
        /// Waves shorter than `original_context / high` are kept.
        high_frequency_factor: f64,
        /// The context of the pre-training, in tokens.
        original_context: f64,
    },
}

/// The U/2 frequencies in radians per token.
pub(crate) fn inverse(theta: f64, scaling: &RopeScaling, rotary_size: usize) -> Vec<f32> {
    let plain = (0..rotary_size / 2).map(|i| theta.powf(-(2.0 * i as f64) / rotary_size as f64));
    plain.map(|frequency| scaled(frequency, scaling) as f32).collect()
}

fn scaled(frequency: f64, scaling: &RopeScaling) -> f64 {
    match *scaling {
        RopeScaling::Default => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 { factor, low_frequency_factor, high_frequency_factor, original_context } => {
            let waves = original_context * frequency / (2.0 * PI);
            if waves < low_frequency_factor {
                frequency / factor
            } else if waves > high_frequency_factor {
                frequency
            } else {
                let kept = (waves - low_frequency_factor) / (high_frequency_factor - low_frequency_factor);
                frequency * (kept + (1.0 - kept) / factor)
            }
        }
    }
}
