//! Encoders: a classification head trained beside an adapter, its metrics, and what is kept of it.

mod common;
mod training;

use std::collections::BTreeMap;

use common::{labelled_examples, tiny_encoder};
use lora_sb_data::{Example, Label};
use lora_sb_model::{Config, Model, Parameter, Recompute, Storage, Task};
use lora_sb_tune::eval::{Metric as Score, held_out_loss, metrics_of, predictions, scores};
use lora_sb_tune::export::native;
use lora_sb_tune::run::{Checkpoint, Metric, RunDirectory};
use lora_sb_tune::train::{Event, TrainingData, gradients_of_step};
use lora_sb_tune::{AdapterConfig, Method, Role, Targets, TrainConfig, Tuned, head};
use training::{micro_batches, outcome, plan, restored_on, run_on, settings};

fn class(number: u32) -> Label {
    Label::Class(number)
}

fn value(number: u32) -> Label {
    Label::Value(number as f32 - 1.0)
}

fn data(label: impl Fn(u32) -> Label + Copy) -> TrainingData {
    TrainingData { train: labelled_examples(53, 1, label), validation: labelled_examples(17, 2, label) }
}

fn adapter(method: Method) -> AdapterConfig {
    AdapterConfig {
        target_modules: Targets::parse("query,value,attention.output.dense,output.dense"),
        modules_to_save: vec!["classifier".into()],
        lora_dropout: 0.1,
        ..common::config(method)
    }
}

fn adapted(model: Model, adapter: &AdapterConfig, data: &TrainingData) -> Tuned {
    Tuned::adapt(model, adapter, &data.train[..adapter.init.samples], &mut |_| ()).unwrap()
}

/// 7 steps of 4 x 2 examples an epoch, for 12 epochs.
fn config() -> TrainConfig {
    TrainConfig {
        learning_rate: 2e-2,
        per_device_train_batch_size: 4,
        num_train_epochs: 12.0,
        eval_steps: 10,
        save_steps: 30,
        max_grad_norm: 0.0,
        metric_for_best_model: Some(Score::Accuracy),
        ..settings()
    }
}

fn evaluations(events: &[Event]) -> Vec<(usize, f64, BTreeMap<String, f64>, bool)> {
    let evaluated = |event: &Event| match event {
        Event::Evaluated { step, eval_loss, metrics, best, .. } => {
            Some((*step, *eval_loss, metrics.clone(), *best))
        }
        _ => None,
    };
    events.iter().filter_map(evaluated).collect()
}

#[test]
fn law_lora_sb_learns_a_toy_task_end_to_end() {
    let (data, config) = (data(class), config());
    for model_type in ["bert", "roberta"] {
        let adapter = adapter(Method::LoraSb);
        let start = || adapted(tiny_encoder(model_type, 3), &adapter, &data);
        let directory = tempfile::tempdir().unwrap();
        let mut run_directory = RunDirectory::create(directory.path(), plan(&config)).unwrap();
        let mut tuned = start();
        let (summary, events) = run_on(&data, &mut tuned, &config, &mut run_directory, None, None);
        let (summary, found) = (summary.unwrap(), evaluations(&events));

        let last = &found.last().unwrap().2;
        assert!(last["accuracy"] > 0.8 && last["matthews_correlation"] > 0.7, "{model_type}: {found:?}");
        assert!(!last.contains_key("f1"), "there are three classes");
        assert_eq!(&summary.last_metrics, last);
        // Of equal scores the first is the best.
        let best = found.iter().rev().max_by(|a, b| a.2["accuracy"].total_cmp(&b.2["accuracy"])).unwrap();
        let marked = summary.best.unwrap();
        assert_eq!((marked.step, marked.eval_loss, marked.score), (best.0, best.1, Some(best.2["accuracy"])));
        let logged: Vec<_> = run_directory.metrics().unwrap();
        let logged = logged.into_iter().filter_map(|line| match line {
            Metric::Evaluation { step, eval_loss, metrics, .. } => Some((step, eval_loss, metrics)),
            Metric::Step { .. } | Metric::Memory { .. } => None,
        });
        let told = found.iter().map(|(step, loss, metrics, _)| (*step, *loss, metrics.clone()));
        assert!(logged.eq(told));

        // The metrics are those of the predictions, and the loss is the model's own.
        let said = predictions(&tuned, &data.validation, 5).unwrap();
        let task = tuned.model.config().task;
        assert_eq!(&scores(task, &said, &data.validation, &metrics_of(task)).unwrap(), last);
        let loss = held_out_loss(&tuned, &data.validation, 7).unwrap().value().unwrap();
        assert!((loss / summary.last_eval.unwrap().eval_loss - 1.0).abs() < 1e-5);

        // The head is kept with the adapter, and puts itself in the place of another.
        let other = Model::random(tuned.model.config().clone(), common::device(), 11, Storage::Trainable);
        let loaded = native::load(&summary.adapter.unwrap(), other.unwrap()).unwrap();
        assert_eq!(predictions(&loaded, &data.validation, 5).unwrap(), said);
        assert_eq!(loaded.head_parameters(), tuned.head_parameters());
        for (name, _) in tuned.trained_tensors() {
            assert_eq!(common::tensor(&loaded, &name), common::tensor(&tuned, &name), "{name}");
        }

        let expected = outcome(directory.path(), &config);
        resumed(&data, &config, &adapter, model_type, start(), &expected);
    }
}

