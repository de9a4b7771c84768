//! What the tests share: golden files, tiny random models, and comparisons that say where they failed.
#![allow(dead_code)] // each test file uses its own part

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lora_sb_data::{Example, Label, Location};
use lora_sb_kernels::{AdamWStep, Generator, Kernels, Stream, Tensor};
use lora_sb_model::{Batch, Config, Model, Parameter, Recompute, Sequence, Site, Storage};
use lora_sb_tune::eval::{labels, sequence};
use lora_sb_tune::{AdapterConfig, Bases, Convention, InitConfig, Method, Targets, Tuned};
use safetensors::{Dtype, SafeTensors};

// The crate of models runs on the same devices and compares itself with the same fixtures.
#[path = "../../../model/tests/support/device.rs"]
pub(crate) mod device;
#[path = "../../../model/tests/support/padded.rs"]
mod padded;

pub(crate) use device::device;
use device::golden_root;
use padded::Padded;

/// The fixtures of a family, or `None` with a line that no test runner swallows.
pub(crate) fn golden(family: &str) -> Option<PathBuf> {
    let dir = golden_root().join(family);
    if dir.join("model/config.json").is_file() {
        return Some(dir);
    }
    say(&format!("SKIPPED golden {family}: {} is missing", dir.display()));
    None
}

/// The fixtures of all families that have a file, by the families' names; with a line where there are none.
pub(crate) fn goldens_with(file: &str) -> Vec<(String, PathBuf)> {
    let entries = std::fs::read_dir(golden_root()).into_iter().flatten().flatten();
    let dirs = entries.map(|entry| entry.path()).filter(|dir| dir.join(file).is_file());
    let name = |dir: &Path| dir.file_name().unwrap().to_string_lossy().into_owned();
    let mut found: Vec<(String, PathBuf)> = dirs.map(|dir| (name(&dir), dir)).collect();
    found.sort();
    match found.is_empty() {
        true => say(&format!("SKIPPED golden {file}: none in {}", golden_root().display())),
        false => {
            let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
            say(&format!("golden {file}: {}", names.join(", ")));
        }
    }
    found
}

/// The targets of a family's adapters, which are those of the adapter that PEFT saved.
pub(crate) fn golden_targets(dir: &Path) -> Targets {
    let bytes = std::fs::read(dir.join("peft_adapter/adapter_config.json")).unwrap();
    let written: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    let names = written["target_modules"].as_array().unwrap();
    Targets::Names(names.iter().map(|name| name.as_str().unwrap().to_owned()).collect())
}

/// A line on the terminal. The test runner captures what the printing macros write, but not this.
pub(crate) fn say(line: &str) {
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).unwrap();
}

/// The golden model of a family, on a device that takes the padding of its fixtures as transformers does.
pub(crate) fn golden_model(dir: &Path, storage: Storage) -> Model {
    Model::load(&dir.join("model"), golden_device(dir), storage).unwrap()
}

