//! The element-wise operations on a GPU.

use super::{Elementwise, check, check_cap};
use crate::{Cuda, Result, Tensor};

impl Elementwise for Cuda {
    fn cast(&self, x: &Tensor, y: &mut Tensor) -> Result<()> {
        let op = "cast";
        check(op, x, y)?;
        let (count, x, y) = (x.len(), self.floats(op, "x", x)?, self.floats_mut(op, "y", y)?);
        self.apply(op, "cast", count, &[x.into(), y.into(), (count as u64).into()])
    }

    fn add(&self, alpha: f32, x: &Tensor, y: &mut Tensor) -> Result<()> {
        let op = "add";
        check(op, x, y)?;
        let (count, x, y) = (x.len(), self.floats(op, "x", x)?, self.floats_mut(op, "y", y)?);
        self.apply(op, "add", count, &[alpha.into(), x.into(), y.into(), (count as u64).into()])
    }

    fn fill(&self, value: f32, x: &mut Tensor) -> Result<()> {
        self.change("fill", value, x)
    }

    fn scaled_sign(&self, alpha: f32, x: &mut Tensor) -> Result<()> {
        self.change("scaled_sign", alpha, x)
    }

    fn scale(&self, alpha: f32, x: &mut Tensor) -> Result<()> {
        self.change("scale", alpha, x)
    }

    fn soft_cap(&self, cap: f32, x: &mut Tensor) -> Result<()> {
        check_cap("soft_cap", cap)?;
        self.change("soft_cap", cap, x)
    }
}

impl Cuda {
    /// Runs the kernel `op` of one number and one tensor, which it changes.
    fn change(&self, op: &'static str, number: f32, x: &mut Tensor) -> Result<()> {
        let (count, x) = (x.len(), self.floats_mut(op, "x", x)?);
        self.apply(op, op, count, &[number.into(), x.into(), (count as u64).into()])
    }
}
