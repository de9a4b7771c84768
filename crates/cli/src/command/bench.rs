//! `bench`: how fast training and generation are on this machine, and where the time goes.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::SystemTime;

use lora_sb_data::Tokenizer;
use lora_sb_kernels::Timed;
use lora_sb_model::{Config, Model, Parameter, Task};
use lora_sb_tune::config::GradientCheckpointing;
use lora_sb_tune::train::Clock;
use lora_sb_tune::{Method, TrainConfig};

use crate::args::{BenchArgs, MethodChoice, RECORDS};
use crate::bench::{self, Batches, Ceiling, Decoding, Machine, Memory, Outcome, Setting, Subject};
use crate::device::{Device, all_cores};
use crate::display;
use crate::failure::{Failure, Result};
use crate::progress::WallClock;
use crate::report::peak_memory;
use crate::room::Room;

/// Runs the command.
pub(crate) fn run(arguments: &BenchArgs, words: &[OsString], now: SystemTime) -> Result<ExitCode> {
    let outcome = measure(arguments)?;
    if arguments.json {
        display::output(&outcome.json().to_string())?;
    } else {
        display::line(&outcome.text());
    }
    if let Some(file) = &arguments.record {
        let day = bench::date(now);
        let file = file.clone().unwrap_or_else(|| PathBuf::from(RECORDS).join(format!("{day}-bench.md")));
        let words: Vec<_> = words.iter().skip(1).map(|word| word.to_string_lossy()).collect();
        outcome.record(&file, &day, &format!("lora-sb {}", words.join(" ")))?;
        if !arguments.json {
            display::line(&format!("\nrecorded in {}", file.display()));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Measures everything that is asked for.
fn measure(arguments: &BenchArgs) -> Result<Outcome> {
    let MethodChoice::One(method) = arguments.method else {
        return Err(Failure::usage("--method all: one method is measured at a time").hint("give one of them"));
    };
    let clock = WallClock::start();
    let mut subject = Subject::named(&arguments.model)?;
    check(arguments, &subject.config)?;
    let train = train_config(arguments, method, &subject.config)?;
    let batches = batches(arguments, &mut subject, &train)?;
    if let Some(file) = &arguments.write_batches {
        bench::write_batches(file, &batches)?;
    }
    let threads = arguments.threads.unwrap_or_else(all_cores);
    let opened = Device::open(arguments.device.unwrap_or_default(), Some(threads))?;
    let dtype = arguments.dtype.unwrap_or_else(|| opened.precision()).dtype();
    let device = opened.kernels;
    let (overhead, Room { taken, .. }) = (device.place().overhead_bytes(), Room::of(&*device)?);
    let stopwatch = WallClock::start();
    let timed = Arc::new(Timed::new(Arc::clone(&device), Box::new(move || stopwatch.seconds())));
    let seed = arguments.seed;
    let mut model = subject.load(timed.clone(), method, dtype, seed)?;
    model.prepare(batches.longest().max(arguments.decode.map_or(0, |tokens| bench::PROMPT + tokens)))?;
    let rows = batches.tokens_per_step().max(1);
    let products =
        |model: &Model| bench::product_rate(model, &*device, rows, arguments.product_seconds, &clock);
    let loaded = clock.seconds();
    let before = products(&model)?;
    let measuring = clock.seconds() - loaded;
    let file_element = model.weight(Parameter::Embedding).map_or(4, |weight| weight.dtype().size());
    let adapter = bench::adapter_config(model.config(), method, arguments.rank, seed);
    let mut tuned = bench::adapted(model, &adapter)?;
    device.reset_peak();
    let ready = clock.seconds() - measuring;
    let recompute = arguments.gradient_checkpointing.recompute();
    let steps = bench::steps(&mut tuned, &batches, arguments.warmup, &train, recompute, &timed, &clock)?;
    // What follows is not a part of training and would be in its peak.
    let (peak_process, peak_tensors) = (peak_memory(), device.usage().peak_bytes);
    let planned = bench::planned(&tuned, &adapter, &batches, recompute, file_element, taken)?;
    let memory = Memory { peak_process, peak_tensors, overhead, planned };
    let ceiling = Ceiling { before, after: products(&tuned.model)?, rows };
    let decode = |tokens| -> Result<Decoding> {
        let decoded = bench::decode(&tuned, tokens, &clock)?;
        Ok(Decoding { decoded, read_rate: bench::memory_rate(&*device, threads, &clock)? })
    };
    let decoding = arguments.decode.map(decode).transpose()?;
    let measured = batches.steps.iter().skip(arguments.warmup);
    let config = tuned.model.config();
    let work = measured.map(|examples| bench::necessary(config, method, examples)).collect();
    let setting = Setting {
        model: subject.name,
        random_weights: subject.random,
        parameters: config.parameter_count(),
        method,
        rank: arguments.rank,
        trained: tuned.trained_parameters(),
        batches: batches.described,
        even: batches.even,
        dtype,
        recompute,
        device: device.name(),
        threads,
        machine: Machine::this(),
    };
    Ok(Outcome { setting, steps, work, ceiling, ready, memory, decoding })
}

/// What the arguments ask for must be possible.
fn check(arguments: &BenchArgs, config: &Config) -> Result<()> {
    let usage = |message: String, hint: &str| Err(Failure::usage(message).hint(hint));
    if arguments.steps == 0 && arguments.decode.is_none() {
        return usage("--steps 0: nothing is measured".into(), "give at least 1 step, or --decode");
    }
    if arguments.gradient_checkpointing == GradientCheckpointing::Auto {
        let message = "--gradient-checkpointing auto: that follows from a plan, and bench makes none";
        return usage(
            message.into(),
            "give true, false or a number of blocks; `lora-sb plan` says what fits",
        );
    }
    if !(arguments.product_seconds.is_finite() && arguments.product_seconds >= 0.0) {
        let message = format!("--product-seconds: expected at least 0, found {}", arguments.product_seconds);
        return usage(message, "0 measures every product three times");
    }
    if arguments.per_device_train_batch_size == Some(0) {
        return usage(
            "--per-device-train-batch-size: expected at least 1, found 0".into(),
            "leave it out for the default",
        );
    }
    if arguments.max_length.is_some_and(|length| length < 2) {
        return usage(
            "--max-length: expected at least 2 tokens, one to predict from and one to predict".into(),
            "leave it out for the default",
        );
    }
    match arguments.decode {
        Some(tokens) if tokens < 2 => usage(
            format!("--decode: expected at least 2 tokens, found {tokens}"),
            "the time is taken from the first new token to the last",
        ),
        Some(_) if config.task != Task::LanguageModel => {
            let family = config.family.model_type();
            usage(format!("--decode: a {family} model writes no text"), "leave it out, or take a decoder")
        }
        _ => Ok(()),
    }
}

/// How `train` would train: its defaults, and one micro-batch a step.
fn train_config(arguments: &BenchArgs, method: Method, config: &Config) -> Result<TrainConfig> {
    let defaults = TrainConfig::defaults_for(method, config.task);
    let train = TrainConfig {
        per_device_train_batch_size: arguments
            .per_device_train_batch_size
            .unwrap_or(defaults.per_device_train_batch_size),
        gradient_accumulation_steps: 1,
        max_length: arguments.max_length.unwrap_or(defaults.max_length),
        seed: arguments.seed,
        ..defaults
    };
    train.validate()?;
    Ok(train)
}

/// The examples of all steps. Real ones may change how many classes the model has.
fn batches(arguments: &BenchArgs, subject: &mut Subject, train: &TrainConfig) -> Result<Batches> {
    let steps = if arguments.steps == 0 { 0 } else { arguments.warmup + arguments.steps };
    let Some(files) = &arguments.data else {
        let (batch, length) = (train.per_device_train_batch_size, train.max_length);
        return Batches::synthetic(&subject.config, steps, batch, length);
    };
    let Some(dir) = arguments.tokenizer.as_deref().or(subject.directory.as_deref()) else {
        return Err(Failure::usage(format!("--data with --model {}: it has no tokenizer", subject.name))
            .hint("give the directory of one with --tokenizer DIR, or a model directory"));
    };
    let tokenizer = Tokenizer::from_dir(dir)?;
    let (batches, config) = Batches::read(files, &tokenizer, subject.config.clone(), train, steps)?;
    subject.config = config;
    Ok(batches)
}
