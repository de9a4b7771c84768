//! The rate of the linear layer's three orientations: `cargo run --release -p lora-sb-kernels --example gemm_rate`.
//!
//! Prints GFLOP/s (2 T N K operations over the median of the repetitions) for each shape.

use std::time::Instant;

use lora_sb_kernels::{Accum, Cpu, Generator, Linear, Memory, Result, Stream, Tensor};

fn main() -> Result<()> {
    let threads: usize = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(2);
    let cpu = Cpu::new(threads)?;
    println!("{threads} threads, GFLOP/s\n    T     N     K  forward  input gradient  weight gradient");
    for (t, n, k) in [
        (1024, 768, 768),
        (1024, 2048, 768),
        (1024, 768, 2048),
        (1024, 256, 768),
        (1024, 64, 768),
        (256, 32000, 768),
        (2048, 704, 256),
    ] {
        let (x, w, y) = (random(&cpu, t, k)?, random(&cpu, n, k)?, random(&cpu, t, n)?);
        let (mut out_y, mut out_x, mut out_w) =
            (cpu.zeros(&[t, n])?, cpu.zeros(&[t, k])?, cpu.zeros(&[n, k])?);
        let operations = 2.0 * (t * n * k) as f64;
        let forward = median(|| cpu.linear(&x, &w, 1.0, Accum::Replace, &mut out_y))?;
        let input = median(|| cpu.linear_input_gradient(&y, &w, 1.0, Accum::Replace, &mut out_x))?;
        let weight = median(|| cpu.linear_weight_gradient(&y, &x, 1.0, Accum::Replace, &mut out_w))?;
        let rate = |seconds: f64| operations / seconds / 1e9;
        println!("{t:5} {n:5} {k:5} {:8.0} {:15.0} {:16.0}", rate(forward), rate(input), rate(weight));
    }
    Ok(())
}

fn random(cpu: &Cpu, rows: usize, columns: usize) -> Result<Tensor> {
    let mut values = vec![0.0; rows * columns];
    Generator::new(1, Stream::Weights, columns as u64).normal(1.0, &mut values);
    cpu.from_f32(&values, &[rows, columns])
}

fn median(mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    let mut seconds = Vec::new();
    for _ in 0..9 {
        let start = Instant::now();
        work()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}
