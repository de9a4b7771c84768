//! A process that dies between any two file operations leaves checkpoints that are whole, and goes on to the same
//! bits.

mod common;
mod training;

use std::path::Path;

use lora_sb_tune::run::{Checkpoint, RunDirectory};
use lora_sb_tune::{Method, TrainConfig};
use training::{FaultyDisk, Outcome, Recorder, outcome, plan, restored, run, settings, tuned};

/// 4 steps with a checkpoint after each and old ones removed: every kind of file operation, many times.
fn short() -> TrainConfig {
    TrainConfig { max_steps: Some(4), save_steps: 1, eval_steps: 2, save_total_limit: Some(1), ..settings() }
}

fn uninterrupted(method: Method) -> Outcome {
    let directory = tempfile::tempdir().unwrap();
    let mut run_directory = RunDirectory::create(directory.path(), plan(&short())).unwrap();
    run(&mut tuned(method), &short(), &mut run_directory, None, None).0.unwrap();
    outcome(directory.path(), &short())
}

/// Starts a run that is killed at a file operation; whether it came to its end before that.
fn killed(path: &Path, method: Method, operation: usize) -> bool {
    let disk = Box::new(FaultyDisk::killed_at(operation));
    let Ok(mut run_directory) = RunDirectory::create_on(disk, path, plan(&short())) else { return false };
    run(&mut tuned(method), &short(), &mut run_directory, None, None).0.is_ok()
}

/// What a new process does: the newest whole checkpoint, or from the beginning.
fn go_on(path: &Path, method: Method) -> Option<usize> {
    let disk = || Box::new(FaultyDisk::sound());
    let mut run_directory = match RunDirectory::open_on(disk(), path, plan(&short())) {
        Ok(run_directory) => run_directory,
        Err(_) => RunDirectory::create_on(disk(), path, plan(&short())).unwrap(),
    };
    let checkpoint =
        Checkpoint::latest(path, &mut |error| panic!("looks whole and is not: {error}")).unwrap();
    let step = checkpoint.as_ref().map(|checkpoint| checkpoint.state().step);
    let mut now = match &checkpoint {
        Some(checkpoint) => restored(method, &run_directory, checkpoint),
        None => tuned(method),
    };
    run(&mut now, &short(), &mut run_directory, checkpoint, None).0.unwrap();
    step
}

#[test]
fn killed_at_every_file_operation_and_resumed_gives_the_same_bits() {
    for method in [Method::LoraSb, Method::Lora] {
        let expected = uninterrupted(method);
        let (mut operation, mut resumed_from) = (0, Vec::new());
        loop {
            let directory = tempfile::tempdir().unwrap();
            let ended = killed(directory.path(), method, operation);
            // All directories that are named as checkpoints are whole, not just the newest.
            let checkpoints = std::fs::read_dir(directory.path().join("checkpoints")).into_iter().flatten();
            for entry in checkpoints.map(|entry| entry.unwrap().path()) {
                if entry.extension().is_none() {
                    Checkpoint::open(&entry).unwrap();
                }
            }
            resumed_from.push(go_on(directory.path(), method));
            assert_eq!(
                outcome(directory.path(), &short()),
                expected,
                "{method}, killed at operation {operation}"
            );
            if ended {
                break;
            }
            operation += 1;
        }
        assert!(operation > 40, "{operation} file operations");
        // From nothing to the last step, never backwards: at most the work since the last checkpoint is lost.
        assert!(resumed_from.is_sorted() && resumed_from[0].is_none(), "{resumed_from:?}");
        // LoRA, which factorises nothing, starts anew until its first step is saved.
        for step in usize::from(method == Method::Lora)..=4 {
            assert!(resumed_from.contains(&Some(step)), "{resumed_from:?}");
        }
    }
}

#[test]
fn killed_again_and_again_gives_the_same_bits() {
    let expected = uninterrupted(Method::LoraXs);
    let directory = tempfile::tempdir().unwrap();
    killed(directory.path(), Method::LoraXs, 12);
    for operation in [3, 9, 14, 22] {
        let disk = Box::new(FaultyDisk::killed_at(operation));
        let mut run_directory = RunDirectory::open_on(disk, directory.path(), plan(&short())).unwrap();
        let checkpoint = Checkpoint::latest(directory.path(), &mut |error| panic!("{error}")).unwrap();
        let mut now = match &checkpoint {
            Some(checkpoint) => restored(Method::LoraXs, &run_directory, checkpoint),
            None => tuned(Method::LoraXs),
        };
        // Whether it dies is not the point here.
        let _ = run(&mut now, &short(), &mut run_directory, checkpoint, None);
    }
    go_on(directory.path(), Method::LoraXs);
    assert_eq!(outcome(directory.path(), &short()), expected);
}

