//! Specification of the squared error.

use crate::Number;

/// `sum_i w_i (z_i - t_i)^2`, with z `[N]` replaced by its gradient.
pub fn loss_and_gradient<F: Number>(z: &mut [F], targets: &[F], weights: &[F]) -> F {
    let mut loss = F::of(0.0);
    for ((z, &target), &weight) in z.iter_mut().zip(targets).zip(weights) {
        let error = *z - target;
        loss += weight * error * error;
        *z = F::of(2.0) * weight * error;
    }
    loss
}
