//! Time, memory and accuracy of LoRA-SB's initialisation on a model directory.
//!
//! `cargo run --release -p lora-sb-tune --example init_bench -- --model=DIR --samples=50 --length=256 --ranks=32,64,96`
//! prints a JSON line for the gradient (streamed once, all linear layers) with the factorisation of every site at
//! each rank, and one for the memory. With `--check=LAYER` the sites of that layer are also factorised exactly, in
//! f64, and the share of the best rank-r energy that was captured is printed (minutes for wide layers).

mod common;
#[path = "common/memory.rs"]
mod memory;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Anything, options, row};
use lora_sb_data::{Example, Location};
use lora_sb_kernels::linalg::{SvdOptions, truncated_svd};
use lora_sb_kernels::{Accum, Cpu, Elementwise, Generator, Linear, Memory, Stream, Tensor, heap};
use lora_sb_model::{Model, Storage};
use lora_sb_tune::init::stream_gradients;
use lora_sb_tune::{Bases, Convention, InitConfig};
use memory::peak_rss_mb;

fn main() -> Result<(), Anything> {
    heap::map_large_blocks();
    let options = options()?;
    let number = |name: &str, default: usize| options.get(name).map_or(Ok(default), |text| text.parse());
    let (samples, length, threads) = (number("samples", 50)?, number("length", 256)?, number("threads", 2)?);
    let ranks: Vec<usize> = match options.get("ranks") {
        Some(text) => text.split(',').map(str::parse).collect::<Result<_, _>>()?,
        None => vec![64],
    };
    let check: Option<usize> = options.get("check").map(|text| text.parse()).transpose()?;

    let kernels = Arc::new(Cpu::new(threads)?);
    let directory = options.get("model").ok_or("--model=DIR is missing")?;
    let mut model = Model::load(Path::new(directory), kernels.clone(), Storage::Mapped)?;
    model.prepare(length)?;
    let examples: Vec<Example> =
        (0..samples).map(|i| example(i, length, model.config().vocab_size)).collect();
    let config = InitConfig {
        bases: Bases::Sb,
        samples,
        convention: Convention::PerSample,
        eta: 1e-4,
        max_tokens: number("max_tokens", 512)?,
    };

    let factorising = Mutex::new(vec![Duration::ZERO; ranks.len()]);
    let start = Instant::now();
    let (mut forward, mut sites) = (Duration::ZERO, 0);
    let mut progress = |_| {
        if sites == 0 {
            forward = start.elapsed();
        }
        sites += 1;
    };
    let mut each = |site: lora_sb_model::Site, mut update: Tensor| {
        kernels.scaled_sign(-1e-4, &mut update)?;
        for (rank, time) in ranks.iter().zip(factorising.lock().unwrap_or_else(|e| e.into_inner()).iter_mut())
        {
            let begun = Instant::now();
            let generator = &mut Generator::new(1, Stream::Svd, 0);
            let svd = truncated_svd(&*kernels, &update, *rank, generator, &SvdOptions::default())?;
            *time += begun.elapsed();
            if check == Some(site.layer) {
                let best = best_energy(&kernels, &update, *rank)?;
                println!("{} r={rank} captured {:.6}", model.module(site), svd.captured_energy / best);
            }
        }
        Ok(())
    };
    let estimate = stream_gradients(&model, &model.sites(), &examples, &config, &mut progress, &mut each)?;
    let total = start.elapsed();
    let factorising = factorising.into_inner().unwrap_or_else(|e| e.into_inner());
    let gradient = total.saturating_sub(factorising.iter().sum());
    println!(
        "{}",
        serde_json::json!({
            "tokens": estimate.tokens,
            "gradient_s": gradient.as_secs_f64(),
            "factorise_s": ranks.iter().zip(&factorising).map(|(r, t)| (r.to_string(), t.as_secs_f64())).collect::<BTreeMap<_, _>>(),
            "loss": estimate.loss / samples as f64,
        })
    );
    report_memory(&model, estimate.tokens, kernels.usage().peak_bytes);
    Ok(())
}

/// The peak beside what `ARCHITECTURE.md` promises: weights, one block's gradients, kept block inputs.
fn report_memory(model: &Model, tokens: usize, peak_tensors: usize) {
    let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    let config = model.config();
    let weights: usize =
        model.parameters().into_iter().filter_map(|p| model.weight(p)).map(Tensor::bytes).sum();
    let block: usize = model
        .sites()
        .into_iter()
        .filter(|site| site.layer == 0)
        .map(|site| model.shape(site).0 * model.shape(site).1 * 4)
        .sum();
    let inputs = tokens * config.hidden_size * config.num_hidden_layers * 4;
    let promised = weights + block + inputs;
    println!(
        "{}",
        serde_json::json!({
            "weights_mb": mib(weights), "block_gradients_mb": mib(block), "kept_inputs_mb": mib(inputs),
            "sum_mb": mib(promised), "peak_tensors_and_weights_mb": mib(peak_tensors + weights),
            "share_of_sum": (peak_tensors + weights) as f64 / promised as f64, "peak_rss_mb": peak_rss_mb(),
        })
    );
}

/// The exact energy of the best rank-r approximation: the largest eigenvalues of the smaller Gram matrix, in f64.
fn best_energy(kernels: &Cpu, matrix: &Tensor, rank: usize) -> lora_sb_kernels::Result<f64> {
    let (m, n) = (matrix.shape()[0], matrix.shape()[1]);
    let side = m.min(n);
    let mut gram = kernels.zeros(&[side, side])?;
    if m <= n {
        kernels.linear(matrix, matrix, 1e8, Accum::Replace, &mut gram)?;
    } else {
        kernels.linear_weight_gradient(matrix, matrix, 1e8, Accum::Replace, &mut gram)?;
    }
    // Entries of the sign matrix times 1e4 are +-1, so the Gram matrix holds integers, exact in f32.
    let values = kernels.to_f32(&gram)?;
    let gram =
        nalgebra::DMatrix::from_iterator(side, side, values.iter().map(|&value| f64::from(value.round())));
    let mut eigenvalues: Vec<f64> = gram.symmetric_eigenvalues().iter().copied().collect();
    eigenvalues.sort_by(|a, b| b.total_cmp(a));
    Ok(eigenvalues.iter().take(rank).sum::<f64>() * 1e-8)
}

fn example(number: usize, length: usize, vocabulary: usize) -> Example {
    let source = Location { file: Arc::from(Path::new("stream")), line: number + 1, element: None };
    Example::text(row(1, number, length, vocabulary), vec![true; length], source)
}
