//! The operations on channels on the CPU.

use super::{Channel, pair, width};
use crate::cpu::blocks::{COLUMNS, Room, rows_per_block, rows_per_tile, sum_rows};
use crate::cpu::vector::{self, lanes, vectorised};
use crate::{Accum, Cpu, Memory, Result, Tensor, shape};

impl Channel for Cpu {
    fn scale_channels(&self, c: &Tensor, y: &mut Tensor) -> Result<()> {
        let op = "scale_channels";
        let n = width(op, c, y)?;
        let (c, length, y) = (self.to_f32(c)?, y.len(), y.floats_mut(op, "y")?);
        if length == 0 {
            return Ok(());
        }
        self.each(length, y.chunks(rows_per_block(n) * n), |y| {
            let mut room = Room::default();
            for y in y.chunks(rows_per_tile(n) * n) {
                room.update(y, |y| y.chunks_exact_mut(n).for_each(|y| multiply(&c, y)));
            }
        });
        Ok(())
    }

    fn channel_products(&self, a: &Tensor, b: &Tensor, accum: Accum, out: &mut Tensor) -> Result<()> {
        let op = "channel_products";
        let (_, n) = pair(op, ["T", "N"], a, b)?;
        shape::expect(op, "out", out, &[("N", n)])?;
        let (a, b, out) = (a.floats(op, "a")?, b.floats(op, "b")?, out.f32_mut(op, "out")?);
        self.each(a.len(), out.chunks_mut(COLUMNS).enumerate(), |(block, out)| {
            if accum == Accum::Replace {
                out.fill(0.0);
            }
            sum_rows([a, b], n, block * COLUMNS, out, |_, [a, b], out| add_products(a, b, out));
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
            let [mut a_room, mut b_room] = <[Room; 2]>::default();
            for (row, out) in out.iter_mut().enumerate() {
                let start = (block * rows + row) * k;
                let [a, b] = [a, b].map(|x| x.slice(start..start + k));
                let sum = alpha * vector::dot(a_room.read(a), b_room.read(b));
                match accum {
                    Accum::Replace => *out = sum,
                    Accum::Add => *out += sum,
                }
            }
        });
        Ok(())
    }
}

vectorised! {
    /// `y = c y`, element by element; one length.
    fn multiply<L>(c: &[f32], y: &mut [f32]) {
        y.iter_mut().zip(c).for_each(|(y, &c)| *y *= c);
    }
}

vectorised! {
    /// `out += a b`, row after row; a and b `[rows, columns]`, out `[columns]`.
    fn add_products<L>(a: &[f32], b: &[f32], out: &mut [f32]) {
        for (a, b) in a.chunks_exact(out.len()).zip(b.chunks_exact(out.len())) {
            for (out, (&a, &b)) in out.iter_mut().zip(a.iter().zip(b)) {
                *out = lanes::fma::<L>(a, b, *out);
            }
        }
    }
}
