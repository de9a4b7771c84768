//! The truncated SVD against nalgebra's exact one in f64.

use lora_sb_kernels::linalg::{SvdOptions, TruncatedSvd, truncated_svd, truncated_svd_bytes};
use lora_sb_kernels::{Cpu, DType, Error, Generator, Memory, Stream};
use nalgebra::{DMatrix, SVD};

/// Row-major elements with their sizes.
struct Matrix {
    m: usize,
    n: usize,
    values: Vec<f32>,
    /// What it is handed over as.
    dtype: DType,
}

impl Matrix {
    fn from_fn(m: usize, n: usize, mut element: impl FnMut(usize, usize) -> f64) -> Self {
        let values = (0..m * n).map(|index| element(index / n, index % n) as f32).collect();
        Matrix { m, n, values, dtype: DType::F32 }
    }

    fn gaussian(m: usize, n: usize, seed: u64) -> Self {
        let mut values = vec![0.0; m * n];
        Generator::new(seed, Stream::Weights, 0).normal(1.0, &mut values);
        Matrix { m, n, values, dtype: DType::F32 }
    }

    fn of(matrix: &DMatrix<f64>) -> Self {
        Self::from_fn(matrix.nrows(), matrix.ncols(), |row, column| matrix[(row, column)])
    }

    fn signs(mut self, scale: f32) -> Self {
        self.values.iter_mut().for_each(|value| *value = scale * value.signum());
        self
    }

    fn in_bf16(self) -> Self {
        Matrix { dtype: DType::Bf16, ..self }
    }

    fn dense(&self) -> DMatrix<f64> {
        dense(&self.values, self.m, self.n)
    }

    /// `sum_i s_i u_i v_i^T` with random orthonormal u and v.
    fn with_spectrum(m: usize, n: usize, spectrum: &[f64], seed: u64) -> Self {
        let basis = |size, seed| Self::gaussian(size, spectrum.len(), seed).dense().qr().q();
        let diagonal = DMatrix::from_diagonal(&spectrum.to_vec().into());
        Self::of(&(basis(m, seed) * diagonal * basis(n, seed + 1).transpose()))
    }

    /// A gradient-like matrix: rank 12 with decaying strength, plus noise.
    fn gradient(m: usize, n: usize, noise: f64, seed: u64) -> Self {
        let spectrum: Vec<f64> =
            (0..12).map(|index| ((m * n) as f64).sqrt() / (1.0 + index as f64)).collect();
        let noise = Self::gaussian(m, n, seed + 2).dense() * noise;
        Self::of(&(Self::with_spectrum(m, n, &spectrum, seed).dense() + noise))
    }
}

fn dense(values: &[f32], rows: usize, columns: usize) -> DMatrix<f64> {
    DMatrix::from_row_iterator(rows, columns, values.iter().map(|&value| f64::from(value)))
}

/// A factorisation in f64.
struct Factors {
    u: DMatrix<f64>,
    s: Vec<f64>,
    v_transposed: DMatrix<f64>,
    svd: TruncatedSvd,
}

impl Factors {
    fn product(&self) -> DMatrix<f64> {
        &self.u * DMatrix::from_diagonal(&self.s.clone().into()) * &self.v_transposed
    }
}

/// Small matrices would be solved densely; these options send them through the iteration, which is on trial.
fn iterated() -> SvdOptions {
    SvdOptions { dense_up_to: 64, ..SvdOptions::default() }
}

fn factors(matrix: &Matrix, rank: usize, threads: usize, seed: u64) -> Factors {
    let cpu = Cpu::new(threads).unwrap();
    let mut tensor = cpu.empty_of(matrix.dtype, &[matrix.m, matrix.n]).unwrap();
    cpu.write_f32(&mut tensor, &matrix.values).unwrap();
    let mut generator = Generator::new(seed, Stream::Svd, 0);
    let svd = truncated_svd(&cpu, &tensor, rank, &mut generator, &iterated()).unwrap();
    assert_eq!(svd.u.shape(), [matrix.m, rank]);
    assert_eq!(svd.v_transposed.shape(), [rank, matrix.n]);
    Factors {
        u: dense(&cpu.to_f32(&svd.u).unwrap(), matrix.m, rank),
        s: svd.singular_values.iter().map(|&value| f64::from(value)).collect(),
        v_transposed: dense(&cpu.to_f32(&svd.v_transposed).unwrap(), rank, matrix.n),
        svd,
    }
}

