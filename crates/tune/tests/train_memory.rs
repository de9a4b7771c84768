//! What the plan says of memory, against what the device counts.

mod common;
mod training;

use lora_sb_model::{Config, Model, Recompute, Storage};
use lora_sb_tune::optim::AdamW;
use lora_sb_tune::plan::{BatchSize, MemoryPlan, MemoryRequest, largest_eval_batch, largest_micro_batch};
use lora_sb_tune::train::gradients_of_step;
use lora_sb_tune::{AdapterConfig, Method, TrainConfig, Tuned};

/// Large enough that tensors, not bookkeeping, fill the memory; no size is a power of two.
fn model() -> Model {
    let json = br#"{"model_type": "llama", "vocab_size": 301, "hidden_size": 96, "intermediate_size": 250,
        "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3,
        "max_position_embeddings": 64, "tie_word_embeddings": false}"#;
    Model::random(Config::from_json(json).unwrap(), common::cpu(), 1).unwrap()
}

fn assert_close(what: &str, planned: usize, measured: usize) {
    let ratio = planned as f64 / measured as f64;
    assert!((0.97..1.05).contains(&ratio), "{what}: planned {planned}, measured {measured}: {ratio:.3}");
}

#[test]
fn the_planned_memory_is_what_the_device_counts() {
    for method in Method::ALL {
        for recompute in [Recompute::None, Recompute::Block] {
            let examples = training::examples(40, 301, 9);
            let micro_batch: Vec<_> = examples.iter().collect();
            let mut train = BatchSize::default();
            train.include(&examples);
            let samples = &examples[..20];
            let mut init = BatchSize::default();
            init.include(samples);

            let model = model();
            let kernels = model.kernels().clone();
            let sites = model.sites();
            let base = common::config(method);
            let init_config = lora_sb_tune::InitConfig { max_tokens: 10_000, ..base.init.clone() };
            let config = AdapterConfig { rank: 13, lora_alpha: 13.0, init: init_config, ..base };
            let architecture = model.config().clone();
            let plan = MemoryPlan::new(&MemoryRequest {
                config: &architecture,
                storage: Storage::Trainable,
                file_element: 4,
                method,
                rank: 13,
                sites: &sites,
                recompute,
                train,
                evaluation: BatchSize::default(),
                init: (method == Method::LoraSb).then_some((init.tokens, init)),
                ids: &[],
                process: 0,
            });
            kernels.reset_peak();
            let mut tuned = Tuned::adapt(model, &config, samples, &mut |_| ()).unwrap();
            if method == Method::LoraSb {
                let measured = kernels.usage().peak_bytes;
                assert_close(&format!("{method} init"), plan.init_peak(), measured);
            }
            let optimizer = AdamW::new(&mut tuned).unwrap();
            kernels.reset_peak();
            gradients_of_step(&mut tuned, &micro_batch, 40, recompute).unwrap();
            let measured = kernels.usage().peak_bytes;
            assert_close(&format!("{method} {recompute:?}"), plan.train_peak() - plan.copied, measured);
            drop(optimizer);
        }
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
