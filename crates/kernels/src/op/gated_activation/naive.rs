//! Specification of the gated activation.

use crate::op::activation::naive::value_and_slope;
use crate::{Activation, Number};

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
