//! The operations on channels on the CPU.

use super::{Channel, pair, width};
use crate::buffer::Floats;
use crate::cpu::blocks::{COLUMNS, rows_per_block};
use crate::cpu::vector::{self, lanes, vectorised};
use crate::{Accum, Cpu, Memory, Result, Tensor, shape};

impl Channel for Cpu {
    fn scale_channels(&self, c: &Tensor, y: &mut Tensor) -> Result<()> {
        let op = "scale_channels";
        let n = width(op, c, y)?;
        let (c, y) = (self.to_f32(c)?, y.f32_mut(op, "y")?);
        if y.is_empty() {
            return Ok(());
        }
        self.each(y.len(), y.chunks_mut(rows_per_block(n) * n), |y| {
            y.chunks_exact_mut(n).for_each(|y| multiply(&c, y));
        });
        Ok(())
    }

    fn channel_products(&self, a: &Tensor, b: &Tensor, accum: Accum, out: &mut Tensor) -> Result<()> {
        let op = "channel_products";
        let (_, n) = pair(op, ["T", "N"], a, b)?;
        shape::expect(op, "out", out, &[("N", n)])?;
        let (a, b, out) = (a.f32(op, "a")?, b.f32(op, "b")?, out.f32_mut(op, "out")?);
        self.each(a.len(), out.chunks_mut(COLUMNS).enumerate(), |(block, out)| {
            if accum == Accum::Replace {
                out.fill(0.0);
            }
            for (a, b) in a.chunks_exact(n).zip(b.chunks_exact(n)) {
                let columns = block * COLUMNS..block * COLUMNS + out.len();
                add_products(&a[columns.clone()], &b[columns], out);
            }
        });
        Ok(())
    }

    fn row_products(&self, a: &Tensor, b: &Tensor, alpha: f32, accum: Accum, out: &mut Tensor) -> Result<()> {
        let op = "row_products";
        let (n, k) = pair(op, ["N", "K"], a, b)?;
        shape::expect(op, "out", out, &[("N", n)])?;
        let (a, b, out) = (a.floats(op, "a")?, b.floats(op, "b")?, out.f32_mut(op, "out")?);
        let rows = rows_per_block(k);
        self.each(n * k, out.chunks_mut(rows).enumerate(), |(block, out)| {
            let (mut a_wide, mut b_wide) = (Vec::new(), Vec::new());
            for (row, out) in out.iter_mut().enumerate() {
                let start = (block * rows + row) * k;
                let (a, b) = (row_of(a, start, k, &mut a_wide), row_of(b, start, k, &mut b_wide));
                let sum = alpha * vector::dot(a, b);
                match accum {
                    Accum::Replace => *out = sum,
                    Accum::Add => *out += sum,
                }
            }
        });
        Ok(())
    }
}

/// Elements `start..start + k`, read where they are if they are `f32` and widened into `wide` otherwise.
fn row_of<'a>(x: Floats<'a>, start: usize, k: usize, wide: &'a mut Vec<f32>) -> &'a [f32] {
    if let Floats::F32(x) = x {
        return &x[start..start + k];
    }
    wide.resize(k, 0.0);
    x.widen(start, wide);
    wide
}

vectorised! {
    /// `y = c y`, element by element; one length.
    fn multiply<L>(c: &[f32], y: &mut [f32]) {
        y.iter_mut().zip(c).for_each(|(y, &c)| *y *= c);
    }
}

vectorised! {
    /// `out += a b`, element by element; one length.
    fn add_products<L>(a: &[f32], b: &[f32], out: &mut [f32]) {
        for ((out, &a), &b) in out.iter_mut().zip(a).zip(b) {
            *out = lanes::fma::<L>(a, b, *out);
        }
    }
}
