//! The row operations on a GPU: copies, bound by memory.

use super::{Rows, check_once, copy_width, width};
use crate::cuda::launch::{DeviceFloats, Launch, THREADS};
use crate::{Cuda, DType, Result, Tensor};

impl Rows for Cuda {
    fn gather_rows(&self, rows: &Tensor, x: &Tensor, y: &mut Tensor) -> Result<()> {
        let op = "gather_rows";
        let d = width(op, rows, y, x)?;
        let (n, rows, x) = (y.shape()[0], self.indices(op, "rows", rows)?, self.floats(op, "x", x)?);
        let y = self.floats_mut(op, "y", y)?;
        let (from, to) = (Place { x, stride: d, rows }, Place { x: y, stride: d, rows: 0 });
        self.copy(op, RowCopy { from, to, n, width: d })
    }

    fn scatter_rows(&self, rows: &Tensor, dy: &Tensor, dx: &mut Tensor) -> Result<()> {
        let op = "scatter_rows";
        let d = width(op, rows, dy, dx)?;
        let (n, rows, dy) = (dy.shape()[0], self.indices(op, "rows", rows)?, self.floats(op, "dy", dy)?);
        let x = self.floats_mut(op, "dx", dx)?;
        self.clear(op, self.of_this_device(op, "dx", dx)?.0)?;
        let (from, to) = (Place { x: dy, stride: d, rows: 0 }, Place { x, stride: d, rows });
        self.copy(op, RowCopy { from, to, n, width: d })
    }

    fn copy_rows(&self, from: &Tensor, x: &Tensor, to: &Tensor, y: &mut Tensor) -> Result<()> {
        let op = "copy_rows";
        let d = copy_width(op, (from, x), (to, y))?;
        let mut sorted = to.u32(op, "to")?.to_vec();
        sorted.sort_unstable();
        check_once(op, sorted.into_iter())?;
        let (n, x) = (from.len(), self.floats(op, "x", x)?);
        let from = Place { x, stride: d, rows: self.indices(op, "from", from)? };
        let y = self.floats_mut(op, "y", y)?;
        let to = Place { x: y, stride: d, rows: self.indices(op, "to", to)? };
        self.copy(op, RowCopy { from, to, n, width: d })
    }
}

/// Pieces of rows that a thread copies: that of `rows.cu`.
const AT_ONCE: usize = 4;

/// The rows that a copy reads or writes.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    /// The first element of row 0, and how many elements later the next row begins.
    pub(crate) x: DeviceFloats,
    pub(crate) stride: usize,
    /// The address of the rows' numbers, or 0 for 0, 1, 2, ...
    pub(crate) rows: u64,
}

/// A copy of n rows of `width` elements, rounded to the type they are written to.
pub(crate) struct RowCopy {
    pub(crate) from: Place,
    pub(crate) to: Place,
    pub(crate) n: usize,
    pub(crate) width: usize,
}

impl RowCopy {
    /// The most elements that can be moved at once.
    fn piece(&self) -> usize {
        let same = self.from.x.dtype == self.to.x.dtype && self.from.x.dtype != DType::F32;
        let fits = |piece: &usize| {
            let aligned = |place: &Place| {
                let bytes = piece * place.x.dtype.size();
                place.stride.is_multiple_of(*piece) && place.x.address.is_multiple_of(bytes as u64)
            };
            self.width.is_multiple_of(*piece) && aligned(&self.from) && aligned(&self.to)
        };
        let pieces: &[usize] = if same { &[8, 4] } else { &[4] };
        pieces.iter().copied().find(fits).unwrap_or(1)
    }
}

impl Cuda {
    /// Copies rows.
    pub(crate) fn copy(&self, op: &'static str, copy: RowCopy) -> Result<()> {
        let piece = copy.piece();
        let (RowCopy { from, to, n, width }, pieces) = (&copy, copy.width / piece);
        debug_assert_eq!(pieces * piece, *width);
        self.launch(
            op,
            "copy_rows",
            Launch::blocks((n * pieces).div_ceil(AT_ONCE * THREADS as usize), THREADS),
            &[
                from.x.into(),
                (from.stride as u64).into(),
                from.rows.into(),
                to.x.into(),
                (to.stride as u64).into(),
                to.rows.into(),
                (*n as u64).into(),
                (pieces as u32).into(),
                (piece as u32).into(),
            ],
        )
    }
}
