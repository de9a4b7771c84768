//! Random operands, weights in every type of a file, and comparisons with a computed tolerance.

#![allow(dead_code, reason = "every test program uses a part of it")]

use std::sync::Arc;

use half::{bf16, f16};
use lora_sb_kernels::cuda::ThreadOrder;
use lora_sb_kernels::{Cpu, Cuda, DType, Generator, Kernels, SharedBytes, Stream, Tensor};

/// Unit roundoff of `f32`.
pub(crate) const EPS: f64 = (f32::EPSILON / 2.0) as f64;

/// Unit roundoff of `bf16`, which has 8 significant bits.
pub(crate) const BF16_EPS: f64 = 1.0 / 256.0;

/// The types of activations.
pub(crate) const DTYPES: [DType; 2] = [DType::F32, DType::Bf16];

/// Every combination of the types of three activations.
pub(crate) fn type_triples() -> impl Iterator<Item = [DType; 3]> {
    (0..8).map(|case: usize| [case / 4, case / 2 % 2, case % 2].map(|which| DTYPES[which]))
}

/// The devices that every operation is checked on: the processor and [`gpu`].
pub(crate) fn devices() -> Vec<Box<dyn Kernels>> {
    let mut devices: Vec<Box<dyn Kernels>> = vec![Box::new(Cpu::new(2).unwrap())];
    devices.extend(gpu().map(|gpu| Box::new(gpu) as Box<dyn Kernels>));
    devices
}

/// The GPU whose number the environment has, as `LORA_SB_TEST_DEVICE=cuda:N`, or else the emulated one; none where the
/// environment has `cpu`, or there is no C++ compiler.
pub(crate) fn gpu() -> Option<Cuda> {
    if let Ok(name) = std::env::var("LORA_SB_TEST_DEVICE") {
        let number = name.strip_prefix("cuda:").map(|number| number.parse().unwrap());
        assert!(number.is_some() || name == "cpu", "LORA_SB_TEST_DEVICE={name}: expected cpu or cuda:N");
        return number.map(|number| Cuda::open(number).unwrap());
    }
    let emulated = Cuda::emulated(ThreadOrder::Forward).unwrap();
    if emulated.is_none() {
        eprintln!("no C++ compiler: the GPU's kernels are not tested");
    }
    emulated
}

/// Random numbers of one test case.
pub(crate) struct Draw(Generator);

impl Draw {
    pub(crate) fn new(case: u64) -> Self {
        Draw(Generator::new(7, Stream::Weights, case))
    }

    /// From N(0, 1).
    pub(crate) fn normal(&mut self, count: usize) -> Vec<f32> {
        let mut values = vec![0.0; count];
        self.0.normal(1.0, &mut values);
        values
    }

    pub(crate) fn normal_f64(&mut self, count: usize) -> Vec<f64> {
        widen(&self.normal(count))
    }

    /// Indices below `bound`.
    pub(crate) fn indices(&mut self, count: usize, bound: usize) -> Vec<u32> {
        (0..count).map(|_| self.0.below(bound) as u32).collect()
    }

    /// `count` different indices below `bound`, in no order.
    pub(crate) fn distinct(&mut self, count: usize, bound: usize) -> Vec<u32> {
        self.0.permutation(bound)[..count].iter().map(|&index| index as u32).collect()
    }
}

/// How a weight reaches the device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Source {
    /// Written by the device.
    Owned,
    /// A file's elements, where the file's header leaves them aligned.
    File(DType),
    /// A file's elements one byte behind an aligned address.
    Misaligned(DType),
}

pub(crate) const SOURCES: [Source; 7] = [
    Source::Owned,
    Source::File(DType::F32),
    Source::File(DType::Bf16),
    Source::File(DType::F16),
    Source::Misaligned(DType::F32),
    Source::Misaligned(DType::Bf16),
    Source::Misaligned(DType::F16),
];