/// Stopped twice and resumed, as new processes do it: the same bits.
fn resumed(
    data: &TrainingData,
    config: &TrainConfig,
    adapter: &AdapterConfig,
    model_type: &str,
    mut tuned: Tuned,
    expected: &training::Outcome,
) {
    let directory = tempfile::tempdir().unwrap();
    let mut run_directory = RunDirectory::create(directory.path(), plan(config)).unwrap();
    let mut resume = None;
    for stop in [3, 31] {
        run_on(data, &mut tuned, config, &mut run_directory, resume, Some(stop)).0.unwrap();
        run_directory = RunDirectory::open(directory.path(), plan(config)).unwrap();
        let checkpoint = Checkpoint::latest(directory.path(), &mut |error| panic!("{error}")).unwrap();
        tuned =
            restored_on(tiny_encoder(model_type, 3), adapter, &run_directory, checkpoint.as_ref().unwrap());
        resume = checkpoint;
    }
    run_on(data, &mut tuned, config, &mut run_directory, resume, None).0.unwrap();
    assert!(outcome(directory.path(), config) == *expected, "{model_type}: the resumed run differs");
}

#[test]
fn law_every_method_learns_numbers() {
    let data = data(value);
    let config = TrainConfig {
        metric_for_best_model: Some(Score::Pearson),
        eval_steps: 0,
        learning_rate: 1e-2,
        ..config()
    };
    for method in Method::ALL {
        let mut tuned = adapted(tiny_encoder("bert", 1), &adapter(method), &data);
        let directory = tempfile::tempdir().unwrap();
        let mut run_directory = RunDirectory::create(directory.path(), plan(&config)).unwrap();
        let (summary, events) = run_on(&data, &mut tuned, &config, &mut run_directory, None, None);
        let (summary, found) = (summary.unwrap(), evaluations(&events));
        assert!(found[1].1 < 0.7 * found[0].1, "{method}: {found:?}");
        assert!(found[1].2["pearson"] > 0.6 && found[1].2.contains_key("spearman"), "{method}: {found:?}");
        assert_eq!(summary.best.unwrap().step, summary.total_steps, "{method}");
    }
}

#[test]
fn any_split_of_labelled_examples_gives_the_same_step() {
    let data = data(class);
    let examples: Vec<&Example> = data.train[..9].iter().collect();
    let mut tuned = adapted(
        tiny_encoder("roberta", 3),
        &AdapterConfig { lora_dropout: 0.0, ..adapter(Method::Lora) },
        &data,
    );
    common::shake(&mut tuned, 0.1);
    let whole = gradients_of_step(&mut tuned, &examples, &micro_batches(9, Recompute::None)).unwrap();
    let expected = common::gradients(&mut tuned);
    // Each example is one label: the mean over examples of any length.
    assert_eq!(whole.trained_tokens, 9);
    let alone = |example: &&Example| {
        held_out_loss(&tuned, std::slice::from_ref(*example), 1).unwrap().value().unwrap() / 9.0
    };
    let mean: f64 = examples.iter().map(alone).sum();
    assert!((whole.loss / mean - 1.0).abs() < 1e-5, "{} {mean}", whole.loss);
    for size in [1, 2, 4] {
        let split = gradients_of_step(&mut tuned, &examples, &micro_batches(size, Recompute::Block)).unwrap();
        assert!((split.loss / whole.loss - 1.0).abs() < 1e-5);
        for (name, found) in common::gradients(&mut tuned) {
            common::assert_near(&name, &found, &expected[&name], common::rounding(100));
        }
    }
}

