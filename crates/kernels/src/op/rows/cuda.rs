//! On a GPU.

use super::*;
use crate::Cuda;

impl Rows for Cuda {
    fn gather_rows(&self, _rows: &Tensor, _x: &Tensor, _y: &mut Tensor) -> Result<()> {
        Err(crate::Error::Value { op: "gather_rows", message: "not on cuda".into() })
    }
    fn scatter_rows(&self, _rows: &Tensor, _dy: &Tensor, _dx: &mut Tensor) -> Result<()> {
        Err(crate::Error::Value { op: "scatter_rows", message: "not on cuda".into() })
    }
    fn copy_rows(&self, _from: &Tensor, _x: &Tensor, _to: &Tensor, _y: &mut Tensor) -> Result<()> {
        Err(crate::Error::Value { op: "copy_rows", message: "not on cuda".into() })
    }
}
