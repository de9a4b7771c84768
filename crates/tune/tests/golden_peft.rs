//! What is exported, loaded by the real PEFT and transformers.
//!
//! `LORA_SB_PEFT_CHECK` names the command that loads a directory with them and compares logits: words separated
//! by spaces, to which `--model`, `--adapter`, `--merged`, `--inputs`, `--expected` and `--tol` are added. Without
//! it the test is skipped with a visible line.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use common::*;
use lora_sb_model::{SaveType, Storage, WeightFileWriter};
use lora_sb_tune::export::{merge, peft};
use lora_sb_tune::{AdapterConfig, Convention, InitConfig, Method, Targets, Tuned};

#[test]
fn golden_llama_exports_load_in_the_real_peft() {
    let Some(dir) = golden("llama") else { return };
    let Ok(check) = std::env::var("LORA_SB_PEFT_CHECK") else {
        say("SKIPPED real PEFT: LORA_SB_PEFT_CHECK is not set");
        return;
    };
    for method in [Method::LoraSb, Method::LoraXs, Method::Lora] {
        let tuned = trained(&dir, method);
        let out = tempfile::tempdir().unwrap();
        let at = |name: &str| out.path().join(name);
        peft::export(&at("adapter"), &tuned, "../model", SaveType::F32).unwrap();
        merge::merge(&at("merged"), &tuned, None).unwrap();
        write_logits(&dir, &tuned, &at("expected.safetensors"));

        let base = [
            ("--model", dir.join("model")),
            ("--adapter", at("adapter")),
            ("--inputs", dir.join("inputs.safetensors")),
        ];
        // Their adapter's logits against ours, then their merged directory's against their adapter's.
        for (flag, path) in [("--expected", at("expected.safetensors")), ("--merged", at("merged"))] {
            let mut words = check.split_whitespace();
            let mut command = Command::new(words.next().unwrap());
            command.args(words).args(["--tol", "1e-5"]).arg(flag).arg(path);
            base.iter().for_each(|(flag, path)| _ = command.arg(flag).arg(path));
            let output = command.output().unwrap();
            let report = String::from_utf8_lossy(&output.stdout);
            assert!(
                output.status.success(),
                "{method}: {report}\n{}",
                String::from_utf8_lossy(&output.stderr)
            );
            say(&format!("{method}: {}", report.trim()));
        }
    }
}

/// Twenty steps of a method with a scale other than 1, so that a forgotten fold would show.
fn trained(dir: &Path, method: Method) -> Tuned {
    let init = InitConfig { samples: 11, convention: Convention::PerSample, eta: 1e-3, max_tokens: 64 };
    let (target_modules, seed) = (Targets::AllLinear, 5);
    let config = AdapterConfig { method, rank: 8, lora_alpha: 16.0, target_modules, init, seed };
    let batches = train_batches(dir);
    let model = golden_model(dir, Storage::Mapped);
    let mut tuned = Tuned::adapt(model, &config, &batches.concat(), &mut |_| ()).unwrap();
    let batches = mean_batches(tuned.model.kernels().as_ref(), &batches);
    adamw_losses(&mut tuned, &batches, 20, 1e-3);
    tuned
}

/// Our logits in the padded shape of the inputs.
fn write_logits(dir: &Path, tuned: &Tuned, path: &Path) {
    let inputs = Golden::open(&dir.join("inputs.safetensors"));
    let (shape, mask) = inputs.i64("attention_mask");
    let batch = mean_batch(tuned.model.kernels().as_ref(), &rows(&inputs, ""));
    let packed = tuned.model.logits(&batch, tuned.hook()).unwrap();
    let vocabulary = packed.shape()[1];
    let packed = tuned.model.kernels().to_f32(&packed).unwrap();
    let mut rows = packed.chunks_exact(vocabulary);
    let row = |real: &i64| match real {
        1 => rows.next().unwrap().to_vec(),
        _ => vec![0.0; vocabulary],
    };
    let padded: Vec<f32> = mask.iter().flat_map(row).collect();
    let listed = [("logits".to_owned(), vec![shape[0], shape[1], vocabulary])];
    let mut file = WeightFileWriter::create(path, SaveType::F32, &BTreeMap::new(), &listed).unwrap();
    file.write(&padded).unwrap();
    file.finish().unwrap();
}
