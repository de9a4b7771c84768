//! Specification of the column ranges.

use crate::Number;

/// `y = x[:, from..from + w]`; x `[T, W]`, y `[T, w]`.
pub fn take<F: Number>(x: &[F], from: usize, y: &mut [F], whole: usize, part: usize) {
    for (x, y) in x.chunks_exact(whole).zip(y.chunks_exact_mut(part)) {
        y.copy_from_slice(&x[from..from + part]);
    }
}

/// `x[:, from..from + w] = y`; y `[T, w]`, x `[T, W]`.
pub fn put<F: Number>(y: &[F], from: usize, x: &mut [F], whole: usize, part: usize) {
    for (x, y) in x.chunks_exact_mut(whole).zip(y.chunks_exact(part)) {
        x[from..from + part].copy_from_slice(y);
    }
}
