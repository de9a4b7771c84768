//! `train`: a run from its first word to its last.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use lora_sb_data::Example;
use lora_sb_model::Model;
use lora_sb_tune::eval::loss_of;
use lora_sb_tune::export::merge;
use lora_sb_tune::method::Kind;
use lora_sb_tune::plan::estimates_gradient;
use lora_sb_tune::run::{self, Checkpoint, ResolvedPlan, RunDirectory};
use lora_sb_tune::train::{HeadWarmup, Summary, train, warm_up_head};
use lora_sb_tune::{AdapterConfig, Bases, Method, Tuned};

use crate::args::SettingsArgs;
use crate::base::Reading;
use crate::config_file::{Layer, Sources, merge as merge_layers};
use crate::display;
use crate::embedded;
use crate::failure::{Failure, Result};
use crate::forecast::{Forecast, Watch, storage};
use crate::interrupt;
use crate::progress::{Progress, Shown, WallClock};
use crate::report::{self, HeldOut};
use crate::resolve::{Resolved, output_dir, resolve, resumed_run};
use crate::text;

/// Lays the layers of settings over one another: built-in recipe, plan of the resumed run, recipe file, command
/// line.
pub(crate) fn layered(
    typed: &SettingsArgs,
    matches: &clap::ArgMatches,
    words: &[std::ffi::OsString],
) -> Result<(SettingsArgs, Sources)> {
    let file = typed.config.as_deref().map(Layer::file).transpose()?.unwrap_or_default();
    let mut below = Layer::default();
    if let Some(resume) = &typed.resume {
        let (run, _) = resumed_run(resume, output_dir(typed));
        let plan = RunDirectory::read_plan(&run).map_err(|error| {
            Failure::from(error)
                .hint("give a run's directory or checkpoint, or `latest` with --output-dir RUN")
        })?;
        below = Layer::of_plan(&plan, &run.join("plan.json").display().to_string())?;
    } else if typed.model.is_none() && typed.data.is_none() && !file.has("model") && !file.has("data") {
        below = Layer::recipe(embedded::RECIPE, "built-in recipe")?;
    }
    below.cover(file);
    merge_layers(below, matches, words)
}

/// Runs the command.
pub(crate) fn run(mut settings: SettingsArgs, sources: Sources) -> Result<ExitCode> {
    let shown = match (settings.quiet, display::is_live()) {
        (true, _) => Shown::Nothing,
        (false, true) => Shown::Live,
        (false, false) => Shown::Lines,
    };
    let resume = settings.resume.take();
    let checkpoint = match &resume {
        Some(resume) => {
            let (run, checkpoint) = resumed_run(resume, output_dir(&settings));
            settings.output_dir = Some(run.clone());
            Some(find_checkpoint(&run, checkpoint)?)
        }
        None => {
            must_be_no_run(&output_dir(&settings))?;
            None
        }
    };
    let resolved = resolve(settings, sources)?;
    let stop = interrupt::stop_flag()?;
    let clock = WallClock::start();
    let mut session = Session::open(resolved, checkpoint.as_ref(), shown)?;
    let before = session.before()?;
    let mut tuned = session.tuned(checkpoint.as_ref())?;
    let watch = Watch::new(&session.forecast, tuned.model.kernels().clone());
    let Session { resolved: Resolved { data, train: config, .. }, run, progress, .. } = &mut session;
    let ended = train(&mut tuned, data, config, run, checkpoint, progress, &clock, Some(&watch), &stop);
    session.progress.clear();
    let summary = ended?;
    session.finish(&tuned, &summary, before)
}

/// The base model, before anything is trained.
struct Before {
    /// Its continuation of the sample's prompt, where there is one.
    sample: Option<String>,
    /// Its held-out loss, where training does not start from it.
    loss: Option<f64>,
}

/// A run between its plan and its end.
struct Session {
    resolved: Resolved,
    run: RunDirectory,
    progress: Progress,
    forecast: Forecast,
    /// Taken by [`Session::tuned`].
    model: Option<Model>,
    shown: Shown,
}

impl Session {
    /// Loads the model, checks what can be checked, makes or opens the directory, and says what will be done.
    fn open(mut resolved: Resolved, checkpoint: Option<&Checkpoint>, shown: Shown) -> Result<Self> {
        let forecast = Forecast::new(&mut resolved)?;
        let Resolved { base, adapter, plan, train, device, .. } = &resolved;
        let reading = Reading { dtype: train.dtype, ..Reading::of_plan(plan) };
        let mut model = base.load(Arc::clone(&device.kernels), storage(adapter.method), &reading)?;
        if let Some(rows) = train.loss_chunk {
            model.set_loss_chunk(rows);
        }
        for warning in resolved.warnings.iter().chain(model.warnings()) {
            display::warn(warning);
        }
        if let Some(prompt) = &resolved.sample_prompt {
            let tokens = text::prompt_ids(&resolved.tokenizer, &model, prompt)?.len();
            model.prepare(tokens + text::SAMPLE_TOKENS)?;
        }
        let run = match checkpoint {
            None => RunDirectory::create(&resolved.output_dir, plan.clone())?,
            Some(_) => resumed(&resolved.output_dir, plan)?,
        };
        let progress = Progress::new(shown, &resolved);
        if shown != Shown::Nothing {
            report::print_start(&resolved, &forecast);
            display::line("");
        }
        if let Some(checkpoint) = checkpoint {
            progress.line(&format!("resumed from {}", checkpoint.path().display()));
        }
        Ok(Session { resolved, run, progress, forecast, model: Some(model), shown })
    }

