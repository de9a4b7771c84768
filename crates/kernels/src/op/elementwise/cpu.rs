//! The element-wise operations on the CPU.

use half::bf16;

use super::{Elementwise, check, check_cap};
use crate::buffer::FloatsMut;
use crate::cpu::blocks::{BLOCK, Room, TILE};
use crate::cpu::vector::{self, vectorised};
use crate::{Cpu, Result, Tensor};

impl Elementwise for Cpu {
    fn cast(&self, x: &Tensor, y: &mut Tensor) -> Result<()> {
        check("cast", x, y)?;
        let (x, y) = (x.floats("cast", "x")?, y.floats_mut("cast", "y")?);
        self.each(x.len(), x.chunks(BLOCK).zip(y.chunks(BLOCK)), |(x, y)| y.copy(x));
        Ok(())
    }

    fn add(&self, alpha: f32, x: &Tensor, y: &mut Tensor) -> Result<()> {
        check("add", x, y)?;
        let (x, y) = (x.floats("add", "x")?, y.floats_mut("add", "y")?);
        self.each(x.len(), x.chunks(BLOCK).zip(y.chunks(BLOCK)), |(x, y)| {
            let [mut x_room, mut y_room] = <[Room; 2]>::default();
            for (x, y) in x.chunks(TILE).zip(y.chunks(TILE)) {
                let x = x_room.read(x);
                y_room.update(y, |y| vector::axpy(alpha, x, y));
            }
        });
        Ok(())
    }

    fn fill(&self, value: f32, x: &mut Tensor) -> Result<()> {
        let (length, x) = (x.len(), x.floats_mut("fill", "x")?);
        self.each(length, x.chunks(BLOCK), |x| match x {
            FloatsMut::F32(x) => x.fill(value),
            FloatsMut::Bf16(x) => x.fill(bf16::from_f32(value)),
        });
        Ok(())
    }

    fn scaled_sign(&self, alpha: f32, x: &mut Tensor) -> Result<()> {
        self.change("scaled_sign", x, |x| signs(alpha, x))
    }

    fn scale(&self, alpha: f32, x: &mut Tensor) -> Result<()> {
        self.change("scale", x, |x| vector::scale(x, alpha))
    }

    fn soft_cap(&self, cap: f32, x: &mut Tensor) -> Result<()> {
        check_cap("soft_cap", cap)?;
        self.change("soft_cap", x, |x| vector::soft_cap(x, cap))
    }
}

impl Cpu {
    /// Changes all elements by `work`, a tile at a time.
    fn change(
        &self,
        op: &'static str,
        x: &mut Tensor,
        work: impl Fn(&mut [f32]) + Send + Sync,
    ) -> Result<()> {
        let (length, x) = (x.len(), x.floats_mut(op, "x")?);
        self.each(length, x.chunks(BLOCK), |x| {
            let mut room = Room::default();
            x.chunks(TILE).for_each(|x| room.update(x, &work));
        });
        Ok(())
    }
}

vectorised! {
    /// `x = alpha sign(x)`; zeros and NaN stay what they are.
    fn signs<L>(alpha: f32, x: &mut [f32]) {
        for x in x {
            *x = match *x {
                positive if positive > 0.0 => alpha,
                negative if negative < 0.0 => -alpha,
                other => other,
            };
        }
    }
}
