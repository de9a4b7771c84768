//! What is left to the vendor's library, by one that notes what it is asked for.

use std::sync::{Arc, Mutex};

use super::of;
use super::product::Sum;
use crate::cuda::ThreadOrder;
use crate::cuda::blas::{Blas, Matrix, Product};
use crate::cuda::driver::{Driver, Failure, Gpu, Outcome, Start};
use crate::cuda::launch::DeviceFloats;
use crate::{Cuda, DType, Memory, Tensor};

/// A library whose products are made by the crate's kernels.
#[derive(Debug)]
struct Library {
    by: Cuda,
    /// Whether it knows a way.
    knows: bool,
    asked: Mutex<Vec<Product>>,
}

#[expect(unsafe_code, reason = "the trait's contract")]
impl Blas for Library {
    fn name(&self) -> String {
        "library".into()
    }

    unsafe fn product(&self, product: &Product) -> Outcome<bool> {
        self.asked.lock().unwrap().push(*product);
        let failed = |error: crate::Error| Failure {
            call: "product",
            message: error.to_string(),
            out_of_memory: false,
        };
        if self.knows {
            let &Product { a, b, c, alpha, beta, bias } = product;
            let bias = bias.map(|address| DeviceFloats { address, dtype: c.dtype });
            let sum = Sum { first: (a, b), second: None, c, alpha, beta, bias };
            self.by.sum("library", &sum).map_err(failed)?;
        }
        Ok(self.knows)
    }
}

/// A driver with that library.
#[derive(Debug)]
struct WithLibrary(Library);

impl WithLibrary {
    fn driver(&self) -> &dyn Driver {
        &*self.0.by.driver
    }
}

#[expect(unsafe_code, reason = "the trait's contract; everything is passed on")]
impl Driver for WithLibrary {
    fn gpu(&self) -> &Gpu {
        self.driver().gpu()
    }
    fn allocate(&self, bytes: usize) -> Outcome<u64> {
        self.driver().allocate(bytes)
    }
    unsafe fn free(&self, address: u64, bytes: usize) {
        // SAFETY: the caller's promise, here and below.
        unsafe { self.driver().free(address, bytes) }
    }
    unsafe fn upload(&self, to: u64, bytes: &[u8]) -> Outcome {
        // SAFETY: as above.
        unsafe { self.driver().upload(to, bytes) }
    }
    unsafe fn download(&self, from: u64, bytes: &mut [u8]) -> Outcome {
        // SAFETY: as above.
        unsafe { self.driver().download(from, bytes) }
    }
    unsafe fn clear(&self, at: u64, bytes: usize) -> Outcome {
        // SAFETY: as above.
        unsafe { self.driver().clear(at, bytes) }
    }
    unsafe fn launch(&self, start: Start<'_>) -> Outcome {
        // SAFETY: as above.
        unsafe { self.driver().launch(start) }
    }
    fn synchronize(&self) -> Outcome {
        self.driver().synchronize()
    }
    fn free_bytes(&self) -> Outcome<usize> {
        self.driver().free_bytes()
    }
    fn blas(&self) -> Option<&dyn Blas> {
        Some(&self.0)
    }
}

fn with_library(knows: bool) -> Option<(Arc<WithLibrary>, Cuda)> {
    let by = Cuda::emulated(ThreadOrder::Forward).unwrap()?;
    let driver = Arc::new(WithLibrary(Library { by, knows, asked: Mutex::default() }));
    Some((Arc::clone(&driver), Cuda::with(driver)))
}

fn tensor(gpu: &Cuda, dtype: DType, shape: [usize; 2]) -> (Tensor, Matrix) {
    let mut tensor = gpu.empty_of(dtype, &shape).unwrap();
    let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| (i % 5) as f32 - 2.0).collect();
    gpu.write_f32(&mut tensor, &values).unwrap();
    let address = gpu.floats("test", "x", &tensor).unwrap().address;
    (tensor, of(DeviceFloats { address, dtype }, shape[0], shape[1]))
}

