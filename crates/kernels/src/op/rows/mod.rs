//! Selecting and spreading rows: the labelled tokens on their way to the loss and back, new keys and values on
//! their way into a cache.

mod cpu;
pub(crate) mod cuda;
pub mod naive;

use crate::{Error, Result, Tensor, shape};

/// Rows by index; tensors are `f32` or `bf16`, each on its own, and copies are rounded to the type they are written to.
pub trait Rows {
    /// `y[i] = x[rows[i]]`; rows `[N]` of u32, x `[T, D]`, y `[N, D]`.
    fn gather_rows(&self, rows: &Tensor, x: &Tensor, y: &mut Tensor) -> Result<()>;

    /// `dx = 0`, then `dx[rows[i]] = dy[i]`; the rows are distinct; dy `[N, D]`, dx `[T, D]`.
    fn scatter_rows(&self, rows: &Tensor, dy: &Tensor, dx: &mut Tensor) -> Result<()>;

    /// `y[to[i]] = x[from[i]]`; from and to `[N]` of u32, x `[S, D]`, y `[P, D]`, whose other rows stay what they
    /// are.
    ///
    /// # Errors
    /// Where a row is behind the last one, or occurs twice in `to`.
    fn copy_rows(&self, from: &Tensor, x: &Tensor, to: &Tensor, y: &mut Tensor) -> Result<()>;
}

/// Checks `rows [N]`, `few [N, D]`, `many [T, D]` and that every row is below T; returns D.
pub(crate) fn width(op: &'static str, rows: &Tensor, few: &Tensor, many: &Tensor) -> Result<usize> {
    let (t, d) = shape::matrix(op, "x", many)?;
    let (n, _) = shape::matrix(op, "y", few)?;
    shape::expect(op, "y", few, &[("N", n), ("D", d)])?;
    shape::expect(op, "rows", rows, &[("N", n)])?;
    below(op, rows.u32(op, "rows")?, "T", t)?;
    Ok(d)
}

/// Checks `from, to [N]`, `x [S, D]`, `y [P, D]` and that the rows are below S and P; returns D.
pub(crate) fn copy_width(
    op: &'static str,
    (from, x): (&Tensor, &Tensor),
    (to, y): (&Tensor, &Tensor),
) -> Result<usize> {
    let (s, d) = shape::matrix(op, "x", x)?;
    let (p, _) = shape::matrix(op, "y", y)?;
    shape::expect(op, "y", y, &[("P", p), ("D", d)])?;
    shape::expect(op, "from", from, &[("N", from.len())])?;
    shape::expect(op, "to", to, &[("N", from.len())])?;
    below(op, from.u32(op, "from")?, "S", s)?;
    below(op, to.u32(op, "to")?, "P", p)?;
    Ok(d)
}

/// Checks that no row is written twice; the rows are sorted.
fn check_once(op: &'static str, sorted: impl Iterator<Item = u32>) -> Result<()> {
    let mut last = None;
    for row in sorted {
        if last == Some(row) {
            return Err(Error::Value { op, message: format!("row {row} of y would be written twice") });
        }
        last = Some(row);
    }
    Ok(())
}

fn below(op: &'static str, rows: &[u32], axis: &str, size: usize) -> Result<()> {
    match rows.iter().find(|&&row| row as usize >= size) {
        None => Ok(()),
        Some(row) => Err(Error::Value { op, message: format!("row {row} of {axis}={size}") }),
    }
}
