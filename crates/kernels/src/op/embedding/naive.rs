//! Specification of the embedding.

use crate::Number;

/// `x[t] = table[ids[t]]`; ids `[T]`, table `[V, D]`, x `[T, D]`.
pub fn forward<F: Number>(ids: &[u32], table: &[F], x: &mut [F], d: usize) {
    for (&id, x) in ids.iter().zip(x.chunks_exact_mut(d)) {
        x.copy_from_slice(&table[id as usize * d..][..d]);
    }
}

/// `dtable[ids[t]] += dx[t]`; dx `[T, D]`, dtable `[V, D]`.
pub fn backward<F: Number>(ids: &[u32], dx: &[F], dtable: &mut [F], d: usize) {
    for (&id, dx) in ids.iter().zip(dx.chunks_exact(d)) {
        let row = &mut dtable[id as usize * d..][..d];
        row.iter_mut().zip(dx).for_each(|(row, &dx)| *row += dx);
    }
}
