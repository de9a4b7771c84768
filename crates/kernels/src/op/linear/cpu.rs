//! The linear layer on the CPU: a matrix product, or rows of dot products where there are few tokens.

use rayon::prelude::*;

use super::{Dims, Linear, dims};
use crate::buffer::Floats;
use crate::cpu::gemm::{Output, View, gemm};
use crate::cpu::vector;
use crate::{Accum, Cpu, Result, Tensor};

/// Up to this many tokens a weight is read once, in place: packing it would cost more than the product.
const FEW_TOKENS: usize = 4;
/// Rows of the weight in one task of the few-token path.
const TASK_ROWS: usize = 64;

impl Linear for Cpu {
    fn linear(&self, x: &Tensor, w: &Tensor, alpha: f32, accum: Accum, y: &mut Tensor) -> Result<()> {
        let op = "linear";
        let d = dims(op, ("x", x), ("w", w), ("y", y))?;
        let (x, w, y) = (x.f32(op, "x")?, w.floats(op, "w")?, y.f32_mut(op, "y")?);
        if (1..=FEW_TOKENS).contains(&d.t) && d.k > 0 && d.n > 0 {
            self.linear_few(d, x, w, alpha, accum, y);
        } else {
            let x = View::rows(Floats::F32(x), 0, d.t, d.k, d.k);
            let w = View::rows(w, 0, d.n, d.k, d.k).transposed();
            gemm(&self.pool, &self.recycler, x, w, alpha, accum, Output::rows(y, d.n));
        }
        Ok(())
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
        let dy = View::rows(Floats::F32(dy.f32(op, "dy")?), 0, d.t, d.n, d.n);
        let w = View::rows(w.floats(op, "w")?, 0, d.n, d.k, d.k);
        let dx = Output::rows(dx.f32_mut(op, "dx")?, d.k);
        gemm(&self.pool, &self.recycler, dy, w, alpha, accum, dx);
        Ok(())
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
        let dy = View::rows(Floats::F32(dy.f32(op, "dy")?), 0, d.t, d.n, d.n).transposed();
        let x = View::rows(Floats::F32(x.f32(op, "x")?), 0, d.t, d.k, d.k);
        let dw = Output::rows(dw.f32_mut(op, "dw")?, d.k);
        gemm(&self.pool, &self.recycler, dy, x, alpha, accum, dw);
        Ok(())
    }
}

impl Cpu {
    /// `y (+)= alpha x W^T` for a few tokens, as a generated token needs it: bound by reading W once.
    fn linear_few(&self, d: Dims, x: &[f32], w: Floats<'_>, alpha: f32, accum: Accum, y: &mut [f32]) {
        let mut columns = vec![0.0f32; d.n * d.t]; // [N, T]
        let task = |(task, out): (usize, &mut [f32])| {
            let mut widened = vec![0.0f32; d.k];
            for (i, out) in out.chunks_exact_mut(d.t).enumerate() {
                let start = (task * TASK_ROWS + i) * d.k;
                let row = match w {
                    Floats::F32(values) => &values[start..start + d.k],
                    _ => {
                        w.widen(start, &mut widened);
                        &widened[..]
                    }
                };
                for (out, x) in out.iter_mut().zip(x.chunks_exact(d.k)) {
                    *out = alpha * vector::dot(row, x);
                }
            }
        };
        self.pool.install(|| columns.par_chunks_mut(TASK_ROWS * d.t).enumerate().for_each(task));
        for (n, column) in columns.chunks_exact(d.t).enumerate() {
            for (t, &value) in column.iter().enumerate() {
                match accum {
                    Accum::Replace => y[t * d.n + n] = value,
                    Accum::Add => y[t * d.n + n] += value,
                }
            }
        }
    }
}
