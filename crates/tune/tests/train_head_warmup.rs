//! The warm-up of a classification head: it moves the head and nothing else, by the formula, always to the same bits.

mod common;
mod training;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::{labelled_examples, tiny_encoder};
use lora_sb_data::{Example, Label};
use lora_sb_kernels::{Cpu, Kernels};
use lora_sb_model::{Frozen, Model, Parameter, Recompute, Storage, Task};
use lora_sb_tune::eval::loss_of;
use lora_sb_tune::optim::clip_factor;
use lora_sb_tune::run::{Checkpoint, RunDirectory};
use lora_sb_tune::train::{
    Cursor, HeadWarmup, HeadWarmupStep, TrainingData, check_head_warmup, gradients_of_step, warm_up_head,
};
use lora_sb_tune::{AdapterConfig, Error, Method, Result, TrainConfig, Tuned};
use training::{micro_batches, outcome, plan, restored_on, run_on, settings};

fn data() -> TrainingData {
    TrainingData {
        train: labelled_examples(53, 1, Label::Class),
        validation: labelled_examples(17, 2, Label::Class),
    }
}

fn adapter(method: Method, modules: &[&str]) -> AdapterConfig {
    let modules_to_save = modules.iter().map(|&module| module.to_owned()).collect();
    AdapterConfig { modules_to_save, ..common::config(method) }
}

/// 9 steps of 3 x 2 examples an epoch, the last with 5. The weight decay and the warm-up of the schedule are those of
/// the run and not of the head's warm-up.
fn config() -> TrainConfig {
    TrainConfig {
        per_device_train_batch_size: 3,
        learning_rate: 2e-2,
        weight_decay: 0.5,
        warmup_steps: 4,
        ..settings()
    }
}

fn bits(model: &Model) -> BTreeMap<Parameter, Vec<u32>> {
    let bits = |tensor| model.kernels().to_f32(tensor).unwrap().into_iter().map(f32::to_bits).collect();
    let parameters = model.parameters().into_iter();
    parameters.map(|parameter| (parameter, bits(model.weight(parameter).unwrap()))).collect()
}

fn warmed(model: &mut Model, adapter: &AdapterConfig, steps: usize) -> (HeadWarmup, Vec<HeadWarmupStep>) {
    let mut told = Vec::new();
    let found = warm_up_head(model, adapter, &data(), &config(), steps, &mut |step| told.push(step)).unwrap();
    (found.unwrap(), told)
}

fn adapted(model: Model, adapter: &AdapterConfig) -> Tuned {
    Tuned::adapt(model, adapter, &data().train[..adapter.init.samples], &mut |_| ()).unwrap()
}

#[test]
fn law_the_head_moves_and_nothing_else_and_the_loss_falls() {
    let head = [Parameter::Pooler, Parameter::PoolerBias, Parameter::Classifier, Parameter::ClassifierBias];
    for (model_type, moved) in [("bert", &head[2..]), ("roberta", &head)] {
        let adapter = adapter(Method::LoraSb, &["classifier"]);
        let mut model = tiny_encoder(model_type, 3);
        let before = bits(&model);
        let loss = |model: &Model| loss_of(model, &Frozen, &data().validation, 4).unwrap().value().unwrap();
        let held_out = loss(&model);
        let (found, told) = warmed(&mut model, &adapter, 45);
        for (parameter, after) in bits(&model) {
            assert_eq!(after != before[&parameter], moved.contains(&parameter), "{parameter:?}");
        }
        assert!(found.loss_after < 0.7 * found.loss_before, "{model_type}: {found:?}");
        assert!(loss(&model) < 0.9 * held_out, "{model_type}: {held_out} -> {}", loss(&model));
        assert_eq!((found.steps, told.len(), told[44].step, told[44].of), (45, 45, 45, 45));
        assert_eq!(told[0].loss, found.loss_before);

        // The gradient that the adapter starts from comes through the warmed head.
        let estimate = |model| adapted(model, &adapter).init_report().unwrap().estimate.unwrap().loss;
        let warm = bits(&model);
        let tuned = adapted(model, &adapter);
        assert_eq!(bits(&tuned.model), warm);
        let from_warm = tuned.init_report().unwrap().estimate.unwrap().loss;
        assert!(from_warm < estimate(tiny_encoder(model_type, 3)));
    }
}

