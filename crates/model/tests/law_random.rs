//! Laws of random models.

mod support;

use half::bf16;
use lora_sb_kernels::{Cpu, DType};
use lora_sb_model::{Model, Parameter, Storage};
use serde_json::json;
use support::{config, device, families, values};

#[test]
fn a_frozen_random_model_is_the_trainable_one_in_bf16() {
    // More elements in one tensor than a generator draws.
    let config = config(json!({ "vocab_size": 81_000 }));
    let trainable = Model::random(config.clone(), device(), 3, Storage::Trainable).unwrap();
    let one_thread = std::sync::Arc::new(Cpu::new(1).unwrap());
    let mapped = Model::random(config, one_thread, 3, Storage::Mapped).unwrap();
    for parameter in trainable.parameters() {
        let frozen = mapped.weight(parameter).unwrap();
        assert_eq!(frozen.dtype(), DType::Bf16);
        let rounded: Vec<f32> = values(trainable.kernels(), trainable.weight(parameter).unwrap())
            .into_iter()
            .map(|value| bf16::from_f32(value).to_f32())
            .collect();
        assert!(values(mapped.kernels(), frozen) == rounded, "{parameter:?}");
    }
    let values = values(trainable.kernels(), trainable.weight(Parameter::Embedding).unwrap());
    let count = values.len() as f64;
    let moment = |power| values.iter().map(|&v| f64::from(v).powi(power)).sum::<f64>() / count;
    // Five standard errors of the mean and of the variance.
    assert!(moment(1).abs() < 5.0 * 0.3 / count.sqrt());
    assert!((moment(2) - 0.09).abs() < 5.0 * 0.09 * (2.0 / count).sqrt());
    let part = 1 << 20;
    assert_ne!(values[..100], values[part..part + 100], "each part has draws of its own");
}

#[test]
fn a_seed_is_a_model() {
    for family in families::all() {
        let config = family.model().config().clone();
        let drawn = |seed| Model::random(config.clone(), device(), seed, Storage::Mapped).unwrap();
        let (one, same, other) = (drawn(5), drawn(5), drawn(6));
        let all = |model: &Model| -> Vec<Vec<f32>> {
            let tensors = model.parameters().into_iter();
            tensors.map(|p| values(model.kernels(), model.weight(p).unwrap())).collect()
        };
        assert!(all(&one) == all(&same) && all(&one) != all(&other), "{}", family.name);
        // Its head is trained beside any adapter.
        for parameter in one.parameters().into_iter().filter(|parameter| parameter.of_classification()) {
            assert_eq!(one.weight(parameter).unwrap().dtype(), DType::F32);
        }
    }
}
