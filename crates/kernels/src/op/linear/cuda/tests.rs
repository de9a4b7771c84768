//! Every kernel on every way in which operands lie, whatever a plan would choose, in both orders of threads.

use super::plan::{Kernel, Plan};
use super::product::Sum;
use crate::cuda::ThreadOrder;
use crate::cuda::blas::Matrix;
use crate::cuda::launch::DeviceFloats;
use crate::{Cuda, DType, Generator, Memory, Stream, Tensor};

fn draw(case: u64, count: usize) -> Vec<f32> {
    let mut values = vec![0.0; count];
    Generator::new(11, Stream::Weights, case).normal(1.0, &mut values);
    values
}

/// A matrix as it lies in a tensor, and its elements as they are read.
struct Drawn {
    tensor: Tensor,
    matrix: Matrix,
    held: Vec<f32>,
}

impl Drawn {
    /// `rows` x `columns` as it is read, in lines whose lengths are multiples of a number.
    fn new(
        gpu: &Cuda,
        dtype: DType,
        (rows, columns): (usize, usize),
        transposed: bool,
        multiple: usize,
    ) -> Self {
        let (lines, length) = if transposed { (columns, rows) } else { (rows, columns) };
        let stride = length.next_multiple_of(multiple);
        let mut tensor = gpu.empty_of(dtype, &[lines, stride]).unwrap();
        gpu.write_f32(&mut tensor, &draw((rows * 1000 + columns) as u64, lines * stride)).unwrap();
        let held = gpu.to_f32(&tensor).unwrap();
        let at = |i: usize, j: usize| if transposed { held[j * stride + i] } else { held[i * stride + j] };
        let held = (0..rows * columns).map(|e| at(e / columns, e % columns)).collect();
        let address = gpu.floats("test", "x", &tensor).unwrap().address;
        let matrix = Matrix { address, dtype, rows: lines, columns: length, stride, transposed };
        Drawn { tensor, matrix, held }
    }

    fn bias(&self) -> DeviceFloats {
        DeviceFloats { address: self.matrix.address, dtype: self.matrix.dtype }
    }
}

/// Adds a b; a `[m, k]`, b `[k, n]`.
fn add(truth: &mut [f64], size: &mut [f64], a: &[f32], b: &[f32], n: usize) {
    let k = b.len() / n;
    for (i, (truth, size)) in truth.iter_mut().zip(size).enumerate() {
        for l in 0..k {
            let product = f64::from(a[i / n * k + l]) * f64::from(b[l * n + i % n]);
            *truth += product;
            *size += product.abs();
        }
    }
}

/// Sums of two terms by a plan: what is found in both orders of threads, which must be the same bits.
fn check(
    plan: Plan,
    dtype: DType,
    result: DType,
    (m, n, k, r): (usize, usize, usize, usize),
    ways: (bool, bool),
    multiple: usize,
) {
    let case = format!("{plan:?} {dtype} to {result} {m}x{n}x{k}+{r} {ways:?} in multiples of {multiple}");
    let mut found: Vec<Vec<f32>> = Vec::new();
    for order in [ThreadOrder::Forward, ThreadOrder::Backward] {
        let Some(gpu) = Cuda::emulated(order).unwrap() else { return };
        let of = |shape, transposed| Drawn::new(&gpu, dtype, shape, transposed, multiple);
        let (a, b) = (of((m, k), ways.0), of((k, n), ways.1));
        let (h, w) = (of((m, r), ways.0), of((r, n), ways.1));
        let (c, bias) = (Drawn::new(&gpu, result, (m, n), false, multiple), of((1, n), false));
        let (first, second) = ((a.matrix, b.matrix), (r > 0).then_some((h.matrix, w.matrix)));
        let (alpha, beta) = (0.5, -0.75);
        let sum = Sum { first, second, c: c.matrix, alpha, beta, bias: Some(bias.bias()) };
        gpu.sum_by_kernels("test", &sum, plan).unwrap();
        let (mut truth, mut size) = (vec![0.0; m * n], vec![0.0; m * n]);
        add(&mut truth, &mut size, &a.held, &b.held, n);
        add(&mut truth, &mut size, &h.held, &w.held, n);
        let stride = n.next_multiple_of(multiple);
        let all = gpu.to_f32(&c.tensor).unwrap();
        for (i, (truth, size)) in truth.iter().zip(&size).enumerate() {
            let (old, bias) = (f64::from(c.held[i]), f64::from(bias.held[i % n]));
            let truth = 0.5 * truth - 0.75 * old + bias;
            let rounding = if result == DType::Bf16 { truth.abs() / 256.0 } else { 0.0 };
            let allowed = 1e-6 * (((k + r) as f64).sqrt() + 4.0) * (size + old.abs() + bias.abs()) + rounding;
            let found = f64::from(all[i / n * stride + i % n]);
            assert!((found - truth).abs() <= allowed, "{case}: element {i} is {found}, truth {truth}");
        }
        found.push(all);
    }
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<u32>>();
    assert_eq!(bits(&found[0]), bits(&found[1]), "{case}: depends on the order of threads");
}

