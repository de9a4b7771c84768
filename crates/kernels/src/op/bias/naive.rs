//! Specification of the bias.

use crate::Number;

/// `y[t] += b`; b `[N]`, y `[T, N]`.
pub fn forward<F: Number>(b: &[F], y: &mut [F]) {
    for y in y.chunks_exact_mut(b.len()) {
        y.iter_mut().zip(b).for_each(|(y, &b)| *y += b);
    }
}

/// `db += sum_t dy[t]`; dy `[T, N]`, db `[N]`.
pub fn backward<F: Number>(dy: &[F], db: &mut [F]) {
    for dy in dy.chunks_exact(db.len()) {
        db.iter_mut().zip(dy).for_each(|(db, &dy)| *db += dy);
    }
}
