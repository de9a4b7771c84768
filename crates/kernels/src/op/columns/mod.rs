//! Taking and putting a range of columns: the parts of a fused projection such as `[query, key, value]`.
//!
//! Each is the other's gradient: what is taken from a range is put back into that range.

mod cpu;
mod cuda;
pub mod naive;

use crate::{Error, Result, Tensor, shape};

/// Ranges of columns; W columns are the whole and `w` of them the part. Both tensors are `f32` or `bf16`, each on its
/// own; what is put is rounded to the whole's type.
pub trait Columns {
    /// `y = x[:, from..from + w]`; x `[T, W]`, y `[T, w]`.
    ///
    /// # Errors
    /// Where the range ends behind the last column.
    fn take_columns(&self, x: &Tensor, from: usize, y: &mut Tensor) -> Result<()>;

    /// `x[:, from..from + w] = y`; y `[T, w]`, x `[T, W]`, whose other columns stay what they are.
    ///
    /// # Errors
    /// Where the range ends behind the last column.
    fn put_columns(&self, y: &Tensor, from: usize, x: &mut Tensor) -> Result<()>;
}

/// Checks `x [T, W]`, `y [T, w]` and `from + w <= W`; returns (W, w).
pub(crate) fn widths(op: &'static str, x: &Tensor, from: usize, y: &Tensor) -> Result<(usize, usize)> {
    let (t, whole) = shape::matrix(op, "x", x)?;
    let (_, part) = shape::matrix(op, "y", y)?;
    shape::expect(op, "y", y, &[("T", t), ("w", part)])?;
    match from.checked_add(part) {
        Some(end) if end <= whole => Ok((whole, part)),
        _ => Err(Error::Value { op, message: format!("{part} columns from {from} of W={whole}") }),
    }
}
