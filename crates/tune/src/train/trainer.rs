//! The loop itself: steps, evaluations, checkpoints.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use lora_sb_data::Example;

use super::{Clock, Cursor, Event, Observer, StepReport, Summary, TrainingData, gradients_of_step};
use crate::eval::{Mean, batch_loss, labelled_tokens};
use crate::export::native;
use crate::optim::{AdamW, Schedule, clip_factor};
use crate::run::tensors::sha256;
use crate::run::{Best, Checkpoint, Metric, RunDirectory, TrainState, frozen_sha256};
use crate::{Error, Method, PlanChange, Result, TrainConfig, Tuned};

pub(super) struct Trainer<'a> {
    tuned: &'a mut Tuned,
    data: &'a TrainingData,
    config: &'a TrainConfig,
    run: &'a mut RunDirectory,
    observer: &'a mut dyn Observer,
    clock: &'a dyn Clock,
    schedule: Schedule,
    cursor: Cursor,
    optimizer: AdamW,
    state: TrainState,
    /// The newest checkpoint that was written or resumed from.
    saved: Option<(usize, PathBuf)>,
    failures: Vec<String>,
    log_failed: bool,
    session: Session,
}

/// What a session, from start or resumption to its end, has taken.
struct Session {
    start: f64,
    steps: usize,
    step_seconds: f64,
}

impl<'a> Trainer<'a> {
    pub(super) fn new(
        tuned: &'a mut Tuned,
        data: &'a TrainingData,
        config: &'a TrainConfig,
        run: &'a mut RunDirectory,
        resume: Option<Checkpoint>,
        observer: &'a mut dyn Observer,
        clock: &'a dyn Clock,
    ) -> Result<Self> {
        config.validate()?;
        run.plan().check_says(config)?;
        let cursor = Cursor::new(data.train.len(), config)?;
        let schedule = config.schedule(data.train.len())?;
        check_examples(data, tuned.model.config().vocab_size)?;
        let all = data.train.iter().chain(&data.validation);
        tuned.model.prepare(all.map(|example| example.ids.len()).max().unwrap_or(0))?;
        let fresh = fresh_state(tuned, data, config, run)?;
        let (optimizer, state, saved) = match resume {
            None => (AdamW::new(tuned)?, fresh, None),
            Some(checkpoint) => {
                let optimizer = restore(tuned, &checkpoint, &fresh)?;
                let saved = (checkpoint.state().step, checkpoint.path().to_path_buf());
                (optimizer, checkpoint.state().clone(), Some(saved))
            }
        };
        run.rewind(saved.as_ref().map(|(step, _)| *step))?;
        let session = Session { start: clock.seconds(), steps: 0, step_seconds: 0.0 };
        let (failures, log_failed) = (Vec::new(), false);
        Ok(Trainer {
            tuned,
            data,
            config,
            run,
            observer,
            clock,
            schedule,
            cursor,
            optimizer,
            state,
            saved,
            failures,
            log_failed,
            session,
        })
    }

    pub(super) fn run(mut self, stop: &AtomicBool) -> Result<Summary> {
        self.observer.event(&Event::Started {
            total_steps: self.schedule.total_steps,
            steps_per_epoch: self.config.steps_per_epoch(self.data.train.len()),
            finished_steps: self.state.step,
            warmup_steps: self.schedule.warmup_steps,
            train_examples: self.data.train.len(),
            validation_examples: self.data.validation.len(),
            trained_parameters: self.tuned.trained_parameters(),
        });
        if self.saved.is_none() {
            self.evaluate()?;
            // So that a run killed early does not pay for its initialisation again.
            self.save();
        }
        while self.state.step < self.schedule.total_steps && !stop.load(Ordering::Relaxed) {
            self.step()?;
            let (step, last) = (self.state.step, self.state.step == self.schedule.total_steps);
            let due = |every: usize| last || (every > 0 && step.is_multiple_of(every));
            let mut save = due(self.config.save_steps);
            if due(self.config.eval_steps) {
                save |= self.evaluate()?;
            }
            if save {
                self.save();
            }
        }
        self.finish()
    }

