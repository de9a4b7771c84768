//! What the tests share: golden files, tiny random models, and comparisons that say where they failed.
#![allow(dead_code)] // each test file uses its own part

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lora_sb_data::{Example, Location};
use lora_sb_kernels::{AdamWStep, Cpu, Generator, Kernels, Stream, Tensor};
use lora_sb_model::{Batch, Config, Model, Recompute, Sequence, Storage};
use lora_sb_tune::{AdapterConfig, Convention, InitConfig, Method, Targets, Tuned};
use safetensors::{Dtype, SafeTensors};

/// A processor with two threads.
pub(crate) fn cpu() -> Arc<dyn Kernels> {
    Arc::new(Cpu::new(2).unwrap())
}

/// The fixtures of a family, or `None` with a line that no test runner swallows.
pub(crate) fn golden(family: &str) -> Option<PathBuf> {
    let set = std::env::var_os("LORA_SB_GOLDEN").map(PathBuf::from);
    let root = set.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden"));
    let dir = root.join(family);
    if dir.join("model/config.json").is_file() {
        return Some(dir);
    }
    say(&format!("SKIPPED golden {family}: {} is missing", dir.display()));
    None
}

/// A line on the terminal. The test runner captures what the printing macros write, but not this.
pub(crate) fn say(line: &str) {
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).unwrap();
}

/// The golden model of a family.
pub(crate) fn golden_model(dir: &Path, storage: Storage) -> Model {
    let mut model = Model::load(&dir.join("model"), cpu(), storage).unwrap();
    model.prepare(64).unwrap();
    model
}

/// A golden safetensors file.
pub(crate) struct Golden(Vec<u8>);

impl Golden {
    /// Reads the file.
    pub(crate) fn open(path: &Path) -> Golden {
        Golden(std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }

    fn bytes(&self, name: &str, dtype: Dtype) -> (Vec<usize>, Vec<u8>) {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let view = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(view.dtype(), dtype, "{name}");
        (view.shape().to_vec(), view.data().to_vec())
    }

    /// An f32 tensor: shape and values.
    pub(crate) fn f32(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        let (shape, bytes) = self.bytes(name, Dtype::F32);
        (shape, bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect())
    }

    /// An f64 tensor's values.
    pub(crate) fn f64(&self, name: &str) -> Vec<f64> {
        let bytes = self.bytes(name, Dtype::F64).1;
        bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
    }

    /// An i64 tensor: shape and values.
    pub(crate) fn i64(&self, name: &str) -> (Vec<usize>, Vec<i64>) {
        let (shape, bytes) = self.bytes(name, Dtype::I64);
        (shape, bytes.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap())).collect())
    }

    /// An i8 tensor's values.
    pub(crate) fn i8(&self, name: &str) -> Vec<i8> {
        self.bytes(name, Dtype::I8).1.into_iter().map(|b| b as i8).collect()
    }

    /// What follows `prefix` in the names that begin with it, sorted.
    pub(crate) fn after(&self, prefix: &str) -> Vec<String> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let mut names: Vec<String> =
            file.names().iter().filter_map(|name| name.strip_prefix(prefix)).map(str::to_owned).collect();
        names.sort();
        names
    }
}

/// A golden batch as sequences without their padding: each row's tokens where the attention mask is 1.
pub(crate) fn rows(file: &Golden, prefix: &str) -> Vec<Example> {
    let (shape, ids) = file.i64(&format!("{prefix}input_ids"));
    let mask = file.i64(&format!("{prefix}attention_mask")).1;
    let labels = file.i64(&format!("{prefix}labels")).1;
    let row = |row: usize| {
        let real: Vec<usize> = (row * shape[1]..(row + 1) * shape[1]).filter(|&at| mask[at] == 1).collect();
        let mut trained: Vec<bool> = real.iter().map(|&at| labels[at] != -100).collect();
        trained[0] = false;
        example(&real.iter().map(|&at| ids[at] as u32).collect::<Vec<_>>(), &trained)
    };
    (0..shape[0]).map(row).collect()
}

/// An example from nowhere.
pub(crate) fn example(ids: &[u32], trained: &[bool]) -> Example {
    let source = Location { file: Path::new("test").into(), line: 1, element: None };
    Example { ids: ids.to_vec(), trained: trained.to_vec(), source }
}