#[test]
fn the_head_is_trained_as_far_as_it_is_named() {
    let config = |json: Model| json.config().clone();
    let (bert, roberta) = (config(tiny_encoder("bert", 3)), config(tiny_encoder("roberta", 3)));
    let resolved = |config: &Config, names: &[&str]| {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        head::resolve(&names, config)
    };
    let (pooler, last) = (
        [Parameter::Pooler, Parameter::PoolerBias].as_slice(),
        [Parameter::Classifier, Parameter::ClassifierBias].as_slice(),
    );
    let all = [pooler, last].concat();
    assert_eq!(resolved(&bert, &["classifier"]).unwrap(), last);
    assert_eq!(resolved(&bert, &["pooler.dense"]).unwrap(), pooler);
    assert_eq!(resolved(&bert, &["classifier", "bert.pooler"]).unwrap(), all);
    assert_eq!(resolved(&roberta, &["classifier"]).unwrap(), all);
    assert_eq!(resolved(&roberta, &["classifier.out_proj"]).unwrap(), last);
    assert_eq!(resolved(&roberta, &["out_proj", "classifier.dense", "out_proj"]).unwrap(), all);
    assert_eq!(resolved(&roberta, &[]).unwrap(), []);
    for (config, name, known) in [
        (&bert, "score", "bert.pooler.dense, classifier"),
        // It names the encoder's layers as well as the head's.
        (&roberta, "dense", "classifier, classifier.dense, classifier.out_proj"),
        (&roberta, "roberta", "classifier.dense"),
        (&roberta, "query", "classifier.dense"),
        (&roberta, "lassifier", "classifier.dense"),
        (common::tiny_model(1).config(), "lm_head", "no classification head"),
    ] {
        let error = resolved(config, &[name]).unwrap_err().to_string();
        assert!(error.contains(known) && error.contains(&format!("{name:?}")), "{error}");
    }
    assert_eq!(head::default_modules(&bert), ["classifier"]);
    assert!(head::default_modules(common::tiny_model(1).config()).is_empty());
}

#[test]
fn a_head_is_counted_and_visited_behind_the_adapter() {
    let data = data(class);
    let mut tuned = adapted(tiny_encoder("roberta", 3), &adapter(Method::LoraSb), &data);
    let head = 18 * 18 + 18 + 3 * 18 + 3;
    assert_eq!((tuned.head_parameters(), tuned.trained_parameters()), (head, 8 * 25 + head));
    let mut visited = Vec::new();
    tuned
        .visit(&mut |name, _, _| {
            visited.push(name.to_owned());
            Ok(())
        })
        .unwrap();
    let named: Vec<String> = tuned.trained_tensors().into_iter().map(|(name, _)| name).collect();
    assert_eq!(visited, named);
    assert_eq!(
        visited[8..],
        [
            "classifier.dense.weight",
            "classifier.dense.bias",
            "classifier.out_proj.weight",
            "classifier.out_proj.bias"
        ]
    );
    let roles = tuned.trained_roles();
    assert_eq!(roles.len(), visited.len());
    assert_eq!(roles[8], Role::Parameter(Parameter::Pooler));

    let without = AdapterConfig { modules_to_save: Vec::new(), ..adapter(Method::LoraSb) };
    let frozen = adapted(tiny_encoder("roberta", 3), &without, &data);
    assert_eq!((frozen.head_parameters(), frozen.trained_parameters()), (0, 8 * 25));
    let full = Tuned::full(tiny_encoder("roberta", 3)).unwrap();
    assert_eq!(
        (full.head_parameters(), full.trained_parameters()),
        (head, full.model.config().parameter_count())
    );
}

