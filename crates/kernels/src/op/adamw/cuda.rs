//! On a GPU.

use super::*;
use crate::Cuda;

impl AdamW for Cuda {
    fn adamw(
        &self,
        _step: &AdamWStep,
        _g: &Tensor,
        _p: &mut Tensor,
        _m: &mut Tensor,
        _v: &mut Tensor,
    ) -> Result<()> {
        Err(crate::Error::Value { op: "adamw", message: "not on cuda".into() })
    }
}
