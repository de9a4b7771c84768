//! The whole way from an operation to the driver, which runs the kernels on the emulator, and to the vendor's products.

use std::mem::ManuallyDrop;
use std::sync::Arc;

use libloading::Library;

use super::fake::{Fake, Hook};
use crate::cuda::{Cuda, emulator};
use crate::{Accum, Cpu, DType, Elementwise, Extra, Kernels, Memory, Result, Tensor};

/// A GPU whose launches the emulator runs.
fn gpu(fake: &Fake) -> Option<Cuda> {
    let path = emulator::library().unwrap()?;
    #[expect(unsafe_code, reason = "a function of the emulator")]
    // SAFETY: the emulator exports it with this signature, and is never unloaded.
    unsafe {
        let library = ManuallyDrop::new(Library::new(path).unwrap());
        fake.hook(*library.get::<Hook>(b"emulate").unwrap());
    }
    Some(Cuda::with(Arc::new(fake.open().unwrap())))
}

/// Small whole numbers, of which sums of products are exact in every order.
fn whole(device: &dyn Kernels, dtype: DType, shape: [usize; 2]) -> Result<Tensor> {
    let values: Vec<f32> =
        (0..shape[0] * shape[1]).map(|index| ((index * 5 + shape[0]) % 7) as f32 - 3.0).collect();
    let mut tensor = device.empty_of(dtype, &shape)?;
    device.write_f32(&mut tensor, &values)?;
    Ok(tensor)
}

#[test]
fn a_kernel_is_launched() {
    let Some(fake) = Fake::new(&[]) else { return };
    let Some(gpu) = gpu(&fake) else { return };
    let values: Vec<f32> = (0..1000).map(|index| index as f32 / 7.0).collect();
    let x = gpu.from_f32(&values, &[1000]).unwrap();
    let mut y = gpu.empty_of(DType::Bf16, &[1000]).unwrap();
    gpu.cast(&x, &mut y).unwrap();
    let rounded: Vec<f32> = values.iter().map(|&value| half::bf16::from_f32(value).to_f32()).collect();
    assert!(gpu.to_f32(&y).unwrap() == rounded);
}

/// Every orientation of a linear layer's product, with and without what is added to it.
fn products(device: &dyn Kernels, dtype: DType, accum: Accum) -> Result<Vec<Vec<f32>>> {
    let [t, n, k] = [43, 37, 41];
    let (x, dy, w) =
        (whole(device, dtype, [t, k])?, whole(device, dtype, [t, n])?, whole(device, DType::F32, [n, k])?);
    let bias = device.from_f32(&(0..n).map(|index| (index % 5) as f32).collect::<Vec<f32>>(), &[n])?;
    let mut y = whole(device, dtype, [t, n])?;
    device.linear(&x, &w, 2.0, accum, &mut y)?;
    let mut fused = whole(device, DType::F32, [t, n])?;
    device.linear_fused(&x, &w, Extra { bias: Some(&bias), term: None }, accum, &mut fused)?;
    let mut dx = whole(device, DType::F32, [t, k])?;
    device.linear_input_gradient(&dy, &w, 0.5, accum, &mut dx)?;
    let mut dw = whole(device, DType::F32, [n, k])?;
    device.linear_weight_gradient(&dy, &x, 1.0, accum, &mut dw)?;
    [y, fused, dx, dw].iter().map(|tensor| device.to_f32(tensor)).collect()
}

#[test]
fn a_linear_layer_is_the_librarys_product() {
    let Some(fake) = Fake::with_products(&[]) else { return };
    let Some(gpu) = gpu(&fake) else { return };
    let cpu = Cpu::new(1).unwrap();
    for dtype in [DType::F32, DType::Bf16] {
        for accum in [Accum::Replace, Accum::Add] {
            let before = fake.count("fake_asked");
            let (found, expected) =
                (products(&gpu, dtype, accum).unwrap(), products(&cpu, dtype, accum).unwrap());
            assert_eq!(found, expected, "{dtype} {accum:?}");
            assert_eq!(fake.count("fake_asked") - before, 4, "{dtype} {accum:?}");
        }
    }
}
