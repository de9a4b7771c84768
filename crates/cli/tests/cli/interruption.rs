//! A run that is killed, or interrupted, goes on to the bits of one that was not.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::{SMALL, Workshop};
use lora_sb_kernels::{Generator, Stream};
use lora_sb_tune::run::{Checkpoint, Metric};

const KILLS: u64 = 20;

fn spawn(shop: &Workshop, arguments: &str) -> Child {
    let words: Vec<&str> = arguments.split_whitespace().collect();
    let mut command = shop.command(&words);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Everything that must not depend on how a run came to its end.
fn result(shop: &Workshop, out: &str) -> (Vec<u8>, Vec<u8>, Vec<u8>, Vec<Metric>) {
    let read = |name: &str| shop.read(Path::new(out).join(name));
    let metrics = String::from_utf8(read("metrics.jsonl")).unwrap();
    let metrics = metrics.lines().map(|line| serde_json::from_str::<Metric>(line).unwrap().timeless());
    (
        read("adapter/adapter.safetensors"),
        read("adapter/adapter.json"),
        read("checkpoints/step-8/optimizer.safetensors"),
        metrics.collect(),
    )
}

/// Every directory that is named as a checkpoint is whole. Returns how many there are.
fn whole_checkpoints(run: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(run.join("checkpoints")) else { return 0 };
    let named = entries.map(|entry| entry.unwrap().path()).filter(|path| path.extension().is_none());
    let mut found = 0;
    for path in named {
        Checkpoint::open(&path).unwrap_or_else(|error| panic!("{error}"));
        found += 1;
    }
    found
}

#[test]
fn killed_at_random_moments_a_run_is_resumed_to_the_same_bits() {
    let shop = Workshop::new();
    let started = Instant::now();
    shop.train("whole", "").ok();
    let whole_time = started.elapsed().as_secs_f64();
    let expected = result(&shop, "whole");
    let mut draw = Generator::new(7, Stream::Order, 0);
    let mut killed_with_checkpoints = 0;
    for kill in 0..KILLS {
        let out = format!("run-{kill}");
        let mut child = spawn(&shop, &format!("train {SMALL} --output-dir {out}"));
        std::thread::sleep(Duration::from_secs_f64(draw.unit() * whole_time));
        child.kill().unwrap();
        child.wait().unwrap();
        if whole_checkpoints(&shop.path(&out)) > 0 {
            killed_with_checkpoints += 1;
            shop.run(&format!("train --resume latest --output-dir {out}")).ok();
        } else {
            // Killed before there was anything to lose.
            let _ = std::fs::remove_dir_all(shop.path(&out));
            shop.train(&out, "").ok();
        }
        assert!(result(&shop, &out) == expected, "kill {kill}: another result");
    }
    assert!(killed_with_checkpoints >= 3, "only {killed_with_checkpoints} kills met a checkpoint");
}

#[test]
fn the_first_interrupt_finishes_the_step_and_saves() {
    let shop = Workshop::new();
    shop.train("whole", "--logging-steps 1 --gradient-accumulation-steps 12").ok();
    let expected = result(&shop, "whole");
    let arguments =
        format!("train {SMALL} --logging-steps 1 --gradient-accumulation-steps 12 --output-dir run");
    let arguments =
        arguments.replace("--logging-steps 2 ", "").replace("--gradient-accumulation-steps 2 ", "");
    let mut child = spawn(&shop, &arguments);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let seen = lines.by_ref().map(Result::unwrap).find(|line| line.starts_with("step 2/8"));
    assert!(seen.is_some());
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    let rest: Vec<String> = lines.map(Result::unwrap).collect();
    let status = child.wait().unwrap();
    let mut err = String::new();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert_eq!(status.code(), Some(130), "{rest:?}\n{err}");
    assert!(err.contains("interrupted"), "{err}");
    let told = rest.iter().find(|line| line.starts_with("stopped after step")).unwrap();
    assert!(told.contains("--resume run"), "{told}");
    let resumed = shop.run("train --resume run").ok();
    assert!(resumed.out.contains("resumed from"), "{}", resumed.out);
    assert!(result(&shop, "run") == expected);
}
