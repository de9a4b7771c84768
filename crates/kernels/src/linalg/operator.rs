//! The symmetric operator of a matrix's smaller side and polynomials of it.

use std::cell::Cell;
use std::ops::Range;

use super::dense::{Square, combine, symmetric_eigen};
use crate::{Accum, Kernels, Result, Tensor};

/// Which singular vectors live on the smaller side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// m <= n: the operator is `A A^T`, its eigenvectors are left singular vectors.
    Left,
    /// m > n: the operator is `A^T A`, its eigenvectors are right singular vectors.
    Right,
}

/// `G = scale A A^T` or `scale A^T A`, whichever is smaller; blocks of vectors are rows, `[k, small]`.
pub(super) struct Operator<'a> {
    kernels: &'a dyn Kernels,
    matrix: &'a Tensor,
    pub(super) side: Side,
    /// The larger size of the matrix.
    large: usize,
    scale: f32,
    /// G itself, where multiplying with it is cheaper than with the matrix twice.
    gram: Option<Tensor>,
    applications: Cell<usize>,
}

/// Applications of G that a factorisation is assumed to take when it is decided whether to form it.
const EXPECTED_APPLICATIONS: usize = 16;

/// A product with fewer vectors takes as long as one with this many: reading the matrix is what costs.
const NARROW: usize = 128;

impl<'a> Operator<'a> {
    /// The operator of `matrix` `[m, n]` for blocks of `block` vectors.
    pub(super) fn new(
        kernels: &'a dyn Kernels,
        matrix: &'a Tensor,
        (m, n): (usize, usize),
        scale: f32,
        block: usize,
    ) -> Result<Self> {
        let side = if m <= n { Side::Left } else { Side::Right };
        let (small, large) = (m.min(n), m.max(n));
        // Multiply-adds: small^2 large to form G and block small^2 to apply it, against 2 block small large.
        // G is never larger than the matrix.
        let saved = EXPECTED_APPLICATIONS * block.max(NARROW) * (2 * large - small);
        let gram =
            if small * large <= saved { Some(gram(kernels, matrix, side, small, scale)?) } else { None };
        Ok(Operator { kernels, matrix, side, large, scale, gram, applications: Cell::new(0) })
    }

    /// How often G was applied to a block.
    pub(super) fn applications(&self) -> usize {
        self.applications.get()
    }

    /// `out (+)= alpha x G`; x and out `[k, small]`.
    pub(super) fn apply(&self, x: &Tensor, alpha: f32, accum: Accum, out: &mut Tensor) -> Result<()> {
        self.applications.set(self.applications.get() + 1);
        match &self.gram {
            Some(gram) => self.kernels.linear(x, gram, alpha, accum, out),
            None => self.back(&self.across(x)?, alpha * self.scale, accum, out),
        }
    }

    /// From the smaller to the larger side: `x A` or `x A^T`; x `[k, small]`, result `[k, large]`.
    pub(super) fn across(&self, x: &Tensor) -> Result<Tensor> {
        let mut out = self.kernels.empty(&[x.shape()[0], self.large])?;
        match self.side {
            Side::Left => {
                self.kernels.linear_input_gradient(x, self.matrix, 1.0, Accum::Replace, &mut out)?
            }
            Side::Right => self.kernels.linear(x, self.matrix, 1.0, Accum::Replace, &mut out)?,
        }
        Ok(out)
    }

    /// From the larger side back: `out (+)= alpha y A^T` or `alpha y A`; y `[k, large]`, out `[k, small]`.
    pub(super) fn back(&self, y: &Tensor, alpha: f32, accum: Accum, out: &mut Tensor) -> Result<()> {
        match self.side {
            Side::Left => self.kernels.linear(y, self.matrix, alpha, accum, out),
            Side::Right => self.kernels.linear_input_gradient(y, self.matrix, alpha, accum, out),
        }
    }
}

fn gram(kernels: &dyn Kernels, matrix: &Tensor, side: Side, small: usize, scale: f32) -> Result<Tensor> {
    let mut gram = kernels.empty(&[small, small])?;
    match side {
        Side::Left => kernels.linear(matrix, matrix, scale, Accum::Replace, &mut gram)?,
        Side::Right => kernels.linear_weight_gradient(matrix, matrix, scale, Accum::Replace, &mut gram)?,
    }
    Ok(gram)
}

/// Rayleigh-Ritz approximations of the largest eigenpairs of G.
pub(super) struct Ritz {
    /// Ritz values, largest first.
    pub(super) values: Vec<f64>,
    /// `|G x - theta x|^2` of each Ritz pair.
    pub(super) squared_residuals: Vec<f64>,
    /// Ritz vectors, orthonormal rows `[k, small]`.
    pub(super) vectors: Tensor,
    /// G times the Ritz vectors, `[k, small]`.
    pub(super) images: Tensor,
}

impl Ritz {
    /// The Ritz pairs of G in the span of the orthonormal rows of `basis` `[k, small]`.
    pub(super) fn of(operator: &Operator, basis: Tensor) -> Result<Self> {
        let kernels = operator.kernels;
        let block = basis.shape()[0];
        let mut images = kernels.empty(basis.shape())?;
        operator.apply(&basis, 1.0, Accum::Replace, &mut images)?;
        let (values, rotation) = symmetric_eigen(&Square::of_products(kernels, &basis, &images)?);
        let rotation = rotation.upload(kernels, block)?;
        let vectors = combine(kernels, &rotation, &basis)?;
        let images = combine(kernels, &rotation, &images)?;
        let squared_residuals = squared_residuals(kernels, &values, &vectors, &images)?;
        Ok(Ritz { values, squared_residuals, vectors, images })
    }
}