fn orthonormality_error(columns: &DMatrix<f64>) -> f64 {
    let gram = columns.transpose() * columns;
    (&gram - DMatrix::identity(gram.nrows(), gram.ncols())).amax()
}

/// Checks every law of the factorisation against the exact singular values and returns it.
fn assert_best(name: &str, matrix: &Matrix, rank: usize) -> Factors {
    let exact = SVD::new(matrix.dense(), false, false).singular_values;
    assert!(exact.as_slice().is_sorted_by(|a, b| a >= b), "{name}: the exact values are not sorted");
    let factors = factors(matrix, rank, 2, 5);
    let name = format!("{name} {}x{} r={rank}", matrix.m, matrix.n);
    let total: f64 = exact.iter().map(|value| value * value).sum();
    let best: f64 = exact.iter().take(rank).map(|value| value * value).sum();

    assert!(factors.svd.converged, "{name}: not converged");
    assert!(orthonormality_error(&factors.u) < 1e-5, "{name}: U {}", orthonormality_error(&factors.u));
    let v_error = orthonormality_error(&factors.v_transposed.transpose());
    assert!(v_error < 1e-5, "{name}: V {v_error}");
    assert!(factors.s.is_sorted_by(|a, b| a >= b), "{name}: singular values are not sorted");
    assert!(factors.s.iter().all(|&value| value >= 0.0), "{name}: a negative singular value");

    let captured = (factors.u.transpose() * matrix.dense() * factors.v_transposed.transpose()).norm_squared();
    assert!(captured >= 0.9999 * best, "{name}: {} of the best energy", captured / best);
    assert!(captured <= 1.00001 * best, "{name}: {} of the best energy", captured / best);
    assert!((factors.svd.captured_energy - captured).abs() <= 1e-5 * captured, "{name}: reported energy");
    assert!((factors.svd.total_energy - total).abs() <= 1e-5 * total, "{name}: reported total");

    let error = (matrix.dense() - factors.product()).norm_squared();
    let optimum = total - best;
    assert!(error <= optimum + 1e-4 * best, "{name}: squared error {error}, Eckart-Young {optimum}");
    for column in factors.u.column_iter() {
        let largest = column.iter().copied().fold(0.0f64, |a, b| if b.abs() > a.abs() { b } else { a });
        assert!(largest > 0.0, "{name}: the largest entry of a column of U is {largest}");
    }
    factors
}

#[test]
fn random_sign_matrices_reach_the_optimum() {
    let matrix = Matrix::gaussian(200, 300, 1).signs(1e-5);
    for rank in [8, 24, 64] {
        assert_best("signs", &matrix, rank);
    }
    assert_best("tall signs", &Matrix::gaussian(307, 211, 2).signs(1e-5), 17);
}

#[test]
fn sign_matrices_of_gradients_reach_the_optimum() {
    for (noise, seed) in [(3.0, 11), (0.3, 12), (0.0, 13)] {
        let matrix = Matrix::gradient(233, 311, noise, seed).signs(-2e-4);
        for rank in [8, 24, 64] {
            assert_best("gradient signs", &matrix, rank);
        }
    }
}

/// Products of signs are exact in either type, so nothing changes but the order of sums.
#[test]
fn sign_matrices_held_as_bf16_reach_the_same_optimum() {
    let sparse =
        Matrix::from_fn(307, 211, |row, column| [0.0, 1.0, -1.0][(row * row + 5 * column) * 7 % 17 % 3]);
    let gradient = |m, n, seed| Matrix::gradient(m, n, 0.5, seed).signs(-1.0);
    for matrix in [gradient(233, 311, 14), gradient(311, 233, 15), sparse] {
        let wide = factors(&matrix, 24, 2, 5);
        let matrix = matrix.in_bf16();
        let narrow = assert_best("signs as bf16", &matrix, 24);
        let difference = (narrow.product() - wide.product()).norm() / wide.product().norm();
        assert!(difference < 1e-3, "{difference}");
    }
    assert_best("small signs as bf16", &Matrix::gaussian(3, 64, 16).signs(1.0).in_bf16(), 2);
}

