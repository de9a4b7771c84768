//! Time, memory and accuracy of LoRA-SB's initialisation on a model directory, or on random weights of a config.json.
//!
//! `cargo run --release -p lora-sb-tune --example init_bench -- --model=DIR --samples=50 --length=256 --ranks=32,64,96
//! --dtype=bf16` prints a JSON line for the gradient of all linear layers and their factorisation at each rank, and one
//! for the memory beside what the plan says. `--blocks=N` takes N blocks at once instead of as many as the plan does. It runs on the processor,
//! with `--device=cuda:N` on a GPU, `--max_tokens` tokens at a time. With
//! `--check=LAYER` the sites of that layer are also factorised exactly, in f64, and the share of the best rank-r energy
//! that was captured is printed (minutes for wide layers).

mod common;
#[path = "common/memory.rs"]
mod memory;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Anything, options, row};
use lora_sb_data::{Example, Location};
use lora_sb_kernels::linalg::{SvdOptions, truncated_svd};
use lora_sb_kernels::{Accum, Cpu, Cuda, DType, Generator, Kernels, Stream, Tensor, heap};
use lora_sb_model::{Config, LoadOptions, Model, Site, Storage};
use lora_sb_tune::init::{Estimate, factorise, stream_gradients};
use lora_sb_tune::method::lora_sb;
use lora_sb_tune::plan::{EstimatePlan, EstimateSize};
use lora_sb_tune::{AdapterConfig, Bases, Convention, InitConfig, Method, Targets};
use memory::peak_rss_mb;

const ETA: f64 = 1e-4;

fn main() -> Result<(), Anything> {
    heap::map_large_blocks();
    let options = options()?;
    let given = |name: &str| options.get(name).map(|text| text.parse::<usize>()).transpose();
    let (samples, length) = (given("samples")?.unwrap_or(50), given("length")?.unwrap_or(256));
    let ranks: Vec<usize> = match options.get("ranks") {
        Some(text) => text.split(',').map(str::parse).collect::<Result<_, _>>()?,
        None => vec![64],
    };
    let dtype = match options.get("dtype").map(String::as_str) {
        None | Some("f32") => DType::F32,
        Some("bf16") => DType::Bf16,
        Some(other) => return Err(format!("--dtype={other}: expected f32 or bf16").into()),
    };
    let kernels = device(options.get("device").map(String::as_str), given("threads")?.unwrap_or(2))?;
    let path = Path::new(options.get("model").ok_or("--model=DIR is missing")?);
    let mut model = load(path, &kernels, dtype)?;
    model.prepare(length)?;
    kernels.synchronize()?;
    let examples: Vec<Example> =
        (0..samples).map(|i| example(i, length, model.config().vocab_size)).collect();
    let init = InitConfig {
        bases: Bases::Sb,
        samples,
        convention: Convention::PerSample,
        eta: ETA,
        max_tokens: given("max_tokens")?.unwrap_or(512),
        blocks_at_once: given("blocks")?,
    };
    let rank = ranks.iter().copied().max().unwrap_or(64);
    let adapter = AdapterConfig {
        method: Method::LoraSb,
        rank,
        lora_alpha: rank as f64,
        lora_dropout: 0.0,
        target_modules: Targets::AllLinear,
        init,
        seed: 1,
        modules_to_save: Vec::new(),
    };
    let sites = model.sites();
    let plan = EstimatePlan {
        footprint: model.footprint(),
        adapter: &adapter,
        sites: &sites,
        size: EstimateSize::of(&examples, adapter.init.max_tokens),
    };
    kernels.reset_peak();
    let before = kernels.usage().live_bytes;
    let run = run(&model, &*kernels, &examples, &plan, &ranks, given("check")?)?;
    println!(
        "{}",
        serde_json::json!({
            "dtype": dtype.to_string(), "tokens": run.estimate.tokens, "blocks_at_once": run.estimate.blocks_at_once,
            "gradient_s": run.gradient.as_secs_f64(),
            "factorise_s": run.factorising.iter().map(|(r, t)| (r.to_string(), t.as_secs_f64())).collect::<BTreeMap<_, _>>(),
            "loss": run.estimate.loss / samples as f64,
        })
    );
    let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    let measured = kernels.usage().peak_bytes - before;
    println!(
        "{}",
        serde_json::json!({
            "planned_mb": mib(plan.peak()), "measured_mb": mib(measured),
            "planned_by_measured": plan.peak() as f64 / measured as f64, "peak_rss_mb": peak_rss_mb(),
        })
    );
    Ok(())
}

fn device(name: Option<&str>, threads: usize) -> Result<Arc<dyn Kernels>, Anything> {
    match name.map(|name| name.strip_prefix("cuda:").map(str::parse::<usize>)) {
        None => Ok(Arc::new(Cpu::new(threads)?)),
        Some(Some(Ok(ordinal))) => Ok(Arc::new(Cuda::open(ordinal)?)),
        _ => Err("--device: expected cuda:N".into()),
    }
}

