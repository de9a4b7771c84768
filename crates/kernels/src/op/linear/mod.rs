//! Linear layers: the product with a weight `[N, K]` in its three orientations.
//!
//! Forward `y = a x W^T`; with a gradient `dy` of the loss with respect to `y`, the input's gradient is
//! `dx = a dy W` and the weight's is `dW = a dy^T x`.

mod cpu;
pub mod naive;

use crate::{Accum, Result, Tensor, shape};

/// Products with a weight `[N, K]` (out x in, as PyTorch's `nn.Linear` keeps it).
pub trait Linear {
    /// `y (+)= alpha x W^T`; x `[T, K]`, w `[N, K]` in any floating type, y `[T, N]`.
    fn linear(&self, x: &Tensor, w: &Tensor, alpha: f32, accum: Accum, y: &mut Tensor) -> Result<()>;

    /// `dx (+)= alpha dy W`; dy `[T, N]`, w `[N, K]` in any floating type, dx `[T, K]`.
    fn linear_input_gradient(
        &self,
        dy: &Tensor,
        w: &Tensor,
        alpha: f32,
        accum: Accum,
        dx: &mut Tensor,
    ) -> Result<()>;

    /// `dw (+)= alpha dy^T x`; dy `[T, N]`, x `[T, K]`, dw `[N, K]`.
    fn linear_weight_gradient(
        &self,
        dy: &Tensor,
        x: &Tensor,
        alpha: f32,
        accum: Accum,
        dw: &mut Tensor,
    ) -> Result<()>;
}

/// The sizes of one product.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dims {
    pub(crate) t: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
}

/// Checks `x [T, K]`, `w [N, K]` and `y [T, N]`, in whichever role each of them stands.
pub(crate) fn dims(
    op: &'static str,
    (x_name, x): (&'static str, &Tensor),
    (w_name, w): (&'static str, &Tensor),
    (y_name, y): (&'static str, &Tensor),
) -> Result<Dims> {
    let (t, k) = shape::matrix(op, x_name, x)?;
    let (n, _) = shape::matrix(op, w_name, w)?;
    shape::expect(op, w_name, w, &[("N", n), ("K", k)])?;
    shape::expect(op, y_name, y, &[("T", t), ("N", n)])?;
    Ok(Dims { t, n, k })
}
