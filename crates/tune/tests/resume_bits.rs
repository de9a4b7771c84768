//! A resumed run equals an uninterrupted one bit for bit, and a changed run is refused.

mod common;
mod training;

use lora_sb_model::Recompute;
use lora_sb_tune::config::{ByteSize, GradientCheckpointing, Precision};
use lora_sb_tune::run::{Checkpoint, RunDirectory};
use lora_sb_tune::train::{Event, TrainingData};
use lora_sb_tune::{AdapterConfig, Error, Method, TrainConfig};
use training::{
    FakeClock, Outcome, Recorder, adapter, data, outcome, plan, restored, restored_on, run, settings, tuned,
    tuned_with,
};

fn uninterrupted(method: Method, config: &TrainConfig) -> Outcome {
    let directory = tempfile::tempdir().unwrap();
    let mut run_directory = RunDirectory::create(directory.path(), plan(config)).unwrap();
    run(&mut tuned(method), config, &mut run_directory, None, None).0.unwrap();
    outcome(directory.path(), config)
}

fn latest(run: &RunDirectory) -> Checkpoint {
    Checkpoint::latest(run.path(), &mut |error| panic!("{error}")).unwrap().unwrap()
}

#[test]
fn a_stopped_and_resumed_run_equals_an_uninterrupted_one() {
    let config = settings();
    for method in Method::ALL {
        let expected = uninterrupted(method, &config);
        assert_eq!(expected.metrics.len(), 9 + 4, "9 steps, evaluations at 0, 4, 8 and 9");
        for stops in [&[1][..], &[2, 3, 7], &[4, 8]] {
            let directory = tempfile::tempdir().unwrap();
            let mut run_directory = RunDirectory::create(directory.path(), plan(&config)).unwrap();
            let mut now = tuned(method);
            let mut resume = None;
            for &stop in stops {
                let (summary, _) = run(&mut now, &config, &mut run_directory, resume, Some(stop));
                let summary = summary.unwrap();
                assert!(
                    summary.stopped
                        && summary.step == stop
                        && summary.checkpoint.ends_with(format!("step-{stop}"))
                );
                drop(run_directory);
                run_directory = RunDirectory::open(directory.path(), plan(&config)).unwrap();
                let checkpoint = latest(&run_directory);
                now = restored(method, &run_directory, &checkpoint);
                resume = Some(checkpoint);
            }
            let (summary, events) = run(&mut now, &config, &mut run_directory, resume, None);
            assert!(!summary.unwrap().stopped);
            let started = Event::Started {
                total_steps: 9,
                steps_per_epoch: 3,
                finished_steps: *stops.last().unwrap(),
                warmup_steps: 2,
                train_examples: 11,
                validation_examples: 3,
                trained_parameters: now.trained_parameters(),
            };
            assert_eq!(events[0], started);
            assert_eq!(outcome(directory.path(), &config), expected, "{method}, stopped after {stops:?}");
        }
    }
}

/// What a micro-batch drops follows from its place in the run, whether blocks are run again or not.
#[test]
fn a_resumed_run_drops_what_an_uninterrupted_one_drops() {
    for method in [Method::LoraSb, Method::Lora, Method::Pissa, Method::Dora] {
        let adapter = AdapterConfig { lora_dropout: 0.3, ..adapter(method) };
        let mut outcomes = Vec::new();
        let kept = [Recompute::None, Recompute::None, Recompute::Block, Recompute::First(1)];
        for (recompute, stops) in kept.into_iter().zip([&[][..], &[2, 3, 7], &[4], &[5]]) {
            let gradient_checkpointing = GradientCheckpointing::Fixed(recompute);
            let config = TrainConfig { gradient_checkpointing, ..settings() };
            let directory = tempfile::tempdir().unwrap();
            let mut run_directory = RunDirectory::create(directory.path(), plan(&config)).unwrap();
            let mut now = tuned_with(&adapter);
            let mut resume = None;
            for &stop in stops {
                run(&mut now, &config, &mut run_directory, resume, Some(stop)).0.unwrap();
                run_directory = RunDirectory::open(directory.path(), plan(&config)).unwrap();
                let checkpoint = latest(&run_directory);
                now = restored_on(common::tiny_model(2), &adapter, &run_directory, &checkpoint);
                resume = Some(checkpoint);
            }
            run(&mut now, &config, &mut run_directory, resume, None).0.unwrap();
            outcomes.push(outcome(directory.path(), &config));
        }
        let without = uninterrupted(method, &settings());
        assert_ne!(outcomes[0].metrics, without.metrics, "{method}: nothing is dropped");
        assert_eq!(outcomes[1], outcomes[0], "{method}");
        assert_eq!(outcomes[2], outcomes[0], "{method}, blocks run again");
        assert_eq!(outcomes[3], outcomes[0], "{method}, one block run again");
    }
}

