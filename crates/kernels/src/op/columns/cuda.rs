//! The column ranges on a GPU: copies of rows, of which the whole's begin some columns later.

use super::{Columns, widths};
use crate::cuda::launch::DeviceFloats;
use crate::op::rows::cuda::{Place, RowCopy};
use crate::{Cuda, Result, Tensor};

impl Columns for Cuda {
    fn take_columns(&self, x: &Tensor, from: usize, y: &mut Tensor) -> Result<()> {
        let op = "take_columns";
        let (whole, width) = widths(op, x, from, y)?;
        let (n, x, y) = (y.shape()[0], self.floats(op, "x", x)?, self.floats_mut(op, "y", y)?);
        self.copy(op, RowCopy { from: range(x, from, whole), to: range(y, 0, width), n, width })
    }

    fn put_columns(&self, y: &Tensor, from: usize, x: &mut Tensor) -> Result<()> {
        let op = "put_columns";
        let (whole, width) = widths(op, x, from, y)?;
        let (n, y, x) = (y.shape()[0], self.floats(op, "y", y)?, self.floats_mut(op, "x", x)?);
        self.copy(op, RowCopy { from: range(y, 0, width), to: range(x, from, whole), n, width })
    }
}

/// The columns of x `[T, stride]` from `from` on.
fn range(x: DeviceFloats, from: usize, stride: usize) -> Place {
    let address = x.address + (from * x.dtype.size()) as u64;
    Place { x: DeviceFloats { address, ..x }, stride, rows: 0 }
}
