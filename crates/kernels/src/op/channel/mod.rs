//! One factor per output channel of a layer, and the sums behind its gradient, as DoRA's magnitude needs them.
//!
//! `y[t, n] *= c[n]`; its backward is `dy[t, n] *= c[n]` for the input, the same operation, and
//! `dc[n] = sum_t x[t, n] dy[t, n]` for the factors, [`Channel::channel_products`].
//! [`Channel::row_products`] of a weight with itself are the squared norms of its rows, and of a gradient with
//! a weight the slopes along them. Source: Liu et al., "DoRA", arXiv 2402.09353, equations 5 and 6.

mod cpu;
mod cuda;
pub mod naive;

use crate::{Accum, Result, Tensor, shape};

/// Factors of channels and sums over them.
pub trait Channel {
    /// `y[t, n] *= c[n]`; c `[N]` in any floating type, y `[T, N]` in `f32` or `bf16`.
    fn scale_channels(&self, c: &Tensor, y: &mut Tensor) -> Result<()>;

    /// `out[n] (+)= sum_t a[t, n] b[t, n]`; a and b `[T, N]` in any floating type, out `[N]` in `f32`.
    fn channel_products(&self, a: &Tensor, b: &Tensor, accum: Accum, out: &mut Tensor) -> Result<()>;

    /// `out[n] (+)= alpha sum_k a[n, k] b[n, k]`; a and b `[N, K]` in any floating type, out `[N]` in
    /// `f32`.
    fn row_products(&self, a: &Tensor, b: &Tensor, alpha: f32, accum: Accum, out: &mut Tensor) -> Result<()>;
}

/// Checks `y [T, N]` and `c [N]`; returns N.
pub(crate) fn width(op: &'static str, c: &Tensor, y: &Tensor) -> Result<usize> {
    let (_, n) = shape::matrix(op, "y", y)?;
    shape::expect(op, "c", c, &[("N", n)])?;
    Ok(n)
}

/// Checks that `b` is `[rows, columns]` as `a` is, named `axes`; returns both sizes.
pub(crate) fn pair(
    op: &'static str,
    axes: [&'static str; 2],
    a: &Tensor,
    b: &Tensor,
) -> Result<(usize, usize)> {
    let (rows, columns) = shape::matrix(op, "a", a)?;
    shape::expect(op, "b", b, &[(axes[0], rows), (axes[1], columns)])?;
    Ok((rows, columns))
}