#[test]
fn the_first_step_is_adamws_on_the_runs_first_examples() {
    let (data, adapter) = (data(), adapter(Method::Lora, &["classifier"]));
    for max_grad_norm in [0.0, 1e-3] {
        let config = TrainConfig { max_grad_norm, ..config() };
        let mut model = tiny_encoder("roberta", 3);
        let mut told = Vec::new();
        warm_up_head(&mut model, &adapter, &data, &config, 1, &mut |step| told.push(step)).unwrap();

        // By the passes of training, which a LoRA that is still zero does not change. They go backward through the body.
        let mut cursor = Cursor::new(data.train.len(), &config).unwrap();
        let examples: Vec<&Example> =
            cursor.step(0).indices.iter().map(|&index| &data.train[index]).collect();
        assert_eq!(examples.len(), 6);
        let mut tuned = adapted(tiny_encoder("roberta", 3), &adapter);
        let step = gradients_of_step(&mut tuned, &examples, &micro_batches(3, Recompute::None)).unwrap();
        assert_eq!(told[0].loss, step.loss);

        let gradients = common::gradients(&mut tuned);
        let names: Vec<(Parameter, String)> = tuned
            .model
            .parameters()
            .into_iter()
            .filter(|parameter| parameter.of_classification())
            .map(|parameter| (parameter, tuned.model.name(parameter)))
            .collect();
        let squares = |name: &String| gradients[name].iter().map(|&g| f64::from(g).powi(2)).sum::<f64>();
        let norm = names.iter().map(|(_, name)| squares(name)).sum::<f64>().sqrt();
        let scale = clip_factor(norm, max_grad_norm);
        for (parameter, name) in &names {
            let values = |model: &Model| model.kernels().to_f32(model.weight(*parameter).unwrap()).unwrap();
            // The moments' corrections cancel at the first step: m = g, v = g^2.
            let moved = |(value, gradient): (f32, &f32)| {
                let g = f64::from(*gradient) * scale;
                (f64::from(value) - config.learning_rate * g / (g.abs() + config.adam_epsilon)) as f32
            };
            let expected: Vec<f32> =
                values(&tuned.model).into_iter().zip(&gradients[name]).map(moved).collect();
            common::assert_near(name, &values(&model), &expected, common::rounding(4));
        }
    }
}

#[test]
fn law_any_number_of_threads_gives_the_same_bits() {
    let adapter = adapter(Method::LoraSb, &["classifier", "pooler"]);
    let run = |threads| {
        let kernels: Arc<dyn Kernels> = Arc::new(Cpu::new(threads).unwrap());
        let config = tiny_encoder("bert", 3).config().clone();
        let mut model = Model::random(config, kernels, 11, Storage::Mapped).unwrap();
        let (found, told) = warmed(&mut model, &adapter, 11);
        (
            bits(&model),
            found.loss_after.to_bits(),
            told.iter().map(|step| step.loss.to_bits()).collect::<Vec<_>>(),
        )
    };
    let expected = run(1);
    for threads in [1, 2, 3, 5] {
        assert!(run(threads) == expected, "{threads} threads");
    }
}

#[test]
fn law_no_step_changes_nothing() {
    let mut told = Vec::new();
    for model in [tiny_encoder("bert", 3), common::tiny_model(2)] {
        let mut model = model;
        let before = bits(&model);
        for method in [Method::LoraSb, Method::Full] {
            let (data, adapter) = (TrainingData::default(), adapter(method, &[]));
            let found = warm_up_head(&mut model, &adapter, &data, &config(), 0, &mut |step| told.push(step));
            assert_eq!(found.unwrap(), None);
        }
        assert!(bits(&model) == before && told.is_empty());
    }
}

