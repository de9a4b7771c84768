//! The truncated singular value decomposition.

use super::dense::{Square, combine, dense_svd};
use super::operator::{Filter, Operator, Polynomial, Ritz, Side, filter_block, rows};
use super::orthonormal::{orthonormalise, random_rows};
use crate::{Accum, DType, Error, Generator, Kernels, Place, Result, Tensor, shape};

const OP: &str = "truncated_svd";

/// How exactly [`truncated_svd`] works.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SvdOptions {
    /// Part of the best rank-r energy that may be missing by estimate. Estimates err: it is a tenth of what
    /// is promised, 0.9999.
    pub tolerance: f64,
    /// Vectors iterated beyond the rank, as a part of the rank; at least 8 are.
    pub oversampling: f64,
    /// Largest degree of the Chebyshev filter between two Rayleigh-Ritz steps.
    pub max_degree: usize,
    /// Rayleigh-Ritz steps after which the result is returned with `converged: false`.
    pub max_iterations: usize,
    /// Smaller sides up to this size are solved densely, in `f64`. A missing part of 1e-5 of the energy still
    /// turns vectors beside near-equal singular values by sqrt(1e-5); the dense solution is exact to `f32`, and
    /// up to 256 it costs no more than the iteration.
    pub dense_up_to: usize,
}

impl Default for SvdOptions {
    fn default() -> Self {
        SvdOptions {
            tolerance: 1e-5,
            oversampling: 0.25,
            max_degree: 16,
            max_iterations: 60,
            dense_up_to: 256,
        }
    }
}

/// `A ~ U diag(s) V^T`, the best approximation of a given rank.
#[derive(Debug)]
pub struct TruncatedSvd {
    /// Left singular vectors, orthonormal columns `[m, r]`; the entry of largest magnitude of each (the first
    /// of equals) is positive.
    pub u: Tensor,
    /// Singular values, largest first; `r` of them, none negative.
    pub singular_values: Vec<f32>,
    /// Right singular vectors, orthonormal rows `[r, n]`.
    pub v_transposed: Tensor,
    /// Rayleigh-Ritz steps taken.
    pub iterations: usize,
    /// How often `A A^T` (or `A^T A`) was applied to the block of vectors.
    pub applications: usize,
    /// Whether the estimate of the missing energy came below the tolerance.
    pub converged: bool,
    /// `|U^T A V|_F^2`, the energy of the approximation.
    pub captured_energy: f64,
    /// `|A|_F^2`.
    pub total_energy: f64,
}

/// The `rank` largest singular values of `matrix` `[m, n]` and their vectors, `1 <= rank <= min(m, n)`.
///
/// The matrix may be `f32` or `bf16`, all else is `f32`. A matrix whose elements `bf16` holds exactly, as it does those
/// of a sign matrix, is best handed over so: the products of `A A^T`, a third of the work, are then exact before they
/// are summed in `f32`, and twice as fast.
///
/// Chebyshev-filtered subspace iteration on `A A^T` or `A^T A`, whichever is smaller, with a block of
/// `rank` plus some vectors (Zhou, Saad, Tiago, Chelikowsky 2006; for the SVD as range finder Halko,
/// Martinsson, Tropp 2011, algorithms 4.4 and 5.1). The sign matrices that LoRA-SB factorises have a nearly
/// flat spectrum, where the few power iterations of a plain randomised SVD lose up to 3 % of the energy; here
/// iterations go on until the estimated loss is below [`SvdOptions::tolerance`]. Small matrices are projected
/// on the whole space, which is a dense factorisation.
///
/// The result depends on the matrix and the generator alone. Singular values below about 3e-4 of the largest
/// are beneath what `f32` products of the squared matrix resolve: the vectors are orthonormal all the same,
/// and what they miss is below 1e-7 of the energy. A matrix of zeros has unit vectors and zero values.
///
/// # Errors
/// [`Error::Value`] for a rank outside its range and for a matrix that holds NaN or infinities,
/// [`Error::Shape`] and [`Error::Type`] where it is no matrix of `f32` or `bf16`.
pub fn truncated_svd(
    kernels: &dyn Kernels,
    matrix: &Tensor,
    rank: usize,
    generator: &mut Generator,
    options: &SvdOptions,
) -> Result<TruncatedSvd> {
    let (m, n) = check(matrix, rank)?;
    let total_energy = kernels.sum_of_squares(matrix)?;
    if !total_energy.is_finite() {
        let message = format!("the {m} x {n} matrix holds NaN or infinite elements");
        return Err(Error::Value { op: OP, message });
    }
    if total_energy == 0.0 {
        return zero(kernels, (m, n), rank);
    }
    let root_mean_square = (total_energy / (m as f64 * n as f64)).sqrt();
    if (1e-8..=1e8).contains(&root_mean_square) {
        return factorise(kernels, matrix, (m, n), rank, total_energy, generator, options);
    }
    // Squares of such elements leave the range of f32.
    let mut scaled = kernels.zeros(&[m, n])?;
    kernels.add((1.0 / root_mean_square) as f32, matrix, &mut scaled)?;
    let energy = kernels.sum_of_squares(&scaled)?;
    let mut svd = factorise(kernels, &scaled, (m, n), rank, energy, generator, options)?;
    svd.singular_values.iter_mut().for_each(|value| *value = (f64::from(*value) * root_mean_square) as f32);
    svd.captured_energy *= total_energy / energy;
    svd.total_energy = total_energy;
    Ok(svd)
}

