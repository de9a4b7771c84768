//! On a GPU.

use super::*;
use crate::Cuda;

impl Attention for Cuda {
    fn attention(
        &self,
        _geometry: &AttentionShape,
        _segments: &Segments,
        _q: &Tensor,
        _k: &Tensor,
        _v: &Tensor,
        _o: &mut Tensor,
        _lse: &mut Tensor,
    ) -> Result<()> {
        Err(crate::Error::Value { op: "attention", message: "not on cuda".into() })
    }
    fn attention_backward(
        &self,
        _geometry: &AttentionShape,
        _segments: &Segments,
        _inputs: (&Tensor, &Tensor, &Tensor),
        _o: &Tensor,
        _lse: &Tensor,
        _d_o: &Tensor,
        _gradients: (&mut Tensor, &mut Tensor, &mut Tensor),
    ) -> Result<()> {
        Err(crate::Error::Value { op: "attention_backward", message: "not on cuda".into() })
    }
}
