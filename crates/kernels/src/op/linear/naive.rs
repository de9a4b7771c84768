//! Specification of the linear layer: three loops, no blocking.

use crate::{Accum, Number};

/// `y (+)= alpha x W^T`; x `[T, K]`, w `[N, K]`, y `[T, N]`.
pub fn forward<F: Number>(x: &[F], w: &[F], alpha: F, accum: Accum, y: &mut [F], k: usize) {
    let n = w.len() / k;
    for (x, y) in x.chunks_exact(k).zip(y.chunks_exact_mut(n)) {
        for (w, y) in w.chunks_exact(k).zip(y) {
            let dot: F = x.iter().zip(w).map(|(&x, &w)| x * w).sum();
            write(y, alpha * dot, accum);
        }
    }
}

/// `dx (+)= alpha dy W`; dy `[T, N]`, w `[N, K]`, dx `[T, K]`.
pub fn input_gradient<F: Number>(dy: &[F], w: &[F], alpha: F, accum: Accum, dx: &mut [F], k: usize) {
    let n = w.len() / k;
    for (dy, dx) in dy.chunks_exact(n).zip(dx.chunks_exact_mut(k)) {
        for (column, dx) in dx.iter_mut().enumerate() {
            let dot: F = dy.iter().enumerate().map(|(row, &dy)| dy * w[row * k + column]).sum();
            write(dx, alpha * dot, accum);
        }
    }
}

/// `dw (+)= alpha dy^T x`; dy `[T, N]`, x `[T, K]`, dw `[N, K]`.
pub fn weight_gradient<F: Number>(dy: &[F], x: &[F], alpha: F, accum: Accum, dw: &mut [F], k: usize) {
    let n = dw.len() / k;
    for (row, dw) in dw.chunks_exact_mut(k).enumerate() {
        for (column, dw) in dw.iter_mut().enumerate() {
            let tokens = dy.chunks_exact(n).zip(x.chunks_exact(k));
            let dot: F = tokens.map(|(dy, x)| dy[row] * x[column]).sum();
            write(dw, alpha * dot, accum);
        }
    }
}

fn write<F: Number>(out: &mut F, value: F, accum: Accum) {
    match accum {
        Accum::Replace => *out = value,
        Accum::Add => *out += value,
    }
}
