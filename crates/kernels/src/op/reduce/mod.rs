//! Reductions to one number, in an order that does not depend on the number of threads.

mod cpu;
mod cuda;
pub mod naive;

use crate::{Result, Tensor};

/// Reductions of a tensor of any floating type.
pub trait Reduce {
    /// The sum of the squares of all elements; NaN or infinite if an element is.
    fn sum_of_squares(&self, x: &Tensor) -> Result<f64>;

    /// That of every tensor, to the same bits; a device whose work is waited for waits once.
    fn sums_of_squares(&self, xs: &[&Tensor]) -> Result<Vec<f64>> {
        xs.iter().map(|x| self.sum_of_squares(x)).collect()
    }
}
