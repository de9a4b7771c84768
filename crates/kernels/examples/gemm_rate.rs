//! The rate of the linear layer's three orientations: `cargo run --release -p lora-sb-kernels --example gemm_rate`.
//!
//! `-- THREADS`; prints GFLOP/s (2 T N K operations over the fastest of the repetitions) for each shape, with `f32`
//! activations and weights and with `bf16` ones; the weight's gradient is `f32` in both.

use std::time::Instant;

use lora_sb_kernels::{Accum, Cpu, DType, Generator, Linear, Memory, Result, Stream, Tensor};

fn main() -> Result<()> {
    let threads: usize = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(2);
    let cpu = Cpu::new(threads)?;
    rates(&cpu, threads)
}

fn rates(cpu: &Cpu, threads: usize) -> Result<()> {
    println!("{threads} threads, GFLOP/s\ntype     T     N     K  forward  input gradient  weight gradient");
    for (t, n, k) in [
        (1024, 768, 768),
        (1024, 2048, 768),
        (1024, 768, 2048),
        (1024, 256, 768),
        (1024, 64, 768),
        (1024, 64, 64),
        (1024, 2048, 64),
        (266, 32000, 768),
        (256, 32000, 768),
        (2048, 704, 256),
        (512, 8192, 2048),
        (512, 2048, 8192),
        (4096, 1024, 1024),
    ] {
        for dtype in [DType::F32, DType::Bf16] {
            let random = |rows, columns| random(cpu, dtype, rows, columns);
            let (x, w, y) = (random(t, k)?, random(n, k)?, random(t, n)?);
            let (mut out_y, mut out_x) = (cpu.empty_of(dtype, &[t, n])?, cpu.empty_of(dtype, &[t, k])?);
            let mut out_w = cpu.empty(&[n, k])?;
            let operations = 2.0 * (t * n * k) as f64;
            let forward = fastest(|| cpu.linear(&x, &w, 1.0, Accum::Replace, &mut out_y))?;
            let input = fastest(|| cpu.linear_input_gradient(&y, &w, 1.0, Accum::Replace, &mut out_x))?;
            let weight = fastest(|| cpu.linear_weight_gradient(&y, &x, 1.0, Accum::Replace, &mut out_w))?;
            let [forward, input, weight] = [forward, input, weight].map(|seconds| operations / seconds / 1e9);
            println!("{dtype:4} {t:5} {n:5} {k:5} {forward:8.0} {input:15.0} {weight:16.0}");
        }
    }
    Ok(())
}

fn random(cpu: &Cpu, dtype: DType, rows: usize, columns: usize) -> Result<Tensor> {
    let mut values = vec![0.0; rows * columns];
    Generator::new(1, Stream::Weights, columns as u64).normal(1.0, &mut values);
    let mut tensor = cpu.empty_of(dtype, &[rows, columns])?;
    cpu.write_f32(&mut tensor, &values)?;
    Ok(tensor)
}

fn fastest(mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    let mut fastest = f64::INFINITY;
    for _ in 0..9 {
        let start = Instant::now();
        work()?;
        fastest = fastest.min(start.elapsed().as_secs_f64());
    }
    Ok(fastest)
}