/// Bytes that [`truncated_svd`] of a matrix `[m, n]` of a type takes at its largest, beside the matrix itself: the Gram
/// matrix of the smaller side, the block's vectors in their various states, and what one product packs.
pub fn truncated_svd_bytes(
    place: Place,
    dtype: DType,
    (m, n): (usize, usize),
    rank: usize,
    options: &SvdOptions,
) -> usize {
    let (small, large) = (m.min(n), m.max(n));
    let block = block_size(small, rank, options);
    let rows = |count: usize, width: usize| place.bytes(count * width);
    let product = |m, n, k| place.product_scratch_bytes((DType::F32, dtype), m, n, k);
    let squaring = place.product_scratch_bytes((dtype, dtype), small, small, large);
    // Basis, images, both rotated, residuals; the rotation and its like are `[k, k]`.
    let ritz = 5 * rows(block, small) + 2 * rows(block, block) + product(block, small, block.max(small));
    let last =
        2 * rows(block, small) + 2 * rows(rank, small) + 2 * rows(rank, large) + product(rank, large, small);
    rows(small, small) + squaring.max(ritz).max(last)
}

fn check(matrix: &Tensor, rank: usize) -> Result<(usize, usize)> {
    let (m, n) = shape::matrix(OP, "matrix", matrix)?;
    if !matches!(matrix.dtype(), DType::F32 | DType::Bf16) {
        return Err(Error::Type {
            op: OP,
            operand: "matrix",
            found: matrix.dtype(),
            expected: "f32 or bf16",
        });
    }
    if rank == 0 || rank > m.min(n) {
        let message = format!("rank {rank} of a {m} x {n} matrix; expected 1 to {}", m.min(n));
        return Err(Error::Value { op: OP, message });
    }
    Ok((m, n))
}

fn zero(kernels: &dyn Kernels, (m, n): (usize, usize), rank: usize) -> Result<TruncatedSvd> {
    let unit_vectors = |rows: usize, columns: usize| {
        let mut values = vec![0.0; rows * columns];
        values.iter_mut().step_by(columns + 1).take(rank).for_each(|value| *value = 1.0);
        kernels.from_f32(&values, &[rows, columns])
    };
    Ok(TruncatedSvd {
        u: unit_vectors(m, rank)?,
        singular_values: vec![0.0; rank],
        v_transposed: unit_vectors(rank, n)?,
        iterations: 0,
        applications: 0,
        converged: true,
        captured_energy: 0.0,
        total_energy: 0.0,
    })
}

