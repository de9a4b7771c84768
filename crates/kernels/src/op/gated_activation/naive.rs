//! Specification of the gated activation.

use super::Activation;
use crate::Number;

/// The activation and its derivative at `z`.
pub fn value_and_slope<F: Number>(activation: Activation, z: F) -> (F, F) {
    let one = F::of(1.0);
    match activation {
        Activation::Silu => {
            let s = one / (one + (-z).exp());
            (z * s, s * (one + z * (one - s)))
        }
    }
}

/// `h = act(gate) * up`.
pub fn forward<F: Number>(activation: Activation, gate: &[F], up: &[F], h: &mut [F]) {
    for ((h, &gate), &up) in h.iter_mut().zip(gate).zip(up) {
        *h = value_and_slope(activation, gate).0 * up;
    }
}

/// `dgate = dh * up * act'(gate)` over `gate`, `dup = dh * act(gate)` over `up`.
pub fn backward<F: Number>(activation: Activation, gate: &mut [F], up: &mut [F], dh: &[F]) {
    for ((gate, up), &dh) in gate.iter_mut().zip(up).zip(dh) {
        let (value, slope) = value_and_slope(activation, *gate);
        (*gate, *up) = (dh * *up * slope, dh * value);
    }
}
