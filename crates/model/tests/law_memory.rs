//! What is planned of a step's memory against what the device counts, for every shape of block.

mod support;

use std::collections::BTreeMap;

use lora_sb_kernels::{DType, Tensor};
use lora_sb_model::memory::Trained;
use lora_sb_model::{Batch, Frozen, Gradients, Model, NoGradients, Parameter, Recompute, Target};
use serde_json::{Value, json};
use support::device::{device, on_each_device};
use support::families::Small;
use support::{Texts, families, zeros};

/// Sizes at which tensors, not their rounding, fill the memory.
fn sizes(family: &str) -> Value {
    let mut sizes = json!({ "intermediate_size": 390, "vocab_size": 301, "max_position_embeddings": 600 });
    let own = match family {
        "bert" | "roberta" | "roberta, regression" => json!({ "hidden_size": 210 }),
        "phi3" => json!({ "hidden_size": 210, "partial_rotary_factor": 0.8 }),
        _ => json!({ "hidden_size": 200, "head_dim": 70 }),
    };
    sizes.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
    sizes
}

/// One family for each shape of a block.
const SHAPES: [&str; 5] = ["llama", "qwen3", "gemma2", "phi3", "bert"];

/// The same, with a feed-forward layer that is by far the widest, as in published models:
/// what several threads compute attention in depends on their number, and is not the widest moment then.
fn wide() -> Vec<(&'static str, Model)> {
    let families = families::all().into_iter().filter(|family| SHAPES.contains(&family.name));
    let model = |family: Small| {
        let mut sizes = sizes(family.name);
        let encoder = family.name == "bert";
        sizes["intermediate_size"] = json!(if encoder { 1970 } else { 1170 });
        if !encoder {
            sizes["num_key_value_heads"] = json!(3);
        }
        (family.name, family.with(sizes))
    };
    families.map(model).collect()
}

#[test]
fn what_a_block_keeps_is_planned_to_the_byte() {
    for family in families::all() {
        let model = family.with(sizes(family.name));
        let batch = Texts::new().batch(&model);
        let x = model.embed(&batch).unwrap();
        let before = model.kernels().usage().live_bytes - model.kernels().place().bytes(x.len());
        let (y, saved) = model.block_forward(1, x, &batch, &Frozen).unwrap();
        drop(y);
        let held = model.kernels().usage().live_bytes - before;
        assert_eq!(held, model.footprint().block_saved(batch.tokens()), "{}", family.name);
        drop(saved);
    }
}

/// Calls `check` for each type, method and policy with what a step takes and what is told of it.
fn each_step(model: &mut Model, batch: &Batch, check: &mut dyn FnMut(String, usize, usize)) {
    let mut gradients = zeros(model);
    for dtype in [DType::F32, DType::Bf16] {
        model.set_dtype(dtype).unwrap();
        for (trained, recompute) in [
            (Trained::OfProducts, Recompute::None),
            (Trained::OfProducts, Recompute::First(2)),
            (Trained::Everything, Recompute::None),
            (Trained::Everything, Recompute::Block),
        ] {
            let (found, told) = peak(model, batch, trained, recompute, &mut gradients);
            check(format!("{} tokens, {dtype}, {trained:?}, {recompute:?}", batch.tokens()), found, told);
        }
    }
}

#[test]
fn no_step_takes_more_than_it_is_said_to() {
    let mut wrong = Vec::new();
    for family in families::all() {
        let mut model = family.with(sizes(family.name));
        // 13 tokens, where products' packed blocks fill the memory, and many, where activations do.
        for copies in [1, 11] {
            let texts = Texts::new();
            let sequences: Vec<_> = (0..copies).flat_map(|_| texts.sequences_for(&model)).collect();
            let batch = Batch::pack(&**model.kernels(), &sequences).unwrap();
            each_step(&mut model, &batch, &mut |name, found, told| {
                if found > told {
                    wrong.push(format!("{}, {name}: {found} found, {told} told", family.name));
                }
            });
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_large_steps_peak_is_foretold() {
    // No step of a test is large beside what a plan leaves for a GPU's products; see below.
    if !device().place().is_host() {
        return;
    }
    let mut wrong = Vec::new();
    for (family, mut model) in wide() {
        let ids: Vec<u32> = (0..571).map(|i| i * 17 % 29).collect();
        let trained: Vec<bool> = ids.iter().map(|id| id % 4 != 1).collect();
        let texts = Texts::new();
        let mut sequence = texts.sequences_for(&model)[0];
        sequence.ids = &ids;
        if let Target::Tokens(_) = sequence.target {
            sequence.target = Target::Tokens(&trained);
        }
        let batch = Batch::pack(&**model.kernels(), &[sequence]).unwrap();
        each_step(&mut model, &batch, &mut |name, found, told| {
            let ratio = told as f64 / found as f64;
            if !(1.0..1.05).contains(&ratio) {
                wrong.push(format!("{family}, {name}: {found} found, {told} told: {ratio:.3}"));
            }
        });
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What is counted for a product's parts and for gaps outweighs these tensors; beside that a plan is as close.
#[test]
fn a_gpus_step_takes_what_it_is_said_to() {
    on_each_device(|| {
        for family in families::all().into_iter().filter(|family| ["llama", "bert"].contains(&family.name)) {
            let mut model = family.with(sizes(family.name));
            let batch = Texts::new().batch(&model);
            let place = model.kernels().place();
            let slack = place.product_scratch_bytes((DType::Bf16, DType::Bf16), 4096, 4096, 4096);
            each_step(&mut model, &batch, &mut |name, found, told| {
                assert!(found <= told, "{}, {name}: {found} found, {told} told", family.name);
                assert!(told <= 2 * found + slack, "{}, {name}: {found} found, {told} told", family.name);
            });
        }
    });
}

/// The bytes of a step that the device counts, and those that are planned.
fn peak(
    model: &Model,
    batch: &Batch,
    trained: Trained,
    recompute: Recompute,
    all: &mut BTreeMap<Parameter, Tensor>,
) -> (usize, usize) {
    let kernels = model.kernels();
    kernels.reset_peak();
    let before = kernels.usage().live_bytes;
    let gradients: &mut dyn Gradients = match trained {
        Trained::Everything => all,
        _ => &mut NoGradients,
    };
    model.loss_and_gradients(batch, &mut Frozen, gradients, recompute).unwrap();
    let usage = kernels.usage();
    // A GPU keeps the tables of the batch's attention.
    assert!(usage.live_bytes == before || !kernels.place().is_host(), "a step leaves nothing behind");
    let told = model.footprint().activations(batch.tokens(), batch.labelled(), recompute, trained);
    (usage.peak_bytes - before, told)
}