fn factorise(
    kernels: &dyn Kernels,
    matrix: &Tensor,
    (m, n): (usize, usize),
    rank: usize,
    total_energy: f64,
    generator: &mut Generator,
    options: &SvdOptions,
) -> Result<TruncatedSvd> {
    let small = m.min(n);
    let block = block_size(small, rank, options);
    // Scaled so that the mean eigenvalue is 1 and their sum is `small`.
    let operator = Operator::new(kernels, matrix, (m, n), (small as f64 / total_energy) as f32, block)?;
    let mut basis = if block == small {
        identity(kernels, small)?
    } else {
        orthonormalise(kernels, random_rows(kernels, block, small, generator)?, generator)?
    };
    let mut progress = Progress::default();
    loop {
        let ritz = Ritz::of(&operator, basis)?;
        progress.record(&ritz, rank, small);
        let converged = progress.missing <= options.tolerance || block == small;
        if converged || progress.iterations >= options.max_iterations {
            let mut svd = project(kernels, &operator, ritz, rank, generator)?;
            svd.iterations = progress.iterations;
            svd.converged = converged;
            svd.total_energy = total_energy;
            return Ok(svd);
        }
        let filter = Filter::of(&ritz, rank, &progress, options);
        basis = orthonormalise(kernels, filter_block(&operator, ritz, filter)?, generator)?;
    }
}

/// Vectors that are iterated; all of them where the whole space is hardly larger.
fn block_size(small: usize, rank: usize, options: &SvdOptions) -> usize {
    let block = rank + ((rank as f64 * options.oversampling) as usize).max(8);
    if small <= options.dense_up_to || small <= block + block / 2 { small } else { block }
}

fn identity(kernels: &dyn Kernels, size: usize) -> Result<Tensor> {
    let mut values = vec![0.0; size * size];
    values.iter_mut().step_by(size + 1).for_each(|value| *value = 1.0);
    kernels.from_f32(&values, &[size, size])
}

/// Largest ratio by which the filter may amplify one Ritz vector over the last. The rounding errors of each
/// vector, 1e-7 of it, are amplified alike; beyond this ratio they would bury the last vectors.
const AMPLIFICATION: f64 = 1e6;

/// Squared residual relative to the squared Ritz value up to which a Ritz vector can be locked: it then
/// misses about 1e-6 of its energy.
const LOCKED: f64 = 1e-6;

/// Part of the tolerance that the degree aims at.
const MARGIN: f64 = 0.1;

impl Filter {
    /// The filter for the next step. Outliers, whose amplification is what limits the degree, are locked as
    /// soon as they have converged, which is soon.
    fn of(ritz: &Ritz, rank: usize, progress: &Progress, options: &SvdOptions) -> Self {
        // The first Ritz values, of a random block, are far below the eigenvalues.
        let max_degree =
            if progress.iterations == 1 { 3.min(options.max_degree) } else { options.max_degree };
        let last = ritz.values[ritz.values.len() - 1];
        let degree_to_amplify = |value: f64, amplification: f64| {
            amplification.acosh() / (2.0 * value / last - 1.0).max(1.0).acosh()
        };
        if last <= ritz.values[0] / AMPLIFICATION {
            return Filter { locked: 0, polynomial: Polynomial::Power };
        }
        let too_large = |value| degree_to_amplify(value, AMPLIFICATION) < max_degree as f64;
        let pairs = ritz.values.iter().zip(&ritz.squared_residuals);
        let locked = pairs
            .take_while(|&(&value, &squared)| too_large(value) && squared <= LOCKED * value * value)
            .count()
            .min(ritz.values.len() - 1);
        let allowed = degree_to_amplify(ritz.values[locked], AMPLIFICATION);
        // The missing energy falls with the square of the amplification, most slowly for the last pair.
        let to_gain = (progress.missing / (MARGIN * options.tolerance)).max(1.0).sqrt();
        let needed = degree_to_amplify(ritz.values[rank - 1], to_gain).ceil();
        let degree = (allowed.min(needed) as usize).clamp(1, max_degree.max(1));
        Filter { locked, polynomial: Polynomial::Chebyshev { cut: last, degree } }
    }
}

/// What is known of convergence.
#[derive(Debug)]
struct Progress {
    iterations: usize,
    /// Sum of the `rank` largest Ritz values.
    energy: f64,
    /// Its growth in the last iteration.
    growth: f64,
    /// Estimate of the part of the best energy that is still missing.
    missing: f64,
}

impl Default for Progress {
    fn default() -> Self {
        Progress { iterations: 0, energy: 0.0, growth: f64::INFINITY, missing: f64::INFINITY }
    }
}

