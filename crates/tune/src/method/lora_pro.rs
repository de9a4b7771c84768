//! LoRA-Pro (Wang et al., arXiv 2407.18242).
//!
//! Update: `W0 + s B A`, A and B trained. Start: [LoRA's](super::lora::start). What differs are the gradients: a step
//! on A and B moves W by `g~ = s (B gA + gB A)`, and with `g = dL/dW` theorem 2.1 there gives the gA and gB whose g~
//! is nearest to g, from LoRA's own gradients `hA = s B^T g` and `hB = s g A^T`, without g:
//!
//! ```text
//! gA = 1/s^2 (B^T B)^-1 hA + X A
//! gB = 1/s^2 (I - B (B^T B)^-1 B^T) hB (A A^T)^-1 - B X
//! ```
//!
//! Every X `[r, r]` gives the same g~. The one taken keeps gA and gB nearest to hA and hB (theorem 2.3); it solves
//! the Sylvester equation
//!
//! ```text
//! B^T B X + X A A^T = -1/s^2 (B^T B)^-1 hA A^T
//! ```
//!
//! The inverses are pseudo-inverses. At the start B = 0: nothing reaches hA, `(B^T B)^+ = 0`, X = 0, and
//! `gB = 1/s^2 hB (A A^T)^-1`, so `g~ = g A^T (A A^T)^-1 A`, the part of g in the span of A's rows. A step on B is
//! all that moves W while B = 0, and of those none is nearer. In general `g~ = P g + (I - P) g Q` with P and Q the
//! projections onto the spans of B's columns and A's rows, of whatever rank they are.
//!
//! What is bent are the gradients of an optimizer step, before they are clipped, and AdamW's moments are taken of
//! the bent ones at the size of A and B. The paper's own AdamW keeps the moments of g~, which are as large as the
//! weight, and gives up what low rank saves.
//!
//! Trained and stored: r (out + in) values of an `[out, in]` weight.

use lora_sb_kernels::{Accum, Kernels, Result, Tensor};
use nalgebra::{DMatrix, DVector, SymmetricEigen};

/// Replaces the gradients of A and B by those of the theorem; `a [r, in]`, `b [out, r]`.
///
/// # Errors
/// Where the device fails.
pub fn adjust(
    kernels: &dyn Kernels,
    scale: f32,
    (a, b): (&Tensor, &Tensor),
    (a_gradient, b_gradient): (&mut Tensor, &mut Tensor),
) -> Result<()> {
    let rank = a.shape()[0];
    let mut small = kernels.empty(&[rank, rank])?;
    kernels.linear(a, a, 1.0, Accum::Replace, &mut small)?;
    let rows = Gram::new(host(kernels, &small)?); // A A^T
    kernels.linear_weight_gradient(b, b, 1.0, Accum::Replace, &mut small)?;
    let columns = Gram::new(host(kernels, &small)?); // B^T B
    kernels.linear(a_gradient, a, 1.0, Accum::Replace, &mut small)?;
    let along_a = host(kernels, &small)?; // hA A^T
    kernels.linear_weight_gradient(b, b_gradient, 1.0, Accum::Replace, &mut small)?;
    let along_b = host(kernels, &small)?; // B^T hB

    let factor = f64::from(scale).powi(-2);
    let (left, right) = (columns.inverse() * factor, rows.inverse() * factor);
    let x = sylvester(&columns, &rows, &left * along_a * -1.0);

    let mut bent = kernels.empty(a.shape())?; // [r, in]
    let (left, x_device) = (device(kernels, &left)?, device(kernels, &x)?);
    kernels.linear_input_gradient(&left, a_gradient, 1.0, Accum::Replace, &mut bent)?;
    kernels.linear_input_gradient(&x_device, a, 1.0, Accum::Add, &mut bent)?;
    *a_gradient = bent;

    let mut bent = kernels.empty(b.shape())?; // [out, r]
    let inside = columns.inverse() * along_b * &right + x;
    kernels.linear_input_gradient(b_gradient, &device(kernels, &right)?, 1.0, Accum::Replace, &mut bent)?;
    kernels.linear_input_gradient(b, &device(kernels, &inside)?, -1.0, Accum::Add, &mut bent)?;
    *b_gradient = bent;
    Ok(())
}

/// A Gram matrix `[r, r]` by its eigenvalues and eigenvectors.
struct Gram {
    values: DVector<f64>,
    /// As columns.
    vectors: DMatrix<f64>,
    /// Eigenvalues up to here are rounding: its elements are f32 sums, so they are known to a part of the largest.
    resolved: f64,
}

impl Gram {
    fn new(matrix: DMatrix<f64>) -> Self {
        let symmetric = (&matrix + matrix.transpose()) * 0.5;
        let SymmetricEigen { eigenvalues: values, eigenvectors: vectors } = SymmetricEigen::new(symmetric);
        let resolved = values.len() as f64 * f64::from(f32::EPSILON) * values.amax();
        Gram { values, vectors, resolved }
    }

    /// The pseudo-inverse.
    fn inverse(&self) -> DMatrix<f64> {
        let inverted = self.values.map(|value| if value > self.resolved { value.recip() } else { 0.0 });
        &self.vectors * DMatrix::from_diagonal(&inverted) * self.vectors.transpose()
    }

    /// Its eigenvalues without those that are rounding.
    fn value(&self, index: usize) -> f64 {
        if self.values[index] > self.resolved { self.values[index] } else { 0.0 }
    }
}

/// The X of `M X + X N = right`, by the eigenvectors of both; 0 where the equation says nothing.
fn sylvester(m: &Gram, n: &Gram, right: DMatrix<f64>) -> DMatrix<f64> {
    let mut turned = m.vectors.transpose() * right * &n.vectors;
    for ((row, column), value) in indexed(&mut turned) {
        let sum = m.value(row) + n.value(column);
        *value = if sum > 0.0 { *value / sum } else { 0.0 };
    }
    &m.vectors * turned * n.vectors.transpose()
}

fn indexed(matrix: &mut DMatrix<f64>) -> impl Iterator<Item = ((usize, usize), &mut f64)> {
    let rows = matrix.nrows();
    matrix.iter_mut().enumerate().map(move |(at, value)| ((at % rows, at / rows), value))
}

fn host(kernels: &dyn Kernels, matrix: &Tensor) -> Result<DMatrix<f64>> {
    let (rows, columns) = (matrix.shape()[0], matrix.shape()[1]);
    let values = kernels.to_f32(matrix)?.into_iter().map(f64::from);
    Ok(DMatrix::from_row_iterator(rows, columns, values))
}

fn device(kernels: &dyn Kernels, matrix: &DMatrix<f64>) -> Result<Tensor> {
    let values: Vec<f32> = matrix.transpose().iter().map(|&value| value as f32).collect();
    kernels.from_f32(&values, &[matrix.nrows(), matrix.ncols()])
}
