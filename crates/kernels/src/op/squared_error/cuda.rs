//! On a GPU.

use super::*;
use crate::Cuda;

impl SquaredError for Cuda {
    fn squared_error(&self, _z: &mut Tensor, _targets: &Tensor, _weights: &Tensor) -> Result<f64> {
        Err(crate::Error::Value { op: "squared_error", message: "not on cuda".into() })
    }
}
