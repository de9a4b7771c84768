//! The linear layer on a GPU.

#[cfg(all(test, feature = "emulator"))]
mod library_tests;
pub(crate) mod plan;
pub(crate) mod product;
#[cfg(all(test, feature = "emulator"))]
mod tests;

use super::{Extra, Linear, check_term, dims};
use crate::cuda::blas::Matrix;
use crate::cuda::launch::DeviceFloats;
use crate::{Accum, Cuda, DType, Result, Tensor, shape};

use self::plan::FEW_ROWS;
use self::product::{Sum, Typed};

impl Linear for Cuda {
    fn linear(&self, x: &Tensor, w: &Tensor, alpha: f32, accum: Accum, y: &mut Tensor) -> Result<()> {
        let op = "linear";
        let d = dims(op, ("x", x), ("w", w), ("y", y))?;
        let w = self.forward_weight(op, ("w", w), x)?;
        let first = (of(self.floats(op, "x", x)?, d.t, d.k), of(w.floats, d.n, d.k).transposed());
        let c = of(self.floats_mut(op, "y", y)?, d.t, d.n);
        self.sum(op, &Sum { first, second: None, c, alpha, beta: beta(accum), bias: None })
    }

    fn linear_fused(
        &self,
        x: &Tensor,
        w: &Tensor,
        extra: Extra<'_>,
        accum: Accum,
        y: &mut Tensor,
    ) -> Result<()> {
        let op = "linear_fused";
        let d = dims(op, ("x", x), ("w", w), ("y", y))?;
        let mut thin = None;
        if let Some((h, b)) = extra.term {
            let r = check_term(op, x, h, b, ("N", d.n))?;
            thin = Some((self.floats(op, "h", h)?, self.forward_weight(op, ("b", b), x)?, r));
        }
        let mut bias = None;
        if let Some(tensor) = extra.bias {
            shape::expect(op, "bias", tensor, &[("N", d.n)])?;
            bias = Some(self.floats(op, "bias", tensor)?);
        }
        let w = self.forward_weight(op, ("w", w), x)?;
        let first = (of(self.floats(op, "x", x)?, d.t, d.k), of(w.floats, d.n, d.k).transposed());
        let second = thin.as_ref().map(|(h, b, r)| (of(*h, d.t, *r), of(b.floats, d.n, *r).transposed()));
        let c = of(self.floats_mut(op, "y", y)?, d.t, d.n);
        self.sum(op, &Sum { first, second, c, alpha: 1.0, beta: beta(accum), bias })
    }

    fn linear_input_gradient(
        &self,
        dy: &Tensor,
        w: &Tensor,
        alpha: f32,
        accum: Accum,
        dx: &mut Tensor,
    ) -> Result<()> {
        let op = "linear_input_gradient";
        let d = dims(op, ("dx", dx), ("w", w), ("dy", dy))?;
        let w = self.weight(op, ("w", w), dy.dtype())?;
        let first = (of(self.floats(op, "dy", dy)?, d.t, d.n), of(w.floats, d.n, d.k));
        let c = of(self.floats_mut(op, "dx", dx)?, d.t, d.k);
        self.sum(op, &Sum { first, second: None, c, alpha, beta: beta(accum), bias: None })
    }

    fn linear_input_gradient_fused(
        &self,
        dy: &Tensor,
        w: &Tensor,
        term: Option<(&Tensor, &Tensor)>,
        accum: Accum,
        dx: &mut Tensor,
    ) -> Result<()> {
        let op = "linear_input_gradient_fused";
        let d = dims(op, ("dx", dx), ("w", w), ("dy", dy))?;
        let mut thin = None;
        if let Some((v, a)) = term {
            let r = check_term(op, dy, v, a, ("K", d.k))?;
            thin = Some((self.floats(op, "v", v)?, self.weight(op, ("a", a), dy.dtype())?, r));
        }
        let w = self.weight(op, ("w", w), dy.dtype())?;
        let first = (of(self.floats(op, "dy", dy)?, d.t, d.n), of(w.floats, d.n, d.k));
        let second = thin.as_ref().map(|(v, a, r)| (of(*v, d.t, *r), of(a.floats, *r, d.k)));
        let c = of(self.floats_mut(op, "dx", dx)?, d.t, d.k);
        self.sum(op, &Sum { first, second, c, alpha: 1.0, beta: beta(accum), bias: None })
    }

    fn linear_weight_gradient(
        &self,
        dy: &Tensor,
        x: &Tensor,
        alpha: f32,
        accum: Accum,
        dw: &mut Tensor,
    ) -> Result<()> {
        let op = "linear_weight_gradient";
        let d = dims(op, ("x", x), ("dw", dw), ("dy", dy))?;
        let dy = of(self.floats(op, "dy", dy)?, d.t, d.n).transposed();
        let first = (dy, of(self.floats(op, "x", x)?, d.t, d.k));
        let c = DeviceFloats { address: self.f32_mut(op, "dw", dw)?, dtype: DType::F32 };
        let c = of(c, d.n, d.k);
        self.sum(op, &Sum { first, second: None, c, alpha, beta: beta(accum), bias: None })
    }
}

impl Cuda {
    /// A weight beside activations of a type: rounded beside `bf16`, as it is beside `f32`, whose kernels widen what they
    /// read.
    pub(crate) fn weight(
        &self,
        op: &'static str,
        (operand, w): (&'static str, &Tensor),
        beside: DType,
    ) -> Result<Typed> {
        let floats = self.floats(op, operand, w)?;
        let dtype = if beside == DType::Bf16 { beside } else { floats.dtype };
        self.as_type(op, floats, w.len(), dtype)
    }

    /// The same for a product `x W^T` with x `[T, *]`, whose kernels for few rows round in passing.
    fn forward_weight(&self, op: &'static str, w: (&'static str, &Tensor), x: &Tensor) -> Result<Typed> {
        let beside = if x.shape()[0] <= FEW_ROWS { DType::F32 } else { x.dtype() };
        self.weight(op, w, beside)
    }
}

/// All of a tensor's elements as a matrix.
pub(crate) fn of(floats: DeviceFloats, rows: usize, columns: usize) -> Matrix {
    let DeviceFloats { address, dtype } = floats;
    Matrix { address, dtype, rows, columns, stride: columns, transposed: false }
}

pub(crate) fn beta(accum: Accum) -> f32 {
    match accum {
        Accum::Replace => 0.0,
        Accum::Add => 1.0,
    }
}

impl Matrix {
    pub(crate) fn transposed(self) -> Self {
        Matrix { transposed: !self.transposed, ..self }
    }
}