#[test]
fn a_resumed_run_does_not_repeat_it() {
    let (data, adapter, config) = (data(), adapter(Method::LoraSb, &["classifier"]), config());
    let start = |steps| {
        let mut model = tiny_encoder("roberta", 3);
        warm_up_head(&mut model, &adapter, &data, &config, steps, &mut |_| ()).unwrap();
        adapted(model, &adapter)
    };
    let run = |mut tuned: Tuned, stop: Option<usize>| {
        let directory = tempfile::tempdir().unwrap();
        let mut run_directory = RunDirectory::create(directory.path(), plan(&config)).unwrap();
        run_on(&data, &mut tuned, &config, &mut run_directory, None, stop).0.unwrap();
        directory
    };
    let expected = outcome(run(start(5), None).path(), &config);
    assert!(expected != outcome(run(start(0), None).path(), &config));
    for stop in [1, 4] {
        let directory = run(start(5), Some(stop));
        let mut run_directory = RunDirectory::open(directory.path(), plan(&config)).unwrap();
        let checkpoint = Checkpoint::latest(directory.path(), &mut |error| panic!("{error}")).unwrap();
        let model = tiny_encoder("roberta", 3);
        let mut tuned = restored_on(model, &adapter, &run_directory, checkpoint.as_ref().unwrap());
        run_on(&data, &mut tuned, &config, &mut run_directory, checkpoint, None).0.unwrap();
        assert!(outcome(directory.path(), &config) == expected, "stopped after {stop}");
    }
}

#[test]
fn what_cannot_be_warmed_up_is_refused() {
    let attempt =
        |model: &mut Model, adapter: &AdapterConfig, data: &TrainingData| -> Result<Option<HeadWarmup>> {
            warm_up_head(model, adapter, data, &config(), 3, &mut |_| ())
        };
    let with = |modules: &[&str]| adapter(Method::Lora, modules);
    for (mut model, adapter, reason) in [
        (common::tiny_model(1), with(&[]), "0, as the model has no classification head, found 3"),
        (tiny_encoder("bert", 3), adapter(Method::Full, &[]), "full fine-tuning train the head as well"),
        (tiny_encoder("bert", 3), with(&[]), "0, as modules_to_save names no module of the head, found 3"),
        (tiny_encoder("bert", 3), with(&["score"]), "found \"score\""),
    ] {
        let before = bits(&model);
        let error = attempt(&mut model, &adapter, &data()).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
        assert_eq!(check_head_warmup(3, &adapter, model.config()).unwrap_err().to_string(), error);
        check_head_warmup(0, &adapter, model.config()).unwrap();
        assert!(bits(&model) == before);
    }
    let mut model = tiny_encoder("bert", 2);
    assert_eq!(model.config().task, Task::Classification { labels: 2 });
    let error = attempt(&mut model, &with(&["classifier"]), &data()).unwrap_err().to_string();
    assert!(error.contains("expected a class below the 2 that the model has, found class 2"), "{error}");
    attempt(&mut model, &with(&["classifier"]), &TrainingData::default()).unwrap_err();
}

#[test]
fn a_loss_that_is_not_finite_names_its_examples() {
    let (data, adapter) = (data(), adapter(Method::LoraSb, &["classifier"]));
    let mut model = tiny_encoder("bert", 3);
    let kernels = model.kernels().clone();
    kernels.fill(f32::NAN, model.weight_mut(Parameter::Classifier).unwrap()).unwrap();
    let error = warm_up_head(&mut model, &adapter, &data, &config(), 3, &mut |_| panic!()).unwrap_err();
    let first = Cursor::new(data.train.len(), &config()).unwrap().step(0).indices[..3].to_vec();
    let Error::NotFiniteStep { step: 1, examples, .. } = &error else { panic!("{error}") };
    assert_eq!(examples.len(), 3, "of the micro-batch");
    for (example, index) in examples.iter().zip(first) {
        assert_eq!(*example, data.train[index].source);
    }
    let text = error.to_string();
    assert!(
        text.starts_with("step 1: the loss of the head's warm-up is NaN; the micro-batch holds"),
        "{text}"
    );
    assert!(error.hint().unwrap().contains("learning_rate"));
}