    /// One optimizer step.
    fn step(&mut self) -> Result<()> {
        let start = self.clock.seconds();
        let indices = self.cursor.step(self.state.step).indices;
        let examples: Vec<&Example> = indices.iter().map(|&index| &self.data.train[index]).collect();
        let learning_rate = self.schedule.learning_rate(self.state.step);
        let micro_batch = self.config.per_device_train_batch_size;
        let found = match gradients_of_step(self.tuned, &examples, micro_batch, self.config.recompute()) {
            Err(Error::NotFiniteStep { quantity, found, examples, .. }) => {
                self.save();
                let (step, saved) = (self.state.step + 1, self.whereabouts());
                return Err(Error::NotFiniteStep { step, quantity, found, examples, saved });
            }
            other => other?,
        };
        let scale = clip_factor(found.grad_norm, self.config.max_grad_norm);
        self.optimizer.step(self.tuned, self.config, learning_rate, scale)?;
        self.state.step += 1;
        self.state.optimizer_step = self.optimizer.steps();
        self.state.tokens += found.tokens as u64;
        self.state.trained_tokens += found.trained_tokens as u64;
        let next = self.cursor.step(self.state.step);
        (self.state.epoch, self.state.examples_in_epoch) = (next.epoch, next.position);

        let seconds = self.clock.seconds() - start;
        self.session.steps += 1;
        self.session.step_seconds += seconds;
        let left = self.schedule.total_steps - self.state.step;
        let report = StepReport {
            step: self.state.step,
            total_steps: self.schedule.total_steps,
            epoch: self.state.step as f64 / self.config.steps_per_epoch(self.data.train.len()) as f64,
            loss: found.loss,
            learning_rate,
            grad_norm: found.grad_norm,
            tokens: found.tokens,
            trained_tokens: found.trained_tokens,
            seconds,
            tokens_per_second: if seconds > 0.0 { found.tokens as f64 / seconds } else { 0.0 },
            remaining_seconds: left as f64 * self.session.step_seconds / self.session.steps as f64,
        };
        let StepReport { step, epoch, loss, grad_norm, tokens, trained_tokens, .. } = report;
        self.log(&Metric::Step { step, epoch, loss, learning_rate, grad_norm, tokens, trained_tokens, seconds });
        self.observer.event(&Event::Step(report));
        Ok(())
    }

    /// Measures the held-out loss; whether it is the lowest so far.
    fn evaluate(&mut self) -> Result<bool> {
        let start = self.clock.seconds();
        let step = self.state.step;
        let mut mean = Mean::default();
        for chunk in self.data.validation.chunks(self.config.per_device_eval_batch_size) {
            let part = batch_loss(self.tuned, chunk)?;
            if !part.value().is_some_and(f64::is_finite) {
                let (found, saved) = (part.value().unwrap_or(f64::NAN), self.whereabouts());
                let examples = chunk.iter().map(|example| example.source.clone()).collect();
                return Err(Error::NotFiniteStep { step, quantity: "held-out loss", found, examples, saved });
            }
            mean.add(part);
        }
        let Some(eval_loss) = mean.value() else { return Ok(false) };
        let here = Best { step, eval_loss };
        let best = self.state.best.is_none_or(|best| eval_loss < best.eval_loss);
        if best {
            self.state.best = Some(here);
        }
        self.state.last_eval = Some(here);
        self.state.first_eval_loss.get_or_insert(eval_loss);
        let seconds = self.clock.seconds() - start;
        self.log(&Metric::Evaluation { step, eval_loss, seconds });
        let trained_tokens = mean.weight();
        self.observer.event(&Event::Evaluated { step, eval_loss, trained_tokens, best, seconds });
        Ok(best)
    }

    /// Writes a checkpoint where there is none of this step yet. A failure is told and tried again at the next
    /// one: what has been trained is worth more than a clean stop.
    fn save(&mut self) {
        let step = self.state.step;
        if self.saved.as_ref().is_some_and(|(saved, _)| *saved == step) {
            return;
        }
        match self.run.save(&self.state, self.tuned, &self.optimizer, self.config.save_total_limit) {
            Ok(path) => {
                self.observer.event(&Event::Saved { step, path: path.clone() });
                self.saved = Some((step, path));
            }
            Err(error) => self.failed(&error),
        }
    }

