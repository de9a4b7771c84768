//! On a GPU.

use super::*;
use crate::Cuda;

impl Elementwise for Cuda {
    fn cast(&self, x: &Tensor, y: &mut Tensor) -> Result<()> {
        let op = "cast";
        check(op, x, y)?;
        let (count, x, y) = (x.len(), self.floats(op, "x", x)?, self.floats_mut(op, "y", y)?);
        self.each(op, "cast", count, &[x.into(), y.into(), (count as u64).into()])
    }

    fn add(&self, _alpha: f32, _x: &Tensor, _y: &mut Tensor) -> Result<()> {
        Err(crate::Error::Value { op: "add", message: "not on cuda".into() })
    }
    fn fill(&self, _value: f32, _x: &mut Tensor) -> Result<()> {
        Err(crate::Error::Value { op: "fill", message: "not on cuda".into() })
    }
    fn scaled_sign(&self, _alpha: f32, _x: &mut Tensor) -> Result<()> {
        Err(crate::Error::Value { op: "scaled_sign", message: "not on cuda".into() })
    }
    fn scale(&self, _alpha: f32, _x: &mut Tensor) -> Result<()> {
        Err(crate::Error::Value { op: "scale", message: "not on cuda".into() })
    }
    fn soft_cap(&self, _cap: f32, _x: &mut Tensor) -> Result<()> {
        Err(crate::Error::Value { op: "soft_cap", message: "not on cuda".into() })
    }
}
