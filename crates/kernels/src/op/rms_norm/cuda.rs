//! On a GPU.

use super::*;
use crate::Cuda;

impl RmsNorm for Cuda {
    fn rms_norm(
        &self,
        _x: &Tensor,
        _gain: &Tensor,
        _kind: RmsGain,
        _eps: f32,
        _y: &mut Tensor,
        _rstd: &mut Tensor,
    ) -> Result<()> {
        Err(crate::Error::Value { op: "rms_norm", message: "not on cuda".into() })
    }
    fn add_rms_norm(
        &self,
        _f: &Tensor,
        _x: &mut Tensor,
        _gain: &Tensor,
        _kind: RmsGain,
        _eps: f32,
        _y: &mut Tensor,
        _rstd: &mut Tensor,
    ) -> Result<()> {
        Err(crate::Error::Value { op: "add_rms_norm", message: "not on cuda".into() })
    }
    fn rms_norm_backward(
        &self,
        _x: &Tensor,
        _gain: &Tensor,
        _kind: RmsGain,
        _rstd: &Tensor,
        _dy: &Tensor,
        _accum: Accum,
        _dx: &mut Tensor,
        _dgain: Option<&mut Tensor>,
    ) -> Result<()> {
        Err(crate::Error::Value { op: "rms_norm_backward", message: "not on cuda".into() })
    }
}