/// One batch whose loss is the mean over all its labelled tokens.
pub(crate) fn mean_batch(kernels: &dyn Kernels, examples: &[Example]) -> Batch {
    let labelled: usize = examples.iter().map(Example::trained_tokens).sum();
    weighted_batch(kernels, examples, |_| 1.0 / labelled as f32)
}

/// One batch with a weight for each sequence's labelled tokens.
pub(crate) fn weighted_batch(
    kernels: &dyn Kernels,
    examples: &[Example],
    weight: impl Fn(&Example) -> f32,
) -> Batch {
    let mut sequences = Vec::new();
    for example in examples {
        sequences.push(Sequence { ids: &example.ids, trained: &example.trained, weight: weight(example) });
    }
    Batch::pack(kernels, &sequences).unwrap()
}

/// Plain AdamW steps over batches in turn: the loss before each step, and after the last.
pub(crate) fn adamw_losses(
    tuned: &mut Tuned,
    batches: &[Batch],
    steps: usize,
    learning_rate: f64,
) -> Vec<f64> {
    let kernels = tuned.model.kernels().clone();
    let mut moments: BTreeMap<String, (Tensor, Tensor)> = BTreeMap::new();
    let mut losses = Vec::new();
    for step in 0..steps {
        tuned.zero_gradients().unwrap();
        losses.push(tuned.loss_and_gradients(&batches[step % batches.len()], Recompute::None).unwrap());
        let numbers = AdamWStep {
            learning_rate,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            gradient_scale: 1.0,
            step: step as u64 + 1,
        };
        let mut update = |name: &str, value: &mut Tensor, gradient: &mut Tensor| {
            let zeros = || kernels.zeros(value.shape()).unwrap();
            let (m, v) = moments.entry(name.into()).or_insert_with(|| (zeros(), zeros()));
            Ok(kernels.adamw(&numbers, gradient, value, m, v)?)
        };
        tuned.visit(&mut update).unwrap();
    }
    losses.push(tuned.loss(&batches[steps % batches.len()]).unwrap());
    losses
}

/// The gradients that stand, by name.
pub(crate) fn gradients(tuned: &mut Tuned) -> BTreeMap<String, Vec<f32>> {
    let kernels = tuned.model.kernels().clone();
    let mut all = BTreeMap::new();
    let mut read = |name: &str, _: &mut Tensor, gradient: &mut Tensor| {
        all.insert(name.to_owned(), kernels.to_f32(gradient)?);
        Ok(())
    };
    tuned.visit(&mut read).unwrap();
    all
}

/// Sets one trained tensor.
pub(crate) fn set(tuned: &mut Tuned, wanted: &str, values: &[f32]) {
    let kernels = tuned.model.kernels().clone();
    let mut found = false;
    let mut write = |name: &str, value: &mut Tensor, _: &mut Tensor| {
        if name == wanted {
            found = true;
            kernels.write_f32(value, values)?;
        }
        Ok(())
    };
    tuned.visit(&mut write).unwrap();
    assert!(found, "{wanted} is not trained");
}

/// A tensor of the adapter, trained or frozen, by its full name.
pub(crate) fn tensor(tuned: &Tuned, name: &str) -> Vec<f32> {
    let all = tuned.trained_tensors().into_iter().chain(tuned.frozen_tensors());
    let found = all.into_iter().find(|(other, _)| other == name).unwrap_or_else(|| panic!("no {name}"));
    tuned.model.kernels().to_f32(found.1).unwrap()
}

/// A tiny random model with unkind sizes: an odd number of query heads, and one key/value head for all of them.
pub(crate) fn tiny_model(layers: usize) -> Model {
    let json = format!(
        r#"{{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 29, "hidden_size": 18,
            "intermediate_size": 23, "num_hidden_layers": {layers}, "num_attention_heads": 3,
            "num_key_value_heads": 1, "head_dim": 6, "hidden_act": "silu", "max_position_embeddings": 64,
            "initializer_range": 0.3, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "attention_bias": false,
            "mlp_bias": false, "tie_word_embeddings": false}}"#
    );
    let mut model = Model::random(Config::from_json(json.as_bytes()).unwrap(), cpu(), 11).unwrap();
    model.prepare(64).unwrap();
    model
}

/// Examples of different lengths, the first third of each untrained.
pub(crate) fn tiny_examples(count: usize) -> Vec<Example> {
    let mut generator = Generator::new(5, Stream::Order, 0);
    let one = |_| {
        let length = 4 + generator.below(11);
        let ids: Vec<u32> = (0..length).map(|_| generator.below(29) as u32).collect();
        example(&ids, &(0..length).map(|at| at > length / 3).collect::<Vec<_>>())
    };
    (0..count).map(one).collect()
}

