//! Layer normalisation on the CPU.

use super::{LayerNorm, width};
use crate::cpu::blocks::{COLUMNS, Room, rows_per_block, rows_per_tile, sum_rows};
use crate::cpu::vector::{lanes, vectorised};
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
        let (gain, shift) = (self.to_f32(gain)?, self.to_f32(shift)?);
        let (length, x, y) = (x.len(), x.floats(op, "x")?, y.floats_mut(op, "y")?);
        let (mean, rstd) = (mean.f32_mut(op, "mean")?, rstd.f32_mut(op, "rstd")?);
        if length == 0 {
            return Ok(());
        }
        let (rows, tile) = (rows_per_block(d), rows_per_tile(d));
        let statistics = mean.chunks_mut(rows).zip(rstd.chunks_mut(rows));
        let blocks = x.chunks(rows * d).zip(y.chunks(rows * d)).zip(statistics);
        self.each(length, blocks, |((x, y), (mean, rstd))| {
            let [mut x_room, mut y_room] = <[Room; 2]>::default();
            let statistics = mean.chunks_mut(tile).zip(rstd.chunks_mut(tile));
            for ((x, y), (mean, rstd)) in x.chunks(tile * d).zip(y.chunks(tile * d)).zip(statistics) {
                let x = x_room.read(x);
                y_room.replace(y, |y| forward(x, &gain, &shift, eps, y, mean, rstd));
            }
        });
        Ok(())
    }

    fn add_layer_norm(
        &self,
        f: &Tensor,
        x: &mut Tensor,
        gain: &Tensor,
        shift: &Tensor,
        eps: f32,
        y: &mut Tensor,
        mean: &mut Tensor,
        rstd: &mut Tensor,
    ) -> Result<()> {
        let op = "add_layer_norm";
        let d = width(op, x, gain, ("y", y), (mean, rstd))?;
        shape::expect(op, "shift", shift, &[("D", d)])?;
        shape::expect(op, "f", f, &[("T", x.shape()[0]), ("D", d)])?;
        let (gain, shift) = (self.to_f32(gain)?, self.to_f32(shift)?);
        let (length, f, x) = (x.len(), f.floats(op, "f")?, x.floats_mut(op, "x")?);
        let y = y.floats_mut(op, "y")?;
        let (mean, rstd) = (mean.f32_mut(op, "mean")?, rstd.f32_mut(op, "rstd")?);
        if length == 0 {
            return Ok(());
        }
        let (rows, tile) = (rows_per_block(d), rows_per_tile(d));
        let statistics = mean.chunks_mut(rows).zip(rstd.chunks_mut(rows));
        let sums = f.chunks(rows * d).zip(x.chunks(rows * d));
        self.each(length, sums.zip(y.chunks(rows * d)).zip(statistics), |(((f, x), y), (mean, rstd))| {
            let [mut f_room, mut x_room, mut y_room] = <[Room; 3]>::default();
            let statistics = mean.chunks_mut(tile).zip(rstd.chunks_mut(tile));
            let sums = f.chunks(tile * d).zip(x.chunks(tile * d));
            for (((f, x), y), (mean, rstd)) in sums.zip(y.chunks(tile * d)).zip(statistics) {
                let x = x_room.sum(f_room.read(f), x);
                y_room.replace(y, |y| forward(x, &gain, &shift, eps, y, mean, rstd));
            }
        });
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
        let (length, x) = (x.len(), x.floats(op, "x")?);
        let (dy, dx) = (dy.floats(op, "dy")?, dx.floats_mut(op, "dx")?);
        if length == 0 {
            return Ok(());
        }
        if let Some(dgain) = dgain {
            let blocks = dgain.f32_mut(op, "dgain")?.chunks_mut(COLUMNS).enumerate();
            self.each(length, blocks, |(block, dgain)| {
                sum_rows([x, dy], d, block * COLUMNS, dgain, |rows, [x, dy], dgain| {
                    gain_gradient(x, &mean[rows.clone()], &rstd[rows], dy, dgain);
                });
            });
        }
        if let Some(dshift) = dshift {
            self.add_rows(dy, d, dshift.f32_mut(op, "dshift")?);
        }
        let (rows, tile) = (rows_per_block(d), rows_per_tile(d));
        let statistics = mean.chunks(rows).zip(rstd.chunks(rows));
        let inputs = x.chunks(rows * d).zip(dy.chunks(rows * d)).zip(statistics);
        self.each(length, inputs.zip(dx.chunks(rows * d)), |(((x, dy), (mean, rstd)), dx)| {
            let [mut x_room, mut dy_room, mut dx_room] = <[Room; 3]>::default();
            let statistics = mean.chunks(tile).zip(rstd.chunks(tile));
            let inputs = x.chunks(tile * d).zip(dy.chunks(tile * d)).zip(statistics);
            for (((x, dy), (mean, rstd)), dx) in inputs.zip(dx.chunks(tile * d)) {
                let (x, dy) = (x_room.read(x), dy_room.read(dy));
                dx_room.write(accum, dx, |dx| input_gradient(x, &gain, mean, rstd, dy, accum, dx));
            }
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
            let center = lanes::sum::<L, 1>([x], |[x]| x) / d as f32;
            let variance = lanes::sum::<L, 1>([x], |[x]| (x - center) * (x - center)) / d as f32;
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
            let mean_gn = lanes::sum::<L, 3>([gain, dy, x], |[gain, dy, x]| gain * dy * (x - mean)) * rstd / d as f32;
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
    /// `dgain += sum over t of dy * n`, row after row.
    fn gain_gradient<L>(x: &[f32], mean: &[f32], rstd: &[f32], dy: &[f32], dgain: &mut [f32]) {
        let d = dgain.len();
        let rows = x.chunks_exact(d).zip(dy.chunks_exact(d));
        for ((x, dy), (&mean, &rstd)) in rows.zip(mean.iter().zip(rstd)) {
            for (dgain, (&x, &dy)) in dgain.iter_mut().zip(x.iter().zip(dy)) {
                *dgain = lanes::fma::<L>(dy, (x - mean) * rstd, *dgain);
            }
        }
    }
}
