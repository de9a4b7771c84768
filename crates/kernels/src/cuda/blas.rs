//! Matrix products of the vendor's library, as a device asks for them.

use std::fmt;

use super::driver::Outcome;
use crate::DType;

/// A matrix of a product, row-major: `rows` lines of `columns` elements, `stride` elements apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix {
    pub(crate) address: u64,
    /// `F32` or `Bf16`.
    pub(crate) dtype: DType,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) stride: usize,
    /// Whether it is read transposed.
    pub(crate) transposed: bool,
}

/// `c = alpha a b + beta c + bias`, a and b as they are read, sums in `f32`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    pub(crate) a: Matrix,
    /// Of a's type.
    pub(crate) b: Matrix,
    /// `F32` or `Bf16`; never transposed.
    pub(crate) c: Matrix,
    pub(crate) alpha: f32,
    pub(crate) beta: f32,
    /// A vector of c's columns in c's type, added to each of its rows.
    pub(crate) bias: Option<u64>,
}

/// The vendor's matrix products, on the driver's stream.
pub(crate) trait Blas: Send + Sync + fmt::Debug {
    /// For reports, as `cuBLASLt 12.4.5`.
    fn name(&self) -> String;

    /// Computes a product; false where the library has no way for its shapes or alignments, and nothing was done.
    ///
    /// # Safety
    /// The matrices are memory of the driver's and as large as they say.
    #[expect(unsafe_code, reason = "a contract that the compiler cannot check")]
    unsafe fn product(&self, product: &Product) -> Outcome<bool>;
}
