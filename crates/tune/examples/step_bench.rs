//! The speed and memory of LoRA-SB's training step on a model directory, on the token stream of
//! `scripts/compare_step.py`, which runs it beside PyTorch.
//!
//! `cargo run --release -p lora-sb-tune --example step_bench -- --model=DIR --rank=64 --batch=4 --length=256`
//! prints one JSON line. The bases are random: a step costs the same whatever they hold.

mod common;
#[path = "common/memory.rs"]
mod memory;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use common::{Anything, options, row};
use lora_sb_kernels::{AdamWStep, Cpu, Generator, Kernels, Stream, Tensor};
use lora_sb_model::{Batch, Model, Recompute, Sequence, Storage};
use lora_sb_tune::{AdapterConfig, InitConfig, Method, Targets, Tuned};
use memory::peak_rss_mb;

fn main() -> Result<(), Anything> {
    let start = Instant::now();
    let options = options()?;
    let number = |name: &str, default: usize| options.get(name).map_or(Ok(default), |text| text.parse());
    let (rank, batch, length) = (number("rank", 64)?, number("batch", 4)?, number("length", 256)?);
    let (steps, warmup, threads) = (number("steps", 8)?, number("warmup", 2)?, number("threads", 2)?);
    let recompute = if number("recompute", 0)? == 1 { Recompute::Block } else { Recompute::None };
    let directory = options.get("model").ok_or("--model=DIR is missing")?;

    let kernels: Arc<dyn Kernels> = Arc::new(Cpu::new(threads)?);
    let mut model = Model::load(Path::new(directory), kernels.clone(), Storage::Mapped)?;
    model.prepare(length)?;
    let mut tuned = adapt(model, kernels.as_ref(), rank)?;
    let mut moments: BTreeMap<String, (Tensor, Tensor)> = BTreeMap::new();
    let ready = start.elapsed().as_secs_f64();
    let (mut times, mut losses) = (Vec::new(), Vec::new());
    for step in 0..warmup + steps {
        let begun = Instant::now();
        let rows: Vec<Vec<u32>> =
            (0..batch).map(|b| row(0, step * batch + b, length, tuned.model.config().vocab_size)).collect();
        let trained = vec![true; length];
        let weight = 1.0 / (batch * (length - 1)) as f32;
        let sequences: Vec<Sequence<'_>> =
            rows.iter().map(|ids| Sequence::text(ids, &trained, weight)).collect();
        let packed = Batch::pack(kernels.as_ref(), &sequences)?;
        let loss = tuned.loss_and_gradients(&packed, recompute)?;
        update(&mut tuned, kernels.as_ref(), &mut moments, step as u64 + 1)?;
        times.push(begun.elapsed().as_secs_f64());
        losses.push((loss * 1e6).round() / 1e6);
    }
    let mut measured = times.split_off(warmup);
    measured.sort_by(f64::total_cmp);
    let rate = |seconds: f64| ((batch * length) as f64 / seconds * 10.0).round() / 10.0;
    let usage = kernels.usage();
    println!(
        "{}",
        serde_json::json!({
            "side": format!("lora-sb {}", kernels.name()),
            "tokens_per_second": rate(measured[measured.len() / 2]),
            "slowest": rate(measured[measured.len() - 1]),
            "fastest": rate(measured[0]),
            "peak_rss_mb": peak_rss_mb(),
            "peak_tensors_mb": usage.peak_bytes as f64 / f64::from(1 << 20),
            "ready_s": ready,
            "losses": losses,
        })
    );
    Ok(())
}

/// LoRA-SB's adapter with random bases on all linear layers.
fn adapt(model: Model, kernels: &dyn Kernels, rank: usize) -> Result<Tuned, Anything> {
    let mut generator = Generator::new(1, Stream::Adapter, 0);
    let mut tensors = BTreeMap::new();
    for site in model.sites() {
        let (out, input) = model.shape(site);
        for (part, shape) in [("A", [rank, input]), ("B", [out, rank]), ("R", [rank, rank])] {
            let mut values = vec![0.0; shape[0] * shape[1]];
            generator.normal(
                if part == "R" { 1e-5 } else { (shape[0].max(shape[1]) as f32).powf(-0.5) },
                &mut values,
            );
            tensors.insert(format!("{}.lora_{part}", model.module(site)), kernels.from_f32(&values, &shape)?);
        }
    }
    let config = AdapterConfig {
        method: Method::LoraXs,
        rank,
        lora_alpha: rank as f64,
        lora_dropout: 0.0,
        target_modules: Targets::AllLinear,
        init: InitConfig::NONE,
        modules_to_save: Vec::new(),
        seed: 1,
    };
    Ok(Tuned::restore(model, &config, tensors)?)
}

fn update(
    tuned: &mut Tuned,
    kernels: &dyn Kernels,
    moments: &mut BTreeMap<String, (Tensor, Tensor)>,
    step: u64,
) -> Result<(), Anything> {
    let step = AdamWStep {
        learning_rate: 1e-4,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.0,
        gradient_scale: 1.0,
        step,
    };
    tuned.visit(&mut |name, value, gradient| {
        if !moments.contains_key(name) {
            let zeros = (kernels.zeros(value.shape())?, kernels.zeros(value.shape())?);
            moments.insert(name.to_owned(), zeros);
        }
        if let Some((m, v)) = moments.get_mut(name) {
            kernels.adamw(&step, gradient, value, m, v)?;
        }
        Ok(kernels.fill(0.0, gradient)?)
    })?;
    Ok(())
}
