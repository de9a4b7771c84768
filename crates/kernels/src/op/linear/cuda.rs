//! The linear layer on a GPU.

mod plan;
pub(crate) mod product;
#[cfg(all(test, feature = "emulator"))]
mod tests;

use super::{Extra, Linear, check_term, dims};
use crate::cuda::blas::Matrix;
use crate::cuda::launch::DeviceFloats;
use crate::cuda::memory::Storage;
use crate::{Accum, Cuda, DType, Result, Tensor, shape};

use self::product::Sum;

impl Linear for Cuda {
    fn linear(&self, x: &Tensor, w: &Tensor, alpha: f32, accum: Accum, y: &mut Tensor) -> Result<()> {
        let op = "linear";
        let d = dims(op, ("x", x), ("w", w), ("y", y))?;
        let w = self.weight(op, ("w", w), x.dtype())?;
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
            thin = Some((self.floats(op, "h", h)?, self.weight(op, ("b", b), x.dtype())?, r));
        }
        let mut bias = None;
        if let Some(tensor) = extra.bias {
            shape::expect(op, "bias", tensor, &[("N", d.n)])?;
            bias = Some(self.floats(op, "bias", tensor)?);
        }
        let w = self.weight(op, ("w", w), x.dtype())?;
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

/// A weight as a product reads it.
struct Weight {
    floats: DeviceFloats,
    /// What holds it where it had to be rounded.
    _rounded: Option<Storage>,
}

impl Cuda {
    /// A weight beside activations of a type: rounded beside `bf16`, as it is beside `f32`, whose kernels widen what they
    /// read.
    fn weight(
        &self,
        op: &'static str,
        (operand, w): (&'static str, &Tensor),
        beside: DType,
    ) -> Result<Weight> {
        let floats = self.floats(op, operand, w)?;
        if beside != DType::Bf16 || floats.dtype == DType::Bf16 {
            return Ok(Weight { floats, _rounded: None });
        }
        let count = w.len();
        let storage = self.scratch(op, count * DType::Bf16.size())?;
        let rounded = DeviceFloats { address: storage.address(), dtype: DType::Bf16 };
        self.each(op, "cast", count, &[floats.into(), rounded.into(), (count as u64).into()])?;
        Ok(Weight { floats: rounded, _rounded: Some(storage) })
    }
}

fn of(floats: DeviceFloats, rows: usize, columns: usize) -> Matrix {
    let DeviceFloats { address, dtype } = floats;
    Matrix { address, dtype, rows, columns, stride: columns, transposed: false }
}

fn beta(accum: Accum) -> f32 {
    match accum {
        Accum::Replace => 0.0,
        Accum::Add => 1.0,
    }
}

impl Matrix {
    fn transposed(self) -> Self {
        Matrix { transposed: !self.transposed, ..self }
    }
}