#[test]
fn labels_and_settings_that_do_not_fit_are_refused_before_anything_is_computed() {
    let attempt = |model: Model, config: &TrainConfig, data: &TrainingData| {
        let directory = tempfile::tempdir().unwrap();
        let mut run_directory = RunDirectory::create(directory.path(), plan(config)).unwrap();
        let mut tuned = Tuned::full(model).unwrap();
        let (summary, events) = run_on(data, &mut tuned, config, &mut run_directory, None, None);
        assert!(events.is_empty());
        summary.unwrap_err().to_string()
    };
    let plain = TrainConfig { metric_for_best_model: None, ..config() };
    let one = |label: Option<Label>| {
        let mut data = data(class);
        data.train[4].label = label;
        data
    };
    let encoder = || tiny_encoder("bert", 3);
    let expected = "test:5: expected a class below the 3 that the model has, found";
    assert_eq!(attempt(encoder(), &plain, &one(Some(Label::Class(3)))), format!("{expected} class 3"));
    assert_eq!(
        attempt(encoder(), &plain, &one(Some(Label::Value(0.5)))),
        format!("{expected} the number 0.5")
    );
    assert_eq!(attempt(encoder(), &plain, &one(None)), format!("{expected} no label"));
    let nan = attempt(tiny_encoder("bert", 1), &plain, &one(Some(Label::Value(f32::NAN))));
    assert!(nan.contains("expected a finite number as label, found class"), "{nan}");
    let decoder = attempt(common::tiny_model(1), &plain, &data(class));
    assert!(decoder.contains("expected no label, as the model predicts tokens"), "{decoder}");

    let mut long = data(class);
    long.validation[2].ids = vec![3; 41];
    long.validation[2].trained = vec![false; 41];
    let long = attempt(encoder(), &plain, &long);
    assert_eq!(long, "test:3: expected at most the 40 tokens that the model has positions for, found 41");

    let by = |metric| TrainConfig { metric_for_best_model: Some(metric), ..config() };
    let pearson = attempt(encoder(), &by(Score::Pearson), &data(class));
    assert_eq!(
        pearson,
        "metric_for_best_model: expected nothing, or one of accuracy, matthews_correlation, found pearson"
    );
    let f1 = attempt(encoder(), &by(Score::F1), &data(class));
    assert!(f1.ends_with("found f1"), "{f1}");
    let text = attempt(common::tiny_model(1), &by(Score::Accuracy), &TrainingData::default());
    assert!(text.contains("measured by its loss"), "{text}");
}

#[test]
fn scores_are_of_the_tasks_own_predictions() {
    let (two, many) = (Task::Classification { labels: 2 }, Task::Classification { labels: 3 });
    assert!(metrics_of(two).contains(&Score::F1) && !metrics_of(many).contains(&Score::F1));
    assert!(metrics_of(Task::LanguageModel).is_empty());
    let examples = labelled_examples(4, 3, value);
    let said = |values: [f32; 4]| values.map(Label::Value).to_vec();
    // A correlation with a constant is not defined, and left out.
    let constant =
        scores(Task::Regression, &said([0.5; 4]), &examples, &metrics_of(Task::Regression)).unwrap();
    assert_eq!(constant, BTreeMap::new());
    let refused = |predictions: &[Label], metrics: &[Score]| {
        scores(Task::Regression, predictions, &examples, metrics).unwrap_err().to_string()
    };
    assert!(refused(&said([0.5; 4]), &[Score::Accuracy]).contains("one of [pearson, spearman]"));
    assert!(refused(&said([0.5; 4])[1..], &[]).contains("one for each of 4 examples, found 3"));
    assert!(refused(&[Label::Class(1); 4], &[]).starts_with("test:1: expected a label as it is predicted"));
    let decoder = Tuned::full(common::tiny_model(1)).unwrap();
    let error = predictions(&decoder, &examples, 2).unwrap_err().to_string();
    assert!(error.contains("a model with a classification head"), "{error}");
}
