//! Selecting and spreading rows: the labelled tokens on their way to the loss and back.

mod cpu;
pub mod naive;

use crate::{Error, Result, Tensor, shape};

/// Rows by index.
pub trait Rows {
    /// `y[i] = x[rows[i]]`; rows `[N]` of u32, x `[T, D]`, y `[N, D]`.
    fn gather_rows(&self, rows: &Tensor, x: &Tensor, y: &mut Tensor) -> Result<()>;

    /// `dx = 0`, then `dx[rows[i]] = dy[i]`; the rows are distinct; dy `[N, D]`, dx `[T, D]`.
    fn scatter_rows(&self, rows: &Tensor, dy: &Tensor, dx: &mut Tensor) -> Result<()>;
}

/// Checks `rows [N]`, `few [N, D]`, `many [T, D]` and that every row is below T; returns D.
pub(crate) fn width(op: &'static str, rows: &Tensor, few: &Tensor, many: &Tensor) -> Result<usize> {
    let (t, d) = shape::matrix(op, "x", many)?;
    let (n, _) = shape::matrix(op, "y", few)?;
    shape::expect(op, "y", few, &[("N", n), ("D", d)])?;
    shape::expect(op, "rows", rows, &[("N", n)])?;
    match rows.u32(op, "rows")?.iter().find(|&&row| row as usize >= t) {
        None => Ok(d),
        Some(row) => Err(Error::Value { op, message: format!("row {row} of T={t}") }),
    }
}
