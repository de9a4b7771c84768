//! Specification of the operations on channels.

use crate::{Accum, Number};

/// `y[t, n] *= c[n]`; c `[N]`, y `[T, N]`.
pub fn scale<F: Number>(c: &[F], y: &mut [F]) {
    for y in y.chunks_exact_mut(c.len()) {
        y.iter_mut().zip(c).for_each(|(y, &c)| *y = *y * c);
    }
}

/// `out[n] (+)= sum_t a[t, n] b[t, n]`; a and b `[T, N]`, out `[N]`.
pub fn channel_products<F: Number>(a: &[F], b: &[F], accum: Accum, out: &mut [F]) {
    let n = out.len();
    for (channel, out) in out.iter_mut().enumerate() {
        let terms = a.iter().zip(b).skip(channel).step_by(n);
        write(accum, terms.map(|(&a, &b)| a * b).sum(), out);
    }
}

/// `out[n] (+)= alpha sum_k a[n, k] b[n, k]`; a and b `[N, K]`, out `[N]`.
pub fn row_products<F: Number>(a: &[F], b: &[F], alpha: F, accum: Accum, out: &mut [F]) {
    let k = a.len() / out.len().max(1);
    for (n, out) in out.iter_mut().enumerate() {
        let row = n * k..(n + 1) * k;
        let sum: F = a[row.clone()].iter().zip(&b[row]).map(|(&a, &b)| a * b).sum();
        write(accum, alpha * sum, out);
    }
}

fn write<F: Number>(accum: Accum, value: F, out: &mut F) {
    match accum {
        Accum::Replace => *out = value,
        Accum::Add => *out += value,
    }
}
