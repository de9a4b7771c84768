//! Specification of layer normalisation.

use crate::op::elementwise;
use crate::{Accum, Number};

/// `y = gain * (x - mean) * rstd + shift`; x `[T, D]`, gain and shift `[D]`, y `[T, D]`, mean and rstd `[T]`.
pub fn forward<F: Number>(
    x: &[F],
    gain: &[F],
    shift: &[F],
    eps: F,
    y: &mut [F],
    mean: &mut [F],
    rstd: &mut [F],
) {
    let d = gain.len();
    let size = F::of(d as f64);
    for (t, (mean, rstd)) in mean.iter_mut().zip(rstd).enumerate() {
        let (x, y) = (&x[t * d..][..d], &mut y[t * d..][..d]);
        *mean = x.iter().copied().sum::<F>() / size;
        let variance = x.iter().map(|&x| (x - *mean) * (x - *mean)).sum::<F>() / size;
        *rstd = F::of(1.0) / (variance + eps).sqrt();
        for i in 0..d {
            y[i] = gain[i] * ((x[i] - *mean) * *rstd) + shift[i];
        }
    }
}

/// `x += f`, then [`forward`]; f `[T, D]`.
pub fn add_forward<F: Number>(
    f: &[F],
    x: &mut [F],
    gain: &[F],
    shift: &[F],
    eps: F,
    y: &mut [F],
    mean: &mut [F],
    rstd: &mut [F],
) {
    elementwise::naive::add(F::of(1.0), f, x);
    forward(x, gain, shift, eps, y, mean, rstd);
}

/// `dx = rstd * (g - mean(g) - n * mean(g * n))` with `n = (x - mean) * rstd`, `g = gain * dy`;
/// `dgain += dy * n`, `dshift += dy`.
pub fn backward<F: Number>(
    x: &[F],
    gain: &[F],
    (mean, rstd): (&[F], &[F]),
    dy: &[F],
    accum: Accum,
    dx: &mut [F],
    mut dgain: Option<&mut [F]>,
    mut dshift: Option<&mut [F]>,
) {
    let d = gain.len();
    let size = F::of(d as f64);
    for (t, (&mean, &rstd)) in mean.iter().zip(rstd).enumerate() {
        let (x, dy, dx) = (&x[t * d..][..d], &dy[t * d..][..d], &mut dx[t * d..][..d]);
        let normed = |i: usize| (x[i] - mean) * rstd;
        let mean_g = (0..d).map(|i| gain[i] * dy[i]).sum::<F>() / size;
        let mean_gn = (0..d).map(|i| gain[i] * dy[i] * normed(i)).sum::<F>() / size;
        for i in 0..d {
            let value = rstd * (gain[i] * dy[i] - mean_g - normed(i) * mean_gn);
            match accum {
                Accum::Replace => dx[i] = value,
                Accum::Add => dx[i] += value,
            }
            if let Some(dgain) = &mut dgain {
                dgain[i] += dy[i] * normed(i);
            }
            if let Some(dshift) = &mut dshift {
                dshift[i] += dy[i];
            }
        }
    }
}
