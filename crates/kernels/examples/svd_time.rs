//! Times the truncated SVD on sign matrices of the sizes of a small model.
//!
//! `cargo run --release -p lora-sb-kernels --example svd_time [threads]`

use std::time::Instant;

use lora_sb_kernels::linalg::{SvdOptions, truncated_svd};
use lora_sb_kernels::{Accum, Cpu, DType, Elementwise, Generator, Linear, Memory, Result, Stream, Tensor};

fn main() -> Result<()> {
    let threads = std::env::args().nth(1).and_then(|threads| threads.parse().ok()).unwrap_or(2);
    let cpu = Cpu::new(threads)?;
    println!("matrix        spectrum    r      ms  RR  applied  captured of total  converged");
    for (m, n) in [(768, 768), (768, 2048), (2048, 768)] {
        for (name, noise) in [("random", f32::INFINITY), ("gradient", 1.0), ("outliers", 0.1)] {
            let matrix = sign_matrix(&cpu, m, n, noise)?;
            for rank in [32, 64, 96] {
                let mut generator = Generator::new(1, Stream::Svd, 0);
                let start = Instant::now();
                let svd = truncated_svd(&cpu, &matrix, rank, &mut generator, &SvdOptions::default())?;
                println!(
                    "{m:>4} x {n:<5}  {name:9} {rank:>3}  {:>6.1}  {:>2}  {:>7}  {:.7}          {}",
                    start.elapsed().as_secs_f64() * 1e3,
                    svd.iterations,
                    svd.applications,
                    svd.captured_energy / svd.total_energy,
                    svd.converged,
                );
            }
        }
    }
    Ok(())
}

/// Signs of a gradient-like matrix: rank 32 with decaying strength, plus noise; only noise where it is infinite.
fn sign_matrix(cpu: &Cpu, m: usize, n: usize, noise: f32) -> Result<Tensor> {
    let mut generator = Generator::new(7, Stream::Weights, 0);
    let mut draw = |rows: usize, columns: usize, deviation: f32| {
        let mut values = vec![0.0; rows * columns];
        generator.normal(deviation, &mut values);
        cpu.from_f32(&values, &[rows, columns])
    };
    let mut matrix = draw(m, n, noise.min(1e3))?;
    if noise.is_finite() {
        let (left, mut right) = (draw(32, m, 1.0)?, cpu.to_f32(&draw(32, n, 1.0)?)?);
        for (index, row) in right.chunks_exact_mut(n).enumerate() {
            row.iter_mut().for_each(|value| *value /= 1.0 + index as f32);
        }
        cpu.linear_weight_gradient(&left, &cpu.from_f32(&right, &[32, n])?, 1.0, Accum::Add, &mut matrix)?;
    }
    cpu.scaled_sign(-1.0, &mut matrix)?;
    let mut signs = cpu.empty_of(DType::Bf16, &[m, n])?;
    cpu.cast(&matrix, &mut signs)?;
    Ok(signs)
}