/// The model in memory may be anything: everything trained comes from the checkpoint.
#[test]
fn a_run_can_be_resumed_from_any_checkpoint() {
    let config = settings();
    let directory = tempfile::tempdir().unwrap();
    let mut run_directory = RunDirectory::create(directory.path(), plan(&config)).unwrap();
    run(&mut tuned(Method::Lora), &config, &mut run_directory, None, None).0.unwrap();
    let expected = outcome(directory.path(), &config);
    // No checkpoint before the first step: LoRA factorises nothing.
    assert!(!run_directory.checkpoint_path(0).exists());
    for step in [3, 6, 9] {
        let checkpoint = Checkpoint::open(&run_directory.checkpoint_path(step)).unwrap();
        let mut other = tuned(Method::Lora);
        common::shake(&mut other, 1.0);
        run(&mut other, &config, &mut run_directory, Some(checkpoint), None).0.unwrap();
        assert_eq!(outcome(directory.path(), &config), expected, "from step {step}");
    }
}

#[test]
fn a_changed_plan_is_refused_with_the_old_and_the_new_value() {
    let config = settings();
    let directory = tempfile::tempdir().unwrap();
    drop(RunDirectory::create(directory.path(), plan(&config)).unwrap());
    let changed = TrainConfig { learning_rate: 0.5, seed: 6, ..config.clone() };
    let error = RunDirectory::open(directory.path(), plan(&changed)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the run was started with another plan: learning_rate: 0.01, now 0.5; seed: 5, now 6"
    );
    assert!(error.hint().unwrap().contains("save_steps"), "{:?}", error.hint());

    let harmless = TrainConfig {
        save_steps: 1,
        save_total_limit: Some(1),
        logging_steps: 1,
        memory_limit: Some(ByteSize(1 << 30)),
        gradient_checkpointing: GradientCheckpointing::Fixed(Recompute::Block),
        ..config.clone()
    };
    RunDirectory::open(directory.path(), plan(&harmless)).unwrap();
    let others = [
        (TrainConfig { dtype: Precision::Bf16, ..config.clone() }, "dtype: \"f32\", now \"bf16\""),
        (TrainConfig { loss_chunk: Some(5), ..config.clone() }, "loss_chunk: null, now 5"),
    ];
    for (changed, expected) in others {
        let error = RunDirectory::open(directory.path(), plan(&changed)).unwrap_err().to_string();
        assert!(error.ends_with(expected), "{error}");
    }

    let mut fewer = plan(&config);
    fewer.values.remove("model");
    let error = RunDirectory::open(directory.path(), fewer).unwrap_err().to_string();
    assert!(error.ends_with("model: \"tiny\", now not set"), "{error}");
}

#[test]
fn checkpoints_may_be_saved_more_often_after_a_resumption() {
    let config = settings();
    let expected = uninterrupted(Method::LoraSb, &config);
    let directory = tempfile::tempdir().unwrap();
    let mut run_directory = RunDirectory::create(directory.path(), plan(&config)).unwrap();
    run(&mut tuned(Method::LoraSb), &config, &mut run_directory, None, Some(2)).0.unwrap();
    let often = TrainConfig { save_steps: 1, save_total_limit: Some(2), ..config };
    let mut run_directory = RunDirectory::open(directory.path(), plan(&often)).unwrap();
    let checkpoint = latest(&run_directory);
    let mut now = restored(Method::LoraSb, &run_directory, &checkpoint);
    run(&mut now, &often, &mut run_directory, Some(checkpoint), None).0.unwrap();
    assert_eq!(outcome(directory.path(), &often), expected);
}

#[test]
fn other_data_another_base_or_other_bases_are_refused() {
    let config = settings();
    let directory = tempfile::tempdir().unwrap();
    let mut run_directory = RunDirectory::create(directory.path(), plan(&config)).unwrap();
    run(&mut tuned(Method::LoraSb), &config, &mut run_directory, None, Some(1)).0.unwrap();

    let mut changed = |tuned: &mut lora_sb_tune::Tuned, data: &TrainingData| {
        let checkpoint = latest(&run_directory);
        let error = lora_sb_tune::train::train(
            tuned,
            data,
            &config,
            &mut run_directory,
            Some(checkpoint),
            &mut Recorder::default(),
            &FakeClock::default(),
            None,
            &false.into(),
        );
        match error {
            Err(Error::PlanChanged { changes }) => changes.into_iter().map(|change| change.key).collect(),
            other => panic!("{other:?}"),
        }
    };
    let mut other = data();
    other.train[4].trained[3] = !other.train[4].trained[3];
    let found: Vec<String> = changed(&mut tuned(Method::LoraSb), &other);
    assert_eq!(found, ["data"]);

    let found: Vec<String> = changed(&mut tuned(Method::LoraXs), &data());
    assert_eq!(found, ["frozen tensors"]);

    let model = common::tiny_model(1);
    let examples = common::tiny_examples(6);
    let mut smaller =
        lora_sb_tune::Tuned::adapt(model, &adapter(Method::LoraSb), &examples, &mut |_| ()).unwrap();
    let found: Vec<String> = changed(&mut smaller, &data());
    assert_eq!(found, ["base model", "frozen tensors"]);
}

#[test]
fn settings_that_are_not_the_plans_are_refused() {
    let config = settings();
    let directory = tempfile::tempdir().unwrap();
    let mut run_directory = RunDirectory::create(directory.path(), plan(&config)).unwrap();
    let other = TrainConfig { max_grad_norm: 2.0, ..config };
    let error = run(&mut tuned(Method::Lora), &other, &mut run_directory, None, None).0.unwrap_err();
    assert_eq!(error.to_string(), "plan: max_grad_norm: expected 2.0, the value that is used, found 1.0");
}
