//! On a GPU.

use super::*;
use crate::Cuda;

impl Embedding for Cuda {
    fn embedding(&self, _ids: &Tensor, _table: &Tensor, _x: &mut Tensor) -> Result<()> {
        Err(crate::Error::Value { op: "embedding", message: "not on cuda".into() })
    }
    fn embedding_gradient(&self, _ids: &Tensor, _dx: &Tensor, _dtable: &mut Tensor) -> Result<()> {
        Err(crate::Error::Value { op: "embedding_gradient", message: "not on cuda".into() })
    }
}
