//! The loop itself: steps, evaluations, checkpoints.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use lora_sb_data::Example;

use super::rehearsal::rehearse;
use super::start::{check_dtype, check_examples, fresh_state, load_trained, restore};
use super::{
    Clock, Cursor, Event, MemoryWatch, MicroBatches, Observer, PeakMemory, StepGradients, StepReport,
    Summary, TrainingData, gradients_of_step,
};
use crate::eval::{Measured, measure, metrics_of, scores};
use crate::export::native;
use crate::optim::{AdamW, Schedule, clip_factor};
use crate::run::{Best, Checkpoint, Metric, RunDirectory, TrainState};
use crate::{Error, Method, Result, TrainConfig, Tuned};

pub(super) struct Trainer<'a> {
    tuned: &'a mut Tuned,
    data: &'a TrainingData,
    config: &'a TrainConfig,
    run: &'a mut RunDirectory,
    observer: &'a mut dyn Observer,
    clock: &'a dyn Clock,
    watch: Option<&'a dyn MemoryWatch>,
    schedule: Schedule,
    cursor: Cursor,
    optimizer: AdamW,
    state: TrainState,
    /// The newest checkpoint that was written or resumed from.
    saved: Option<(usize, PathBuf)>,
    /// Scores of the newest evaluation.
    last_metrics: BTreeMap<String, f64>,
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
        watch: Option<&'a dyn MemoryWatch>,
    ) -> Result<Self> {
        config.validate()?;
        check_dtype(config.dtype, &tuned.model)?;
        config.check_for(tuned.method(), tuned.model.config().task)?;
        run.plan().check_says(config)?;
        let cursor = Cursor::new(data.train.len(), config)?;
        let schedule = config.schedule(data.train.len())?;
        check_examples(data, tuned.model.config())?;
        let all = data.train.iter().chain(&data.validation);
        tuned.model.prepare(all.map(|example| example.ids.len()).max().unwrap_or(0))?;
        if let Some(rows) = config.loss_chunk {
            tuned.model.set_loss_chunk(rows);
        }
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
            watch,
            schedule,
            cursor,
            optimizer,
            state,
            saved,
            last_metrics: BTreeMap::new(),
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
            self.rehearse()?;
            self.evaluate()?;
            // So that a run killed early does not pay for its factorisations again. Where nothing was factorised,
            // starting anew is cheaper than writing a model's worth of zero moments.
            if self.state.frozen_sha256.is_some() {
                self.save();
            }
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

    /// Goes through the largest micro-batch of the run, where somebody watches the memory.
    fn rehearse(&mut self) -> Result<()> {
        let Some(watch) = self.watch else { return Ok(()) };
        let start = self.clock.seconds();
        let size = rehearse(self.tuned, &self.data.train, self.config)?;
        let (memory, seconds) = (PeakMemory::of(watch), self.clock.seconds() - start);
        self.observer.event(&Event::Rehearsed { size, memory, seconds });
        Ok(())
    }

    /// One optimizer step.
    fn step(&mut self) -> Result<()> {
        let start = self.clock.seconds();
        let indices = self.cursor.step(self.state.step).indices;
        let examples: Vec<&Example> = indices.iter().map(|&index| &self.data.train[index]).collect();
        let learning_rate = self.schedule.learning_rate(self.state.step);
        let micro_batches = MicroBatches {
            size: self.config.per_device_train_batch_size,
            recompute: self.config.recompute(),
            seed: self.config.seed,
            step: self.state.step,
        };
        let found = match gradients_of_step(self.tuned, &examples, &micro_batches) {
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

        self.report(found, learning_rate, self.clock.seconds() - start);
        Ok(())
    }

    /// Tells and writes down a step.
    fn report(&mut self, found: StepGradients, learning_rate: f64, seconds: f64) {
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
        self.log(&Metric::Step {
            step,
            epoch,
            loss,
            learning_rate,
            grad_norm,
            tokens,
            trained_tokens,
            seconds,
        });
        self.observer.event(&Event::Step(report));
    }

    /// Measures the held-out examples; whether that is the best so far.
    fn evaluate(&mut self) -> Result<bool> {
        let start = self.clock.seconds();
        let step = self.state.step;
        let Measured { loss, predictions } = self.measure()?;
        let Some(eval_loss) = loss.value() else { return Ok(false) };
        let task = self.tuned.model.config().task;
        let metrics = match predictions.is_empty() {
            true => BTreeMap::new(),
            false => scores(task, &predictions, &self.data.validation, &metrics_of(task))?,
        };
        let by = self.config.metric_for_best_model;
        let score = by.and_then(|metric| metrics.get(metric.name()).copied());
        let here = Best { step, eval_loss, score };
        let best = self.state.best.is_none_or(|best| here.beats(&best, by.is_some()));
        if best {
            self.state.best = Some(here);
        }
        self.state.last_eval = Some(here);
        self.state.first_eval_loss.get_or_insert(eval_loss);
        self.last_metrics = metrics.clone();
        let seconds = self.clock.seconds() - start;
        self.log(&Metric::Evaluation { step, eval_loss, metrics: metrics.clone(), seconds });
        let trained_tokens = loss.weight();
        self.observer.event(&Event::Evaluated { step, eval_loss, metrics, trained_tokens, best, seconds });
        Ok(best)
    }

    /// Loss and predictions of the held-out examples.
    fn measure(&self) -> Result<Measured> {
        let step = self.state.step;
        let mut all = Measured::default();
        for chunk in self.data.validation.chunks(self.config.per_device_eval_batch_size) {
            let part = measure(&self.tuned.model, self.tuned.hook(), chunk)?;
            if !part.loss.value().is_some_and(f64::is_finite) {
                let (found, saved) = (part.loss.value().unwrap_or(f64::NAN), self.whereabouts());
                let examples = chunk.iter().map(|example| example.source.clone()).collect();
                return Err(Error::NotFiniteStep { step, quantity: "held-out loss", found, examples, saved });
            }
            all.loss.add(part.loss);
            all.predictions.extend(part.predictions);
        }
        Ok(all)
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
            None => {
                format!("nothing is saved: {}", self.failures.last().map_or("no step was taken", |why| why))
            }
        }
    }

    fn finish(mut self) -> Result<Summary> {
        let step = self.state.step;
        let checkpoint = match self.saved.take() {
            Some((saved, path)) if saved == step => path,
            _ => self.run.save(&self.state, self.tuned, &self.optimizer, self.config.save_total_limit)?,
        };
        let memory = self.watch.map(PeakMemory::of);
        if let Some(PeakMemory { planned, peak }) = memory {
            self.log(&Metric::Memory { step, planned_bytes: planned, peak_bytes: peak });
        }
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
            last_metrics: self.last_metrics,
            tokens: self.state.tokens,
            trained_tokens: self.state.trained_tokens,
            seconds: self.clock.seconds() - self.session.start,
            checkpoint,
            best_checkpoint,
            adapter,
            best_adapter,
            memory,
            failures: self.failures,
        };
        self.observer.event(&Event::Finished(Box::new(summary.clone())));
        Ok(summary)
    }

    /// Writes the adapter as it is now and, where another step was better, as it was then. Full fine-tuning has
    /// no adapter; its weights are in the checkpoints.
    fn export(&mut self, last: &Path, best: Option<&Path>) -> Result<(Option<PathBuf>, Option<PathBuf>)> {
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
