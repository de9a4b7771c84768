//! Specification of the activations.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

use super::Activation;
use crate::Number;

/// The activation and its derivative at `z`.
pub fn value_and_slope<F: Number>(activation: Activation, z: F) -> (F, F) {
    let (one, half) = (F::of(1.0), F::of(0.5));
    match activation {
        Activation::Silu => {
            let s = one / (one + (-z).exp());
            (z * s, s * (one + z * (one - s)))
        }
        Activation::Gelu => {
            // erfc of the opposite instead of 1 + erf: nothing cancels for negative z.
            let phi = half * (-z * F::of(FRAC_1_SQRT_2)).erfc();
            let density = (-z * z * half).exp() / F::of((2.0 * PI).sqrt());
            (z * phi, phi + z * density)
        }
        Activation::GeluTanh => {
            let (a, b) = (F::of((2.0 / PI).sqrt()), F::of(0.044715));
            let s = half * (one + (a * (z + b * z * z * z)).tanh());
            let du = a * (one + F::of(3.0) * b * z * z);
            (z * s, s + F::of(2.0) * z * s * (one - s) * du)
        }
        Activation::Tanh => {
            let y = z.tanh();
            (y, one - y * y)
        }
    }
}

/// `y = f(x)`.
pub fn forward<F: Number>(activation: Activation, x: &[F], y: &mut [F]) {
    y.iter_mut().zip(x).for_each(|(y, &x)| *y = value_and_slope(activation, x).0);
}

/// `dx = dy f'(x)` over `x`.
pub fn backward<F: Number>(activation: Activation, x: &mut [F], dy: &[F]) {
    x.iter_mut().zip(dy).for_each(|(x, &dy)| *x = dy * value_and_slope(activation, *x).1);
}