    /// What is trained, new or from a checkpoint.
    fn tuned(&mut self, checkpoint: Option<&Checkpoint>) -> Result<Tuned> {
        let Some(mut model) = self.model.take() else { return Err(Failure::new("the model is in use")) };
        let adapter = &self.resolved.adapter;
        if adapter.method == Method::Full {
            return Ok(Tuned::full(model)?);
        }
        if let Some(checkpoint) = checkpoint {
            let tensors = self.run.tensors(checkpoint, model.kernels().clone().as_ref())?;
            return Ok(Tuned::restore(model, adapter, tensors)?);
        }
        self.warm_up_head(&mut model)?;
        let Resolved { adapter, data, .. } = &self.resolved;
        let samples: Vec<Example> = match estimates_gradient(adapter) {
            true => adapter.init.select(data.train.len(), adapter.seed),
            false => Vec::new(),
        }
        .into_iter()
        .map(|index| data.train[index].clone())
        .collect();
        let started = std::time::Instant::now();
        let progress = &mut self.progress;
        let tuned = Tuned::adapt(model, adapter, &samples, &mut |done| progress.init(done))?;
        self.tell_init(&tuned, samples.len(), started.elapsed().as_secs_f64());
        Ok(tuned)
    }

    /// Trains the classification head alone, where that is asked for.
    fn warm_up_head(&mut self, model: &mut Model) -> Result<()> {
        let Resolved { adapter, data, train, head_warmup_steps, .. } = &self.resolved;
        let progress = &mut self.progress;
        let steps = *head_warmup_steps;
        let warmed =
            warm_up_head(model, adapter, data, train, steps, &mut |done| progress.head_warmup(done))?;
        if let Some(HeadWarmup { loss_before, loss_after, .. }) = warmed {
            let steps = display::count(steps, "step");
            progress.line(&format!("head warmed up for {steps}: loss {loss_before:.4} -> {loss_after:.4}"));
        }
        Ok(())
    }

    fn tell_init(&self, tuned: &Tuned, samples: usize, seconds: f64) {
        let Some(report) = tuned.init_report() else { return };
        if samples > 0 {
            let what = if tuned.method() == Method::LoraGa { "gradient" } else { "update" };
            let (examples, time) = (display::count(samples, "example"), display::duration(seconds));
            self.progress.line(&format!("first {what} estimated on {examples} in {time}"));
        }
        if let Some(first) = report.unconverged.first() {
            let modules = display::count(report.unconverged.len(), "module");
            display::warn(&format!("the factorisation of {modules} stopped early (the first: {first})"));
        }
    }

    /// What the base model does. LoRA-SB starts a simulated step away from it, so that what its training starts from
    /// is not the base.
    fn before(&mut self) -> Result<Before> {
        let sample = self.sample()?;
        let Resolved { data, train, adapter, .. } = &self.resolved;
        let Some(model) = self.model.as_mut().filter(|_| starts_elsewhere(adapter)) else {
            return Ok(Before { sample, loss: None });
        };
        let longest = data.validation.iter().map(|example| example.ids.len()).max().unwrap_or(0);
        model.prepare(longest)?;
        let batch_size = train.per_device_eval_batch_size;
        let loss = loss_of(model, &lora_sb_model::Frozen, &data.validation, batch_size)?.value();
        if let Some(loss) = loss {
            self.progress.line(&format!("base model: held-out loss {loss:.4}"));
        }
        Ok(Before { sample, loss })
    }

    /// How the base model continues the sample's prompt.
    fn sample(&self) -> Result<Option<String>> {
        let Some(model) = self.model.as_ref().filter(|_| self.shown != Shown::Nothing) else {
            return Ok(None);
        };
        let Resolved { sample_prompt, tokenizer, train, .. } = &self.resolved;
        let prompt = sample_prompt.as_deref();
        let hook = &lora_sb_model::Frozen;
        prompt.map(|prompt| text::continuation(model, hook, tokenizer, prompt, train.seed)).transpose()
    }

