//! Numbers of Hugging Face transformers for tiny random models; see `golden/README.md`.
//!
//! `LORA_SB_GOLDEN` names another folder of the same format. Every size comes from the fixtures.

mod support;

use std::collections::BTreeMap;
use std::path::PathBuf;

use lora_sb_kernels::{Generator, Stream};
use lora_sb_model::{
    Batch, Decoder, Frozen, Generation, Model, Recompute, Sampling, Sequence, Storage, WeightFile, generate,
};
use safetensors::SafeTensors;
use serde_json::Value;
use support::{cpu, host, largest, largest_difference, values, zeros};

/// Both sides round as f32 does, each in its own order: the fixtures' own f32-against-f64 noise, ten times.
const NOISE: f64 = 10.0;

#[test]
fn golden_llama_logits_and_loss() {
    with("llama", logits_and_loss);
}

#[test]
fn golden_llama_gradients() {
    with("llama", gradients);
}

#[test]
fn golden_llama_greedy_generation() {
    with("llama", greedy_generation);
}

/// Runs a check on a family's folder; a missing folder is said and skipped.
fn with(family: &str, check: fn(&Golden)) {
    let root = match std::env::var_os("LORA_SB_GOLDEN") {
        Some(root) => PathBuf::from(root),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../golden"),
    };
    let folder = root.join(family);
    if folder.is_dir() {
        check(&Golden { folder });
    } else {
        eprintln!("SKIPPED: no golden folder {}", folder.display());
    }
}

struct Golden {
    folder: PathBuf,
}

impl Golden {
    fn model(&self, storage: Storage) -> Model {
        let model = Model::load(&self.folder.join("model"), cpu(), storage).unwrap();
        assert!(model.warnings().is_empty(), "{:?}", model.warnings());
        model
    }

    fn meta(&self) -> Value {
        serde_json::from_slice(&std::fs::read(self.folder.join("meta.json")).unwrap()).unwrap()
    }

    fn tolerance(&self, quantity: &str) -> f64 {
        NOISE * self.meta()["f32_vs_f64"][quantity].as_f64().unwrap()
    }

    fn floats(&self, file: &str, name: &str) -> Vec<f32> {
        let file = WeightFile::open(&self.folder.join(file)).unwrap();
        file.get(name).unwrap().unwrap_or_else(|| panic!("no {name}")).to_f32()
    }

    /// A matrix of i64, by rows.
    fn integers(&self, file: &str, name: &str) -> Vec<Vec<i64>> {
        let bytes = std::fs::read(self.folder.join(file)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let view = file.tensor(name).unwrap();
        let values: Vec<i64> =
            view.data().chunks_exact(8).map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap())).collect();
        values.chunks_exact(view.shape()[1]).map(<[i64]>::to_vec).collect()
    }

    fn inputs(&self) -> Inputs {
        let file = "inputs.safetensors";
        let (ids, masks) = (self.integers(file, "input_ids"), self.integers(file, "attention_mask"));
        let labels = self.integers(file, "labels");
        let mut inputs = Inputs { ids: vec![], trained: vec![], rows: vec![] };
        for (row, mask) in masks.iter().enumerate() {
            let kept: Vec<usize> = (0..mask.len()).filter(|&i| mask[i] == 1).collect();
            inputs.ids.push(kept.iter().map(|&i| ids[row][i] as u32).collect());
            inputs.trained.push(kept.iter().map(|&i| labels[row][i] != -100).collect());
            inputs.rows.extend(kept.iter().map(|&i| row * mask.len() + i));
        }
        inputs
    }
}

/// The fixture's rows without their padding.
struct Inputs {
    ids: Vec<Vec<u32>>,
    trained: Vec<Vec<bool>>,
    /// Where each packed token stands in the padded matrix, flattened.
    rows: Vec<usize>,
}

impl Inputs {
    /// Packed, with the mean over all labelled tokens as its loss.
    fn batch(&self, model: &Model) -> Batch {
        let labelled: usize =
            self.trained.iter().map(|row| row[1..].iter().filter(|&&trained| trained).count()).sum();
        let weight = 1.0 / labelled as f32;
        let rows = self.ids.iter().zip(&self.trained);
        let sequences: Vec<_> = rows.map(|(ids, trained)| Sequence { ids, trained, weight }).collect();
        Batch::pack(&**model.kernels(), &sequences).unwrap()
    }
}

