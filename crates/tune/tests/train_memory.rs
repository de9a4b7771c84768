//! What the plan says of memory, against what the device counts.

mod common;
mod training;

use common::device::{fresh_device, on_each_device};
use lora_sb_data::{Example, Label};
use lora_sb_kernels::DType;
use lora_sb_model::{Config, Model, Parameter, Recompute, Storage};
use lora_sb_tune::optim::AdamW;
use lora_sb_tune::plan::{
    BatchSize, EstimateSize, MemoryPlan, MemoryRequest, estimates_gradient, largest_eval_batch,
    largest_micro_batch,
};
use lora_sb_tune::train::gradients_of_step;
use lora_sb_tune::{AdapterConfig, Bases, InitConfig, Method, TrainConfig, Tuned, head};

/// Large enough that tensors, not bookkeeping, fill the memory; no size is a power of two.
fn model() -> Model {
    let json = br#"{"model_type": "llama", "vocab_size": 301, "hidden_size": 96, "intermediate_size": 250,
        "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3,
        "max_position_embeddings": 64, "tie_word_embeddings": false}"#;
    Model::random(Config::from_json(json).unwrap(), fresh_device(), 1, Storage::Trainable).unwrap()
}

/// The same for an encoder of three classes.
fn encoder() -> Model {
    let json = br#"{"model_type": "roberta", "vocab_size": 301, "hidden_size": 96, "intermediate_size": 250,
        "num_hidden_layers": 3, "num_attention_heads": 6, "max_position_embeddings": 64, "type_vocab_size": 1,
        "hidden_act": "gelu", "layer_norm_eps": 1e-5, "pad_token_id": 1,
        "id2label": {"0": "no", "1": "yes", "2": "perhaps"}}"#;
    Model::random(Config::from_json(json).unwrap(), fresh_device(), 1, Storage::Trainable).unwrap()
}

/// How far a plan may be off. The largest moments of an adapter and of the model are added up, wherever each is.
#[track_caller]
fn assert_close(what: &str, planned: usize, measured: usize, most: f64) {
    let ratio = planned as f64 / measured as f64;
    assert!((0.97..most).contains(&ratio), "{what}: planned {planned}, measured {measured}: {ratio:.3}");
}

fn size(examples: &[Example]) -> BatchSize {
    let mut size = BatchSize::default();
    size.include(examples);
    size
}

/// An adapter of rank 13, its start made from all samples at once.
fn adapter(method: Method) -> AdapterConfig {
    let base = common::config(method);
    let init = InitConfig { max_tokens: 10_000, ..base.init.clone() };
    AdapterConfig { rank: 13, lora_alpha: 13.0, init, ..base }
}

/// How a step is laid out: its type, what is kept, rows of logits at a time.
const LAYOUTS: [(DType, Recompute, usize); 6] = [
    (DType::F32, Recompute::None, 1000),
    (DType::F32, Recompute::First(2), 1000),
    (DType::F32, Recompute::Block, 37),
    (DType::Bf16, Recompute::None, 37),
    (DType::Bf16, Recompute::First(2), 1000),
    (DType::Bf16, Recompute::Block, 1000),
];

/// Plans and takes a step, and the initialisation before it where that is from a gradient.
#[track_caller]
fn check(what: &str, model: Model, config: &AdapterConfig, examples: &[Example], most: f64) {
    // A plan leaves more for a GPU's products than these tensors take.
    if !model.kernels().place().is_host() {
        return;
    }
    for layout in LAYOUTS {
        each_peak(&model, config, examples, layout, &mut |part, planned, measured| {
            assert_close(&format!("{what} in {layout:?}, {part}"), planned, measured, most);
        });
    }
}

/// Tells what is planned and what is measured of the initialisation, where it takes anything, and of a step.
fn each_peak(
    model: &Model,
    config: &AdapterConfig,
    examples: &[Example],
    (dtype, recompute, loss_chunk): (DType, Recompute, usize),
    tell: &mut dyn FnMut(&str, usize, usize),
) {
    // A model of its own for each, since it is used up.
    let mut model = again(model);
    model.set_dtype(dtype).unwrap();
    model.set_loss_chunk(loss_chunk);
    let kernels = model.kernels().clone();
    let (sites, samples) = (model.sites(), &examples[..examples.len() / 2]);
    let head: Vec<Parameter> = head::resolve(&config.modules_to_save, model.config()).unwrap();
    let architecture = model.config().clone();
    let estimated = estimates_gradient(config);
    let plan = MemoryPlan::new(&MemoryRequest {
        config: &architecture,
        storage: Storage::Trainable,
        file_element: 4,
        adapter: config,
        sites: &sites,
        head: &head,
        dtype,
        recompute,
        loss_chunk,
        place: kernels.place(),
        train: size(examples),
        evaluation: BatchSize::default(),
        init: estimated.then(|| EstimateSize::of(samples, config.init.max_tokens)),
        ids: &[],
        process: 0,
    });
    kernels.reset_peak();
    let mut tuned = Tuned::adapt(model, config, samples, &mut |_| ()).unwrap();
    if plan.initialisation > 0 {
        tell("initialisation", plan.weights + plan.initialisation, kernels.usage().peak_bytes);
    }
    let optimizer = AdamW::new(&mut tuned).unwrap();
    kernels.reset_peak();
    let step: Vec<&Example> = examples.iter().collect();
    gradients_of_step(&mut tuned, &step, &training::micro_batches(examples.len(), recompute)).unwrap();
    tell("step", plan.train_peak() - plan.copied - plan.idle(), kernels.usage().peak_bytes);
    drop(optimizer);
}

