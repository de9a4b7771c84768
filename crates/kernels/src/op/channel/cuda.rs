//! On a GPU.

use super::*;
use crate::Cuda;

impl Channel for Cuda {
    fn scale_channels(&self, _c: &Tensor, _y: &mut Tensor) -> Result<()> {
        Err(crate::Error::Value { op: "scale_channels", message: "not on cuda".into() })
    }
    fn channel_products(&self, _a: &Tensor, _b: &Tensor, _accum: Accum, _out: &mut Tensor) -> Result<()> {
        Err(crate::Error::Value { op: "channel_products", message: "not on cuda".into() })
    }
    fn row_products(
        &self,
        _a: &Tensor,
        _b: &Tensor,
        _alpha: f32,
        _accum: Accum,
        _out: &mut Tensor,
    ) -> Result<()> {
        Err(crate::Error::Value { op: "row_products", message: "not on cuda".into() })
    }
}
