//! Layer normalisation on the CPU.

use super::{LayerNorm, width};
use crate::cpu::blocks::{COLUMNS, rows_per_block};
use crate::cpu::vector::{LANES, Level, lanes, vectorised};
use crate::{Accum, Cpu, Memory, Result, Tensor, shape};

impl LayerNorm for Cpu {
    fn layer_norm(
        &self,
        x: &Tensor,
        gain: &Tensor,
        shift: &Tensor,
        eps: f32,
        y: &mut Tensor,
        mean: &mut Tensor,
        rstd: &mut Tensor,
    ) -> Result<()> {
        let op = "layer_norm";
        let d = width(op, x, gain, ("y", y), (mean, rstd))?;
        shape::expect(op, "shift", shift, &[("D", d)])?;
        let (x, gain, shift) = (x.f32(op, "x")?, self.to_f32(gain)?, self.to_f32(shift)?);
        let (y, mean, rstd) = (y.f32_mut(op, "y")?, mean.f32_mut(op, "mean")?, rstd.f32_mut(op, "rstd")?);
        if x.is_empty() {
            return Ok(());
        }
        let rows = rows_per_block(d);
        let statistics = mean.chunks_mut(rows).zip(rstd.chunks_mut(rows));
        let blocks = x.chunks(rows * d).zip(y.chunks_mut(rows * d)).zip(statistics);
        self.each(x.len(), blocks, |((x, y), (mean, rstd))| forward(x, &gain, &shift, eps, y, mean, rstd));
        Ok(())
    }

    fn layer_norm_backward(
        &self,
        x: &Tensor,
        gain: &Tensor,
        statistics: (&Tensor, &Tensor),
        dy: &Tensor,
        accum: Accum,
        dx: &mut Tensor,
        dgain: Option<&mut Tensor>,
        dshift: Option<&mut Tensor>,
    ) -> Result<()> {
        let op = "layer_norm_backward";
        let d = width(op, x, gain, ("dy", dy), statistics)?;
        shape::expect(op, "dx", dx, &[("T", x.shape()[0]), ("D", d)])?;
        for (name, gradient) in [("dgain", &dgain), ("dshift", &dshift)] {
            if let Some(gradient) = gradient {
                shape::expect(op, name, gradient, &[("D", d)])?;
            }
        }
        let (gain, mean, rstd) =
            (self.to_f32(gain)?, statistics.0.f32(op, "mean")?, statistics.1.f32(op, "rstd")?);
        let (x, dy, dx) = (x.f32(op, "x")?, dy.f32(op, "dy")?, dx.f32_mut(op, "dx")?);
        if x.is_empty() {
            return Ok(());
        }
        if let Some(dgain) = dgain {
            let blocks = dgain.f32_mut(op, "dgain")?.chunks_mut(COLUMNS).enumerate();
            self.each(x.len(), blocks, |(block, dgain)| {
                gain_gradient(x, mean, rstd, dy, block * COLUMNS, d, dgain)
            });
        }
        if let Some(dshift) = dshift {
            let blocks = dshift.f32_mut(op, "dshift")?.chunks_mut(COLUMNS).enumerate();
            self.each(x.len(), blocks, |(block, dshift)| shift_gradient(dy, block * COLUMNS, d, dshift));
        }
        let rows = rows_per_block(d);
        let statistics = mean.chunks(rows).zip(rstd.chunks(rows));
        let inputs = x.chunks(rows * d).zip(dy.chunks(rows * d)).zip(statistics);
        self.each(x.len(), inputs.zip(dx.chunks_mut(rows * d)), |(((x, dy), (mean, rstd)), dx)| {
            input_gradient(x, &gain, mean, rstd, dy, accum, dx);
        });
        Ok(())
    }
}

