//! On a GPU.

use super::*;
use crate::Cuda;

impl Linear for Cuda {
    fn linear(&self, _x: &Tensor, _w: &Tensor, _alpha: f32, _accum: Accum, _y: &mut Tensor) -> Result<()> {
        Err(crate::Error::Value { op: "linear", message: "not on cuda".into() })
    }
    fn linear_fused(
        &self,
        _x: &Tensor,
        _w: &Tensor,
        _extra: Extra<'_>,
        _accum: Accum,
        _y: &mut Tensor,
    ) -> Result<()> {
        Err(crate::Error::Value { op: "linear_fused", message: "not on cuda".into() })
    }
    fn linear_input_gradient(
        &self,
        _dy: &Tensor,
        _w: &Tensor,
        _alpha: f32,
        _accum: Accum,
        _dx: &mut Tensor,
    ) -> Result<()> {
        Err(crate::Error::Value { op: "linear_input_gradient", message: "not on cuda".into() })
    }
    fn linear_input_gradient_fused(
        &self,
        _dy: &Tensor,
        _w: &Tensor,
        _term: Option<(&Tensor, &Tensor)>,
        _accum: Accum,
        _dx: &mut Tensor,
    ) -> Result<()> {
        Err(crate::Error::Value { op: "linear_input_gradient_fused", message: "not on cuda".into() })
    }
    fn linear_weight_gradient(
        &self,
        _dy: &Tensor,
        _x: &Tensor,
        _alpha: f32,
        _accum: Accum,
        _dw: &mut Tensor,
    ) -> Result<()> {
        Err(crate::Error::Value { op: "linear_weight_gradient", message: "not on cuda".into() })
    }
}
