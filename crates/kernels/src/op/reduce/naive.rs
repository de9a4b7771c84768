//! Specification of the reductions.

use crate::Number;

/// The sum of the squares of all elements.
pub fn sum_of_squares<F: Number>(x: &[F]) -> f64 {
    x.iter().map(|&x| x.f64() * x.f64()).sum()
}
