//! Orthonormal bases of blocks of vectors.

use super::dense::{Square, axpy, combine, dot};
use crate::{Error, Generator, Kernels, Result, Tensor};

/// Squared sine of the angle below which a row counts as lying in the span of the rows before it. Products
/// in `f32` resolve about 1e-6.
const DEAD: f64 = 1e-5;

/// Deviation of the normalised Gram matrix from the identity (Frobenius) up to which one application of its
/// Cholesky factor reaches the rounding of `f32`: the block's condition is then at most 2.
const NEARLY_ORTHONORMAL: f64 = 0.5;

/// Two passes are usual, and one or two more after rows were replaced.
const PASSES: usize = 12;

/// Rows of independent normal numbers, `[k, d]`.
pub(super) fn random_rows(
    kernels: &dyn Kernels,
    count: usize,
    width: usize,
    generator: &mut Generator,
) -> Result<Tensor> {
    let mut values = vec![0.0; count * width];
    generator.normal(1.0, &mut values);
    kernels.from_f32(&values, &[count, width])
}

/// `count` orthonormal rows `[k, d]`, k <= d, in directions that no choice of axes prefers: an orthonormal basis of
/// Gaussian rows, whose triangular factor has a positive diagonal (Mezzadri 2007, "How to generate random matrices
/// from the classical compact groups").
///
/// # Errors
/// [`Error::Value`] where there are more rows than columns.
pub fn random_orthonormal(
    kernels: &dyn Kernels,
    count: usize,
    width: usize,
    generator: &mut Generator,
) -> Result<Tensor> {
    if count > width {
        let message = format!("{count} rows of {width} elements cannot be orthonormal");
        return Err(Error::Value { op: "random_orthonormal", message });
    }
    let rows = random_rows(kernels, count, width, generator)?;
    orthonormalise(kernels, rows, generator)
}

/// An orthonormal basis of the rows of `x` `[k, d]`, k <= d, by Cholesky-QR repeated until it is one to the
/// rounding of `f32` (Yamamoto, Nakatsukasa, Yanagisawa, Fukaya 2015, "Roundoff error analysis of the
/// CholeskyQR2 algorithm").
///
/// Row i of the result is a combination of rows 0..=i of `x`. A row that lies in the span of those before it
/// is replaced by a random direction, so the result always has k orthonormal rows.
pub(super) fn orthonormalise(
    kernels: &dyn Kernels,
    mut x: Tensor,
    generator: &mut Generator,
) -> Result<Tensor> {
    for _ in 0..PASSES {
        let whitening = Whitening::of(&Square::of_products(kernels, &x, &x)?);
        x = combine(kernels, &whitening.transform.upload(kernels, x.shape()[0])?, &x)?;
        if !whitening.dead.is_empty() {
            replace_rows(kernels, &mut x, &whitening.dead, generator)?;
        } else if whitening.deviation <= NEARLY_ORTHONORMAL {
            return Ok(x);
        }
    }
    let message = format!("a block of shape {:?} has no orthonormal basis after {PASSES} passes", x.shape());
    Err(Error::Value { op: "truncated_svd", message })
}

fn replace_rows(
    kernels: &dyn Kernels,
    x: &mut Tensor,
    rows: &[usize],
    generator: &mut Generator,
) -> Result<()> {
    let width = x.shape()[1];
    let mut values = kernels.to_f32(x)?;
    for &row in rows {
        generator.normal((width as f32).sqrt().recip(), &mut values[row * width..][..width]);
    }
    kernels.write_f32(x, &values)
}

/// The triangular transform that makes rows with a given Gram matrix orthonormal.
struct Whitening {
    transform: Square,
    deviation: f64,
    dead: Vec<usize>,
}

impl Whitening {
    /// `L^-1 D^-1/2` for the Gram matrix `D^1/2 L L^T D^1/2` with D its diagonal.
    fn of(gram: &Square) -> Self {
        let size = gram.size;
        let scales: Vec<f64> = (0..size).map(|i| gram.at(i, i)).map(inverse_root).collect();
        let (mut lower, mut dead, mut deviation) = (Square::zeros(size), Vec::new(), 0.0);
        for i in 0..size {
            for j in 0..i {
                let correlation = gram.at(i, j) * scales[i] * scales[j];
                deviation += 2.0 * correlation * correlation;
                if lower.at(j, j) != 0.0 {
                    let above = dot(&lower.row(i)[..j], &lower.row(j)[..j]);
                    lower.set(i, j, (correlation - above) / lower.at(j, j));
                }
            }
            let row = &lower.row(i)[..i];
            let pivot = 1.0 - dot(row, row);
            // A dead row's diagonal stays zero, which keeps it out of all rows below.
            if scales[i] > 0.0 && pivot > DEAD {
                lower.set(i, i, pivot.sqrt());
            } else {
                dead.push(i);
            }
        }
        Whitening { transform: inverse(&lower, &scales), deviation: deviation.sqrt(), dead }
    }
}

/// `L^-1 D` for a lower triangular L and a diagonal D; zero in the rows where L's diagonal is.
fn inverse(lower: &Square, diagonal: &[f64]) -> Square {
    let size = lower.size;
    let mut out = Square::zeros(size);
    for i in (0..size).filter(|&i| lower.at(i, i) != 0.0) {
        let (done, rest) = out.values.split_at_mut(i * size);
        let row = &mut rest[..=i];
        row[i] = diagonal[i];
        for j in 0..i {
            axpy(-lower.at(i, j), &done[j * size..][..=j], &mut row[..=j]);
        }
        let scale = 1.0 / lower.at(i, i);
        row.iter_mut().for_each(|value| *value *= scale);
    }
    out
}

/// `1 / sqrt(x)`, and 0 where x is not a positive normal number.
fn inverse_root(square: f64) -> f64 {
    if square.is_finite() && square > f64::from(f32::MIN_POSITIVE) { 1.0 / square.sqrt() } else { 0.0 }
}
