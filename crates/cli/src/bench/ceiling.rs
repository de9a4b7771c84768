//! What the machine does at best: products on the model's own layers, and reading memory.

use std::hint::black_box;

use lora_sb_kernels::{Accum, DType, Generator, Kernels, Stream, Tensor};
use lora_sb_model::{Model, Parameter};
use lora_sb_tune::train::Clock;

use crate::failure::Result;

/// How long reading is measured, in seconds.
const READ_SECONDS: f64 = 0.5;
/// Bytes that are read: many times a processor's caches.
const READ_BYTES: usize = 512 << 20;
/// A layer counts as large from this share of the largest one on.
const LARGE: f64 = 0.5;

/// Floating-point operations a second of `y = x W^T` with the largest layers of a block, `rows` rows and activations of
/// the model's type: the median of repetitions that take about `seconds` in all, and of at least three.
pub(crate) fn product_rate(
    model: &Model,
    kernels: &dyn Kernels,
    rows: usize,
    seconds: f64,
    clock: &dyn Clock,
) -> Result<f64> {
    let weights = large_weights(model);
    let mut jobs = Vec::new();
    for weight in &weights {
        let [n, k] = [weight.shape()[0], weight.shape()[1]];
        jobs.push((
            random(kernels, model.dtype(), &[rows, k])?,
            *weight,
            kernels.empty_of(model.dtype(), &[rows, n])?,
        ));
    }
    let (mut operations, mut taken) = (0.0, 0.0);
    for (x, weight, y) in &mut jobs {
        let mut times = Vec::new();
        let begun = clock.seconds();
        while times.len() < 3 || clock.seconds() - begun < seconds / weights.len() as f64 {
            let start = clock.seconds();
            kernels.linear(x, weight, 1.0, Accum::Replace, y)?;
            times.push(clock.seconds() - start);
        }
        times.sort_by(f64::total_cmp);
        taken += times[times.len() / 2];
        operations += 2.0 * (rows * weight.len()) as f64;
    }
    Ok(operations / taken.max(f64::MIN_POSITIVE))
}

/// One weight of each shape among the large ones of the first block.
fn large_weights(model: &Model) -> Vec<&Tensor> {
    let of_first = model.sites().into_iter().filter(|site| site.layer == 0);
    let weights: Vec<&Tensor> = of_first.filter_map(|site| model.weight(Parameter::Weight(site))).collect();
    let largest = weights.iter().map(|weight| weight.len()).max().unwrap_or(0) as f64;
    let mut large: Vec<&Tensor> = Vec::new();
    for weight in weights {
        if weight.len() as f64 >= LARGE * largest && large.iter().all(|other| other.shape() != weight.shape())
        {
            large.push(weight);
        }
    }
    large
}

fn random(kernels: &dyn Kernels, dtype: DType, shape: &[usize]) -> Result<Tensor> {
    let mut values = vec![0.0; shape.iter().product()];
    Generator::new(0, Stream::Weights, 0).uniform(1.0, &mut values);
    let mut tensor = kernels.empty_of(dtype, shape)?;
    kernels.write_f32(&mut tensor, &values)?;
    Ok(tensor)
}

/// Bytes a second that `threads` threads read from memory, each a part of its own: the best pass.
pub(crate) fn read_rate(threads: usize, clock: &dyn Clock) -> f64 {
    let values = vec![1_u64; READ_BYTES / size_of::<u64>()];
    let part = values.len().div_ceil(threads.max(1));
    let sum = |part: &[u64]| black_box(part.iter().fold(0_u64, |sum, &value| sum.wrapping_add(value)));
    let (begun, mut best) = (clock.seconds(), f64::INFINITY);
    while best.is_infinite() || clock.seconds() - begun < READ_SECONDS {
        let start = clock.seconds();
        std::thread::scope(|scope| values.chunks(part).for_each(|part| drop(scope.spawn(move || sum(part)))));
        best = best.min(clock.seconds() - start);
    }
    READ_BYTES as f64 / best.max(f64::MIN_POSITIVE)
}
