//! On a GPU.

use super::*;
use crate::Cuda;

impl CrossEntropy for Cuda {
    fn cross_entropy(
        &self,
        _x: &Tensor,
        _w: &Tensor,
        _labels: &Tensor,
        _weights: &Tensor,
        _soft_cap: Option<f32>,
        _chunk_rows: usize,
        _dx: Option<&mut Tensor>,
        _dw: Option<&mut Tensor>,
    ) -> Result<f64> {
        Err(crate::Error::Value { op: "cross_entropy", message: "not on cuda".into() })
    }
    fn cross_entropy_of_logits(
        &self,
        _logits: &mut Tensor,
        _labels: &Tensor,
        _weights: &Tensor,
    ) -> Result<f64> {
        Err(crate::Error::Value { op: "cross_entropy_of_logits", message: "not on cuda".into() })
    }
}
