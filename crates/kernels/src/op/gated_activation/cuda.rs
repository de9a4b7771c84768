//! On a GPU.

use super::*;
use crate::Cuda;

impl GatedActivation for Cuda {
    fn gated_activation(
        &self,
        _activation: Activation,
        _gate: &Tensor,
        _up: &Tensor,
        _h: &mut Tensor,
    ) -> Result<()> {
        Err(crate::Error::Value { op: "gated_activation", message: "not on cuda".into() })
    }
    fn gated_activation_backward(
        &self,
        _activation: Activation,
        _gate: &mut Tensor,
        _up: &mut Tensor,
        _dh: &Tensor,
    ) -> Result<()> {
        Err(crate::Error::Value { op: "gated_activation_backward", message: "not on cuda".into() })
    }
}