/// `|G x - theta x|^2` of each pair; vectors and images `[k, small]`.
fn squared_residuals(
    kernels: &dyn Kernels,
    values: &[f64],
    vectors: &Tensor,
    images: &Tensor,
) -> Result<Vec<f64>> {
    let block = values.len();
    let mut negative = Square::zeros(block);
    values.iter().enumerate().for_each(|(i, &value)| negative.set(i, i, -value));
    let mut residuals = combine(kernels, &negative.upload(kernels, block)?, vectors)?;
    kernels.add(1.0, images, &mut residuals)?;
    let squares = Square::of_products(kernels, &residuals, &residuals)?;
    Ok((0..block).map(|i| squares.at(i, i)).collect())
}

/// What happens to the Ritz vectors between two Rayleigh-Ritz steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Filter {
    /// Leading Ritz vectors that stay as they are.
    pub(super) locked: usize,
    /// What is applied to the others.
    pub(super) polynomial: Polynomial,
}

/// A polynomial of the operator.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Polynomial {
    /// `G`.
    Power,
    /// `T_degree((2 G - cut) / cut)`: within `[0, cut]` it stays within [-1, 1], above it grows as fast as a
    /// polynomial of its degree can. The cut must not lie above the block's smallest eigenvalue: the
    /// directions of eigenvalues between would be lost.
    Chebyshev { cut: f64, degree: usize },
}

/// The locked Ritz vectors followed by the polynomial of the others (Zhou, Saad, Tiago, Chelikowsky 2006,
/// "Self-consistent-field calculations using Chebyshev-filtered subspace iteration"). What rounding brings in
/// along locked vectors is removed in each step, before it is amplified.
pub(super) fn filter_block(operator: &Operator, ritz: Ritz, filter: Filter) -> Result<Tensor> {
    let kernels = operator.kernels;
    let block = ritz.values.len();
    let lock = rows(kernels, &ritz.vectors, 0..filter.locked)?;
    let vectors = rows(kernels, &ritz.vectors, filter.locked..block)?;
    let mut images = rows(kernels, &ritz.images, filter.locked..block)?;
    let filtered = match filter.polynomial {
        Polynomial::Power => {
            remove(kernels, &lock, &mut images)?;
            images
        }
        Polynomial::Chebyshev { cut, degree } => chebyshev(operator, &lock, vectors, &images, cut, degree)?,
    };
    stack(kernels, &lock, &filtered)
}

/// The recurrence `T_{j+1} = 2 x T_j - T_{j-1}` written over its own `T_{j-1}`: with signs +, +, -, -
/// repeating, `S_j = +-T_j` obeys `S_{j+1} = +-2 x S_j + S_{j-1}`, and the span is the same.
fn chebyshev(
    operator: &Operator,
    lock: &Tensor,
    vectors: Tensor,
    images: &Tensor,
    cut: f64,
    degree: usize,
) -> Result<Tensor> {
    let kernels = operator.kernels;
    let (mut previous, mut current) = (vectors, kernels.zeros(images.shape())?);
    kernels.add((2.0 / cut) as f32, images, &mut current)?;
    kernels.add(-1.0, &previous, &mut current)?;
    remove(kernels, lock, &mut current)?;
    let mut sign = -1.0;
    for _ in 1..degree {
        operator.apply(&current, (sign * 4.0 / cut) as f32, Accum::Add, &mut previous)?;
        kernels.add(-2.0 * sign as f32, &current, &mut previous)?;
        remove(kernels, lock, &mut previous)?;
        std::mem::swap(&mut previous, &mut current);
        sign = -sign;
    }
    Ok(current)
}

/// Removes from the rows of `x` `[k, d]` their parts along the orthonormal rows of `basis` `[l, d]`.
fn remove(kernels: &dyn Kernels, basis: &Tensor, x: &mut Tensor) -> Result<()> {
    if basis.is_empty() {
        return Ok(());
    }
    let mut parts = kernels.empty(&[x.shape()[0], basis.shape()[0]])?;
    kernels.linear(x, basis, 1.0, Accum::Replace, &mut parts)?;
    kernels.linear_input_gradient(&parts, basis, -1.0, Accum::Add, x)
}

/// Some rows of `x` `[k, d]`.
pub(super) fn rows(kernels: &dyn Kernels, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
    let mut out = kernels.empty(&[range.len(), x.shape()[1]])?;
    kernels.gather_rows(&indices(kernels, range)?, x, &mut out)?;
    Ok(out)
}

/// The rows of `top` over the rows of `bottom`.
fn stack(kernels: &dyn Kernels, top: &Tensor, bottom: &Tensor) -> Result<Tensor> {
    let (above, below, width) = (top.shape()[0], bottom.shape()[0], top.shape()[1]);
    let mut out = kernels.empty(&[above + below, width])?;
    let mut part = kernels.empty(out.shape())?;
    kernels.scatter_rows(&indices(kernels, 0..above)?, top, &mut part)?;
    kernels.scatter_rows(&indices(kernels, above..above + below)?, bottom, &mut out)?;
    kernels.add(1.0, &part, &mut out)?;
    Ok(out)
}

fn indices(kernels: &dyn Kernels, range: Range<usize>) -> Result<Tensor> {
    let indices: Vec<u32> = range.map(|row| row as u32).collect();
    kernels.from_u32(&indices, &[indices.len()])
}
