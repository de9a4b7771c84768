//! An adapter in every form that other tools load, with the logits they must then give: `scripts/check_export.py`
//! compares.
//!
//! `cargo run --release -p lora-sb-tune --example export_check -- --model=DIR --out=DIR --rank=8` adapts the model with
//! each method on a random token stream, takes a few optimizer steps so that nothing is at its start, and writes
//! `OUT/<method>/{peft,merged,logits.safetensors}` and the inputs as `OUT/ids.txt`.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{Anything, options, row};
use lora_sb_data::{Example, Location};
use lora_sb_kernels::{AdamWStep, Cpu, Kernels};
use lora_sb_model::{Batch, Model, Recompute, SaveType, Sequence, Storage, WeightFileWriter};
use lora_sb_tune::export::{merge, peft};
use lora_sb_tune::{AdapterConfig, Convention, InitConfig, Method, Targets, Tuned};

fn main() -> Result<(), Anything> {
    let options = options()?;
    let rank: usize = options.get("rank").map_or(Ok(8), |text| text.parse())?;
    let model = Path::new(options.get("model").ok_or("--model=DIR is missing")?);
    let out = Path::new(options.get("out").ok_or("--out=DIR is missing")?);
    std::fs::create_dir_all(out)?;
    let mut written = None;
    for method in [Method::LoraSb, Method::LoraXs, Method::Lora] {
        let kernels: Arc<dyn Kernels> = Arc::new(Cpu::new(2)?);
        let mut base = Model::load(model, kernels.clone(), Storage::Mapped)?;
        base.prepare(LENGTH)?;
        let ids = written.get_or_insert_with(|| {
            (0..2).map(|i| row(2, i, LENGTH, base.config().vocab_size)).collect::<Vec<_>>()
        });
        let tuned = train(base, method, rank)?;
        let dir = out.join(method.name());
        std::fs::create_dir_all(&dir)?;
        peft::export(&dir.join("peft"), &tuned, &model.display().to_string(), SaveType::F32)?;
        merge::merge(&dir.join("merged"), &tuned, Some(SaveType::F32))?;
        write_logits(&dir.join("logits.safetensors"), &tuned, ids)?;
    }
    let lines = written.unwrap_or_default();
    let lines: Vec<String> =
        lines.iter().map(|ids| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")).collect();
    std::fs::write(out.join("ids.txt"), lines.join(";"))?;
    Ok(())
}

/// Tokens of a sequence: prime, so that no tile fits it.
const LENGTH: usize = 37;

fn train(model: Model, method: Method, rank: usize) -> Result<Tuned, Anything> {
    let vocabulary = model.config().vocab_size;
    let example = |number: usize| {
        let source = Location { file: Arc::from(Path::new("stream")), line: number + 1, element: None };
        Example { ids: row(1, number, LENGTH, vocabulary), trained: vec![true; LENGTH], source }
    };
    let examples: Vec<Example> = (0..8).map(example).collect();
    let config = AdapterConfig {
        method,
        rank,
        lora_alpha: 1.5 * rank as f64,
        target_modules: Targets::AllLinear,
        init: InitConfig { samples: 8, convention: Convention::PerSample, eta: 1e-2, max_tokens: 128 },
        seed: 1,
    };
    let kernels = model.kernels().clone();
    let mut tuned = Tuned::adapt(model, &config, &examples, &mut |_| ())?;
    for step in 1..=3 {
        let sequence = |example: &Example| (example.ids.clone(), example.trained.clone());
        let (ids, trained) = sequence(&examples[step as usize]);
        let batch =
            Batch::pack(kernels.as_ref(), &[Sequence { ids: &ids, trained: &trained, weight: 1.0 / 36.0 }])?;
        tuned.loss_and_gradients(&batch, Recompute::None)?;
        let step = AdamWStep {
            learning_rate: 1e-2,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            gradient_scale: 1.0,
            step,
        };
        tuned.visit(&mut |_, value, gradient| {
            let (mut m, mut v) = (kernels.zeros(value.shape())?, kernels.zeros(value.shape())?);
            kernels.adamw(&step, gradient, value, &mut m, &mut v)?;
            Ok(kernels.fill(0.0, gradient)?)
        })?;
    }
    Ok(tuned)
}

fn write_logits(path: &Path, tuned: &Tuned, ids: &[Vec<u32>]) -> Result<(), Anything> {
    let kernels = tuned.model.kernels();
    let nothing = vec![false; LENGTH];
    let sequences: Vec<Sequence<'_>> =
        ids.iter().map(|ids| Sequence { ids, trained: &nothing, weight: 0.0 }).collect();
    let batch = Batch::pack(kernels.as_ref(), &sequences)?;
    let logits = kernels.to_f32(&tuned.model.logits(&batch, tuned.hook())?)?;
    let shape = vec![ids.len(), LENGTH, tuned.model.config().vocab_size];
    let mut file =
        WeightFileWriter::create(path, SaveType::F32, &Default::default(), &[("logits".into(), shape)])?;
    file.write(&logits)?;
    Ok(file.finish()?)
}
