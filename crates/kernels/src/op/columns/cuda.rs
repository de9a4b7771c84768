//! On a GPU.

use super::*;
use crate::Cuda;

impl Columns for Cuda {
    fn take_columns(&self, _x: &Tensor, _from: usize, _y: &mut Tensor) -> Result<()> {
        Err(crate::Error::Value { op: "take_columns", message: "not on cuda".into() })
    }
    fn put_columns(&self, _y: &Tensor, _from: usize, _x: &mut Tensor) -> Result<()> {
        Err(crate::Error::Value { op: "put_columns", message: "not on cuda".into() })
    }
}
