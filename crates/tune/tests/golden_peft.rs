//! What is exported, loaded by the real PEFT and transformers.
//!
//! `LORA_SB_PEFT_CHECK` names the command that loads a directory with them and compares logits: words separated
//! by spaces, to which `--model`, `--adapter`, `--merged`, `--inputs`, `--expected` and `--tol` are added. Without
//! it that part is skipped with a visible line; `scripts/check_export.py` makes the same comparison in one go.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use common::*;
use lora_sb_model::{SaveType, Storage, WeightFileWriter};
use lora_sb_tune::export::verify::{random_sequences, verify};
use lora_sb_tune::export::{merge, peft};
use lora_sb_tune::{AdapterConfig, Bases, Convention, InitConfig, Method, Targets, Tuned, head};

#[test]
fn golden_exports_load_in_the_real_peft() {
    let check = std::env::var("LORA_SB_PEFT_CHECK").ok();
    if check.is_none() {
        say("SKIPPED real PEFT: LORA_SB_PEFT_CHECK is not set");
    }
    for (family, dir) in goldens_with("train_batches.safetensors") {
        // What a method exports does not depend on the family; names and heads do.
        let few = [Method::LoraSb, Method::Dora];
        let methods: Vec<Method> = if family == "llama" { adapters().collect() } else { few.into() };
        for method in methods {
            let tuned = trained(&dir, method);
            let out = tempfile::tempdir().unwrap();
            let at = |name: &str| out.path().join(name);
            let options = peft::Options { dtype: SaveType::F32, pad_rank: None };
            peft::export(&at("adapter"), &tuned, "../model", &options).unwrap();
            merge::merge(&at("merged"), &tuned, None).unwrap();
            let sequences = random_sequences(tuned.model.config(), 1);
            for name in ["adapter", "merged"] {
                let mut base = || Ok(golden_model(&dir, Storage::Mapped));
                let found = verify(&at(name), &tuned, &sequences, &mut base).unwrap();
                assert!(found.tolerance < 1e-2 * found.max_abs_logit_change, "{family} {method}: {found:?}");
            }
            write_logits(&dir, &tuned, &at("expected.safetensors"));
            if let Some(check) = &check {
                compare(check, &dir, out.path(), &format!("{family} {method}"));
            }
        }
    }
}

/// Their adapter's logits against ours, then their merged directory's against their adapter's.
fn compare(check: &str, dir: &Path, out: &Path, what: &str) {
    let base = [
        ("--model", dir.join("model")),
        ("--adapter", out.join("adapter")),
        ("--inputs", dir.join("inputs.safetensors")),
    ];
    for (flag, name) in [("--expected", "expected.safetensors"), ("--merged", "merged")] {
        let mut words = check.split_whitespace();
        let mut command = Command::new(words.next().unwrap());
        command.args(words).args(["--tol", "1e-5"]).arg(flag).arg(out.join(name));
        base.iter().for_each(|(flag, path)| _ = command.arg(flag).arg(path));
        let output = command.output().unwrap();
        let report = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{what}: {report}\n{}", String::from_utf8_lossy(&output.stderr));
        say(&format!("{what}: {}", report.trim()));
    }
}

/// Twenty steps of a method with a scale other than 1, so that a forgotten fold would show.
fn trained(dir: &Path, method: Method) -> Tuned {
    let (model, batches) = (golden_model(dir, Storage::Mapped), train_batches(dir));
    let sides = model.sites().into_iter().map(|site| model.shape(site)).map(|(out, input)| out.min(input));
    let rank = sides.min().unwrap().min(16) / 2; // LoRA-GA takes twice as many singular vectors
    let config = AdapterConfig {
        method,
        rank,
        lora_alpha: 2.0 * rank as f64,
        lora_dropout: 0.0,
        target_modules: Targets::AllLinear,
        init: InitConfig {
            bases: Bases::of(method),
            samples: 11,
            convention: Convention::PerSample,
            eta: 1e-3,
            max_tokens: largest_batch(&batches),
            blocks_at_once: None,
        },
        modules_to_save: head::default_modules(model.config()),
        seed: 5,
    };
    let mut tuned = Tuned::adapt(model, &config, &batches.concat(), &mut |_| ()).unwrap();
    let batches = mean_batches(tuned.model.kernels().as_ref(), &batches);
    adamw_losses(&mut tuned, &batches, 20, 1e-3);
    tuned
}

/// Our logits in the shape of theirs: of every token in the padded rows, or of every row.
fn write_logits(dir: &Path, tuned: &Tuned, path: &Path) {
    let inputs = Golden::open(&dir.join("inputs.safetensors"));
    let batch = mean_batch(tuned.model.kernels().as_ref(), &rows(&inputs, ""));
    let packed = tuned.model.logits(&batch, tuned.hook()).unwrap();
    let width = packed.shape()[1];
    let (mut shape, mask) = inputs.i64("attention_mask");
    let mut logits = tuned.model.kernels().to_f32(&packed).unwrap();
    if packed.shape()[0] == shape[0] {
        shape[1] = width;
    } else {
        let mut rows = logits.chunks_exact(width);
        let row = |real: &i64| match real {
            1 => rows.next().unwrap().to_vec(),
            _ => vec![0.0; width],
        };
        logits = mask.iter().flat_map(row).collect();
        shape.push(width);
    }
    let listed = [("logits".to_owned(), shape)];
    let mut file = WeightFileWriter::create(path, SaveType::F32, &BTreeMap::new(), &listed).unwrap();
    file.write(&logits).unwrap();
    file.finish().unwrap();
}
