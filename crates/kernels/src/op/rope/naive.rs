//! Specification of the rotation.

use crate::Number;

/// Turns `x [T, H*E]` by `cos, sin [P, U/2]` at `positions [T]`; sizes are (H*E, E, U/2).
pub fn forward<F: Number>(
    cos: &[F],
    sin: &[F],
    positions: &[u32],
    x: &mut [F],
    (width, head_size, half): (usize, usize, usize),
) {
    for (&position, x) in positions.iter().zip(x.chunks_exact_mut(width)) {
        let row = position as usize * half;
        for head in x.chunks_exact_mut(head_size) {
            for i in 0..half {
                let (c, s) = (cos[row + i], sin[row + i]);
                let (x1, x2) = (head[i], head[half + i]);
                (head[i], head[half + i]) = (x1 * c - x2 * s, x2 * c + x1 * s);
            }
        }
    }
}

/// The gradient of [`forward`]: the opposite turn.
pub fn backward<F: Number>(
    cos: &[F],
    sin: &[F],
    positions: &[u32],
    dx: &mut [F],
    sizes: (usize, usize, usize),
) {
    let opposite: Vec<F> = sin.iter().map(|&s| -s).collect();
    forward(cos, &opposite, positions, dx, sizes);
}
