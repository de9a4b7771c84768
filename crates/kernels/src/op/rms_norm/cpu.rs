//! Root mean square normalisation on the CPU.

use super::{RmsGain, RmsNorm, naive, width};
use crate::cpu::blocks::{COLUMNS, Room, rows_per_block, rows_per_tile, sum_rows};
use crate::cpu::vector::{lanes, vectorised};
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
        let gain = naive::factors(&self.to_f32(gain)?, kind);
        let (length, x) = (x.len(), x.floats(op, "x")?);
        let (y, rstd) = (y.floats_mut(op, "y")?, rstd.f32_mut(op, "rstd")?);
        if length == 0 {
            return Ok(());
        }
        let (rows, tile) = (rows_per_block(d), rows_per_tile(d));
        let blocks = x.chunks(rows * d).zip(y.chunks(rows * d)).zip(rstd.chunks_mut(rows));
        self.each(length, blocks, |((x, y), rstd)| {
            let [mut x_room, mut y_room] = <[Room; 2]>::default();
            for ((x, y), rstd) in x.chunks(tile * d).zip(y.chunks(tile * d)).zip(rstd.chunks_mut(tile)) {
                let x = x_room.read(x);
                y_room.replace(y, |y| forward(x, &gain, eps, y, rstd));
            }
        });
        Ok(())
    }

    fn add_rms_norm(
        &self,
        f: &Tensor,
        x: &mut Tensor,
        gain: &Tensor,
        kind: RmsGain,
        eps: f32,
        y: &mut Tensor,
        rstd: &mut Tensor,
    ) -> Result<()> {
        let op = "add_rms_norm";
        let d = width(op, x, gain, y, rstd)?;
        shape::expect(op, "f", f, &[("T", x.shape()[0]), ("D", d)])?;
        let gain = naive::factors(&self.to_f32(gain)?, kind);
        let (length, f, x) = (x.len(), f.floats(op, "f")?, x.floats_mut(op, "x")?);
        let (y, rstd) = (y.floats_mut(op, "y")?, rstd.f32_mut(op, "rstd")?);
        if length == 0 {
            return Ok(());
        }
        let (rows, tile) = (rows_per_block(d), rows_per_tile(d));
        let sums = f.chunks(rows * d).zip(x.chunks(rows * d));
        let blocks = sums.zip(y.chunks(rows * d)).zip(rstd.chunks_mut(rows));
        self.each(length, blocks, |(((f, x), y), rstd)| {
            let [mut f_room, mut x_room, mut y_room] = <[Room; 3]>::default();
            let sums = f.chunks(tile * d).zip(x.chunks(tile * d));
            for (((f, x), y), rstd) in sums.zip(y.chunks(tile * d)).zip(rstd.chunks_mut(tile)) {
                let x = x_room.sum(f_room.read(f), x);
                y_room.replace(y, |y| forward(x, &gain, eps, y, rstd));
            }
        });
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
        let (length, x) = (x.len(), x.floats(op, "x")?);
        let (dy, dx) = (dy.floats(op, "dy")?, dx.floats_mut(op, "dx")?);
        if length == 0 {
            return Ok(());
        }
        if let Some(dgain) = dgain {
            let blocks = dgain.f32_mut(op, "dgain")?.chunks_mut(COLUMNS).enumerate();
            self.each(length, blocks, |(block, dgain)| {
                sum_rows([x, dy], d, block * COLUMNS, dgain, |rows, [x, dy], dgain| {
                    gain_gradient(x, &rstd[rows], dy, dgain);
                });
            });
        }
        let (rows, tile) = (rows_per_block(d), rows_per_tile(d));
        let inputs = x.chunks(rows * d).zip(dy.chunks(rows * d)).zip(rstd.chunks(rows));
        self.each(length, inputs.zip(dx.chunks(rows * d)), |(((x, dy), rstd), dx)| {
            let [mut x_room, mut dy_room, mut dx_room] = <[Room; 3]>::default();
            let inputs = x.chunks(tile * d).zip(dy.chunks(tile * d)).zip(rstd.chunks(tile));
            for (((x, dy), rstd), dx) in inputs.zip(dx.chunks(tile * d)) {
                let (x, dy) = (x_room.read(x), dy_room.read(dy));
                dx_room.write(accum, dx, |dx| input_gradient(x, &gain, rstd, dy, accum, dx));
            }
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
            let sum = lanes::sum::<L, 3>([gain, dy, x], |[gain, dy, x]| gain * dy * x);
            let mean = sum * rstd / d as f32;
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
    /// `dgain += sum over t of dy * n`, row after row.
    fn gain_gradient<L>(x: &[f32], rstd: &[f32], dy: &[f32], dgain: &mut [f32]) {
        let d = dgain.len();
        for ((x, dy), &rstd) in x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(rstd) {
            for (dgain, (&x, &dy)) in dgain.iter_mut().zip(x.iter().zip(dy)) {
                *dgain = lanes::fma::<L>(dy, x * rstd, *dgain);
            }
        }
    }
}