vectorised! {
    /// `y = gain * (x - mean) * rstd + shift` for a block of rows.
    ///
    /// The variance is taken around the mean in a second pass: the mean of the squares less the square of the
    /// mean cancels where the mean is large.
    fn forward<L>(
        x: &[f32],
        gain: &[f32],
        shift: &[f32],
        eps: f32,
        y: &mut [f32],
        mean: &mut [f32],
        rstd: &mut [f32],
    ) {
        let d = gain.len();
        let rows = x.chunks_exact(d).zip(y.chunks_exact_mut(d));
        for ((x, y), (mean, rstd)) in rows.zip(mean.iter_mut().zip(rstd)) {
            let center = sum::<L, 1>([x], |[x]| x) / d as f32;
            let variance = sum::<L, 1>([x], |[x]| (x - center) * (x - center)) / d as f32;
            let scale = 1.0 / (variance + eps).sqrt();
            (*mean, *rstd) = (center, scale);
            for (((y, &x), &gain), &shift) in y.iter_mut().zip(x).zip(gain).zip(shift) {
                *y = lanes::fma::<L>(gain, (x - center) * scale, shift);
            }
        }
    }
}

vectorised! {
    /// `dx (+)= rstd * (g - mean(g) - n * mean(g * n))` for a block of rows.
    fn input_gradient<L>(
        x: &[f32],
        gain: &[f32],
        mean: &[f32],
        rstd: &[f32],
        dy: &[f32],
        accum: Accum,
        dx: &mut [f32],
    ) {
        let d = gain.len();
        let rows = x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(dx.chunks_exact_mut(d));
        for (((x, dy), dx), (&mean, &rstd)) in rows.zip(mean.iter().zip(rstd)) {
            let mean_g = lanes::dot::<L>(gain, dy) / d as f32;
            let mean_gn = sum::<L, 3>([gain, dy, x], |[gain, dy, x]| gain * dy * (x - mean)) * rstd / d as f32;
            let inputs = x.iter().zip(dy).zip(gain);
            let values = inputs
                .map(|((&x, &dy), &gain)| rstd * (gain * dy - mean_g - (x - mean) * rstd * mean_gn));
            match accum {
                Accum::Replace => dx.iter_mut().zip(values).for_each(|(dx, value)| *dx = value),
                Accum::Add => dx.iter_mut().zip(values).for_each(|(dx, value)| *dx += value),
            }
        }
    }
}

vectorised! {
    /// `dgain += sum over t of dy * n` for the columns from `column`, row after row.
    fn gain_gradient<L>(
        x: &[f32],
        mean: &[f32],
        rstd: &[f32],
        dy: &[f32],
        column: usize,
        d: usize,
        dgain: &mut [f32],
    ) {
        let rows = x.chunks_exact(d).zip(dy.chunks_exact(d));
        for ((x, dy), (&mean, &rstd)) in rows.zip(mean.iter().zip(rstd)) {
            let inputs = x[column..].iter().zip(&dy[column..]);
            for (dgain, (&x, &dy)) in dgain.iter_mut().zip(inputs) {
                *dgain = lanes::fma::<L>(dy, (x - mean) * rstd, *dgain);
            }
        }
    }
}

vectorised! {
    /// `dshift += sum over t of dy` for the columns from `column`, row after row.
    fn shift_gradient<L>(dy: &[f32], column: usize, d: usize, dshift: &mut [f32]) {
        for dy in dy.chunks_exact(d) {
            dshift.iter_mut().zip(&dy[column..]).for_each(|(dshift, &dy)| *dshift += dy);
        }
    }
}

/// The sum of `term` over slices of one length.
#[inline(always)]
fn sum<L: Level, const N: usize>(slices: [&[f32]; N], term: impl Fn([f32; N]) -> f32) -> f32 {
    let length = slices[0].len();
    let mut parts = [0.0f32; LANES];
    let whole = length - length % LANES;
    for start in (0..whole).step_by(LANES) {
        let chunks = slices.map(|slice| &slice[start..start + LANES]);
        for (lane, part) in parts.iter_mut().enumerate() {
            *part += term(chunks.map(|chunk| chunk[lane]));
        }
    }
    for (part, place) in parts.iter_mut().zip(whole..length) {
        *part += term(slices.map(|slice| slice[place]));
    }
    lanes::combine(parts, |a, b| a + b)
}
