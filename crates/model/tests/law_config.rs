//! What a configuration alone tells: names, shapes, counts, bytes.

mod support;

use lora_sb_kernels::{DType, Place, RopeScaling};
use lora_sb_model::memory;
use lora_sb_model::{Frozen, Parameter, Positions, Projection, Rotation, Storage};
use serde_json::{Value, json};
use support::{Texts, config, model};

#[test]
fn names_are_those_of_the_files() {
    let config = config(json!({ "attention_bias": true }));
    let site = Projection::Output.of(2);
    assert_eq!(config.module(site), "model.layers.2.self_attn.o_proj");
    assert_eq!(config.name(Parameter::Bias(site)), "model.layers.2.self_attn.o_proj.bias");
    let names: Vec<String> = config.parameters().into_iter().map(|p| config.name(p)).collect();
    assert_eq!(
        names[..3],
        [
            "model.embed_tokens.weight",
            "model.layers.0.input_layernorm.weight",
            "model.layers.0.self_attn.q_proj.weight"
        ]
    );
    assert_eq!(names[names.len() - 2..], ["model.norm.weight", "lm_head.weight"]);
    assert_eq!(names.iter().filter(|name| name.ends_with("bias")).count(), 3 * 4);
    let mut unique = names.clone();
    unique.sort();
    unique.dedup();
    assert_eq!(unique.len(), names.len());
}

#[test]
fn older_and_newer_spellings_are_one_configuration() {
    let linear = RopeScaling::Linear { factor: 4.0 };
    for (changes, theta, scaling) in [
        (json!({}), 10_000.0, RopeScaling::Default),
        (json!({ "rope_theta": 5e5, "rope_scaling": null }), 5e5, RopeScaling::Default),
        (json!({ "rope_scaling": { "type": "linear", "factor": 4 } }), 10_000.0, linear),
        (json!({ "rope_scaling": { "rope_type": "linear", "factor": 4.0 } }), 10_000.0, linear),
        (
            json!({ "rope_parameters": { "rope_type": "linear", "factor": 4.0, "rope_theta": 5e5 } }),
            5e5,
            linear,
        ),
        (
            json!({ "rope_parameters": { "rope_type": "default", "rope_theta": 2e4 } }),
            2e4,
            RopeScaling::Default,
        ),
    ] {
        let config = config(changes);
        let rotations = vec![Rotation { theta, scaling }];
        assert_eq!(config.positions, Positions::Rotary { rotary_size: 6, rotations });
    }
    let config = config(json!({ "num_key_value_heads": null, "head_dim": null, "hidden_size": 18 }));
    assert_eq!((config.num_key_value_heads, config.head_dim), (3, 6));
    assert_eq!(config.to_json()["unknown_key"], json!({ "kept": [1, 2.5] }));
    assert_eq!(config.to_json()["head_dim"], Value::Null);
}

#[test]
fn a_blocks_saved_bytes_are_foretold() {
    let model = model(json!({}));
    let kernels = model.kernels();
    let batch = Texts::new().batch(&model);
    // A GPU keeps what the first call of attention found out about the batch.
    drop(model.block_forward(1, model.embed(&batch).unwrap(), &batch, &Frozen).unwrap());
    let before = kernels.usage().live_bytes;
    let x = model.embed(&batch).unwrap();
    let (y, saved) = model.block_forward(1, x, &batch, &Frozen).unwrap();
    drop(y);
    let held = kernels.usage().live_bytes - before;
    assert_eq!(held, model.footprint().block_saved(batch.tokens()));
    let input = saved.into_input();
    assert_eq!(kernels.usage().live_bytes - before, kernels.place().bytes(input.len()));
    drop(input);
    assert_eq!(kernels.usage().live_bytes, before);
}

#[test]
fn the_weights_bytes_are_foretold() {
    let model = model(json!({ "hidden_size": 200, "intermediate_size": 170 }));
    let held: usize = model.parameters().into_iter().map(|p| model.weight(p).unwrap().len()).sum();
    assert_eq!(memory::weights(model.config(), Storage::Mapped, 2, DType::F32, Place::Cpu), 2 * held);
    let place = model.kernels().place();
    let rope = 2 * place.bytes(64 * model.config().head_dim / 2);
    let live = model.kernels().usage().live_bytes;
    assert_eq!(memory::weights(model.config(), Storage::Trainable, 2, DType::F32, place) + rope, live);
}

#[test]
fn rows_of_a_mapped_embedding_that_nobody_reads_are_not_counted() {
    // Rows of 32 bytes in f16: the system maps 2048 of them at a time.
    let sizes = |tied| config(json!({ "hidden_size": 16, "vocab_size": 5000, "tie_word_embeddings": tied }));
    let unread =
        |tied, ids: &[u32]| memory::embedding_unread(&sizes(tied), 2, Place::Cpu, ids.iter().copied());
    assert_eq!(unread(false, &[]), 3 << 16);
    assert_eq!(unread(false, &[2047, 0, 9]), 2 << 16);
    assert_eq!(unread(false, &[2047, 2048, 4999, 5000]), 0);
    assert_eq!(unread(true, &[]), 0, "a tied head reads all of it");
}
