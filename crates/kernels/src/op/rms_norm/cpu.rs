//! Root mean square normalisation on the CPU.

use super::{RmsGain, RmsNorm, naive, width};
use crate::cpu::blocks::{COLUMNS, rows_per_block};
use crate::cpu::vector::{LANES, lanes, vectorised};
use crate::{Accum, Cpu, Memory, Result, Tensor, shape};

impl RmsNorm for Cpu {
    fn rms_norm(
        &self,
        x: &Tensor,
        gain: &Tensor,
        kind: RmsGain,
        eps: f32,
        y: &mut Tensor,
        rstd: &mut Tensor,
    ) -> Result<()> {
        let op = "rms_norm";
        let d = width(op, x, gain, y, rstd)?;
        let (x, gain) = (x.f32(op, "x")?, naive::factors(&self.to_f32(gain)?, kind));
        let (y, rstd) = (y.f32_mut(op, "y")?, rstd.f32_mut(op, "rstd")?);
        if x.is_empty() {
            return Ok(());
        }
        let rows = rows_per_block(d);
        let blocks = x.chunks(rows * d).zip(y.chunks_mut(rows * d)).zip(rstd.chunks_mut(rows));
        self.each(x.len(), blocks, |((x, y), rstd)| forward(x, &gain, eps, y, rstd));
        Ok(())
    }

    fn rms_norm_backward(
        &self,
        x: &Tensor,
        gain: &Tensor,
        kind: RmsGain,
        rstd: &Tensor,
        dy: &Tensor,
        accum: Accum,
        dx: &mut Tensor,
        dgain: Option<&mut Tensor>,
    ) -> Result<()> {
        let op = "rms_norm_backward";
        let d = width(op, x, gain, dy, rstd)?;
        shape::expect(op, "dx", dx, &[("T", x.shape()[0]), ("D", d)])?;
        if let Some(dgain) = &dgain {
            shape::expect(op, "dgain", dgain, &[("D", d)])?;
        }
        let (gain, rstd) = (naive::factors(&self.to_f32(gain)?, kind), rstd.f32(op, "rstd")?);
        let (x, dy, dx) = (x.f32(op, "x")?, dy.f32(op, "dy")?, dx.f32_mut(op, "dx")?);
        if x.is_empty() {
            return Ok(());
        }
        if let Some(dgain) = dgain {
            let blocks = dgain.f32_mut(op, "dgain")?.chunks_mut(COLUMNS).enumerate();
            self.each(x.len(), blocks, |(block, dgain)| {
                gain_gradient(x, rstd, dy, block * COLUMNS, d, dgain)
            });
        }
        let rows = rows_per_block(d);
        let inputs = x.chunks(rows * d).zip(dy.chunks(rows * d)).zip(rstd.chunks(rows));
        self.each(x.len(), inputs.zip(dx.chunks_mut(rows * d)), |(((x, dy), rstd), dx)| {
            input_gradient(x, &gain, rstd, dy, accum, dx);
        });
        Ok(())
    }
}

vectorised! {
    /// `y = gain * x * rstd` for a block of rows.
    fn forward<L>(x: &[f32], gain: &[f32], eps: f32, y: &mut [f32], rstd: &mut [f32]) {
        let d = gain.len();
        for ((x, y), rstd) in x.chunks_exact(d).zip(y.chunks_exact_mut(d)).zip(rstd) {
            let scale = 1.0 / (lanes::dot::<L>(x, x) / d as f32 + eps).sqrt();
            *rstd = scale;
            for ((y, &x), &gain) in y.iter_mut().zip(x).zip(gain) {
                *y = gain * (x * scale);
            }
        }
    }
}

vectorised! {
    /// `dx (+)= rstd * (g - n * mean(g * n))` for a block of rows.
    fn input_gradient<L>(x: &[f32], gain: &[f32], rstd: &[f32], dy: &[f32], accum: Accum, dx: &mut [f32]) {
        let d = gain.len();
        let rows = x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(dx.chunks_exact_mut(d));
        for (((x, dy), dx), &rstd) in rows.zip(rstd) {
            let mean = product_sum::<L>(gain, dy, x) * rstd / d as f32;
            let inputs = x.iter().zip(dy).zip(gain);
            let values = inputs.map(|((&x, &dy), &gain)| rstd * (gain * dy - x * rstd * mean));
            match accum {
                Accum::Replace => dx.iter_mut().zip(values).for_each(|(dx, value)| *dx = value),
                Accum::Add => dx.iter_mut().zip(values).for_each(|(dx, value)| *dx += value),
            }
        }
    }
}

vectorised! {
    /// `dgain += sum over t of dy * n` for the columns from `column`, row after row.
    fn gain_gradient<L>(x: &[f32], rstd: &[f32], dy: &[f32], column: usize, d: usize, dgain: &mut [f32]) {
        for ((x, dy), &rstd) in x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(rstd) {
            let inputs = x[column..].iter().zip(&dy[column..]);
            for (dgain, (&x, &dy)) in dgain.iter_mut().zip(inputs) {
                *dgain = lanes::fma::<L>(dy, x * rstd, *dgain);
            }
        }
    }
}

/// `sum a b c`; one length.
#[inline(always)]
fn product_sum<L: crate::cpu::vector::Level>(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let mut parts = [0.0f32; LANES];
    let ((a, a_rest), (b, b_rest), (c, c_rest)) =
        (a.as_chunks::<LANES>(), b.as_chunks::<LANES>(), c.as_chunks::<LANES>());
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        for lane in 0..LANES {
            parts[lane] = lanes::fma::<L>(a[lane] * b[lane], c[lane], parts[lane]);
        }
    }
    for (part, ((&a, &b), &c)) in parts.iter_mut().zip(a_rest.iter().zip(b_rest).zip(c_rest)) {
        *part = lanes::fma::<L>(a * b, c, *part);
    }
    lanes::combine(parts, |a, b| a + b)
}