/// The weight on the device, and its elements after rounding to its type.
pub(crate) fn weight(
    kernels: &dyn Kernels,
    source: Source,
    values: &[f32],
    shape: &[usize],
) -> (Tensor, Vec<f32>) {
    let (dtype, padding) = match source {
        Source::Owned => return (kernels.from_f32(values, shape).unwrap(), values.to_vec()),
        Source::File(dtype) => (dtype, 0),
        Source::Misaligned(dtype) => (dtype, 1),
    };
    // u64 words make the address of the first byte known to be aligned.
    let mut bytes = Aligned(vec![0; values.len() / 2 + 2]);
    let (mut rounded, size) = (Vec::with_capacity(values.len()), dtype.size());
    for (i, &value) in values.iter().enumerate() {
        let place = &mut bytemuck::cast_slice_mut::<u64, u8>(&mut bytes.0)[padding + i * size..][..size];
        rounded.push(match dtype {
            DType::Bf16 => {
                place.copy_from_slice(&bf16::from_f32(value).to_le_bytes());
                bf16::from_f32(value).to_f32()
            }
            DType::F16 => {
                place.copy_from_slice(&f16::from_f32(value).to_le_bytes());
                f16::from_f32(value).to_f32()
            }
            _ => {
                place.copy_from_slice(&value.to_le_bytes());
                value
            }
        });
    }
    let shared = SharedBytes::new(Arc::new(bytes), padding..padding + values.len() * size).unwrap();
    (kernels.from_bytes(shared, dtype, shape).unwrap(), rounded)
}

/// An owned activation on the device, and its elements after rounding to its type.
pub(crate) fn activation(
    kernels: &dyn Kernels,
    dtype: DType,
    values: &[f32],
    shape: &[usize],
) -> (Tensor, Vec<f32>) {
    let mut tensor = kernels.empty_of(dtype, shape).unwrap();
    kernels.write_f32(&mut tensor, values).unwrap();
    (tensor, rounded(dtype, values))
}

/// The nearest values of a type.
pub(crate) fn rounded(dtype: DType, values: &[f32]) -> Vec<f32> {
    match dtype {
        DType::Bf16 => values.iter().map(|&value| bf16::from_f32(value).to_f32()).collect(),
        _ => values.to_vec(),
    }
}

struct Aligned(Vec<u64>);

impl AsRef<[u8]> for Aligned {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

pub(crate) fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| f64::from(value)).collect()
}

/// Elements without their signs: what a sum's rounding errors are measured by.
pub(crate) fn magnitudes(values: &[f64]) -> Vec<f64> {
    values.iter().map(|value| value.abs()).collect()
}

/// The relative error allowed to a sum of `terms` products, against the sum of their magnitudes: roundings
/// add like a random walk, and the constant covers the operations around the sum.
pub(crate) fn sum_error(terms: usize) -> f64 {
    EPS * (2.0 * (terms as f64).sqrt() + 8.0)
}

/// Checks `|found - truth| <= relative * magnitude`, element by element; a NaN anywhere fails.
#[track_caller]
pub(crate) fn close(case: &str, found: &[f32], truth: &[f64], relative: f64, magnitude: &[f64]) {
    assert_eq!(found.len(), truth.len(), "{case}: number of elements");
    assert_eq!(found.len(), magnitude.len(), "{case}: number of magnitudes");
    for (i, ((&found, &truth), &magnitude)) in found.iter().zip(truth).zip(magnitude).enumerate() {
        let (error, allowed) =
            ((f64::from(found) - truth).abs(), relative * magnitude + f64::from(f32::MIN_POSITIVE));
        assert!(
            error <= allowed,
            "{case}: element {i} is {found}, truth {truth}: off by {error}, allowed {allowed}"
        );
    }
}

/// [`close`] for what is stored in an activation's type: a `bf16` element may be off by its rounding besides.
#[track_caller]
pub(crate) fn close_in(
    dtype: DType,
    case: &str,
    found: &[f32],
    truth: &[f64],
    relative: f64,
    magnitude: &[f64],
) {
    if dtype == DType::F32 {
        return close(case, found, truth, relative, magnitude);
    }
    let errors = truth.iter().zip(magnitude).map(|(truth, magnitude)| {
        let before = relative * magnitude;
        before + BF16_EPS * (truth.abs() + before)
    });
    close(case, found, truth, 1.0, &errors.collect::<Vec<f64>>());
}