/// The model of a directory, or one of random weights where the path is a config.json.
fn load(path: &Path, kernels: &Arc<dyn Kernels>, dtype: DType) -> Result<Model, Anything> {
    if path.is_dir() {
        let options = LoadOptions { dtype, ..LoadOptions::default() };
        return Ok(Model::load_with(path, kernels.clone(), Storage::Mapped, options)?);
    }
    let config = Config::from_json(&std::fs::read(path)?)?;
    let mut model = Model::random(config, kernels.clone(), 1, Storage::Mapped)?;
    model.set_dtype(dtype)?;
    Ok(model)
}

/// What was measured.
struct Run {
    estimate: Estimate,
    gradient: Duration,
    /// All sites at each rank.
    factorising: BTreeMap<usize, Duration>,
}

fn run(
    model: &Model,
    kernels: &dyn Kernels,
    examples: &[Example],
    plan: &EstimatePlan<'_>,
    ranks: &[usize],
    check: Option<usize>,
) -> Result<Run, Anything> {
    let mut factorising = BTreeMap::from_iter(ranks.iter().map(|&rank| (rank, Duration::ZERO)));
    let (mut checking, start) = (Duration::ZERO, Instant::now());
    let mut kept = Vec::new();
    let mut take = |gradients: BTreeMap<Site, Tensor>| {
        let begun = Instant::now();
        for (&site, gradient) in gradients.iter().filter(|(site, _)| check == Some(site.layer)) {
            report_captured(kernels, &model.module(site), gradient, ranks)?;
        }
        checking += begun.elapsed();
        let start = |gradient, rank| {
            let generator = &mut Generator::new(1, Stream::Svd, 0);
            lora_sb::start(kernels, gradient, Bases::Sb, ETA, rank, 1.0, generator)
        };
        for &rank in &ranks[1..] {
            let begun = Instant::now();
            let make = |_, gradient: &Tensor| start(kernels.to_owned_f32(gradient)?, rank);
            factorise(gradients.iter().map(|(&site, g)| (site, g)).collect(), &make, &mut || ())?;
            *factorising.entry(rank).or_default() += begun.elapsed();
        }
        let begun = Instant::now();
        kept.push(factorise(gradients, &|_, gradient| start(gradient, ranks[0]), &mut || ())?);
        kernels.synchronize()?;
        *factorising.entry(ranks[0]).or_default() += begun.elapsed();
        Ok(())
    };
    let (sites, init) = (plan.sites, &plan.adapter.init);
    let estimate =
        stream_gradients(model, sites, examples, init, plan.blocks_at_once(), &mut |_| (), &mut take)?;
    let gradient = start.elapsed().saturating_sub(factorising.values().sum::<Duration>() + checking);
    Ok(Run { estimate, gradient, factorising })
}

/// Prints the share of the best rank-r energy of a gradient's signs that is captured.
fn report_captured(
    kernels: &dyn Kernels,
    module: &str,
    gradient: &Tensor,
    ranks: &[usize],
) -> lora_sb_kernels::Result<()> {
    let mut signs = kernels.to_owned_f32(gradient)?;
    kernels.scaled_sign(1.0, &mut signs)?;
    let mut narrow = kernels.empty_of(DType::Bf16, signs.shape())?;
    kernels.cast(&signs, &mut narrow)?;
    let eigenvalues = eigenvalues(kernels, &signs)?;
    for &rank in ranks {
        let generator = &mut Generator::new(1, Stream::Svd, 0);
        let svd = truncated_svd(kernels, &narrow, rank, generator, &SvdOptions::default())?;
        let best: f64 = eigenvalues.iter().take(rank).sum();
        println!("{module} r={rank} captured {:.6}", svd.captured_energy / best);
    }
    Ok(())
}

/// The eigenvalues of the smaller Gram matrix of a matrix of signs, largest first, in f64.
fn eigenvalues(kernels: &dyn Kernels, signs: &Tensor) -> lora_sb_kernels::Result<Vec<f64>> {
    let (m, n) = (signs.shape()[0], signs.shape()[1]);
    let side = m.min(n);
    let mut gram = kernels.zeros(&[side, side])?;
    if m <= n {
        kernels.linear(signs, signs, 1.0, Accum::Replace, &mut gram)?;
    } else {
        kernels.linear_weight_gradient(signs, signs, 1.0, Accum::Replace, &mut gram)?;
    }
    // The Gram matrix holds integers, exact in f32.
    let values = kernels.to_f32(&gram)?;
    let gram = nalgebra::DMatrix::from_iterator(side, side, values.iter().map(|&value| f64::from(value)));
    let mut eigenvalues: Vec<f64> = gram.symmetric_eigenvalues().iter().copied().collect();
    eigenvalues.sort_by(|a, b| b.total_cmp(a));
    Ok(eigenvalues)
}

fn example(number: usize, length: usize, vocabulary: usize) -> Example {
    let source = Location { file: Arc::from(Path::new("stream")), line: number + 1, element: None };
    Example::text(row(1, number, length, vocabulary), vec![true; length], source)
}
