//! Specification of root mean square normalisation.

use super::RmsGain;
use crate::op::elementwise;
use crate::{Accum, Number};

/// The factors of the normed elements from what is stored of them.
pub fn factors<F: Number>(gain: &[F], kind: RmsGain) -> Vec<F> {
    match kind {
        RmsGain::Weight => gain.to_vec(),
        RmsGain::OnePlusWeight => gain.iter().map(|&w| F::of(1.0) + w).collect(),
    }
}

/// `y = gain * x * rstd`; x `[T, D]`, gain `[D]`, y `[T, D]`, rstd `[T]`.
pub fn forward<F: Number>(x: &[F], gain: &[F], kind: RmsGain, eps: F, y: &mut [F], rstd: &mut [F]) {
    let (d, gain) = (gain.len(), factors(gain, kind));
    for ((x, y), rstd) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)).zip(rstd) {
        let mean_square = x.iter().map(|&x| x * x).sum::<F>() / F::of(d as f64);
        *rstd = F::of(1.0) / (mean_square + eps).sqrt();
        for ((y, &x), &gain) in y.iter_mut().zip(x).zip(&gain) {
            *y = gain * (x * *rstd);
        }
    }
}

/// `x += f`, then [`forward`]; f `[T, D]`.
pub fn add_forward<F: Number>(
    f: &[F],
    x: &mut [F],
    gain: &[F],
    kind: RmsGain,
    eps: F,
    y: &mut [F],
    rstd: &mut [F],
) {
    elementwise::naive::add(F::of(1.0), f, x);
    forward(x, gain, kind, eps, y, rstd);
}

/// `dx = rstd * (g - n * mean(g * n))` with `n = x * rstd`, `g = gain * dy`; `dgain += dy * n`.
pub fn backward<F: Number>(
    x: &[F],
    gain: &[F],
    kind: RmsGain,
    rstd: &[F],
    dy: &[F],
    accum: Accum,
    dx: &mut [F],
    mut dgain: Option<&mut [F]>,
) {
    let (d, gain) = (gain.len(), factors(gain, kind));
    for (t, &rstd) in rstd.iter().enumerate() {
        let (x, dy, dx) = (&x[t * d..][..d], &dy[t * d..][..d], &mut dx[t * d..][..d]);
        let mean = (0..d).map(|i| gain[i] * dy[i] * x[i] * rstd).sum::<F>() / F::of(d as f64);
        for i in 0..d {
            let normed = x[i] * rstd;
            let value = rstd * (gain[i] * dy[i] - normed * mean);
            match accum {
                Accum::Replace => dx[i] = value,
                Accum::Add => dx[i] += value,
            }
            if let Some(dgain) = &mut dgain {
                dgain[i] += dy[i] * normed;
            }
        }
    }
}
