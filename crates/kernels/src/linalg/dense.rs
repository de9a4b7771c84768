//! Small dense problems on the host, in `f64`.

use nalgebra::{DMatrix, SymmetricEigen};

use crate::{Accum, Kernels, Result, Tensor};

/// A square matrix on the host, row-major.
#[derive(Clone, Debug)]
pub(super) struct Square {
    pub(super) size: usize,
    pub(super) values: Vec<f64>,
}

impl Square {
    pub(super) fn zeros(size: usize) -> Self {
        Square { size, values: vec![0.0; size * size] }
    }

    /// The products of the rows of `x` with the rows of `y`, `x y^T`; both `[k, d]`.
    pub(super) fn of_products(kernels: &dyn Kernels, x: &Tensor, y: &Tensor) -> Result<Self> {
        let size = x.shape()[0];
        let mut products = kernels.empty(&[size, size])?;
        kernels.linear(x, y, 1.0, Accum::Replace, &mut products)?;
        let values = kernels.to_f32(&products)?.into_iter().map(f64::from).collect();
        Ok(Square { size, values })
    }

    pub(super) fn row(&self, row: usize) -> &[f64] {
        &self.values[row * self.size..][..self.size]
    }

    pub(super) fn at(&self, row: usize, column: usize) -> f64 {
        self.values[row * self.size + column]
    }

    pub(super) fn set(&mut self, row: usize, column: usize, value: f64) {
        self.values[row * self.size + column] = value;
    }

    /// The first `rows` rows on the device, `[rows, k]`.
    pub(super) fn upload(&self, kernels: &dyn Kernels, rows: usize) -> Result<Tensor> {
        let values: Vec<f32> = self.values[..rows * self.size].iter().map(|&value| value as f32).collect();
        kernels.from_f32(&values, &[rows, self.size])
    }

    /// The first `columns` columns on the device, `[k, columns]`, of the transposed matrix.
    pub(super) fn upload_transposed(&self, kernels: &dyn Kernels, columns: usize) -> Result<Tensor> {
        let mut values = Vec::with_capacity(self.size * columns);
        for row in 0..self.size {
            values.extend((0..columns).map(|column| self.at(column, row) as f32));
        }
        kernels.from_f32(&values, &[self.size, columns])
    }
}

/// Linear combinations of rows, `transform x`; transform `[r, k]`, x `[k, d]`, result `[r, d]`.
pub(super) fn combine(kernels: &dyn Kernels, transform: &Tensor, x: &Tensor) -> Result<Tensor> {
    let mut out = kernels.empty(&[transform.shape()[0], x.shape()[1]])?;
    kernels.linear_input_gradient(transform, x, 1.0, Accum::Replace, &mut out)?;
    Ok(out)
}

/// Eigenvalues of the symmetric part, largest first, and the eigenvectors as rows in the same order.
pub(super) fn symmetric_eigen(matrix: &Square) -> (Vec<f64>, Square) {
    let size = matrix.size;
    let symmetric = DMatrix::from_fn(size, size, |i, j| 0.5 * (matrix.at(i, j) + matrix.at(j, i)));
    let eigen = SymmetricEigen::new(symmetric);
    let mut order: Vec<usize> = (0..size).collect();
    order.sort_by(|&a, &b| eigen.eigenvalues[b].total_cmp(&eigen.eigenvalues[a]));
    let values = order.iter().map(|&index| eigen.eigenvalues[index]).collect();
    let mut vectors = Square::zeros(size);
    for (row, &index) in order.iter().enumerate() {
        for column in 0..size {
            vectors.set(row, column, eigen.eigenvectors[(column, index)]);
        }
    }
    (values, vectors)
}

/// `C = X^T diag(s) Y` of a small square matrix.
#[derive(Debug)]
pub(super) struct DenseSvd {
    /// Left singular vectors as rows.
    pub(super) left: Square,
    pub(super) singular_values: Vec<f64>,
    /// Right singular vectors as rows.
    pub(super) right: Square,
}

/// The SVD through the eigenvectors of `C C^T`. In `f64` the squaring costs singular values below 1e-8 of
/// the largest, which is less than the `f32` products that made `C` resolve.
pub(super) fn dense_svd(core: &Square) -> DenseSvd {
    let size = core.size;
    let mut squared = Square::zeros(size);
    for i in 0..size {
        for j in 0..=i {
            let product = dot(core.row(i), core.row(j));
            squared.set(i, j, product);
            squared.set(j, i, product);
        }
    }
    let (eigenvalues, left) = symmetric_eigen(&squared);
    let dead = eigenvalues[0].max(0.0).sqrt() * 1e-10;
    let mut right = Square::zeros(size);
    let mut singular_values = Vec::with_capacity(size);
    let mut bound = f64::INFINITY;
    for i in 0..size {
        let mut row = vec![0.0; size];
        for (&weight, j) in left.row(i).iter().zip(0..) {
            axpy(weight, core.row(j), &mut row);
        }
        let mut norm = remove_rows(&right, i, &mut row);
        // Values of the size of the rounding errors come out of order.
        bound = if norm > dead { norm.min(bound) } else { 0.0 };
        singular_values.push(bound);
        if norm <= dead {
            norm = complete(&right, i, &mut row);
        }
        for (column, value) in row.into_iter().enumerate() {
            right.set(i, column, value / norm);
        }
    }
    DenseSvd { left, singular_values, right }
}

/// Makes `row` the unit vector that lies furthest from the first `count` rows of an orthonormal basis, less its
/// part along them, and returns its norm, which is at least `sqrt((k - count) / k)`.
fn complete(basis: &Square, count: usize, row: &mut [f64]) -> f64 {
    let along = |unit: usize| (0..count).map(|other| basis.at(other, unit).powi(2)).sum::<f64>();
    let furthest = (0..basis.size).min_by(|&a, &b| along(a).total_cmp(&along(b))).unwrap_or(0);
    row.fill(0.0);
    row[furthest] = 1.0;
    remove_rows(basis, count, row)
}

/// Removes the first `count` rows of an orthonormal basis from `row`, twice (Kahan's "twice is enough"), and
/// returns the norm of what is left.
fn remove_rows(basis: &Square, count: usize, row: &mut [f64]) -> f64 {
    for _ in 0..2 {
        for other in 0..count {
            let product = dot(basis.row(other), row);
            axpy(-product, basis.row(other), row);
        }
    }
    dot(row, row).sqrt()
}

pub(super) fn dot(x: &[f64], y: &[f64]) -> f64 {
    // Four sums, in a fixed order, let the compiler use vector registers.
    let mut sums = [0.0; 4];
    let (x_chunks, y_chunks) = (x.chunks_exact(4), y.chunks_exact(4));
    let rest: f64 = x_chunks.remainder().iter().zip(y_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in x_chunks.zip(y_chunks) {
        for lane in 0..4 {
            sums[lane] += x[lane] * y[lane];
        }
    }
    (sums[0] + sums[1]) + (sums[2] + sums[3]) + rest
}

pub(super) fn axpy(alpha: f64, x: &[f64], y: &mut [f64]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += alpha * x;
    }
}