/// The device itself, where no prediction is made from a padding token.
fn golden_device(dir: &Path) -> Arc<dyn Kernels> {
    let json = std::fs::read(dir.join("model/config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let size = |key: &str| config[key].as_u64();
    let pad = size("pad_token_id").zip(size("max_position_embeddings"));
    let Some((pad, positions)) = pad else { return device() };
    let mut batches = Vec::new();
    let mut include = |examples: &[Example]| {
        let pads = |example: &Example| example.ids.iter().take_while(|&&id| u64::from(id) == pad).count();
        batches.push(examples.iter().map(|example| (example.ids.len(), pads(example))).collect::<Vec<_>>());
    };
    include(&rows(&Golden::open(&dir.join("inputs.safetensors")), ""));
    if dir.join("train_batches.safetensors").is_file() {
        train_batches(dir).iter().for_each(|batch| include(batch));
    }
    if batches.iter().flatten().all(|&(_, pads)| pads == 0) {
        return device();
    }
    let lengths = |batch: &[(usize, usize)]| batch.iter().map(|row| row.0).collect::<Vec<_>>();
    let known: BTreeMap<_, _> = batches.iter().map(|batch| (lengths(batch), batch)).collect();
    assert!(batches.iter().all(|batch| known[&lengths(batch)] == batch), "padding follows from the lengths");
    Arc::new(Padded::new(device(), batches, Some((pad as u32, positions as usize))))
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

    /// Whether it holds a tensor.
    pub(crate) fn has(&self, name: &str) -> bool {
        SafeTensors::deserialize(&self.0).unwrap().tensor(name).is_ok()
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        SafeTensors::deserialize(&self.0).unwrap().tensor(name).unwrap().shape().to_vec()
    }

    fn dtype(&self, name: &str) -> Dtype {
        SafeTensors::deserialize(&self.0).unwrap().tensor(name).unwrap().dtype()
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

/// A golden batch as sequences without their padding: each row's tokens where the attention mask is 1. A classifier
/// reads a row's first token, so that padding at the front, of which transformers predicts, stays.
pub(crate) fn rows(file: &Golden, prefix: &str) -> Vec<Example> {
    let name = |name: &str| format!("{prefix}{name}");
    let (shape, ids) = file.i64(&name("input_ids"));
    let mask = file.i64(&name("attention_mask")).1;
    let types = file.has(&name("token_type_ids")).then(|| file.i64(&name("token_type_ids")).1);
    let classified = file.shape(&name("labels")).len() == 1;
    let row = |row: usize| {
        let places = row * shape[1]..(row + 1) * shape[1];
        let end = places.clone().rposition(|at| mask[at] == 1).unwrap() + places.start + 1;
        let real: Vec<usize> = places.filter(|&at| mask[at] == 1 || classified && at < end).collect();
        let own: Vec<u32> = real.iter().map(|&at| ids[at] as u32).collect();
        let mut example = example(&own, &vec![false; own.len()]);
        example.second = types.as_ref().and_then(|types| real.iter().position(|&at| types[at] == 1));
        (example, real)
    };
    let mut rows: Vec<(Example, Vec<usize>)> = (0..shape[0]).map(row).collect();
    if file.dtype(&name("labels")) == Dtype::F32 {
        let values = file.f32(&name("labels")).1;
        rows.iter_mut().zip(values).for_each(|(row, value)| row.0.label = Some(Label::Value(value)));
    } else {
        let (shape, labels) = file.i64(&name("labels"));
        for (number, (example, real)) in rows.iter_mut().enumerate() {
            if shape.len() == 1 {
                example.label = Some(Label::Class(labels[number] as u32));
                continue;
            }
            example.trained = real.iter().map(|&at| labels[at] != -100).collect();
            example.trained[0] = false;
        }
    }
    rows.into_iter().map(|(example, _)| example).collect()
}

/// An example from nowhere.
pub(crate) fn example(ids: &[u32], trained: &[bool]) -> Example {
    let source = Location { file: Path::new("test").into(), line: 1, element: None };
    Example::text(ids.to_vec(), trained.to_vec(), source)
}

/// One batch whose loss is the mean over all its labels.
pub(crate) fn mean_batch(kernels: &dyn Kernels, examples: &[Example]) -> Batch {
    let labelled: usize = examples.iter().map(labels).sum();
    weighted_batch(kernels, examples, |_| 1.0 / labelled as f32)
}

/// One batch with a weight for each sequence's labels.
pub(crate) fn weighted_batch(
    kernels: &dyn Kernels,
    examples: &[Example],
    weight: impl Fn(&Example) -> f32,
) -> Batch {
    let sequences: Vec<Sequence<'_>> =
        examples.iter().map(|example| sequence(example, weight(example))).collect();
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
        tuned.adjust_gradients().unwrap();
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
    let mut model =
        Model::random(Config::from_json(json.as_bytes()).unwrap(), device(), 11, Storage::Trainable).unwrap();
    model.prepare(64).unwrap();
    model
}

/// A tiny random encoder with a classification head, as unkind: `bert` or `roberta`, for `labels` classes or, with
/// one, for numbers.
pub(crate) fn tiny_encoder(model_type: &str, labels: usize) -> Model {
    let names: Vec<String> = (0..labels).map(|label| format!("\"{label}\": \"LABEL_{label}\"")).collect();
    let json = format!(
        r#"{{"model_type": "{model_type}", "vocab_size": 29, "hidden_size": 18, "intermediate_size": 23,
            "num_hidden_layers": 2, "num_attention_heads": 3, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
            "max_position_embeddings": 40, "type_vocab_size": 2, "initializer_range": 0.3, "pad_token_id": 1,
            "id2label": {{{}}}}}"#,
        names.join(", ")
    );
    let config = Config::from_json(json.as_bytes()).unwrap();
    Model::random(config, device(), 11, Storage::Trainable).unwrap()
}

/// Examples with a label, one text or a pair each. Class `c` of 3 (or the value `c`) shows in its tokens: they are
/// those whose number is `c` more than a multiple of 3, but for one in four that is drawn at random.
pub(crate) fn labelled_examples(count: usize, seed: u64, label: impl Fn(u32) -> Label) -> Vec<Example> {
    let mut generator = Generator::new(seed, Stream::Order, 1);
    let one = |number: usize| {
        let class = generator.below(3);
        let length = 4 + generator.below(9);
        let mut token = || match generator.below(4) {
            0 => 2 + generator.below(27) as u32,
            _ => (3 + 3 * generator.below(8) + class) as u32,
        };
        let ids: Vec<u32> = (0..length).map(|_| token()).collect();
        let mut example = example(&ids, &vec![false; length]);
        example.source.line = number + 1;
        example.second = number.is_multiple_of(2).then_some(length / 2);
        example.label = Some(label(class as u32));
        example
    };
    (0..count).map(one).collect()
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

/// An adapter with the scale 1 on all linear layers: of rank 5, of rank 3 where twice that has to fit.
pub(crate) fn config(method: Method) -> AdapterConfig {
    let rank = if method == Method::LoraGa { 3 } else { 5 };
    AdapterConfig {
        method,
        rank,
        lora_alpha: if method == Method::RsLora { (rank as f64).sqrt() } else { rank as f64 },
        lora_dropout: 0.0,
        target_modules: Targets::AllLinear,
        init: InitConfig {
            bases: Bases::of(method),
            samples: 6,
            convention: Convention::PerSample,
            eta: 1e-2,
            max_tokens: 32,
            blocks_at_once: None,
        },
        modules_to_save: Vec::new(),
        seed: 3,
    }
}

/// All methods with an adapter.
pub(crate) fn adapters() -> impl Iterator<Item = Method> {
    Method::ALL.into_iter().filter(|&method| method != Method::Full)
}

/// A tiny tuned model with the scale 2; what starts where the base is, is moved off it.
pub(crate) fn tiny_tuned(method: Method) -> Tuned {
    let config = config(method);
    let config = AdapterConfig { lora_alpha: 2.0 * config.lora_alpha, ..config };
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

/// Tokens of the largest: an initialisation with that many a micro-batch takes each by itself, and the device of
/// [`golden_model`] knows its padding.
pub(crate) fn largest_batch(batches: &[Vec<Example>]) -> usize {
    let tokens = |batch: &Vec<Example>| batch.iter().map(|example| example.ids.len()).sum();
    batches.iter().map(tokens).max().unwrap_or(0)
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

/// The base's weight at a site.
pub(crate) fn weight(model: &Model, site: Site) -> &Tensor {
    model.weight(Parameter::Weight(site)).unwrap()
}

/// What the adapter adds to the weight at a site.
pub(crate) fn delta(tuned: &Tuned, site: Site) -> Vec<f32> {
    let kernels = tuned.model.kernels().as_ref();
    let delta = tuned.adapter().unwrap().delta(kernels, site, weight(&tuned.model, site)).unwrap();
    kernels.to_f32(&delta.unwrap()).unwrap()
}
