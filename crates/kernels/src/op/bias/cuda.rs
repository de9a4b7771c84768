//! On a GPU.

use super::*;
use crate::Cuda;

impl Bias for Cuda {
    fn bias(&self, _b: &Tensor, _y: &mut Tensor) -> Result<()> {
        Err(crate::Error::Value { op: "bias", message: "not on cuda".into() })
    }
    fn bias_gradient(&self, _dy: &Tensor, _db: &mut Tensor) -> Result<()> {
        Err(crate::Error::Value { op: "bias_gradient", message: "not on cuda".into() })
    }
}
