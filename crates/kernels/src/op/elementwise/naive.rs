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

/// `x = alpha x`.
pub fn scale<F: Number>(alpha: F, x: &mut [F]) {
    x.iter_mut().for_each(|x| *x = alpha * *x);
}

/// `cap tanh(x / cap)` and its derivative; `x` and 1 where there is no cap.
pub fn soft_capped<F: Number>(cap: Option<f32>, x: F) -> (F, F) {
    let one = F::of(1.0);
    let Some(cap) = cap else { return (x, one) };
    let cap = F::of(f64::from(cap));
    let t = (x / cap).tanh();
    (cap * t, one - t * t)
}

/// `x = cap tanh(x / cap)`.
pub fn soft_cap<F: Number>(cap: f32, x: &mut [F]) {
    x.iter_mut().for_each(|x| *x = soft_capped(Some(cap), *x).0);
}