    /// Writes what the run came to and says so.
    fn finish(self, tuned: &Tuned, summary: &Summary, before: Before) -> Result<ExitCode> {
        let Resolved { base, tokenizer, train, adapter, sample_prompt, output_dir, .. } = &self.resolved;
        if let Some(warning) = summary.memory.and_then(report::beyond_plan) {
            display::warn(&warning);
        }
        let code = if summary.stopped { ExitCode::from(interrupt::INTERRUPTED) } else { ExitCode::SUCCESS };
        let mut result = summary.adapter.clone();
        if adapter.method == Method::Full && !summary.stopped {
            let dir = output_dir.join("model");
            merge::merge(&dir, tuned, None)?;
            base.add_tokenizer(&dir)?;
            result = Some(dir);
        }
        if self.shown == Shown::Nothing {
            if let Some(result) = &result {
                display::line(&result.display().to_string());
            }
            return Ok(code);
        }
        display::line("");
        let held_out = HeldOut { loss: before.loss, metrics: self.first_metrics()? };
        report::print_end(summary, &held_out, &self.forecast, &self.resolved);
        if let (Some(prompt), Some(before)) = (sample_prompt, before.sample) {
            let after = text::continuation(&tuned.model, tuned.hook(), tokenizer, prompt, train.seed)?;
            for (title, text) in [("Before", before), ("After", after)] {
                display::heading(title);
                let text = display::printable(&text);
                display::line(&format!("{}{prompt}{:#}{text}", display::DIM, display::DIM));
            }
        }
        self.tell_files(summary, result.as_deref());
        Ok(code)
    }

    /// The scores before the first step, which a resumed run has seen long ago.
    fn first_metrics(&self) -> Result<BTreeMap<String, f64>> {
        let first = self.run.metrics()?.into_iter().find_map(|line| match line {
            run::Metric::Evaluation { metrics, .. } => Some(metrics),
            run::Metric::Step { .. } | run::Metric::Memory { .. } => None,
        });
        Ok(first.unwrap_or_default())
    }

    fn tell_files(&self, summary: &Summary, result: Option<&Path>) {
        let Resolved { output_dir, sample_prompt, .. } = &self.resolved;
        let shown = |path: &Path| path.display().to_string();
        let mut rows = Vec::new();
        if let Some(result) = result {
            rows.push(("result", shown(result)));
        }
        if let Some(best) = summary.best_adapter.as_deref().filter(|best| Some(*best) != result) {
            rows.push(("best", shown(best)));
        }
        rows.push(("checkpoint", shown(&summary.checkpoint)));
        rows.push(("metrics", shown(&output_dir.join("metrics.jsonl"))));
        rows.push(("plan", shown(&output_dir.join("plan.json"))));
        display::heading("Files");
        display::line(&display::table(&rows));
        let run = output_dir.display();
        if summary.stopped {
            display::line(&format!(
                "\nstopped after step {}; to go on: lora-sb train --resume {run}",
                summary.step
            ));
        } else if self.resolved.is_encoder() {
            display::line(&format!("\nto try it: lora-sb predict --adapter {run} --text \"...\""));
        } else {
            let prompt = sample_prompt.as_deref().unwrap_or("...");
            display::line(&format!("\nto try it: lora-sb generate --adapter {run} --prompt {prompt:?}"));
        }
    }
}

/// Whether an adapter begins away from the base model.
fn starts_elsewhere(adapter: &AdapterConfig) -> bool {
    adapter.method.kind() == Kind::Latent && matches!(adapter.init.bases, Bases::Sb | Bases::SbGradient)
}

/// The run of a directory, to go on with it. Another kind of device than it began on rounds otherwise, which is allowed and
/// said.
fn resumed(dir: &Path, plan: &ResolvedPlan) -> Result<RunDirectory> {
    let device = |plan: &ResolvedPlan| Some(plan.values.get("device")?.value.as_str()?.to_owned());
    let kind = |device: &str| device.split(':').next().unwrap_or_default().to_owned();
    let (before, now) = (device(&RunDirectory::read_plan(dir)?), device(plan));
    if let Some((before, now)) = before.zip(now).filter(|(before, now)| kind(before) != kind(now)) {
        display::warn(&format!(
            "the run began on {before} and goes on on {now}: its result is not that of a run without interruption to the last bit"
        ));
    }
    RunDirectory::open(dir, plan.clone()).map_err(|error| Failure::from(error).hint(CHANGED_PLAN))
}

const CHANGED_PLAN: &str = "resume with the same settings (those that are not given are taken from the run), or start a \
                            new run with another --output-dir";

/// A default run must not end an earlier one.
fn must_be_no_run(dir: &Path) -> Result<()> {
    let occupied = std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some());
    if !occupied && !dir.is_file() {
        return Ok(());
    }
    let hint = match dir.join("plan.json").exists() {
        true => format!("go on with it by --resume {}, or give another --output-dir", dir.display()),
        false => "give another --output-dir".to_owned(),
    };
    Err(Failure::new(format!("{}: is there already and is not overwritten", dir.display())).hint(hint))
}

/// The checkpoint that was asked for, or the newest that is whole.
fn find_checkpoint(run: &Path, checkpoint: Option<PathBuf>) -> Result<Checkpoint> {
    if let Some(path) = checkpoint {
        return Ok(Checkpoint::open(&path)?);
    }
    let found = Checkpoint::latest(run, &mut |error| display::warn(&error.to_string()))?;
    found.ok_or_else(|| {
        Failure::new(format!("{}: no checkpoint that is whole", run.display()))
            .hint("the run ended before its first one: remove the directory and start again")
    })
}
