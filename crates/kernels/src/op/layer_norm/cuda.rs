//! On a GPU.

use super::*;
use crate::Cuda;

impl LayerNorm for Cuda {
    fn layer_norm(
        &self,
        _x: &Tensor,
        _gain: &Tensor,
        _shift: &Tensor,
        _eps: f32,
        _y: &mut Tensor,
        _mean: &mut Tensor,
        _rstd: &mut Tensor,
    ) -> Result<()> {
        Err(crate::Error::Value { op: "layer_norm", message: "not on cuda".into() })
    }
    fn add_layer_norm(
        &self,
        _f: &Tensor,
        _x: &mut Tensor,
        _gain: &Tensor,
        _shift: &Tensor,
        _eps: f32,
        _y: &mut Tensor,
        _mean: &mut Tensor,
        _rstd: &mut Tensor,
    ) -> Result<()> {
        Err(crate::Error::Value { op: "add_layer_norm", message: "not on cuda".into() })
    }
    fn layer_norm_backward(
        &self,
        _x: &Tensor,
        _gain: &Tensor,
        _statistics: (&Tensor, &Tensor),
        _dy: &Tensor,
        _accum: Accum,
        _dx: &mut Tensor,
        _dgain: Option<&mut Tensor>,
        _dshift: Option<&mut Tensor>,
    ) -> Result<()> {
        Err(crate::Error::Value { op: "layer_norm_backward", message: "not on cuda".into() })
    }
}