/// The same architecture with the same weights on a device that has counted nothing yet.
fn again(model: &Model) -> Model {
    Model::random(model.config().clone(), fresh_device(), 1, Storage::Trainable).unwrap()
}

#[test]
fn the_planned_memory_is_what_the_device_counts() {
    let examples = training::examples(40, 301, 9);
    for method in Method::ALL {
        let most = if matches!(method, Method::Lora | Method::Full | Method::LoraSb) { 1.05 } else { 1.1 };
        check(method.name(), model(), &adapter(method), &examples, most);
    }
    for bases in [Bases::SbZero, Bases::RandomOrthonormal, Bases::W0Orthonormal] {
        let own = adapter(Method::LoraSb);
        let init = InitConfig { bases, ..own.init.clone() };
        check(bases.name(), model(), &AdapterConfig { init, ..own }, &examples, 1.1);
    }
    for method in [Method::Lora, Method::LoraSb, Method::Pissa, Method::Dora] {
        let dropout = AdapterConfig { lora_dropout: 0.1, ..adapter(method) };
        check(&format!("{method} with dropout"), model(), &dropout, &examples, 1.1);
    }
}

/// Beside tensors this small, what a plan leaves for a GPU's products is large.
#[test]
fn the_planned_memory_of_a_gpu_covers_what_it_counts() {
    on_each_device(|| {
        let (model, examples) = (model(), training::examples(6, 301, 9));
        let (place, bf16) = (model.kernels().place(), DType::Bf16);
        let slack = 2 * place.product_scratch_bytes((bf16, bf16), 4096, 4096, 4096);
        for method in [Method::LoraSb, Method::Lora, Method::Full] {
            for layout in [(DType::F32, Recompute::First(2), 1000), (DType::Bf16, Recompute::None, 37)] {
                let config = adapter(method);
                each_peak(&model, &config, &examples, layout, &mut |part, planned, measured| {
                    let what = format!("{place:?}, {method} in {layout:?}, {part}");
                    let enough = planned as f64 >= 0.97 * measured as f64 && planned <= 2 * measured + slack;
                    assert!(enough, "{what}: planned {planned}, measured {measured}");
                });
            }
        }
    });
}

#[test]
fn the_planned_memory_of_an_encoder_is_what_the_device_counts() {
    let mut examples = training::examples(40, 301, 9);
    for (number, example) in examples.iter_mut().enumerate() {
        example.trained.fill(false);
        example.label = Some(Label::Class(number as u32 % 3));
    }
    for method in [Method::LoraSb, Method::Lora, Method::Dora, Method::Full] {
        let config = AdapterConfig { modules_to_save: vec!["classifier".into()], ..adapter(method) };
        check(&format!("{method} of an encoder"), encoder(), &config, &examples, 1.1);
    }
}

#[test]
fn the_largest_batches_are_those_the_run_meets() {
    let examples = training::examples(11, 29, 1);
    let config = training::settings();
    let largest = largest_micro_batch(&examples, &config).unwrap();
    let mut lengths: Vec<usize> = examples.iter().map(|example| example.ids.len()).collect();
    lengths.sort_unstable_by(|a, b| b.cmp(a));
    assert!(largest.tokens >= lengths[0] && largest.tokens <= lengths[0] + lengths[1]);
    assert!(largest.labelled < largest.tokens);

    // With all examples in one micro-batch there is nothing to choose.
    let whole = TrainConfig { per_device_train_batch_size: 11, per_device_eval_batch_size: 11, ..config };
    let all = lengths.iter().sum::<usize>();
    assert_eq!(largest_micro_batch(&examples, &whole).unwrap().tokens, all);
    assert_eq!(largest_eval_batch(&examples, &whole).tokens, all);
}