fn logits_and_loss(golden: &Golden) {
    let model = golden.model(Storage::Mapped);
    let inputs = golden.inputs();
    let batch = inputs.batch(&model);

    let logits = values(model.kernels(), &model.logits(&batch, &Frozen).unwrap());
    let padded = golden.floats("expected.safetensors", "logits");
    let v = model.config().vocab_size;
    let expected: Vec<f32> =
        inputs.rows.iter().flat_map(|&row| &padded[row * v..(row + 1) * v]).copied().collect();
    let difference = f64::from(largest_difference(&logits, &expected));
    let tolerance = golden.tolerance("logits_max_abs");
    assert!(difference <= tolerance, "logits differ by {difference:e}, tolerance {tolerance:e}");

    let loss = model.loss(&batch, &Frozen).unwrap();
    let expected = f64::from(golden.floats("expected.safetensors", "loss")[0]);
    let tolerance = golden.tolerance("loss_abs");
    assert!(
        (loss - expected).abs() <= tolerance,
        "loss {loss}, expected {expected}, tolerance {tolerance:e}"
    );
}

fn gradients(golden: &Golden) {
    let model = golden.model(Storage::Trainable);
    let batch = golden.inputs().batch(&model);
    let mut gradients = zeros(&model);
    model.loss_and_gradients(&batch, &mut Frozen, &mut gradients, Recompute::None).unwrap();

    let tolerance = golden.tolerance("grad_max_rel_to_tensor_max");
    let zero = golden.meta()["f32_vs_f64"]["analytically_zero_grads"].clone();
    let gradients = host(&model, &gradients);
    let all: BTreeMap<_, _> = gradients
        .iter()
        .map(|(&p, found)| {
            (p, (found, golden.floats("expected.safetensors", &format!("grad.{}", model.name(p)))))
        })
        .collect();
    let of_all = all.values().map(|(_, expected)| largest(expected)).fold(0.0, f32::max);
    for (parameter, (found, expected)) in all {
        let name = model.name(parameter);
        let is_zero = zero.as_array().is_some_and(|zero| zero.iter().any(|zero| zero == name.as_str()));
        let scale = if is_zero { of_all } else { largest(&expected) };
        let difference = f64::from(largest_difference(found, &expected) / scale);
        assert!(
            difference <= tolerance,
            "{name}: relative difference {difference:e}, tolerance {tolerance:e}"
        );
    }
    let file = WeightFile::open(&golden.folder.join("expected.safetensors")).unwrap();
    let expected = file.names().iter().filter(|name| name.starts_with("grad.")).count();
    assert_eq!(gradients.len(), expected, "every gradient of the fixture is compared");
}

fn greedy_generation(golden: &Golden) {
    let file = "generate.safetensors";
    if !golden.folder.join(file).exists() {
        return eprintln!("SKIPPED: no {file} in {}", golden.folder.display());
    }
    let ids = |name| -> Vec<Vec<u32>> {
        golden
            .integers(file, name)
            .into_iter()
            .map(|row| row.into_iter().map(|id| id as u32).collect())
            .collect()
    };
    let (prompts, new) = (ids("prompt_ids"), ids("new_ids"));
    let model = golden.model(Storage::Mapped);
    let (steps, v) = (new[0].len(), model.config().vocab_size);
    let options = Generation { max_new_tokens: steps, sampling: Sampling::Greedy, stop: vec![] };
    let mut generator = Generator::new(0, Stream::Sampling, 0);
    let mut told = vec![Vec::new(); prompts.len()];
    let found =
        generate(&model, &Frozen, &prompts, &options, &mut generator, &mut |i, id| told[i].push(id)).unwrap();
    assert_eq!(found, new);
    assert_eq!(told, new);

    // The same tokens again, for the logits of each step.
    let expected = golden.floats(file, "logits");
    let tolerance = golden.tolerance("logits_max_abs");
    let mut decoder = Decoder::new(&model, &Frozen, &prompts, steps).unwrap();
    for step in 0..steps {
        let pieces: Vec<(usize, &[u32])> = match step {
            0 => prompts.iter().map(|ids| &ids[..]).enumerate().collect(),
            _ => new.iter().map(|ids| &ids[step - 1..step]).enumerate().collect(),
        };
        let logits = values(model.kernels(), &decoder.advance(&pieces).unwrap());
        for (row, logits) in logits.chunks_exact(v).enumerate() {
            let start = (row * steps + step) * v;
            let difference = f64::from(largest_difference(logits, &expected[start..start + v]));
            assert!(difference <= tolerance, "step {step}, prompt {row}: {difference:e} > {tolerance:e}");
        }
    }
}
