//! A run as it goes: one live line on a terminal, plain lines in a pipe.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use lora_sb_data::thousands;
use lora_sb_tune::eval::Metric;
use lora_sb_tune::init::InitProgress;
use lora_sb_tune::train::{Clock, Event, HeadWarmupStep, Observer, StepReport};

use crate::display::{self, count, duration, number};
use crate::report;
use crate::resolve::Resolved;

/// The time of this machine.
#[derive(Debug)]
pub(crate) struct WallClock(Instant);

impl WallClock {
    /// Starts at 0.
    pub(crate) fn start() -> Self {
        WallClock(Instant::now())
    }
}

impl Clock for WallClock {
    fn seconds(&self) -> f64 {
        self.0.elapsed().as_secs_f64()
    }
}

/// How much is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shown {
    /// A line that is drawn again and again, evaluations and checkpoints above it.
    Live,
    /// A line every `logging_steps`.
    Lines,
    /// Nothing.
    Nothing,
}

/// Draws a run.
#[derive(Debug)]
pub(crate) struct Progress {
    shown: Shown,
    logging_steps: usize,
    /// The scores that evaluations show.
    metrics: Vec<Metric>,
    /// The score that chooses the best checkpoint, where it is not the loss.
    best: Option<Metric>,
    bar: ProgressBar,
    /// Losses, tokens and seconds of the steps since the last line.
    since: Since,
}

#[derive(Debug, Default)]
struct Since {
    steps: usize,
    loss: f64,
    tokens: usize,
    seconds: f64,
}

impl Progress {
    pub(crate) fn new(shown: Shown, resolved: &Resolved) -> Self {
        let target = match shown {
            Shown::Live => ProgressDrawTarget::stderr_with_hz(10),
            _ => ProgressDrawTarget::hidden(),
        };
        Progress {
            shown,
            logging_steps: resolved.train.logging_steps,
            metrics: resolved.metrics.clone(),
            best: resolved.train.metric_for_best_model,
            bar: ProgressBar::with_draw_target(None, target),
            since: Since::default(),
        }
    }

    /// How far the warm-up of the head is.
    pub(crate) fn head_warmup(&mut self, done: HeadWarmupStep) {
        self.style("head's warm-up: steps {pos}/{len} {wide_bar} {msg}");
        self.bar.set_length(done.of as u64);
        self.bar.set_message(format!("loss {:.4}", done.loss));
        self.bar.set_position(done.step as u64);
    }

    /// How far the initialisation is.
    pub(crate) fn init(&mut self, progress: InitProgress) {
        let (text, done, of) = match progress {
            InitProgress::Forward { samples, of } => ("adapter's start: samples", samples, of),
            InitProgress::Factorised { sites, of } => ("adapter's start: modules", sites, of),
        };
        self.style("{msg} {pos}/{len} {wide_bar}");
        self.bar.set_length(of as u64);
        self.bar.set_message(text);
        self.bar.set_position(done as u64);
    }

    /// Prints a line above the live one.
    pub(crate) fn line(&self, text: &str) {
        match self.shown {
            Shown::Nothing => {}
            Shown::Lines => display::line(text),
            Shown::Live => self.bar.suspend(|| display::line(text)),
        }
    }

    /// Takes the live line away.
    pub(crate) fn clear(&self) {
        self.bar.finish_and_clear();
    }

    fn style(&self, template: &str) {
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style.progress_chars("=> "));
        }
    }

    fn step(&mut self, report: &StepReport) {
        self.since.steps += 1;
        self.since.loss += report.loss;
        self.since.tokens += report.tokens;
        self.since.seconds += report.seconds;
        self.bar.set_position(report.step as u64);
        // Shorter than a line of the log: what a narrow terminal cuts off is at its end.
        self.bar.set_message(format!(
            "loss {:.4}  {} left  {} tok/s  lr {}  norm {:.3}",
            report.loss,
            duration(report.remaining_seconds),
            thousands(report.tokens_per_second.round() as usize),
            rounded(report.learning_rate),
            report.grad_norm,
        ));
        let due = report.step.is_multiple_of(self.logging_steps) || report.step == report.total_steps;
        if self.shown == Shown::Lines && due {
            let since = std::mem::take(&mut self.since);
            let speed = if since.seconds > 0.0 { since.tokens as f64 / since.seconds } else { 0.0 };
            let numbers = numbers(report, since.loss / since.steps as f64, speed);
            let width = report.total_steps.to_string().len();
            display::line(&format!("step {:width$}/{}  {numbers}", report.step, report.total_steps));
        }
    }
}

/// The numbers of a step in one line.
fn numbers(report: &StepReport, loss: f64, tokens_per_second: f64) -> String {
    format!(
        "loss {loss:.4}  lr {}  grad norm {:.3}  {} tokens/s  {} left",
        rounded(report.learning_rate),
        report.grad_norm,
        thousands(tokens_per_second.round() as usize),
        duration(report.remaining_seconds),
    )
}

/// Three digits of a learning rate.
fn rounded(value: f64) -> String {
    let short: f64 = format!("{value:.2e}").parse().unwrap_or(value);
    number(short)
}

impl Observer for Progress {
    fn event(&mut self, event: &Event) {
        match event {
            Event::Started { total_steps, finished_steps, .. } => {
                self.style("[{bar:10}] {pos}/{len}  {wide_msg}");
                self.bar.set_length(*total_steps as u64);
                self.bar.set_position(*finished_steps as u64);
                self.bar.set_message("");
                self.bar.enable_steady_tick(Duration::from_millis(200));
            }
            Event::Rehearsed { size, memory, seconds } => {
                let (tokens, line) = (count(size.tokens, "token"), report::peak_line(*memory));
                self.line(&format!(
                    "longest micro-batch ({tokens}) rehearsed: peak memory {line}  [{}]",
                    duration(*seconds)
                ));
            }
            Event::Step(report) => self.step(report),
            Event::Evaluated { step, eval_loss, metrics, best, seconds, .. } => {
                let best = match (*best && *step > 0, self.best) {
                    (false, _) => String::new(),
                    (true, None) => "  (lowest so far)".into(),
                    (true, Some(metric)) if metrics.contains_key(metric.name()) => {
                        format!("  (best {metric} so far)")
                    }
                    (true, Some(metric)) => format!("  (lowest loss so far; {metric} is not defined)"),
                };
                let score = |metric: &Metric| Some(format!("  {metric} {:.4}", metrics.get(metric.name())?));
                let scores: String = self.metrics.iter().filter_map(score).collect();
                self.line(&format!(
                    "step {step}: held-out loss {eval_loss:.4}{scores}{best}  [{}]",
                    duration(*seconds)
                ));
            }
            Event::Saved { step, path } => self.line(&format!("step {step}: saved {}", path.display())),
            Event::SaveFailed { step, message } => {
                let text = format!("step {step}: not saved, tried again later: {message}");
                self.bar.suspend(|| display::warn(&text));
            }
            Event::Finished(_) => self.clear(),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}
