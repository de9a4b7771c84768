//! The vendor's products: what the library is told is the product that was asked for.

use half::bf16;

use super::super::Nvidia;
use super::fake::Fake;
use crate::DType;
use crate::cuda::blas::{Matrix, Product};
use crate::cuda::driver::Driver;

/// A row-major matrix on the host, `stride` elements from line to line, with its place on the device.
struct Lines {
    values: Vec<f32>,
    matrix: Matrix,
}

/// Small whole numbers: every product and sum is exact.
fn value(index: usize, case: usize) -> f32 {
    ((index * 7 + case * 5) % 11) as f32 - 5.0
}

#[expect(unsafe_code, reason = "copies to and from memory that was taken for them")]
fn write(driver: &Nvidia, address: u64, dtype: DType, values: &[f32]) {
    let rounded: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
    let bytes: &[u8] = match dtype {
        DType::Bf16 => bytemuck::cast_slice(&rounded),
        _ => bytemuck::cast_slice(values),
    };
    // SAFETY: the callers take 4 bytes a value.
    unsafe { driver.upload(address, bytes).unwrap() };
}

#[expect(unsafe_code, reason = "copies to and from memory that was taken for them")]
fn read(driver: &Nvidia, address: u64, dtype: DType, count: usize) -> Vec<f32> {
    let mut bytes = vec![0; count * dtype.size()];
    // SAFETY: the callers take 4 bytes a value.
    unsafe { driver.download(address, &mut bytes).unwrap() };
    match dtype {
        DType::Bf16 => bytes.as_chunks().0.iter().map(|&word| bf16::from_le_bytes(word).to_f32()).collect(),
        _ => bytes.as_chunks().0.iter().map(|&word| f32::from_le_bytes(word)).collect(),
    }
}

impl Lines {
    /// Of `rows` lines as they are read, `gap` elements between the end of one line and the next.
    fn new(
        driver: &Nvidia,
        dtype: DType,
        [rows, columns]: [usize; 2],
        transposed: bool,
        gap: usize,
        case: usize,
    ) -> Lines {
        let (rows, columns) = if transposed { (columns, rows) } else { (rows, columns) };
        let stride = columns + gap;
        let values: Vec<f32> = (0..rows * stride).map(|index| value(index, case)).collect();
        let address = driver.allocate(4 * values.len()).unwrap();
        write(driver, address, dtype, &values);
        Lines { values, matrix: Matrix { address, dtype, rows, columns, stride, transposed } }
    }

    fn at(&self, row: usize, column: usize) -> f32 {
        let (row, column) = if self.matrix.transposed { (column, row) } else { (row, column) };
        self.values[row * self.matrix.stride + column]
    }
}

/// One product by the library and by its definition.
fn check(driver: &Nvidia, [m, n, k]: [usize; 3], types: [DType; 2], case: usize) -> Product {
    let [inputs, output] = types;
    let gap = case % 3;
    let a = Lines::new(driver, inputs, [m, k], case & 1 != 0, gap, case);
    let b = Lines::new(driver, inputs, [k, n], case & 2 != 0, 2 * gap, case + 1);
    let c = Lines::new(driver, output, [m, n], false, 3 * gap, case + 2);
    let biases: Vec<f32> = (0..n).map(|index| value(index, case + 3)).collect();
    let bias = (case & 4 != 0).then(|| driver.allocate(4 * n).unwrap());
    if let Some(bias) = bias {
        write(driver, bias, output, &biases);
    }
    let (alpha, beta) = (0.5, if case & 8 != 0 { -1.0 } else { 0.0 });
    let product = Product { a: a.matrix, b: b.matrix, c: c.matrix, alpha, beta, bias };
    driver.synchronize().unwrap();
    assert!(computed(driver, &product), "{product:?}");
    let found = read(driver, c.matrix.address, output, c.values.len());
    let mut expected = c.values.clone();
    for row in 0..m {
        for column in 0..n {
            let sum: f32 = (0..k).map(|inner| a.at(row, inner) * b.at(inner, column)).sum();
            let bias = bias.map_or(0.0, |_| biases[column]);
            expected[row * c.matrix.stride + column] = alpha * sum + beta * c.at(row, column) + bias;
        }
    }
    if output == DType::Bf16 {
        expected.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32());
    }
    assert_eq!(found, expected, "{product:?}");
    product
}

#[expect(unsafe_code, reason = "a product of matrices that are as large as they say")]
fn computed(driver: &Nvidia, product: &Product) -> bool {
    // SAFETY: the tests make the matrices.
    unsafe { driver.blas().unwrap().product(product).unwrap() }
}

#[test]
fn are_those_of_rows() {
    let Some(fake) = Fake::with_products(&[]) else { return };
    let driver = fake.open().unwrap();
    assert_eq!(driver.blas().unwrap().name(), "cuBLASLt 12.4.5");
    let types = [[DType::F32; 2], [DType::Bf16; 2], [DType::Bf16, DType::F32]];
    for types in types {
        for case in 0..16 {
            for shape in [[1, 1, 1], [2, 3, 5], [7, 4, 9], [17, 8, 1]] {
                check(&driver, shape, types, case);
            }
        }
    }
}

#[test]
fn are_asked_for_once_and_told_apart_by_what_matters() {
    let Some(fake) = Fake::with_products(&[]) else { return };
    let driver = fake.open().unwrap();
    let product = check(&driver, [4, 6, 8], [DType::Bf16; 2], 4);
    assert_eq!(fake.count("fake_asked"), 1);
    assert!(computed(&driver, &Product { alpha: 3.0, ..product }));
    let other = driver.allocate(64).unwrap();
    assert!(computed(&driver, &Product { bias: Some(other), ..product }));
    assert_eq!(fake.count("fake_asked"), 1, "numbers and places do not matter");
    assert!(computed(&driver, &Product { beta: 1.0, ..product }));
    assert!(computed(&driver, &Product { bias: None, ..product }));
    let mut moved = product;
    moved.b.address += 2;
    moved.b.columns -= 1;
    moved.c.columns -= 1;
    assert!(computed(&driver, &moved));
    assert_eq!(fake.count("fake_asked"), 4);
}

#[test]
fn are_left_to_the_kernels_where_the_library_has_no_way() {
    let Some(fake) = Fake::with_products(&[]) else { return };
    let driver = fake.open().unwrap();
    let product = check(&driver, [14, 6, 8], [DType::F32; 2], 4);
    let with_rows = |rows: usize| {
        let mut other = product;
        (other.a.rows, other.c.rows) = (rows, rows);
        other
    };
    assert!(!computed(&driver, &with_rows(13)) && !computed(&driver, &with_rows(13)));
    assert_eq!(fake.count("fake_asked"), 2, "that it has none is known, too");
    assert!(!computed(&driver, &with_rows(0)) && !computed(&driver, &with_rows(1 << 31)));
    assert!(!computed(&driver, &Product { bias: product.bias.map(|bias| bias + 4), ..product }));
    assert_eq!(fake.count("fake_asked"), 2);
}

#[test]
fn that_do_not_run_leave_the_gpu_usable_and_say_so() {
    let Some(fake) = Fake::with_products(&["REFUSES"]) else { return };
    let driver = fake.open().unwrap();
    assert!(driver.blas().is_none());
    let expected = "cuBLASLt 12.4.5 is not usable: cublasLtCreate: error 1";
    assert_eq!(driver.without_blas(), Some(expected));
    drop(driver);
    assert_eq!(fake.count("fake_retained"), 0);
    let fake = Fake::new(&[]).unwrap();
    assert_eq!(fake.open().unwrap().without_blas(), Some("cuBLASLt is not found"));
}
