//! AdamW: Adam with decoupled weight decay.
//!
//! Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101, algorithm 2,
//! with the order of operations of `torch.optim.AdamW`:
//!
//! ```text
//! p <- p (1 - lr wd)
//! m <- beta1 m + (1 - beta1) g          v <- beta2 v + (1 - beta2) g^2
//! p <- p - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
//! ```

mod cpu;
mod cuda;
pub mod naive;

use crate::{Result, Tensor, shape};

/// The numbers of one AdamW step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay, multiplied by the learning rate.
    pub weight_decay: f64,
    /// What the gradient is multiplied by before it is used: the clipping factor, or 1.
    pub gradient_scale: f64,
    /// Counts from 1.
    pub step: u64,
}

/// One optimizer step of one parameter.
pub trait AdamW {
    /// Updates the parameter `p` and its moments `m`, `v` from the gradient `g`; all of one shape.
    fn adamw(
        &self,
        step: &AdamWStep,
        g: &Tensor,
        p: &mut Tensor,
        m: &mut Tensor,
        v: &mut Tensor,
    ) -> Result<()>;
}

/// What the numbers of a step come to for every element.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Factors {
    pub(crate) gradient: f32,
    /// Kept of the first moment, and taken of the gradient.
    pub(crate) first: (f32, f32),
    /// Kept of the second moment, and taken of the squared gradient.
    pub(crate) second: (f32, f32),
    pub(crate) decay: f32,
    pub(crate) rate: f32,
    pub(crate) correction2: f32,
    pub(crate) epsilon: f32,
}

impl Factors {
    pub(crate) fn new(s: &AdamWStep) -> Self {
        let correction1 = 1.0 - s.beta1.powf(s.step as f64);
        Factors {
            gradient: s.gradient_scale as f32,
            first: (s.beta1 as f32, (1.0 - s.beta1) as f32),
            second: (s.beta2 as f32, (1.0 - s.beta2) as f32),
            decay: (1.0 - s.learning_rate * s.weight_decay) as f32,
            rate: (s.learning_rate / correction1) as f32,
            correction2: (1.0 - s.beta2.powf(s.step as f64)).sqrt() as f32,
            epsilon: s.epsilon as f32,
        }
    }
}

/// Checks that all have the parameter's number of elements.
pub(crate) fn check(g: &Tensor, p: &Tensor, m: &Tensor, v: &Tensor) -> Result<()> {
    for (name, tensor) in [("g", g), ("m", m), ("v", v)] {
        let axes: Vec<_> = p.shape().iter().map(|&size| ("p", size)).collect();
        shape::expect("adamw", name, tensor, &axes)?;
    }
    Ok(())
}