const WAYS: [(bool, bool); 3] = [(false, false), (false, true), (true, false)];

#[test]
fn products_of_the_tensor_cores() {
    for (kernel, least) in [(Kernel::Bf16Large, 8), (Kernel::Bf16Medium, 8), (Kernel::Bf16Small, 1)] {
        for ways in WAYS {
            for (parts, result, sizes, multiple) in [
                (1, DType::F32, (131, 257, 37, 5), least),
                (3, DType::Bf16, (65, 264, 168, 40), 8),
                (2, DType::Bf16, (7, 71, 129, 0), 16),
            ] {
                check(Plan { kernel, parts }, DType::Bf16, result, sizes, ways, multiple);
            }
        }
    }
}

#[test]
fn products_of_the_ordinary_cores() {
    for kernel in [Kernel::F32Large, Kernel::F32Small] {
        for ways in WAYS.into_iter().chain([(true, true)]) {
            for (dtype, parts, result, sizes, multiple) in [
                (DType::F32, 1, DType::F32, (131, 129, 37, 5), 1),
                (DType::F32, 3, DType::Bf16, (68, 136, 100, 8), 4),
                (DType::Bf16, 2, DType::F32, (3, 71, 33, 0), 8),
            ] {
                check(Plan { kernel, parts }, dtype, result, sizes, ways, multiple);
            }
        }
    }
}

#[test]
fn products_of_few_rows() {
    for (rows, most) in [(1, 1), (3, 4), (4, 4), (5, 8), (8, 8)] {
        for (dtype, result, n, k, r, multiple) in [
            (DType::F32, DType::F32, 9, 37, 5, 1),
            (DType::Bf16, DType::Bf16, 8, 2312, 16, 8),
            (DType::Bf16, DType::F32, 3, 1032, 0, 1),
        ] {
            let plan = Plan { kernel: Kernel::Few(most), parts: 1 };
            check(plan, dtype, result, (rows, n, k, r), (false, true), multiple);
        }
    }
}

#[test]
fn a_product_of_no_depth_is_what_is_added_to_it() {
    let Some(gpu) = Cuda::emulated(ThreadOrder::Forward).unwrap() else { return };
    for dtype in [DType::F32, DType::Bf16] {
        let of = |shape| Drawn::new(&gpu, dtype, shape, false, 1);
        let (a, b, bias) = (of((3, 0)), of((0, 5)), of((1, 5)));
        let c = gpu.empty_of(dtype, &[3, 5]).unwrap();
        let address = gpu.floats("test", "c", &c).unwrap().address;
        let matrix = Matrix { address, dtype, rows: 3, columns: 5, stride: 5, transposed: false };
        let held = Some(DeviceFloats { address: bias.matrix.address, dtype });
        let first = (a.matrix, b.matrix);
        let sum = Sum { first, second: None, c: matrix, alpha: 2.0, beta: 0.0, bias: held };
        gpu.sum("test", &sum).unwrap();
        assert_eq!(gpu.to_f32(&c).unwrap(), bias.held.repeat(3));
        gpu.sum("test", &Sum { beta: 0.5, bias: None, ..sum }).unwrap();
        let half: Vec<f32> = bias.held.iter().map(|x| 0.5 * x).collect();
        assert_eq!(gpu.to_f32(&c).unwrap(), half.repeat(3));
    }
}