impl Progress {
    /// The smallest of three estimates of `sum(lambda_i) - sum(theta_i)` over the first `rank` pairs:
    ///
    /// * what the whole block leaves of the trace, a bound (Ky Fan);
    /// * `sum |G x_i - theta_i x_i|^2 / (theta_i - theta_k)`, a bound where the eigenvalues outside the block
    ///   are below its last Ritz value (Parlett 1998, "The symmetric eigenvalue problem", theorem 11.7.1);
    /// * the rest of the geometric series of the growths, for spectra whose gaps are too small for it.
    fn record(&mut self, ritz: &Ritz, rank: usize, trace: usize) {
        let energy: f64 = ritz.values[..rank].iter().sum();
        let growth = (energy - self.energy).max(0.0);
        let mut missing = (trace as f64 - ritz.values.iter().sum::<f64>()).max(0.0);
        // The first two blocks have not seen the spectrum's upper end: their last value bounds nothing yet.
        if self.iterations >= 2 {
            let last = ritz.values[ritz.values.len() - 1];
            let pairs = ritz.values.iter().zip(&ritz.squared_residuals).take(rank);
            let gap = |value: &f64| (value - last).max(f64::MIN_POSITIVE);
            let residual: f64 = pairs.map(|(value, squared)| squared / gap(value)).sum();
            let ratio = if growth > 0.0 { (growth / self.growth).clamp(0.5, 0.95) } else { 0.5 };
            missing = missing.min(residual).min(growth * ratio / (1.0 - ratio));
        }
        let missing = missing / energy;
        *self = Progress { iterations: self.iterations + 1, energy, growth, missing };
    }
}

/// The SVD of the matrix restricted to the span of the Ritz vectors on its smaller side and of their images
/// on the larger one: `core = Q A P^T` with orthonormal rows in Q and P.
fn project(
    kernels: &dyn Kernels,
    operator: &Operator,
    ritz: Ritz,
    rank: usize,
    generator: &mut Generator,
) -> Result<TruncatedSvd> {
    let block = ritz.values.len();
    // Ritz values, being squares, no longer order singular values this small; the core does.
    let kept = if ritz.values[rank - 1] < ritz.values[0] * 1e-3 { block } else { rank };
    let q = rows(kernels, &ritz.vectors, 0..kept)?;
    let p = orthonormalise(kernels, operator.across(&q)?, generator)?;
    let mut images = kernels.empty(q.shape())?;
    operator.back(&p, 1.0, Accum::Replace, &mut images)?;
    let core = dense_svd(&Square::of_products(kernels, &q, &images)?);
    let (left, left_rotation, right, mut right_rotation) = match operator.side {
        Side::Left => (q, core.left, p, core.right),
        Side::Right => (p, core.right, q, core.left),
    };
    let u = columns(kernels, &left, &left_rotation, rank, &mut right_rotation)?;
    let v_transposed = combine(kernels, &right_rotation.upload(kernels, rank)?, &right)?;
    let singular_values = &core.singular_values[..rank];
    Ok(TruncatedSvd {
        u,
        singular_values: singular_values.iter().map(|&value| value as f32).collect(),
        v_transposed,
        iterations: 0,
        applications: operator.applications(),
        converged: true,
        captured_energy: singular_values.iter().map(|value| value * value).sum(),
        total_energy: 0.0,
    })
}

/// `left^T rotation^T` `[m, r]` with the sign of each column fixed; the other side's rows follow the signs.
fn columns(
    kernels: &dyn Kernels,
    left: &Tensor,
    rotation: &Square,
    rank: usize,
    other: &mut Square,
) -> Result<Tensor> {
    let mut u = kernels.empty(&[left.shape()[1], rank])?;
    let rotation = rotation.upload_transposed(kernels, rank)?;
    kernels.linear_weight_gradient(left, &rotation, 1.0, Accum::Replace, &mut u)?;
    let mut values = kernels.to_f32(&u)?;
    let mut largest = vec![0.0f32; rank];
    for row in values.chunks_exact(rank) {
        for (largest, value) in largest.iter_mut().zip(row) {
            if value.abs() > largest.abs() {
                *largest = *value;
            }
        }
    }
    for row in values.chunks_exact_mut(rank) {
        row.iter_mut().zip(&largest).for_each(|(value, largest)| *value *= largest.signum());
    }
    for (column, largest) in largest.iter().enumerate() {
        let row = &mut other.values[column * other.size..][..other.size];
        row.iter_mut().for_each(|value| *value *= f64::from(largest.signum()));
    }
    kernels.write_f32(&mut u, &values)?;
    Ok(u)
}
