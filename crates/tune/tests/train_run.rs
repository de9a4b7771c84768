//! A whole run: its events, its files, and how it ends.

mod common;
mod training;

use std::sync::atomic::AtomicBool;

use lora_sb_kernels::Tensor;
use lora_sb_model::{Norm, Parameter};
use lora_sb_tune::eval::held_out_loss;
use lora_sb_tune::export::native;
use lora_sb_tune::optim::Scheduler;
use lora_sb_tune::run::{Checkpoint, Metric, RunDirectory};
use lora_sb_tune::train::{Cursor, Event, StepReport, TrainingData, train};
use lora_sb_tune::{Error, Method, TrainConfig};
use training::{FakeClock, Recorder, data, examples, plan, run, settings, tuned};

fn steps(events: &[Event]) -> Vec<StepReport> {
    let step = |event: &Event| if let Event::Step(report) = event { Some(*report) } else { None };
    events.iter().filter_map(step).collect()
}

#[test]
fn a_run_tells_and_writes_what_it_does() {
    let config = settings();
    let directory = tempfile::tempdir().unwrap();
    let mut run_directory = RunDirectory::create(directory.path(), plan(&config)).unwrap();
    let mut now = tuned(Method::LoraSb);
    let before = held_out_loss(&now, &data().validation, 2).unwrap().value();
    let (summary, events) = run(&mut now, &config, &mut run_directory, None, None);
    let summary = summary.unwrap();

    let steps = steps(&events);
    assert_eq!(steps.iter().map(|report| report.step).collect::<Vec<_>>(), (1..=9).collect::<Vec<_>>());
    let schedule = config.schedule(11).unwrap();
    let tokens: usize = data().train.iter().map(|example| example.ids.len()).sum();
    for report in &steps {
        assert_eq!(report.learning_rate, schedule.learning_rate(report.step - 1));
        assert_eq!(report.epoch, report.step as f64 / 3.0);
        assert_eq!(report.seconds, 0.5, "one look at the clock before and one after");
        assert_eq!(report.tokens_per_second, report.tokens as f64 / 0.5);
        assert_eq!(report.remaining_seconds, (9 - report.step) as f64 * 0.5);
    }
    for epoch in steps.chunks(3) {
        assert_eq!(
            epoch.iter().map(|report| report.tokens).sum::<usize>(),
            tokens,
            "every example once an epoch"
        );
    }
    assert_eq!(summary.tokens, 3 * tokens as u64);

    let evaluated: Vec<usize> = events
        .iter()
        .filter_map(|event| if let Event::Evaluated { step, .. } = event { Some(*step) } else { None })
        .collect();
    assert_eq!(evaluated, [0, 4, 8, 9]);
    assert_eq!(summary.first_eval_loss, before);
    assert_eq!(
        summary.last_eval.unwrap().eval_loss,
        held_out_loss(&now, &data().validation, 2).unwrap().value().unwrap()
    );
    assert!(summary.failures.is_empty() && !summary.stopped);
    assert_eq!(events.last(), Some(&Event::Finished(Box::new(summary.clone()))));

    let lines = run_directory.metrics().unwrap();
    let logged: Vec<(usize, f64, f64)> = lines
        .iter()
        .filter_map(|line| match line {
            Metric::Step { step, loss, grad_norm, .. } => Some((*step, *loss, *grad_norm)),
            Metric::Evaluation { .. } | Metric::Memory { .. } => None,
        })
        .collect();
    assert_eq!(logged, steps.iter().map(|r| (r.step, r.loss, r.grad_norm)).collect::<Vec<_>>());

    let adapter = native::load(&summary.adapter.unwrap(), common::tiny_model(2)).unwrap();
    for (name, value) in adapter.trained_tensors() {
        assert_eq!(common::tensor(&adapter, &name), common::tensor(&now, &name));
        assert!(!value.is_empty());
    }
}

/// Random labels cannot be learnt in general, but 11 of them can be learnt by heart.
#[test]
fn the_loss_falls() {
    let config =
        TrainConfig { num_train_epochs: 20.0, max_grad_norm: 0.0, learning_rate: 3e-2, ..settings() };
    for method in Method::ALL {
        let directory = tempfile::tempdir().unwrap();
        let mut run_directory = RunDirectory::create(directory.path(), plan(&config)).unwrap();
        let (summary, events) = run(&mut tuned(method), &config, &mut run_directory, None, None);
        summary.unwrap();
        let steps = steps(&events);
        let mean = |reports: &[StepReport]| reports.iter().map(|report| report.loss).sum::<f64>() / 3.0;
        let (first, last) = (mean(&steps[..3]), mean(&steps[steps.len() - 3..]));
        assert!(last < 0.9 * first, "{method}: {first} to {last}");
    }
}

