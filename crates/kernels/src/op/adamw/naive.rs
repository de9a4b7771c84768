//! Specification of AdamW.

use super::AdamWStep;
use crate::Number;

/// One step over all elements.
pub fn step<F: Number>(s: &AdamWStep, g: &[F], p: &mut [F], m: &mut [F], v: &mut [F]) {
    let correction1 = 1.0 - s.beta1.powf(s.step as f64);
    let correction2 = (1.0 - s.beta2.powf(s.step as f64)).sqrt();
    let rate = F::of(s.learning_rate / correction1);
    for i in 0..p.len() {
        let g = g[i] * F::of(s.gradient_scale);
        m[i] = m[i] * F::of(s.beta1) + g * F::of(1.0 - s.beta1);
        v[i] = v[i] * F::of(s.beta2) + g * g * F::of(1.0 - s.beta2);
        let decayed = p[i] * F::of(1.0 - s.learning_rate * s.weight_decay);
        p[i] = decayed - rate * m[i] / (v[i].sqrt() / F::of(correction2) + F::of(s.epsilon));
    }
}
