//! What is planned of a step's memory against what the device counts, for every shape of block.

mod support;

use std::collections::BTreeMap;

use lora_sb_kernels::Tensor;
use lora_sb_model::{Batch, Frozen, Gradients, Model, NoGradients, Parameter, Recompute, memory};
use serde_json::{Value, json};
use support::{Texts, families, zeros};

/// Sizes at which tensors, not their rounding, fill the memory.
fn sizes(family: &str) -> Value {
    match family {
        "bert" | "roberta" | "roberta, regression" => {
            json!({ "hidden_size": 210, "intermediate_size": 390, "vocab_size": 301 })
        }
        "phi3" => json!({
            "hidden_size": 210, "intermediate_size": 390, "partial_rotary_factor": 0.8, "vocab_size": 301
        }),
        _ => json!({ "hidden_size": 200, "intermediate_size": 390, "head_dim": 70, "vocab_size": 301 }),
    }
}

#[test]
fn what_a_block_keeps_is_planned_to_the_byte() {
    for family in families::all() {
        let model = family.with(sizes(family.name));
        let batch = Texts::new().batch(&model);
        let x = model.embed(&batch).unwrap();
        let before = model.kernels().usage().live_bytes - lora_sb_kernels::allocated_bytes(x.len());
        let (y, saved) = model.block_forward(1, x, &batch, &Frozen).unwrap();
        drop(y);
        let held = model.kernels().usage().live_bytes - before;
        assert_eq!(held, memory::block_saved(model.config(), batch.tokens()), "{}", family.name);
        drop(saved);
    }
}

#[test]
fn a_steps_peak_is_foretold() {
    for family in families::all() {
        let model = family.with(sizes(family.name));
        let mut gradients = zeros(&model);
        // 13 tokens, where products' packed blocks fill the memory, and many, where activations do.
        for copies in [1, 11] {
            let texts = Texts::new();
            let sequences: Vec<_> = (0..copies).flat_map(|_| texts.sequences_for(&model)).collect();
            let batch = Batch::pack(&**model.kernels(), &sequences).unwrap();
            for trained in [memory::Trained::OfProducts, memory::Trained::Everything] {
                for recompute in [Recompute::None, Recompute::Block] {
                    let name = format!("{}, {copies}, {trained:?}, {recompute:?}", family.name);
                    check_peak(&name, &model, &batch, trained, recompute, &mut gradients);
                }
            }
        }
    }
}

fn check_peak(
    name: &str,
    model: &Model,
    batch: &Batch,
    trained: memory::Trained,
    recompute: Recompute,
    all: &mut BTreeMap<Parameter, Tensor>,
) {
    let kernels = model.kernels();
    kernels.reset_peak();
    let before = kernels.usage().live_bytes;
    let gradients: &mut dyn Gradients = match trained {
        memory::Trained::Everything => all,
        _ => &mut NoGradients,
    };
    model.loss_and_gradients(batch, &mut Frozen, gradients, recompute).unwrap();
    let usage = kernels.usage();
    assert_eq!(usage.live_bytes, before, "a step leaves nothing behind");
    let found = usage.peak_bytes - before;
    let told = memory::activations(model.config(), batch.tokens(), batch.labelled(), recompute, trained);
    let ratio = told as f64 / found as f64;
    assert!((0.97..1.05).contains(&ratio), "{name}: {found} found, {told} told: {ratio:.3}");
}
