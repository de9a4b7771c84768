//! Specification of the row operations.

use crate::Number;

/// `y[i] = x[rows[i]]`; x `[T, D]`, y `[N, D]`.
pub fn gather<F: Number>(rows: &[u32], x: &[F], y: &mut [F], d: usize) {
    for (&row, y) in rows.iter().zip(y.chunks_exact_mut(d)) {
        y.copy_from_slice(&x[row as usize * d..][..d]);
    }
}

/// `dx = 0`, then `dx[rows[i]] = dy[i]`; dy `[N, D]`, dx `[T, D]`.
pub fn scatter<F: Number>(rows: &[u32], dy: &[F], dx: &mut [F], d: usize) {
    dx.fill(F::of(0.0));
    for (&row, dy) in rows.iter().zip(dy.chunks_exact(d)) {
        dx[row as usize * d..][..d].copy_from_slice(dy);
    }
}

/// `y[to[i]] = x[from[i]]`; x `[S, D]`, y `[P, D]`.
pub fn copy<F: Number>(from: &[u32], x: &[F], to: &[u32], y: &mut [F], d: usize) {
    for (&from, &to) in from.iter().zip(to) {
        y[to as usize * d..][..d].copy_from_slice(&x[from as usize * d..][..d]);
    }
}