#[test]
fn one_term_is_the_librarys_with_its_bias_in_the_results_type() {
    for knows in [true, false] {
        let Some((driver, gpu)) = with_library(knows) else { return };
        let ((x, a), (w, b)) = (tensor(&gpu, DType::Bf16, [16, 8]), tensor(&gpu, DType::Bf16, [8, 12]));
        let ((c, c_matrix), (bias, bias_matrix)) =
            (tensor(&gpu, DType::Bf16, [16, 12]), tensor(&gpu, DType::F32, [1, 12]));
        let bias_floats = DeviceFloats { address: bias_matrix.address, dtype: DType::F32 };
        let sum =
            Sum { first: (a, b), second: None, c: c_matrix, alpha: 1.0, beta: 0.0, bias: Some(bias_floats) };
        gpu.sum("test", &sum).unwrap();
        let asked = driver.0.asked.lock().unwrap();
        assert_eq!(asked.len(), 1);
        assert!(asked[0].bias.is_some_and(|address| address != bias_matrix.address), "rounded into scratch");
        // Small whole numbers: exact in bf16.
        let (x, w) = (gpu.to_f32(&x).unwrap(), gpu.to_f32(&w).unwrap());
        let bias = gpu.to_f32(&bias).unwrap();
        for (i, found) in gpu.to_f32(&c).unwrap().into_iter().enumerate() {
            let dot: f32 = (0..8).map(|k| x[i / 12 * 8 + k] * w[k * 12 + i % 12]).sum();
            assert_eq!(found, dot + bias[i % 12], "element {i}, the library knows a way: {knows}");
        }
    }
}

#[test]
fn what_the_library_does_slower_is_not_asked_of_it() {
    let Some((driver, gpu)) = with_library(true) else { return };
    let ((_a, a), (_b, b)) = (tensor(&gpu, DType::F32, [16, 8]), tensor(&gpu, DType::Bf16, [8, 12]));
    let (_c, c) = tensor(&gpu, DType::F32, [16, 12]);
    let sum = Sum { first: (a, b), second: None, c, alpha: 1.0, beta: 0.0, bias: None };
    // Two types; two terms of a small product; few rows.
    gpu.sum("test", &sum).unwrap();
    let (_d, d) = tensor(&gpu, DType::F32, [8, 12]);
    gpu.sum("test", &Sum { first: (a, d), second: Some((a, d)), ..sum }).unwrap();
    gpu.sum("test", &Sum { first: (Matrix { rows: 4, ..a }, d), c: Matrix { rows: 4, ..c }, ..sum }).unwrap();
    assert_eq!(driver.0.asked.lock().unwrap().len(), 0);
}

#[test]
fn two_terms_are_two_products() {
    let Some((driver, gpu)) = with_library(true) else { return };
    let ((_a, a), (_b, b)) = (tensor(&gpu, DType::Bf16, [16, 8]), tensor(&gpu, DType::Bf16, [8, 12]));
    let ((_h, h), (_w, w)) = (tensor(&gpu, DType::Bf16, [16, 3]), tensor(&gpu, DType::Bf16, [3, 12]));
    let ((one, of_one), (two, of_two)) =
        (tensor(&gpu, DType::F32, [16, 12]), tensor(&gpu, DType::F32, [16, 12]));
    let sum = Sum { first: (a, b), second: Some((h, w)), c: of_one, alpha: 0.5, beta: 1.0, bias: None };
    gpu.sum("test", &sum).unwrap();
    assert_eq!(driver.0.asked.lock().unwrap().len(), 0);
    let sum = Sum { c: of_two, ..sum };
    gpu.two_sums("test", &sum, (h, w)).unwrap();
    assert_eq!(driver.0.asked.lock().unwrap().len(), 2);
    // Halves of small whole numbers.
    assert_eq!(gpu.to_f32(&one).unwrap(), gpu.to_f32(&two).unwrap());
}
