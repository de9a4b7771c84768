//! The largest micro-batch is gone through before the first step, and nothing of that remains.

mod common;
mod training;

use lora_sb_tune::config::Precision;
use lora_sb_tune::plan::{BatchSize, largest_micro_batch};
use lora_sb_tune::run::{Checkpoint, Metric, RunDirectory};
use lora_sb_tune::train::{Event, PeakMemory, TrainingData};
use lora_sb_tune::{AdapterConfig, Error, Method, TrainConfig};
use training::{
    FakeMemory, Outcome, adapter, data, outcome, plan, restored, run_watched, settings, tuned, tuned_with,
};

const MEMORY: PeakMemory = PeakMemory { planned: 1000 << 20, peak: Some(1234 << 20) };

/// The size of a micro-batch that was rehearsed, at most one.
fn rehearsed(events: &[Event]) -> Option<BatchSize> {
    let sizes = events.iter().filter_map(|event| match event {
        Event::Rehearsed { size, memory, seconds } => {
            assert_eq!((*memory, *seconds), (MEMORY, 0.5));
            Some(*size)
        }
        _ => None,
    });
    let sizes: Vec<BatchSize> = sizes.collect();
    assert!(sizes.len() <= 1);
    sizes.first().copied()
}

/// A run to its end, watched or not, without the line about the memory.
fn outcome_of(adapter: &AdapterConfig, watched: bool) -> Outcome {
    let config = settings();
    let directory = tempfile::tempdir().unwrap();
    let mut run_directory = RunDirectory::create(directory.path(), plan(&config)).unwrap();
    let mut now = if adapter.method == Method::Full { tuned(Method::Full) } else { tuned_with(adapter) };
    let memory = FakeMemory(MEMORY);
    let watch = watched.then_some(&memory as _);
    let (summary, events) = run_watched(&data(), &mut now, &config, &mut run_directory, None, None, watch);
    assert_eq!(summary.unwrap().memory, watched.then_some(MEMORY));
    assert_eq!(rehearsed(&events).is_some(), watched);
    let mut outcome = outcome(directory.path(), &config);
    let lines = outcome.metrics.len();
    outcome.metrics.retain(|line| !matches!(line, Metric::Memory { .. }));
    assert_eq!(lines - outcome.metrics.len(), usize::from(watched));
    outcome
}

#[test]
fn law_a_rehearsal_changes_no_bit_of_a_run() {
    for method in Method::ALL {
        let plain = adapter(method);
        assert_eq!(outcome_of(&plain, true), outcome_of(&plain, false), "{method}");
    }
    for method in [Method::LoraSb, Method::Lora, Method::Pissa, Method::Dora] {
        let dropping = AdapterConfig { lora_dropout: 0.3, ..adapter(method) };
        assert_eq!(outcome_of(&dropping, true), outcome_of(&dropping, false), "{method} with dropout");
    }
}

#[test]
fn the_micro_batch_that_takes_most_is_rehearsed_and_only_at_the_start() {
    let config = TrainConfig { save_steps: 1, ..settings() };
    let directory = tempfile::tempdir().unwrap();
    let mut run_directory = RunDirectory::create(directory.path(), plan(&config)).unwrap();
    let memory = FakeMemory(MEMORY);
    let (data, watch) = (data(), Some(&memory as _));
    let (summary, events) =
        run_watched(&data, &mut tuned(Method::LoraSb), &config, &mut run_directory, None, Some(2), watch);
    let size = rehearsed(&events).unwrap();
    let largest = largest_micro_batch(&data.train, &config).unwrap();
    assert_eq!(size.tokens, largest.tokens);
    assert!(size.labelled > 0 && size.labelled <= largest.labelled);
    assert!(matches!(events[..2], [Event::Started { .. }, Event::Rehearsed { .. }]), "{events:?}");
    assert!(summary.unwrap().stopped);
    let last = run_directory.metrics().unwrap().pop();
    let line = |step| Metric::Memory { step, planned_bytes: MEMORY.planned, peak_bytes: MEMORY.peak };
    assert_eq!(last, Some(line(2)));

    let mut run_directory = RunDirectory::open(directory.path(), plan(&config)).unwrap();
    let checkpoint = Checkpoint::latest(directory.path(), &mut |error| panic!("{error}")).unwrap().unwrap();
    let mut now = restored(Method::LoraSb, &run_directory, &checkpoint);
    let (summary, events) =
        run_watched(&data, &mut now, &config, &mut run_directory, Some(checkpoint), None, watch);
    assert_eq!((summary.unwrap().memory, rehearsed(&events)), (Some(MEMORY), None));
    // The line of the session that was stopped has gone: as in a run that was not.
    let lines = run_directory.metrics().unwrap();
    let about_memory: Vec<&Metric> =
        lines.iter().filter(|line| matches!(line, Metric::Memory { .. })).collect();
    assert_eq!((about_memory, lines.last()), (vec![&line(9)], Some(&line(9))));
}

/// It may come in the last step of the last epoch; what the run never meets is not rehearsed.
#[test]
fn a_long_example_is_rehearsed_wherever_it_comes() {
    let memory = FakeMemory(MEMORY);
    let mut now = tuned(Method::Lora);
    let mut tokens = |data: &TrainingData, config: &TrainConfig| {
        let directory = tempfile::tempdir().unwrap();
        let mut run_directory = RunDirectory::create(directory.path(), plan(config)).unwrap();
        let (summary, events) =
            run_watched(data, &mut now, config, &mut run_directory, None, Some(1), Some(&memory));
        summary.unwrap();
        rehearsed(&events).unwrap().tokens
    };
    let two_steps = TrainConfig { max_steps: Some(2), ..settings() };
    let mut met = 0;
    for long in 0..11 {
        let mut data = data();
        data.train[long].ids.resize(33, 3);
        data.train[long].trained.resize(33, true);
        assert!(tokens(&data, &settings()) > 33, "example {long}");
        met += usize::from(tokens(&data, &two_steps) > 33);
    }
    assert_eq!(met, 8, "two steps take 8 of the 11 examples");
}

#[test]
fn a_model_that_computes_in_another_type_is_refused() {
    let config = TrainConfig { dtype: Precision::Bf16, ..settings() };
    let directory = tempfile::tempdir().unwrap();
    let mut run_directory = RunDirectory::create(directory.path(), plan(&config)).unwrap();
    let mut now = tuned(Method::LoraSb);
    let (ended, events) = run_watched(&data(), &mut now, &config, &mut run_directory, None, None, None);
    match ended {
        Err(error @ Error::Config { .. }) => {
            assert_eq!(error.to_string(), "dtype: expected f32, what the model computes in, found bf16");
        }
        other => panic!("{other:?}"),
    }
    assert!(events.is_empty());
}