    fn log(&mut self, metric: &Metric) {
        let logged = self.run.log(metric);
        let failed = logged.is_err();
        // Told once; the lines wait in memory, and a full disk would fail at every step.
        if let (Err(error), false) = (logged, self.log_failed) {
            self.failed(&error);
        }
        self.log_failed = failed;
    }

    fn failed(&mut self, error: &Error) {
        let message = error.to_string();
        self.observer.event(&Event::SaveFailed { step: self.state.step, message: message.clone() });
        self.failures.push(message);
    }

    /// The last checkpoint, in words.
    fn whereabouts(&self) -> String {
        match &self.saved {
            Some((step, path)) => format!("the state after step {step} is in {}", path.display()),
            None => format!("nothing is saved: {}", self.failures.last().map_or("no step was taken", |why| why)),
        }
    }

    fn finish(mut self) -> Result<Summary> {
        let step = self.state.step;
        let checkpoint = match self.saved.take() {
            Some((saved, path)) if saved == step => path,
            _ => self.run.save(&self.state, self.tuned, &self.optimizer, self.config.save_total_limit)?,
        };
        let best = self.state.best.map(|best| self.run.checkpoint_path(best.step));
        let best_checkpoint = best.filter(|path| path.exists());
        let (adapter, best_adapter) = self.export(&checkpoint, best_checkpoint.as_deref())?;
        let summary = Summary {
            step,
            total_steps: self.schedule.total_steps,
            stopped: step < self.schedule.total_steps,
            first_eval_loss: self.state.first_eval_loss,
            last_eval: self.state.last_eval,
            best: self.state.best,
            tokens: self.state.tokens,
            trained_tokens: self.state.trained_tokens,
            seconds: self.clock.seconds() - self.session.start,
            checkpoint,
            best_checkpoint,
            adapter,
            best_adapter,
            failures: self.failures,
        };
        self.observer.event(&Event::Finished(summary.clone()));
        Ok(summary)
    }

    /// Writes the adapter as it is now and, where another step was better, as it was then. Full fine-tuning has
    /// no adapter; its weights are in the checkpoints.
    fn export(
        &mut self,
        last: &std::path::Path,
        best: Option<&std::path::Path>,
    ) -> Result<(Option<PathBuf>, Option<PathBuf>)> {
        if self.tuned.method() == Method::Full {
            return Ok((None, None));
        }
        let base = self.run.base_model();
        let [adapter, best_adapter] = ["adapter", "adapter-best"].map(|name| self.run.path().join(name));
        native::save(&adapter, self.tuned, &base)?;
        // One of an earlier session would be of another step.
        self.run.remove(&best_adapter)?;
        match best {
            None => Ok((Some(adapter), None)),
            Some(best) if best == last => Ok((Some(adapter.clone()), Some(adapter))),
            Some(best) => {
                load_trained(self.tuned, &Checkpoint::open(best)?)?;
                let written = native::save(&best_adapter, self.tuned, &base);
                load_trained(self.tuned, &Checkpoint::open(last)?)?;
                written.map(|()| (Some(adapter), Some(best_adapter)))
            }
        }
    }
}

/// The state before the first step, with the hashes of everything that a run's results depend on.
fn fresh_state(
    tuned: &Tuned,
    data: &TrainingData,
    config: &TrainConfig,
    run: &RunDirectory,
) -> Result<TrainState> {
    // Full fine-tuning replaces every value of its base, so there is nothing that a resumption could mistake.
    let base = match tuned.method() {
        Method::Full => None,
        _ => Some(tuned.model.fingerprint()?),
    };
    Ok(TrainState {
        step: 0,
        optimizer_step: 0,
        epoch: 0,
        examples_in_epoch: 0,
        accumulated_micro_batches: 0,
        seed: config.seed,
        tokens: 0,
        trained_tokens: 0,
        first_eval_loss: None,
        best: None,
        last_eval: None,
        plan_sha256: run.plan().sha256(),
        data_sha256: data_sha256(data),
        base,
        frozen_sha256: frozen_sha256(tuned)?,
    })
}

