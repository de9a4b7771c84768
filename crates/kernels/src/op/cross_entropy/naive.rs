//! Specification of the loss: all logits at once.

use crate::op::elementwise::naive::soft_capped;
use crate::{Accum, Number, op::linear};

/// The loss and, over `logits`, its gradient with respect to them; logits `[N, V]`, labels and weights `[N]`.
pub fn loss_and_gradient<F: Number>(logits: &mut [F], labels: &[u32], weights: &[F], v: usize) -> F {
    let mut loss = F::of(0.0);
    for ((z, &label), &weight) in logits.chunks_exact_mut(v).zip(labels).zip(weights) {
        let max = z.iter().copied().fold(z[0], |max, z| if z > max { z } else { max });
        let total: F = z.iter().map(|&z| (z - max).exp()).sum();
        let lse = max + total.ln();
        loss += weight * (lse - z[label as usize]);
        z.iter_mut().for_each(|z| *z = weight * (*z - lse).exp());
        z[label as usize] += -weight;
    }
    loss
}

/// The loss of `x [N, D]` under `w [V, D]` and an optional cap of the logits, with `dx [N, D]` replaced and `dw [V, D]` added to.
pub fn forward_backward<F: Number>(
    x: &[F],
    w: &[F],
    labels: &[u32],
    weights: &[F],
    soft_cap: Option<f32>,
    dx: &mut [F],
    dw: &mut [F],
    d: usize,
) -> F {
    let (v, one) = (w.len() / d, F::of(1.0));
    let mut logits = vec![F::of(0.0); labels.len() * v];
    linear::naive::forward(x, w, one, Accum::Replace, &mut logits, d);
    let slopes: Vec<F> = logits.iter().map(|&z| soft_capped(soft_cap, z).1).collect();
    logits.iter_mut().for_each(|z| *z = soft_capped(soft_cap, *z).0);
    let loss = loss_and_gradient(&mut logits, labels, weights, v);
    logits.iter_mut().zip(slopes).for_each(|(dz, slope)| *dz = *dz * slope);
    linear::naive::input_gradient(&logits, w, one, Accum::Replace, dx, d);
    linear::naive::weight_gradient(&logits, x, one, Accum::Add, dw, d);
    loss
}
