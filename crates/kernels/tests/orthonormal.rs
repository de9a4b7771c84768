//! Random orthonormal rows.

use lora_sb_kernels::linalg::random_orthonormal;
use lora_sb_kernels::{Cpu, Error, Generator, Memory, Stream};
use nalgebra::DMatrix;

fn rows(count: usize, width: usize, seed: u64) -> Vec<f32> {
    let cpu = Cpu::new(2).unwrap();
    let mut generator = Generator::new(seed, Stream::Adapter, 0);
    let rows = random_orthonormal(&cpu, count, width, &mut generator).unwrap();
    assert_eq!(rows.shape(), [count, width]);
    cpu.to_f32(&rows).unwrap()
}

#[test]
fn rows_are_orthonormal_up_to_the_square() {
    for (count, width) in [(1, 1), (1, 7), (3, 3), (5, 13), (17, 17), (31, 211)] {
        for seed in 0..4 {
            let values = rows(count, width, seed).into_iter().map(f64::from);
            let matrix = DMatrix::from_row_iterator(count, width, values);
            let error = (&matrix * matrix.transpose() - DMatrix::identity(count, count)).amax();
            assert!(error < 1e-5, "{count}x{width}: {error:.2e}");
        }
    }
}

#[test]
fn the_seed_decides() {
    assert_eq!(rows(5, 13, 1), rows(5, 13, 1));
    assert_ne!(rows(5, 13, 1), rows(5, 13, 2));
}

/// No axis is preferred: a row's elements have mean 0 and square 1 / width.
#[test]
fn directions_are_uniform() {
    let (width, seeds) = (6, 2000);
    let (mut sums, mut squares) = (vec![0.0; width], vec![0.0; width]);
    for seed in 0..seeds {
        for (at, value) in rows(3, width, seed)[2 * width..].iter().enumerate() {
            sums[at] += f64::from(*value) / seeds as f64;
            squares[at] += f64::from(*value).powi(2) / seeds as f64;
        }
    }
    for (mean, square) in sums.iter().zip(&squares) {
        // Five standard deviations of a mean of 2000: 0.41 / 45, and less for the squares.
        assert!(mean.abs() < 0.046 && (square - 1.0 / 6.0).abs() < 0.03, "{sums:?} {squares:?}");
    }
}

#[test]
fn more_rows_than_columns_are_refused() {
    let cpu = Cpu::new(1).unwrap();
    let error = random_orthonormal(&cpu, 5, 3, &mut Generator::new(0, Stream::Adapter, 0)).unwrap_err();
    assert!(matches!(error, Error::Value { op: "random_orthonormal", .. }), "{error}");
    assert!(error.to_string().contains("5 rows of 3"), "{error}");
}
