//! The element-wise operations on the CPU.

use super::{Elementwise, check, check_cap};
use crate::cpu::blocks::BLOCK;
use crate::cpu::vector::{self, vectorised};
use crate::{Cpu, Result, Tensor};

impl Elementwise for Cpu {
    fn cast(&self, x: &Tensor, y: &mut Tensor) -> Result<()> {
        check("cast", x, y)?;
        let (x, y) = (x.floats("cast", "x")?, y.floats_mut("cast", "y")?);
        self.each(x.len(), x.chunks(BLOCK).zip(y.chunks(BLOCK)), |(x, y)| y.replace(|y| x.widen(0, y)));
        Ok(())
    }

    fn add(&self, alpha: f32, x: &Tensor, y: &mut Tensor) -> Result<()> {
        check("add", x, y)?;
        let (x, y) = (x.floats("add", "x")?, y.floats_mut("add", "y")?);
        self.each(x.len(), x.chunks(BLOCK).zip(y.chunks(BLOCK)), |(x, y)| {
            let mut space = Vec::new();
            let x = x.widened(&mut space);
            y.update(|y| vector::axpy(alpha, x, y));
        });
        Ok(())
    }

    fn fill(&self, value: f32, x: &mut Tensor) -> Result<()> {
        let x = x.f32_mut("fill", "x")?;
        self.each(x.len(), x.chunks_mut(BLOCK), |x| x.fill(value));
        Ok(())
    }

    fn scaled_sign(&self, alpha: f32, x: &mut Tensor) -> Result<()> {
        let x = x.f32_mut("scaled_sign", "x")?;
        self.each(x.len(), x.chunks_mut(BLOCK), |x| signs(alpha, x));
        Ok(())
    }

    fn scale(&self, alpha: f32, x: &mut Tensor) -> Result<()> {
        let x = x.f32_mut("scale", "x")?;
        self.each(x.len(), x.chunks_mut(BLOCK), |x| vector::scale(x, alpha));
        Ok(())
    }

    fn soft_cap(&self, cap: f32, x: &mut Tensor) -> Result<()> {
        check_cap("soft_cap", cap)?;
        let x = x.f32_mut("soft_cap", "x")?;
        self.each(x.len(), x.chunks_mut(BLOCK), |x| vector::soft_cap(x, cap));
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
