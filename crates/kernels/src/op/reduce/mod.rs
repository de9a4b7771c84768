//! Reductions to one number, in an order that does not depend on the number of threads.

mod cpu;
mod cuda;
pub mod naive;

use crate::{Result, Tensor};

/// Reductions of a tensor of any floating type.
pub trait Reduce {
    /// The sum of the squares of all elements; NaN or infinite if an element is.
    fn sum_of_squares(&self, x: &Tensor) -> Result<f64>;
}