#[test]
fn the_best_checkpoint_and_the_newest_are_kept() {
    // The held-out loss falls as far as all examples are alike, and rises as those trained on are learnt by heart.
    let config = TrainConfig {
        learning_rate: 0.1,
        lr_scheduler_type: Scheduler::Constant,
        eval_steps: 1,
        save_steps: 1,
        save_total_limit: Some(2),
        num_train_epochs: 8.0,
        ..settings()
    };
    let directory = tempfile::tempdir().unwrap();
    let mut run_directory = RunDirectory::create(directory.path(), plan(&config)).unwrap();
    let mut now = tuned(Method::Lora);
    let data = data();
    let (mut recorder, clock, stop) = (Recorder::default(), FakeClock::default(), AtomicBool::new(false));
    let summary =
        train(&mut now, &data, &config, &mut run_directory, None, &mut recorder, &clock, None, &stop)
            .unwrap();
    let losses: Vec<(usize, f64)> = recorder
        .events
        .iter()
        .filter_map(|event| match event {
            Event::Evaluated { step, eval_loss, .. } => Some((*step, *eval_loss)),
            _ => None,
        })
        .collect();
    let lowest = losses.iter().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    let best = summary.best.unwrap();
    assert_eq!((best.step, best.eval_loss), *lowest);
    assert!((1..23).contains(&best.step), "the test needs a best that is not among the newest: {losses:?}");

    let mut kept: Vec<_> = std::fs::read_dir(directory.path().join("checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    kept.sort();
    let mut expected = [best.step, 23, 24].map(|step| format!("step-{step}"));
    expected.sort();
    assert_eq!(kept, expected);

    let marked: lora_sb_tune::run::Best =
        serde_json::from_slice(&std::fs::read(directory.path().join("best.json")).unwrap()).unwrap();
    assert_eq!(marked, best);
    let adapter = native::load(&summary.best_adapter.unwrap(), common::tiny_model(2)).unwrap();
    assert_eq!(held_out_loss(&adapter, &data.validation, 2).unwrap().value(), Some(best.eval_loss));
    // The model in memory is that of the last step, not the best one.
    let last = held_out_loss(&now, &data.validation, 2).unwrap().value();
    assert_eq!(last, Some(summary.last_eval.unwrap().eval_loss));
}

#[test]
fn a_stop_before_the_first_step_saves_the_start() {
    let config = settings();
    let directory = tempfile::tempdir().unwrap();
    let mut run_directory = RunDirectory::create(directory.path(), plan(&config)).unwrap();
    let stop = AtomicBool::new(true);
    let mut recorder = Recorder::default();
    let mut now = tuned(Method::LoraSb);
    let clock = FakeClock::default();
    let summary =
        train(&mut now, &data(), &config, &mut run_directory, None, &mut recorder, &clock, None, &stop)
            .unwrap();
    assert!(summary.stopped && summary.step == 0);
    assert_eq!(recorder.saved(), [0]);
    Checkpoint::open(&summary.checkpoint).unwrap();
}

/// Tokens 28 have an embedding that is NaN, and one example holds one.
#[test]
fn a_loss_that_is_not_finite_stops_with_the_batch_and_the_state_before_it() {
    let mut broken = data();
    for example in &mut broken.train {
        example.ids.iter_mut().for_each(|id| *id = (*id).min(27));
    }
    broken.train[6].ids[1] = 28;
    broken.validation.clear();
    let config = TrainConfig { save_steps: 0, ..settings() };
    let poisoned = || {
        let mut now = tuned(Method::Lora);
        let kernels = training::kernels(&now);
        let embedding = now.model.weight_mut(Parameter::Embedding).unwrap();
        let mut values = kernels.to_f32(embedding).unwrap();
        values[28 * 18..].fill(f32::NAN);
        kernels.write_f32(embedding, &values).unwrap();
        now
    };
    let directory = tempfile::tempdir().unwrap();
    let mut run_directory = RunDirectory::create(directory.path(), plan(&config)).unwrap();
    let mut recorder = Recorder::default();
    let mut now = poisoned();
    let (clock, stop) = (FakeClock::default(), AtomicBool::new(false));
    let error =
        train(&mut now, &broken, &config, &mut run_directory, None, &mut recorder, &clock, None, &stop)
            .unwrap_err();

    let finished = steps(&recorder.events).len();
    let message = error.to_string();
    assert!(message.starts_with(&format!("step {}: the loss is NaN", finished + 1)), "{message}");
    let Error::NotFiniteStep { examples, .. } = &error else { panic!("{error:?}") };
    assert!(examples.iter().any(|at| at.to_string() == "train.jsonl:7"), "{message}");
    assert!(examples.len() <= 2, "the micro-batch, not the step: {message}");
    let hint = error.hint().unwrap();
    assert!(hint.contains("learning_rate") && hint.contains(&format!("step-{finished}")), "{hint}");

    let saved = Checkpoint::latest(directory.path(), &mut |_| ()).unwrap().unwrap();
    assert_eq!(saved.state().step, finished);
    let kernels = training::kernels(&now);
    for (name, tensor) in saved.trained(kernels.as_ref()).unwrap() {
        let values = kernels.to_f32(&tensor).unwrap();
        assert!(values.iter().all(|value| value.is_finite()), "{name}");
        assert_eq!(values, common::tensor(&now, &name), "nothing moved after the state was saved");
    }
}

/// A huge but finite loss gradient times a huge but finite input: only their product overflows.
#[test]
fn a_gradient_that_is_not_finite_stops_with_its_micro_batch() {
    let config = settings();
    let mut now = tuned(Method::Lora);
    let kernels = training::kernels(&now);
    let gain = now.model.weight_mut(Parameter::Gain(Norm::Final)).unwrap();
    kernels.fill(1e20, gain).unwrap();
    let huge = |name: &str, value: &mut Tensor, _: &mut Tensor| {
        if name.ends_with("lora_A") { Ok(kernels.fill(1e30, value)?) } else { Ok(()) }
    };
    now.visit(&mut { huge }).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let mut run_directory = RunDirectory::create(directory.path(), plan(&config)).unwrap();
    let (summary, events) = run(&mut now, &config, &mut run_directory, None, None);
    let error = summary.unwrap_err();
    assert!(steps(&events).is_empty());
    let Error::NotFiniteStep { step: 1, quantity: "gradient norm", examples, .. } = &error else {
        panic!("{error:?}")
    };
    let mut cursor = Cursor::new(11, &config).unwrap();
    let lines: Vec<usize> = cursor.step(0).indices[..2].iter().map(|index| index + 1).collect();
    assert_eq!(examples.iter().map(|at| at.line).collect::<Vec<_>>(), lines);
}

#[test]
fn a_held_out_loss_that_is_not_finite_names_its_examples() {
    let mut broken = data();
    for example in broken.train.iter_mut().chain(&mut broken.validation) {
        example.ids.iter_mut().for_each(|id| *id = (*id).min(27));
    }
    broken.validation[2].ids[0] = 28;
    let mut now = tuned(Method::Lora);
    let kernels = training::kernels(&now);
    let embedding = now.model.weight_mut(Parameter::Embedding).unwrap();
    let mut values = kernels.to_f32(embedding).unwrap();
    values[28 * 18..].fill(f32::INFINITY);
    kernels.write_f32(embedding, &values).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let config = settings();
    let mut run_directory = RunDirectory::create(directory.path(), plan(&config)).unwrap();
    let (mut recorder, clock, stop) = (Recorder::default(), FakeClock::default(), AtomicBool::new(false));
    let error =
        train(&mut now, &broken, &config, &mut run_directory, None, &mut recorder, &clock, None, &stop)
            .unwrap_err()
            .to_string();
    assert_eq!(error, "step 0: the held-out loss is NaN; the micro-batch holds train.jsonl:3");
}

#[test]
fn data_that_cannot_be_trained_on_is_refused_before_anything_is_computed() {
    let config = settings();
    let attempt = |change: &dyn Fn(&mut TrainingData)| {
        let mut data = data();
        change(&mut data);
        let directory = tempfile::tempdir().unwrap();
        let mut run_directory = RunDirectory::create(directory.path(), plan(&config)).unwrap();
        let (mut recorder, clock, stop) = (Recorder::default(), FakeClock::default(), AtomicBool::new(false));
        let mut now = tuned(Method::Lora);
        let error =
            train(&mut now, &data, &config, &mut run_directory, None, &mut recorder, &clock, None, &stop);
        assert!(recorder.events.is_empty());
        error.unwrap_err().to_string()
    };
    let empty = attempt(&|data| data.train.clear());
    assert!(empty.contains("examples: expected at least 1, found 0"), "{empty}");
    let masked = attempt(&|data| data.train[3].trained.fill(false));
    assert_eq!(masked, "train.jsonl:4: expected at least one trained token behind the first, found none");
    let first = attempt(&|data| {
        data.validation[1].trained.fill(false);
        data.validation[1].trained[0] = true;
    });
    assert_eq!(first, "train.jsonl:2: expected at least one trained token behind the first, found none");
    let foreign = attempt(&|data| data.train[0].ids[2] = 29);
    assert_eq!(foreign, "train.jsonl:1: expected token ids below the model's vocabulary of 29, found 29");
}

#[test]
fn without_held_out_data_there_is_no_best() {
    let config = settings();
    let directory = tempfile::tempdir().unwrap();
    let mut run_directory = RunDirectory::create(directory.path(), plan(&config)).unwrap();
    let data = TrainingData { train: examples(3, 29, 1), validation: Vec::new() };
    let (mut recorder, clock, stop) = (Recorder::default(), FakeClock::default(), AtomicBool::new(false));
    let mut now = tuned(Method::Full);
    let summary =
        train(&mut now, &data, &config, &mut run_directory, None, &mut recorder, &clock, None, &stop)
            .unwrap();
    assert_eq!((summary.best, summary.first_eval_loss, summary.best_checkpoint), (None, None, None));
    assert_eq!((summary.step, summary.adapter), (3, None));
}
