//! On a GPU.

use super::*;
use crate::Cuda;

impl Rope for Cuda {
    fn rope(&self, _table: &RopeTable, _positions: &Tensor, _x: &mut Tensor) -> Result<()> {
        Err(crate::Error::Value { op: "rope", message: "not on cuda".into() })
    }
    fn rope_backward(&self, _table: &RopeTable, _positions: &Tensor, _dx: &mut Tensor) -> Result<()> {
        Err(crate::Error::Value { op: "rope_backward", message: "not on cuda".into() })
    }
}