/// Puts what a checkpoint trained into `tuned`, after checking that it is one of the same run.
fn restore(tuned: &mut Tuned, checkpoint: &Checkpoint, fresh: &TrainState) -> Result<AdamW> {
    let state = checkpoint.state();
    let none = || "none".to_owned();
    let pairs = [
        ("plan", state.plan_sha256.clone(), fresh.plan_sha256.clone()),
        ("data", state.data_sha256.clone(), fresh.data_sha256.clone()),
        ("base model", state.base.clone().unwrap_or_else(none), fresh.base.clone().unwrap_or_else(none)),
        (
            "frozen tensors",
            state.frozen_sha256.clone().unwrap_or_else(none),
            fresh.frozen_sha256.clone().unwrap_or_else(none),
        ),
    ];
    let differs = pairs.into_iter().filter(|(_, old, new)| old != new);
    let changes: Vec<PlanChange> =
        differs.map(|(key, old, new)| PlanChange { key: key.into(), old, new }).collect();
    if !changes.is_empty() {
        return Err(Error::PlanChanged { changes });
    }
    load_trained(tuned, checkpoint)?;
    let kernels = tuned.model.kernels().clone();
    AdamW::restore(tuned, state.optimizer_step, checkpoint.optimizer(kernels.as_ref())?)
}

/// Overwrites everything that is trained with a checkpoint's values.
fn load_trained(tuned: &mut Tuned, checkpoint: &Checkpoint) -> Result<()> {
    let kernels = tuned.model.kernels().clone();
    let mut saved = checkpoint.trained(kernels.as_ref())?;
    let wrong = |tensor: &str, expected: String, found: String| Error::Tensor {
        file: checkpoint.path().display().to_string(),
        tensor: tensor.into(),
        expected,
        found,
    };
    tuned.visit(&mut |name, value, _| match saved.remove(name) {
        Some(tensor) if tensor.shape() == value.shape() => {
            Ok(kernels.write_f32(value, &kernels.to_f32(&tensor)?)?)
        }
        found => {
            let found = found.map_or("no such tensor".into(), |tensor| format!("shape {:?}", tensor.shape()));
            Err(wrong(name, format!("shape {:?}", value.shape()), found))
        }
    })?;
    match saved.into_keys().next() {
        None => Ok(()),
        Some(extra) => Err(wrong(&extra, "only what is trained".into(), "a tensor that is not".into())),
    }
}

/// Checks the examples against the model, before anything is computed.
fn check_examples(data: &TrainingData, vocab_size: usize) -> Result<()> {
    for example in data.train.iter().chain(&data.validation) {
        let wrong = |expected: &str, found: String| {
            let (name, expected) = (example.source.to_string(), expected.to_owned());
            Err(Error::Config { name, expected, found })
        };
        if example.ids.len() != example.trained.len() {
            return wrong("one flag for each token", format!("{} flags", example.trained.len()));
        }
        if labelled_tokens(example) == 0 {
            return wrong("at least one trained token behind the first", "none".into());
        }
        if let Some(id) = example.ids.iter().find(|&&id| id as usize >= vocab_size) {
            return wrong(&format!("token ids below the model's vocabulary of {vocab_size}"), id.to_string());
        }
    }
    Ok(())
}

fn data_sha256(data: &TrainingData) -> String {
    let mut bytes = Vec::new();
    for part in [&data.train, &data.validation] {
        bytes.extend((part.len() as u64).to_le_bytes());
        for example in part {
            bytes.extend((example.ids.len() as u64).to_le_bytes());
            bytes.extend(example.ids.iter().flat_map(|id| id.to_le_bytes()));
            bytes.extend(example.trained.iter().map(|&trained| u8::from(trained)));
        }
    }
    sha256(&bytes)
}
