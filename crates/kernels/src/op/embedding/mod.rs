//! The embedding table: a row per token id.

mod cpu;
mod cuda;
pub mod naive;

use crate::{Error, Result, Tensor, shape};

/// Looking up rows of a table `[V, D]`.
pub trait Embedding {
    /// `x[t] = table[ids[t]]`; ids `[T]` of u32, table `[V, D]` in any floating type, x `[T, D]` in `f32` or `bf16`.
    ///
    /// # Errors
    /// Where an id is not below V.
    fn embedding(&self, ids: &Tensor, table: &Tensor, x: &mut Tensor) -> Result<()>;

    /// `dtable[ids[t]] += dx[t]`, in the order of t; dx `[T, D]` in `f32` or `bf16`, dtable `[V, D]` in
    /// `f32`.
    fn embedding_gradient(&self, ids: &Tensor, dx: &Tensor, dtable: &mut Tensor) -> Result<()>;
}

/// Checks `ids [T]`, `x [T, D]` and `table [V, D]`; returns (V, D).
pub(crate) fn dims(op: &'static str, ids: &Tensor, x: &Tensor, table: &Tensor) -> Result<(usize, usize)> {
    let (t, d) = shape::matrix(op, "x", x)?;
    shape::expect(op, "ids", ids, &[("T", t)])?;
    let (v, _) = shape::matrix(op, "table", table)?;
    shape::expect(op, "table", table, &[("V", v), ("D", d)])?;
    Ok((v, d))
}

/// Checks that every id is a row of the table.
pub(crate) fn check_ids(op: &'static str, ids: &[u32], v: usize) -> Result<()> {
    match ids.iter().find(|&&id| id as usize >= v) {
        None => Ok(()),
        Some(id) => Err(Error::Value { op, message: format!("id {id} in a table of V={v} rows") }),
    }
}