#[test]
fn a_damaged_checkpoint_is_skipped_with_a_warning_and_redone() {
    let config = settings();
    let directory = tempfile::tempdir().unwrap();
    let mut run_directory = RunDirectory::create(directory.path(), plan(&config)).unwrap();
    run(&mut tuned(Method::LoraSb), &config, &mut run_directory, None, None).0.unwrap();
    let expected = outcome(directory.path(), &config);
    let newest = run_directory.checkpoint_path(9);
    let file = newest.join("trained.safetensors");
    let whole = std::fs::read(&file).unwrap();

    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let damages: [(&str, &dyn Fn()); 4] = [
        ("SHA-256", &|| std::fs::write(&file, &flipped).unwrap()),
        ("bytes", &|| std::fs::write(&file, &whole[..whole.len() - 1]).unwrap()),
        ("cannot be read", &|| std::fs::remove_file(&file).unwrap()),
        ("manifest.json", &|| std::fs::remove_file(newest.join("manifest.json")).unwrap()),
    ];
    for (expected, damage) in damages {
        damage();
        let mut warnings = Vec::new();
        let found =
            Checkpoint::latest(directory.path(), &mut |error| warnings.push(error.to_string())).unwrap();
        assert_eq!(found.unwrap().state().step, 8, "the best, of step 8, is the next one");
        assert!(warnings.len() == 1 && warnings[0].contains(expected), "{warnings:?}");
    }
    let checkpoint = Checkpoint::latest(directory.path(), &mut |_| ()).unwrap().unwrap();
    let mut now = restored(Method::LoraSb, &run_directory, &checkpoint);
    run(&mut now, &config, &mut run_directory, Some(checkpoint), None).0.unwrap();
    assert_eq!(outcome(directory.path(), &config), expected);
}

#[test]
fn a_full_disk_is_told_and_tried_again_and_nothing_is_lost() {
    let config = settings();
    let expected = {
        let directory = tempfile::tempdir().unwrap();
        let mut run_directory = RunDirectory::create(directory.path(), plan(&config)).unwrap();
        run(&mut tuned(Method::LoraSb), &config, &mut run_directory, None, None).0.unwrap();
        outcome(directory.path(), &config)
    };
    let directory = tempfile::tempdir().unwrap();
    let disk = FaultyDisk { operations: Default::default(), fails_from: 20, fails_until: 27 };
    let mut run_directory = RunDirectory::create_on(Box::new(disk), directory.path(), plan(&config)).unwrap();
    let (summary, events) = run(&mut tuned(Method::LoraSb), &config, &mut run_directory, None, None);
    let recorder = Recorder { events, stop_after: None };
    let failures = recorder.failures();
    assert!(!failures.is_empty() && failures[0].1.contains("no space left on device"), "{failures:?}");
    let told: Vec<String> = failures.into_iter().map(|(_, message)| message).collect();
    assert_eq!(summary.unwrap().failures, told);
    assert_eq!(outcome(directory.path(), &config), expected);
}

#[test]
fn a_disk_that_stays_full_is_an_error_at_the_end() {
    let config = settings();
    let directory = tempfile::tempdir().unwrap();
    let disk = Box::new(FaultyDisk::killed_at(20));
    let mut run_directory = RunDirectory::create_on(disk, directory.path(), plan(&config)).unwrap();
    let (summary, events) = run(&mut tuned(Method::LoraSb), &config, &mut run_directory, None, None);
    let error = summary.unwrap_err();
    assert!(error.to_string().contains("cannot be written: no space left on device"), "{error}");
    assert!(error.hint().unwrap().contains("make room"), "{:?}", error.hint());
    let steps = events.iter().filter(|event| matches!(event, lora_sb_tune::train::Event::Step(_))).count();
    assert_eq!(steps, 9, "training went on to its last step");
}

#[test]
fn a_file_in_the_way_is_named() {
    let config = settings();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("taken");
    std::fs::write(&file, "").unwrap();
    let error = RunDirectory::create(&file, plan(&config)).unwrap_err();
    assert!(error.to_string().starts_with(&file.display().to_string()), "{error}");
    assert!(error.hint().unwrap().contains("a file is in the way"), "{:?}", error.hint());

    let path = directory.path().join("run");
    let mut run_directory = RunDirectory::create(&path, plan(&config)).unwrap();
    let error = RunDirectory::create(&path, plan(&config)).unwrap_err();
    assert!(error.to_string().ends_with("holds a run already"), "{error}");

    std::fs::write(path.join("checkpoints"), "").unwrap();
    let (summary, events) = run(&mut tuned(Method::Lora), &config, &mut run_directory, None, None);
    let message = summary.unwrap_err().to_string();
    assert!(message.contains("checkpoints") && message.contains("cannot be written"), "{message}");
    let recorder = Recorder { events, stop_after: None };
    // At steps 3, 6 and 9, and at each new best.
    assert!(recorder.failures().len() >= 3 && recorder.saved().is_empty(), "{:?}", recorder.failures());
}
