//! Linear layers: the product with a weight `[N, K]` in its three orientations.
//!
//! Forward `y = a x W^T`; with a gradient `dy` of the loss with respect to `y`, the input's gradient is
//! `dx = a dy W` and the weight's is `dW = a dy^T x`.
//!
//! The type of x (or dy) decides the arithmetic. `f32`: everything is widened and computed in `f32`. `bf16`: the
//! weight is rounded to `bf16` as well, products are exact, and sums are `f32`. A weight's gradient is computed in
//! `bf16` where both its operands are. Results are `f32` or `bf16`, whatever the operands are.

pub(crate) mod cpu;
pub(crate) mod cuda;
mod dots;
mod few;
pub mod naive;

use crate::{Accum, Error, Result, Tensor, shape};

/// What a product's result receives in the same pass.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extra<'a> {
    /// b `[N]`, added to every row; any floating type.
    pub bias: Option<&'a Tensor>,
    /// A thin product `h B^T`: h `[T, r]` of x's type, B `[N, r]`.
    pub term: Option<(&'a Tensor, &'a Tensor)>,
}

/// Products with a weight `[N, K]` (out x in, as PyTorch's `nn.Linear` keeps it).
pub trait Linear {
    /// `y (+)= alpha x W^T`; x `[T, K]`, w `[N, K]` in any floating type, y `[T, N]`.
    fn linear(&self, x: &Tensor, w: &Tensor, alpha: f32, accum: Accum, y: &mut Tensor) -> Result<()>;

    /// `y (+)= x W^T + h B^T + b`, the last two where they are there; shapes and types as in [`Linear::linear`].
    fn linear_fused(
        &self,
        x: &Tensor,
        w: &Tensor,
        extra: Extra<'_>,
        accum: Accum,
        y: &mut Tensor,
    ) -> Result<()>;

    /// `dx (+)= alpha dy W`; dy `[T, N]`, w `[N, K]` in any floating type, dx `[T, K]`.
    fn linear_input_gradient(
        &self,
        dy: &Tensor,
        w: &Tensor,
        alpha: f32,
        accum: Accum,
        dx: &mut Tensor,
    ) -> Result<()>;

    /// `dx (+)= dy W + v A`, the second where it is there: v `[T, r]` of dy's type, A `[r, K]`.
    fn linear_input_gradient_fused(
        &self,
        dy: &Tensor,
        w: &Tensor,
        term: Option<(&Tensor, &Tensor)>,
        accum: Accum,
        dx: &mut Tensor,
    ) -> Result<()>;

    /// `dw (+)= alpha dy^T x`; dy `[T, N]`, x `[T, K]`, dw `[N, K]` in `f32`.
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

/// Checks a thin product's operands, h `[T, r]` and B `[N, r]` or A `[r, K]`, and gives r.
pub(crate) fn check_term(
    op: &'static str,
    x: &Tensor,
    h: &Tensor,
    b: &Tensor,
    out: (&'static str, usize),
) -> Result<usize> {
    let (_, r) = shape::matrix(op, "h", h)?;
    shape::expect(op, "h", h, &[("T", x.shape()[0]), ("r", r)])?;
    match out.0 {
        "N" => shape::expect(op, "b", b, &[out, ("r", r)])?,
        _ => shape::expect(op, "a", b, &[("r", r), out])?,
    }
    if h.dtype() != x.dtype() {
        return Err(Error::Type { op, operand: "h", found: h.dtype(), expected: x.dtype().name() });
    }
    Ok(r)
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
