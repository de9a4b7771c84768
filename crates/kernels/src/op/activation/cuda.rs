//! On a GPU.

use super::*;
use crate::Cuda;

impl Activate for Cuda {
    fn activation(&self, _activation: Activation, _x: &Tensor, _y: &mut Tensor) -> Result<()> {
        Err(crate::Error::Value { op: "activation", message: "not on cuda".into() })
    }
    fn activation_backward(&self, _activation: Activation, _x: &mut Tensor, _dy: &Tensor) -> Result<()> {
        Err(crate::Error::Value { op: "activation_backward", message: "not on cuda".into() })
    }
}
