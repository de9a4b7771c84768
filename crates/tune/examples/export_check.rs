//! Adapters in every form that other tools load, with the logits they must then give, and the logits of adapters that
//! PEFT saved: `scripts/check_export.py` makes the latter and compares both.
//!
//! `cargo run --release -p lora-sb-tune --example export_check -- --model=DIR --out=DIR --rank=8` adapts the model with
//! each method on a random token stream, takes a few optimizer steps so that nothing is at its start, and writes
//! `OUT/ours/<method>/{peft,merged,logits.safetensors}` and the inputs as `OUT/ids.txt`. Each of `OUT/theirs/<name>/peft`
//! is imported, and its logits written beside it.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{Anything, options, row};
use lora_sb_data::{Example, Label, Location};
use lora_sb_kernels::{AdamWStep, Cpu, Kernels};
use lora_sb_model::{Batch, Model, Recompute, SaveType, Sequence, Storage, Target, Task, WeightFileWriter};
use lora_sb_tune::export::verify::verify;
use lora_sb_tune::export::{merge, peft};
use lora_sb_tune::{AdapterConfig, Bases, Convention, InitConfig, Method, Targets, Tuned, head};

/// Tokens of a sequence: prime, so that no tile fits it, and short enough for a tiny table of positions.
const LENGTH: usize = 29;

fn main() -> Result<(), Anything> {
    let options = options()?;
    let rank: usize = options.get("rank").map_or(Ok(8), |text| text.parse())?;
    let model = Path::new(options.get("model").ok_or("--model=DIR is missing")?);
    let out = Path::new(options.get("out").ok_or("--out=DIR is missing")?);
    let vocabulary = load(model)?.config().vocab_size;
    let ids: Vec<Vec<u32>> = (0..2).map(|number| row(2, number, LENGTH, vocabulary)).collect();
    for method in Method::ALL.into_iter().filter(|&method| method != Method::Full) {
        let tuned = train(load(model)?, method, rank)?;
        let dir = out.join("ours").join(method.name());
        std::fs::create_dir_all(&dir)?;
        let choices = peft::Options { dtype: SaveType::F32, pad_rank: None };
        let warnings = peft::export(&dir.join("peft"), &tuned, &model.display().to_string(), &choices)?;
        merge::merge(&dir.join("merged"), &tuned, Some(SaveType::F32))?;
        for name in ["peft", "merged"] {
            let verified = verify(&dir.join(name), &tuned, &ids, &mut || load(model))?;
            println!(
                "{method} {name}: verified to {:.2e} of {:.2e}",
                verified.max_abs_logit_difference, verified.tolerance
            );
        }
        warnings.iter().for_each(|warning| println!("{method}: {warning}"));
        write_logits(&dir.join("logits.safetensors"), &tuned, &ids)?;
    }
    let lines: Vec<String> =
        ids.iter().map(|ids| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")).collect();
    std::fs::write(out.join("ids.txt"), lines.join(";"))?;
    let theirs = out.join("theirs");
    if !theirs.exists() {
        return Ok(());
    }
    for entry in std::fs::read_dir(theirs)? {
        let dir = entry?.path();
        let imported = peft::import(&dir.join("peft"), load(model)?)?;
        write_logits(&dir.join("our_logits.safetensors"), &imported.tuned, &ids)?;
    }
    Ok(())
}

fn load(dir: &Path) -> lora_sb_tune::Result<Model> {
    let kernels: Arc<dyn Kernels> = Arc::new(Cpu::new(2)?);
    let mut model = Model::load(dir, kernels, Storage::Mapped)?;
    model.prepare(LENGTH)?;
    Ok(model)
}

fn train(model: Model, method: Method, rank: usize) -> Result<Tuned, Anything> {
    let (vocabulary, task) = (model.config().vocab_size, model.config().task);
    let example = |number: usize| {
        let source = Location { file: Arc::from(Path::new("stream")), line: number + 1, element: None };
        let trained = vec![task == Task::LanguageModel; LENGTH];
        let mut example = Example::text(row(1, number, LENGTH, vocabulary), trained, source);
        example.label = match task {
            Task::LanguageModel => None,
            Task::Classification { labels } => Some(Label::Class((number % labels) as u32)),
            Task::Regression => Some(Label::Value(number as f32)),
        };
        example
    };
    let examples: Vec<Example> = (0..8).map(example).collect();
    let config = AdapterConfig {
        method,
        rank,
        lora_alpha: 1.5 * rank as f64,
        lora_dropout: 0.0,
        target_modules: Targets::AllLinear,
        init: InitConfig {
            bases: Bases::of(method),
            samples: 8,
            convention: Convention::PerSample,
            eta: 1e-2,
            max_tokens: 128,
            blocks_at_once: None,
        },
        modules_to_save: head::default_modules(model.config()),
        seed: 1,
    };
    let kernels = model.kernels().clone();
    let mut tuned = Tuned::adapt(model, &config, &examples, &mut |_| ())?;
    for step in 1..=3 {
        let batch = Batch::pack(kernels.as_ref(), &[sequence(&examples[step as usize])])?;
        tuned.loss_and_gradients(&batch, Recompute::None)?;
        tuned.adjust_gradients()?;
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

fn sequence(example: &Example) -> Sequence<'_> {
    let (target, weight) = match example.label {
        None => (Target::Tokens(&example.trained), 1.0 / (LENGTH - 1) as f32),
        Some(Label::Class(class)) => (Target::Class(class), 1.0),
        Some(Label::Value(value)) => (Target::Value(value), 1.0),
    };
    Sequence { ids: &example.ids, second: None, target, weight }
}

/// `[sequences, LENGTH, vocabulary]`, or `[sequences, labels]`.
fn write_logits(path: &Path, tuned: &Tuned, ids: &[Vec<u32>]) -> Result<(), Anything> {
    let kernels = tuned.model.kernels();
    let nothing = vec![false; LENGTH];
    let sequences: Vec<Sequence<'_>> = ids.iter().map(|ids| Sequence::text(ids, &nothing, 0.0)).collect();
    let batch = Batch::pack(kernels.as_ref(), &sequences)?;
    let logits = tuned.model.logits(&batch, tuned.hook())?;
    let mut shape = vec![ids.len()];
    shape.extend((tuned.model.config().task == Task::LanguageModel).then_some(LENGTH));
    shape.push(logits.shape()[1]);
    let mut file =
        WeightFileWriter::create(path, SaveType::F32, &Default::default(), &[("logits".into(), shape)])?;
    file.write(&kernels.to_f32(&logits)?)?;
    Ok(file.finish()?)
}