/// An adapter of rank 5 on all linear layers.
pub(crate) fn config(method: Method) -> AdapterConfig {
    AdapterConfig {
        method,
        rank: 5,
        lora_alpha: 5.0,
        target_modules: Targets::AllLinear,
        init: InitConfig { samples: 6, convention: Convention::PerSample, eta: 1e-2, max_tokens: 32 },
        seed: 3,
    }
}

/// A tiny tuned model; LoRA's B, which starts at zero, is moved off it.
pub(crate) fn tiny_tuned(method: Method) -> Tuned {
    let config = AdapterConfig { lora_alpha: 10.0, ..config(method) };
    let mut tuned = Tuned::adapt(tiny_model(2), &config, &tiny_examples(6), &mut |_| ()).unwrap();
    if method != Method::LoraSb {
        shake(&mut tuned, 0.1);
    }
    tuned
}

/// Adds random values to all trained tensors.
pub(crate) fn shake(tuned: &mut Tuned, deviation: f32) {
    let kernels = tuned.model.kernels().clone();
    let mut generator = Generator::new(8, Stream::Adapter, 99);
    let mut add = |_: &str, value: &mut Tensor, _: &mut Tensor| {
        let mut noise = vec![0.0; value.len()];
        generator.normal(deviation, &mut noise);
        Ok(kernels.add(1.0, &kernels.from_f32(&noise, value.shape())?, value)?)
    };
    tuned.visit(&mut add).unwrap();
}

/// The largest absolute difference.
pub(crate) fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).abs()).fold(0.0, |worst, next| {
        assert!(!next.is_nan(), "NaN in a comparison");
        worst.max(next)
    })
}

/// The largest magnitude.
pub(crate) fn largest(a: &[f32]) -> f64 {
    a.iter().map(|a| f64::from(a.abs())).fold(0.0, f64::max)
}

/// Asserts that two tensors agree to `tolerance` of the larger one's largest entry.
#[track_caller]
pub(crate) fn assert_near(what: &str, found: &[f32], expected: &[f32], tolerance: f64) {
    let (distance, scale) = (distance(found, expected), largest(expected).max(largest(found)));
    assert!(
        distance <= tolerance * scale,
        "{what}: differs by {distance:.3e}, {:.3e} of the largest entry; the tolerance is {tolerance:.3e}",
        distance / scale
    );
}

/// The rounding of a sum of `terms` f32 products, relative to the largest term: `8 eps sqrt(terms)`.
pub(crate) fn rounding(terms: usize) -> f64 {
    8.0 * f64::from(f32::EPSILON) * (terms as f64).sqrt()
}

/// Asserts that a run's losses follow a golden one to 1e-4.
#[track_caller]
pub(crate) fn assert_losses(found: &[f64], file: &Golden, name: &str) {
    let expected = file.f32(name).1;
    assert_eq!(found.len(), expected.len());
    for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let difference = (found - f64::from(*expected)).abs();
        assert!(difference <= 1e-4, "{name}: step {step}: {found} for {expected}");
    }
}

/// The rows of the four golden training batches.
pub(crate) fn train_batches(dir: &Path) -> Vec<Vec<Example>> {
    let train = Golden::open(&dir.join("train_batches.safetensors"));
    (0..4).map(|index| rows(&train, &format!("batch{index}."))).collect()
}

/// Each as one batch whose loss is its mean.
pub(crate) fn mean_batches(kernels: &dyn Kernels, batches: &[Vec<Example>]) -> Vec<Batch> {
    batches.iter().map(|batch| mean_batch(kernels, batch)).collect()
}

/// A family's `meta.json`.
pub(crate) fn meta(dir: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(dir.join("meta.json")).unwrap()).unwrap()
}

/// Golden tensors `<prefix>.<module>` as an adapter's `<module>.<part>`.
pub(crate) fn named_tensors(
    file: &Golden,
    parts: &[(&str, &str)],
    kernels: &dyn Kernels,
) -> BTreeMap<String, Tensor> {
    let mut tensors = BTreeMap::new();
    for (prefix, part) in parts {
        for module in file.after(&format!("{prefix}.")) {
            let (shape, values) = file.f32(&format!("{prefix}.{module}"));
            tensors.insert(format!("{module}.{part}"), kernels.from_f32(&values, &shape).unwrap());
        }
    }
    tensors
}
