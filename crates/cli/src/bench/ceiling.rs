//! What the device does at best: products on the model's own layers, and reading memory.

use std::hint::black_box;

use lora_sb_kernels::{Accum, DType, Generator, Kernels, Stream, Tensor};
use lora_sb_model::{Model, Parameter};
use lora_sb_tune::train::Clock;

use crate::failure::Result;

/// How long reading is measured, in seconds.
const READ_SECONDS: f64 = 0.5;
/// Products are asked for together until they take so long, so that the way to the device and back does not count.
const LEAST_SECONDS: f64 = 2e-3;
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
        let mut several = |count: usize| -> Result<f64> {
            kernels.synchronize()?;
            let start = clock.seconds();
            (0..count).try_for_each(|_| kernels.linear(x, weight, 1.0, Accum::Replace, y))?;
            kernels.synchronize()?;
            Ok((clock.seconds() - start) / count as f64)
        };
        let first = several(1)?.min(several(1)?);
        let together = (LEAST_SECONDS / first.max(f64::MIN_POSITIVE)).clamp(1.0, 1e3) as usize;
        let (mut times, begun) = (Vec::new(), clock.seconds());
        while times.len() < 3 || clock.seconds() - begun < seconds / weights.len() as f64 {
            times.push(several(together)?);
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

/// Bytes a second of the device's memory: those that the processor's threads read, each a part of its own, or that a GPU
/// reads and writes where it copies. The best pass.
pub(crate) fn memory_rate(kernels: &dyn Kernels, threads: usize, clock: &dyn Clock) -> Result<f64> {
    if !kernels.place().is_host() {
        return copy_rate(kernels, clock);
    }
    let values = vec![1_u64; READ_BYTES / size_of::<u64>()];
    let part = values.len().div_ceil(threads.max(1));
    let sum = |part: &[u64]| black_box(part.iter().fold(0_u64, |sum, &value| sum.wrapping_add(value)));
    let best = best_pass(clock, &mut || {
        std::thread::scope(|scope| values.chunks(part).for_each(|part| drop(scope.spawn(move || sum(part)))));
        Ok(())
    })?;
    Ok(READ_BYTES as f64 / best)
}

/// The same of a GPU: half of the bytes are read, half are written.
fn copy_rate(kernels: &dyn Kernels, clock: &dyn Clock) -> Result<f64> {
    let shape = [READ_BYTES / 2 / size_of::<f32>()];
    let (from, mut to) = (kernels.zeros(&shape)?, kernels.empty(&shape)?);
    let best = best_pass(clock, &mut || {
        kernels.cast(&from, &mut to)?;
        Ok(kernels.synchronize()?)
    })?;
    Ok(READ_BYTES as f64 / best)
}

/// Seconds of the shortest of several passes.
fn best_pass(clock: &dyn Clock, pass: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
    let (begun, mut best) = (clock.seconds(), f64::INFINITY);
    while best.is_infinite() || clock.seconds() - begun < READ_SECONDS {
        let start = clock.seconds();
        pass()?;
        best = best.min(clock.seconds() - start);
    }
    Ok(best.max(f64::MIN_POSITIVE))
}