#[test]
fn matrices_of_bf16_need_not_hold_signs() {
    let rounded = |matrix: Matrix| {
        let values =
            matrix.values.iter().map(|value| f32::from_bits(value.to_bits() & 0xffff_0000)).collect();
        Matrix { values, ..matrix }.in_bf16()
    };
    assert_best("bf16", &rounded(Matrix::gaussian(150, 400, 3)), 20);
    let tiny = Matrix::gaussian(1009, 97, 5);
    let values = tiny.values.iter().map(|value| value * 1e-12).collect();
    assert_best("tiny bf16", &rounded(Matrix { values, ..tiny }), 5);
}

#[test]
fn gaussian_matrices_reach_the_optimum() {
    assert_best("gaussian", &Matrix::gaussian(150, 400, 3), 20);
    assert_best("wide", &Matrix::gaussian(97, 1009, 4), 5);
    assert_best("tall", &Matrix::gaussian(1009, 97, 5), 5);
    assert_best("square", &Matrix::gaussian(131, 131, 6), 13);
    assert_best("one value", &Matrix::gaussian(211, 223, 7), 1);
}

#[test]
fn a_matrix_too_large_to_square_reaches_the_optimum() {
    // From about 2048 x 2048 on, A A^T costs more than it saves and the matrix is applied twice instead.
    let spectrum: Vec<f64> = (0..30).map(|index| 1.0 / (1.0 + f64::from(index)).sqrt()).collect();
    let best: f64 = spectrum[..4].iter().map(|value| value * value).sum();
    for (m, n) in [(2099, 2111), (2111, 2099)] {
        let factors = factors(&Matrix::with_spectrum(m, n, &spectrum, 8), 4, 2, 5);
        assert!(factors.svd.converged, "{m}x{n}");
        let captured = factors.svd.captured_energy / best;
        assert!((0.9999..=1.00001).contains(&captured), "{m}x{n}: {captured}");
        assert!(orthonormality_error(&factors.u) < 1e-5, "{m}x{n}");
        assert!(orthonormality_error(&factors.v_transposed.transpose()) < 1e-5, "{m}x{n}");
        for (found, expected) in factors.s.iter().zip(&spectrum) {
            assert!((found - expected).abs() < 1e-3, "{m}x{n}: {:?}", factors.s);
        }
    }
}

#[test]
fn decaying_spectra_reach_the_optimum() {
    let harmonic: Vec<f64> = (0..200).map(|index| 1.0 / (1.0 + f64::from(index))).collect();
    let geometric: Vec<f64> = (0..200).map(|index| 0.8f64.powi(index)).collect();
    for rank in [4, 16, 64] {
        assert_best("harmonic", &Matrix::with_spectrum(260, 200, &harmonic, 21), rank);
        assert_best("geometric", &Matrix::with_spectrum(200, 260, &geometric, 22), rank);
    }
}

#[test]
fn rows_and_columns_of_very_different_size_reach_the_optimum() {
    // One singular value dwarfs the others, and all of them matter at a tighter tolerance than the default.
    let noise = Matrix::gaussian(307, 283, 23);
    let element = |row: usize, column: usize| {
        f64::from(noise.values[row * 283 + column]) / (1.0 + row as f64) / (1.0 + column as f64)
    };
    let matrix = Matrix::from_fn(307, 283, element);
    for rank in [1, 7, 64] {
        let factors = assert_best("graded", &matrix, rank);
        let exact = SVD::new(matrix.dense(), false, false).singular_values;
        let best: f64 = exact.iter().take(rank).map(|value| value * value).sum();
        let captured = factors.svd.captured_energy / best;
        assert!((captured - 1.0).abs() < 2e-5, "graded r={rank}: {captured}");
    }
}

#[test]
fn equal_singular_values_stay_orthonormal() {
    let factors = assert_best("equal", &Matrix::with_spectrum(160, 230, &[3.0; 160], 31), 20);
    assert!(factors.s.iter().all(|value| (value - 3.0).abs() < 1e-5), "{:?}", factors.s);
    let pairs: Vec<f64> = (0..150).map(|index| 1.0 + f64::from(index / 2)).collect();
    assert_best("pairs", &Matrix::with_spectrum(150, 190, &pairs, 32), 21);
}

