//! Specification of the element-wise operations.

use crate::Number;

/// `y += alpha x`.
pub fn add<F: Number>(alpha: F, x: &[F], y: &mut [F]) {
    y.iter_mut().zip(x).for_each(|(y, &x)| *y += alpha * x);
}

/// `x = alpha sign(x)`, with sign(0) = 0 and sign(NaN) = NaN.
pub fn scaled_sign<F: Number>(alpha: F, x: &mut [F]) {
    let zero = F::of(0.0);
    for x in x {
        if *x > zero {
            *x = alpha;
        } else if *x < zero {
            *x = -alpha;
        }
    }
}
