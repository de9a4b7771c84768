//! Every family against Hugging Face transformers on tiny random models; see `golden/README.md`.
//!
//! `LORA_SB_GOLDEN` names another folder of the same format. Every size comes from the fixtures.

mod support;

use std::collections::BTreeMap;

use lora_sb_kernels::{DType, Generator, Stream};
use lora_sb_model::{Decoder, Frozen, Generation, Model, Next, Recompute, Sampling, Storage, Task, generate};
use support::golden::{Golden, Inputs};
use support::{host, largest, largest_difference, values, zeros};

/// The tests of each family.
macro_rules! families {
    ($($family:ident: $($check:ident),*;)*) => {
        $(mod $family {
            $(#[test]
            fn $check() {
                super::Golden::with(stringify!($family), super::$check);
            })*
        })*
    };
}

families! {
    llama: logits_and_loss, gradients, logits_and_loss_in_bf16, gradients_in_bf16, generation;
    mistral: logits_and_loss, gradients, logits_and_loss_in_bf16, gradients_in_bf16, generation;
    qwen2: logits_and_loss, gradients, logits_and_loss_in_bf16, gradients_in_bf16, generation;
    qwen3: logits_and_loss, gradients, logits_and_loss_in_bf16, gradients_in_bf16, generation;
    gemma2: logits_and_loss, gradients, logits_and_loss_in_bf16, gradients_in_bf16, generation;
    gemma3_text: logits_and_loss, gradients, logits_and_loss_in_bf16, gradients_in_bf16, generation;
    phi3: logits_and_loss, gradients, logits_and_loss_in_bf16, gradients_in_bf16, generation;
    bert_cls: logits_and_loss, gradients, logits_and_loss_in_bf16, gradients_in_bf16;
    roberta_cls: logits_and_loss, gradients, logits_and_loss_in_bf16, gradients_in_bf16;
    roberta_reg: logits_and_loss, gradients, logits_and_loss_in_bf16, gradients_in_bf16;
}

/// How far numbers may be from transformers'.
#[derive(Clone, Copy)]
struct Tolerances {
    /// Of logits, absolute.
    logits: f64,
    loss: f64,
    /// Of gradients, relative to their tensor's largest.
    gradients: f64,
}

impl Tolerances {
    /// Both sides compute in f32.
    fn f32(golden: &Golden) -> Self {
        Tolerances {
            logits: golden.tolerance("logits_max_abs"),
            loss: golden.tolerance("loss_abs"),
            gradients: golden.tolerance("grad_max_rel_to_tensor_max"),
        }
    }

    /// This side computes in `bf16`, transformers in f32.
    ///
    /// A rounding to `bf16` is off by at most 2^-8 of the value, one to f32 by 2^-24. How roundings grow on their way
    /// through the model, and what is left of a gradient after its terms have cancelled each other, is the fixture's
    /// matter, and its own noise tells: transformers' f32 rounds at the same places as `bf16` does here, and in sums as
    /// well. So the tolerance is that noise, 2^16 times as large. The loss moves with the logits: `|dloss| <= 2 max |dz|`
    /// for a softmax, `2 |z - t| |dz|` for a square.
    fn bf16(golden: &Golden, model: &Model) -> Self {
        let ratio = 2f64.powi(24 - 8);
        let logits = ratio * golden.noise("logits_max_abs");
        let slope = match model.config().task {
            Task::Regression => 2.0 * f64::from(golden.floats("expected.safetensors", "loss")[0]).sqrt(),
            _ => 2.0,
        };
        let gradients = ratio * golden.noise("grad_max_rel_to_tensor_max");
        Tolerances { logits, loss: slope * logits, gradients }
    }
}

fn logits_and_loss(golden: &Golden) {
    let inputs = golden.inputs();
    let model = golden.model(Storage::Mapped, &inputs);
    compare_logits_and_loss(golden, &inputs, &model, Tolerances::f32(golden));
}

fn logits_and_loss_in_bf16(golden: &Golden) {
    let inputs = golden.inputs();
    let mut model = golden.model(Storage::Mapped, &inputs);
    model.set_dtype(DType::Bf16).unwrap();
    compare_logits_and_loss(golden, &inputs, &model, Tolerances::bf16(golden, &model));
}

fn gradients(golden: &Golden) {
    let inputs = golden.inputs();
    let model = golden.model(Storage::Trainable, &inputs);
    compare_gradients(golden, &inputs, &model, Tolerances::f32(golden));
}

fn gradients_in_bf16(golden: &Golden) {
    let inputs = golden.inputs();
    let mut model = golden.model(Storage::Trainable, &inputs);
    model.set_dtype(DType::Bf16).unwrap();
    compare_gradients(golden, &inputs, &model, Tolerances::bf16(golden, &model));
}

fn compare_logits_and_loss(golden: &Golden, inputs: &Inputs, model: &Model, tolerances: Tolerances) {
    let batch = inputs.batch(model);
    let logits = model.logits(&batch, &Frozen).unwrap();
    let width = logits.shape()[1];
    let (logits, expected) =
        (values(model.kernels(), &logits), golden.floats("expected.safetensors", "logits"));
    let row = |logits: &[f32], row: usize| logits[row * width..(row + 1) * width].to_vec();
    let tolerance = tolerances.logits;
    for (ours, theirs) in inputs.compared() {
        let difference = f64::from(largest_difference(&row(&logits, ours), &row(&expected, theirs)));
        assert!(difference <= tolerance, "row {theirs}: {difference:e}, tolerance {tolerance:e}");
    }

    let loss = model.loss(&batch, &Frozen).unwrap();
    let expected = f64::from(golden.floats("expected.safetensors", "loss")[0]);
    let tolerance = tolerances.loss;
    assert!(
        (loss - expected).abs() <= tolerance,
        "loss {loss}, expected {expected}, tolerance {tolerance:e}"
    );
}

fn compare_gradients(golden: &Golden, inputs: &Inputs, model: &Model, tolerances: Tolerances) {
    let batch = inputs.batch(model);
    let mut gradients = zeros(model);
    model.loss_and_gradients(&batch, &mut Frozen, &mut gradients, Recompute::None).unwrap();

    let tolerance = tolerances.gradients;
    let zero = golden.meta()["f32_vs_f64"]["analytically_zero_grads"].clone();
    let gradients = host(model, &gradients);
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
    let expected = golden.names("expected.safetensors");
    let expected = expected.iter().filter(|name| name.starts_with("grad.")).count();
    assert_eq!(gradients.len(), expected, "every gradient of the fixture is compared");
}

fn generation(golden: &Golden) {
    let file = "generate.safetensors";
    if !golden.has(file) {
        return;
    }
    let ids = |name| -> Vec<Vec<u32>> {
        let rows = golden.integers(file, name).unwrap();
        rows.into_iter().map(|row| row.into_iter().map(|id| id as u32).collect()).collect()
    };
    let (prompts, new) = (ids("prompt_ids"), ids("new_ids"));
    let model = golden.plain_model(Storage::Mapped);
    let (steps, v) = (new[0].len(), model.config().vocab_size);
    let options = Generation { max_new_tokens: steps, sampling: Sampling::Greedy, stop: vec![] };
    let mut generators: Vec<Generator> =
        (0..prompts.len() as u64).map(|index| Generator::new(0, Stream::Sampling, index)).collect();
    let mut told = vec![Vec::new(); prompts.len()];
    let mut on_token = |index: usize, id| {
        told[index].push(id);
        Next::Continue
    };
    let found = generate(&model, &Frozen, &prompts, &options, &mut generators, &mut on_token).unwrap();
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
