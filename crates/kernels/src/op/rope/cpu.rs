//! The rotation on the CPU.

use super::{Rope, RopeTable, widths};
use crate::buffer::FloatsMut;
use crate::cpu::blocks::rows_per_block;
use crate::cpu::vector::lanes::{self, Element};
use crate::cpu::vector::vectorised;
use crate::{Cpu, Result, Tensor};

impl Rope for Cpu {
    fn rope(&self, table: &RopeTable, positions: &Tensor, x: &mut Tensor) -> Result<()> {
        self.turn("rope", table, positions, "x", x, 1.0)
    }

    fn rope_backward(&self, table: &RopeTable, positions: &Tensor, dx: &mut Tensor) -> Result<()> {
        self.turn("rope_backward", table, positions, "dx", dx, -1.0)
    }
}

impl Cpu {
    /// Turns every head of `x [T, H*E]`, forward for `direction` 1 and backward for -1.
    fn turn(
        &self,
        op: &'static str,
        table: &RopeTable,
        positions: &Tensor,
        name: &'static str,
        x: &mut Tensor,
        direction: f32,
    ) -> Result<()> {
        let (width, head_size, half) = widths(op, table, positions, x)?;
        let (cos, sin) = (table.cos.f32(op, "cos")?, table.sin.f32(op, "sin")?);
        let (length, positions) = (x.len(), positions.u32(op, "positions")?);
        let x = x.floats_mut(op, name)?;
        if length == 0 {
            return Ok(());
        }
        let rows = rows_per_block(width);
        self.each(length, positions.chunks(rows).zip(x.chunks(rows * width)), |(positions, x)| {
            for (&position, x) in positions.iter().zip(x.chunks(width)) {
                let row = position as usize * half;
                let (cos, sin) = (&cos[row..row + half], &sin[row..row + half]);
                match x {
                    FloatsMut::F32(x) => turn_heads(cos, sin, direction, head_size, x),
                    FloatsMut::Bf16(x) => turn_heads(cos, sin, direction, head_size, x),
                }
            }
        });
        Ok(())
    }
}

vectorised! {
    /// Turns the heads of one token by the angles of `cos, sin [U/2]`.
    fn turn_heads<L, E: Element>(cos: &[f32], sin: &[f32], direction: f32, head_size: usize, x: &mut [E]) {
        let half = cos.len();
        for head in x.chunks_exact_mut(head_size) {
            let (real, imaginary) = head.split_at_mut(half);
            for (((real, imaginary), &c), &s) in real.iter_mut().zip(imaginary).zip(cos).zip(sin) {
                let (s, x1, x2) = (s * direction, real.wide(), imaginary.wide());
                *real = E::round(lanes::fma::<L>(x1, c, -x2 * s));
                *imaginary = E::round(lanes::fma::<L>(x2, c, x1 * s));
            }
        }
    }
}