#[test]
fn a_rank_below_the_one_asked_for_gives_zero_values_and_orthonormal_vectors() {
    let matrix = Matrix::with_spectrum(180, 240, &[5.0, 4.0, 4.0, 1.0, 0.5], 41);
    let factors = assert_best("rank 5", &matrix, 12);
    for (found, expected) in
        factors.s.iter().zip([5.0, 4.0, 4.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    {
        assert!((found - expected).abs() < 1e-5, "{:?}", factors.s);
    }
    assert_best("ones", &Matrix::from_fn(131, 257, |_, _| 1.0), 9);
    assert_best(
        "one element",
        &Matrix::from_fn(90, 70, |row, column| if (row, column) == (7, 3) { -2.0 } else { 0.0 }),
        6,
    );
}

#[test]
fn a_zero_matrix_has_zero_values_and_orthonormal_vectors() {
    for (m, n) in [(150, 200), (7, 5), (1, 3)] {
        let rank = 5.min(m);
        let factors = factors(&Matrix::from_fn(m, n, |_, _| 0.0), rank, 1, 1);
        assert_eq!(factors.s, vec![0.0; rank]);
        assert_eq!(orthonormality_error(&factors.u), 0.0);
        assert_eq!(orthonormality_error(&factors.v_transposed.transpose()), 0.0);
        assert_eq!((factors.svd.captured_energy, factors.svd.total_energy), (0.0, 0.0));
    }
}

#[test]
fn the_smallest_sizes_are_factorised() {
    for (m, n) in [(1, 1), (1, 13), (13, 1), (2, 2), (5, 7), (7, 5), (64, 3), (3, 64)] {
        assert_best("small", &Matrix::gaussian(m, n, 51), 1);
        assert_best("small", &Matrix::gaussian(m, n, 52).signs(1.0), m.min(n));
    }
    let vector = assert_best("row", &Matrix::from_fn(1, 4, |_, column| [1.0, -2.0, 2.0, 4.0][column]), 1);
    assert!((vector.s[0] - 5.0).abs() < 1e-6 && (vector.v_transposed[3] - 0.8).abs() < 1e-6);
}

#[test]
fn full_rank_reconstructs_the_matrix() {
    for (m, n) in [(67, 101), (103, 71), (100, 100)] {
        let matrix = Matrix::gaussian(m, n, 61);
        let error = (matrix.dense() - assert_best("full rank", &matrix, m.min(n)).product()).norm();
        assert!(error < 1e-5 * matrix.dense().norm(), "{m}x{n}: {error}");
    }
}

#[test]
fn elements_far_from_one_are_scaled() {
    for scale in [1e-20, 1e-12, 1e12, 1e18] {
        let factors = assert_best("scaled", &Matrix::gaussian(110, 140, 71).signs(scale), 7);
        assert!(factors.s[0] > 15.0 * f64::from(scale), "{scale}: {:?}", factors.s);
    }
}

#[test]
fn the_result_depends_on_the_seed_alone() {
    let matrix = Matrix::gradient(203, 309, 1.0, 81).signs(1e-4);
    let one = factors(&matrix, 16, 1, 9);
    for threads in [1, 2, 3] {
        let other = factors(&matrix, 16, threads, 9);
        assert_eq!(one.u, other.u, "{threads} threads");
        assert_eq!(one.s, other.s, "{threads} threads");
        assert_eq!(one.v_transposed, other.v_transposed, "{threads} threads");
    }
}

#[test]
fn seeds_agree_where_there_is_a_gap() {
    let mut spectrum = vec![1.0; 150];
    spectrum.splice(..6, [9.0, 8.0, 7.5, 7.5, 6.0, 5.0]);
    let matrix = Matrix::with_spectrum(150, 170, &spectrum, 91);
    let one = factors(&matrix, 6, 2, 1);
    let two = factors(&matrix, 6, 2, 2);
    let difference = (one.product() - two.product()).norm() / one.product().norm();
    assert!(difference < 1e-2, "{difference}");
    assert_ne!(one.u, two.u);
}

#[test]
fn bad_input_is_refused_with_its_numbers() {
    let cpu = Cpu::new(1).unwrap();
    let refused = |values: &[f32], shape: &[usize], rank| {
        let tensor = cpu.from_f32(values, shape).unwrap();
        let mut generator = Generator::new(0, Stream::Svd, 0);
        truncated_svd(&cpu, &tensor, rank, &mut generator, &SvdOptions::default()).unwrap_err()
    };
    let message = refused(&[1.0; 35], &[5, 7], 6).to_string();
    assert_eq!(message, "truncated_svd: rank 6 of a 5 x 7 matrix; expected 1 to 5");
    assert!(refused(&[1.0; 35], &[5, 7], 0).to_string().contains("rank 0"));
    assert!(refused(&[], &[0, 7], 1).to_string().contains("0 x 7"));
    assert!(refused(&[1.0, f32::NAN], &[1, 2], 1).to_string().contains("NaN"));
    assert!(refused(&[1.0, f32::INFINITY], &[1, 2], 1).to_string().contains("infinite"));
    assert!(matches!(refused(&[1.0; 8], &[2, 2, 2], 1), Error::Shape { operand: "matrix", .. }));
}

/// The dense path gives each singular vector, not only their energy.
#[test]
fn moderate_sides_are_solved_to_f32() {
    let cpu = Cpu::new(2).unwrap();
    let matrix = Matrix::gaussian(150, 170, 5).signs(1.0);
    let tensor = cpu.from_f32(&matrix.values, &[150, 170]).unwrap();
    let mut generator = Generator::new(0, Stream::Svd, 0);
    let svd = truncated_svd(&cpu, &tensor, 150, &mut generator, &SvdOptions::default()).unwrap();
    let exact = DMatrix::from_row_slice(150, 170, &matrix.values).map(f64::from).svd(false, false);
    let mut exact: Vec<f64> = exact.singular_values.iter().copied().collect();
    exact.sort_by(|a, b| b.total_cmp(a));
    for (found, exact_value) in svd.singular_values.iter().zip(&exact) {
        // f32 rounding of the factors and of the products they come from, relative to the largest value.
        assert!((f64::from(*found) - exact_value).abs() < 1e-5 * exact[0], "{found} {exact_value}");
    }
}

#[test]
fn the_memory_it_takes_is_known_before() {
    for (m, n) in [(401, 1009), (1009, 401), (797, 797), (97, 1009), (211, 173)] {
        for rank in [1, 24, 64] {
            for matrix in
                [Matrix::gradient(m, n, 1.0, 3), Matrix::gradient(m, n, 1.0, 3).signs(1.0).in_bf16()]
            {
                let (cpu, dtype, options) = (Cpu::new(2).unwrap(), matrix.dtype, SvdOptions::default());
                let mut tensor = cpu.empty_of(dtype, &[m, n]).unwrap();
                cpu.write_f32(&mut tensor, &matrix.values).unwrap();
                let before = cpu.usage().live_bytes;
                cpu.reset_peak();
                truncated_svd(&cpu, &tensor, rank, &mut Generator::new(1, Stream::Svd, 0), &options).unwrap();
                let found = cpu.usage().peak_bytes - before;
                let known = truncated_svd_bytes(cpu.place(), dtype, (m, n), rank, &options);
                let ratio = known as f64 / found as f64;
                assert!(
                    (0.999..1.2).contains(&ratio),
                    "{dtype} {m}x{n} r={rank}: {known} for {found}: {ratio:.3}"
                );
            }
        }
    }
}

#[test]
fn a_cap_on_iterations_is_reported() {
    let cpu = Cpu::new(2).unwrap();
    let matrix = Matrix::gaussian(200, 300, 1).signs(1.0);
    let tensor = cpu.from_f32(&matrix.values, &[200, 300]).unwrap();
    let mut generator = Generator::new(0, Stream::Svd, 0);
    let options = SvdOptions { max_iterations: 1, ..iterated() };
    let svd = truncated_svd(&cpu, &tensor, 8, &mut generator, &options).unwrap();
    assert!(!svd.converged);
    assert_eq!((svd.iterations, svd.applications), (1, 1));
}
