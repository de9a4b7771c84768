//! What a run will take, and what it came to.

use std::collections::BTreeMap;

use lora_sb_data::thousands;
use lora_sb_model::{Model, Parameter, Recompute, Site, Storage};
use lora_sb_tune::method::Kind;
use lora_sb_tune::plan::{
    BatchSize, MemoryPlan, MemoryRequest, PROCESS_OVERHEAD, ParameterReport, estimates_gradient, ids_met,
    largest_eval_batch, largest_micro_batch,
};
use lora_sb_tune::train::Summary;
use lora_sb_tune::{Bases, Method};
use serde_json::{Value, json};

use crate::base::Base;
use crate::display::{self, bytes, count, duration, percent, table};
use crate::embedded;
use crate::failure::Result;
use crate::resolve::Resolved;

/// Numbers of a run that are known before its first step.
pub(crate) struct Forecast {
    pub(crate) parameters: ParameterReport,
    /// Values of a classification head that are trained beside an adapter.
    head: usize,
    pub(crate) memory: MemoryPlan,
    sites: usize,
    file_element: usize,
    storage: Storage,
    random_weights: bool,
}

/// The elements' size in the file that a model was read from.
pub(crate) fn element_size(model: &Model) -> usize {
    model.weight(Parameter::Embedding).map_or(4, |weight| weight.dtype().size())
}

/// The same of random weights: `bf16` where they are frozen.
pub(crate) fn random_element(resolved: &Resolved) -> usize {
    if resolved.adapter.method == Method::Full { 4 } else { 2 }
}

impl Forecast {
    /// Adds up a run. `sites` are the adapted layers, `file_element` the bytes of a weight in its file, `process`
    /// the [`memory_in_use`] before the model was read.
    pub(crate) fn new(
        resolved: &Resolved,
        sites: &[Site],
        file_element: usize,
        process: usize,
    ) -> Result<Self> {
        let Resolved { model, train, adapter, data, .. } = resolved;
        let storage = if adapter.method == Method::Full { Storage::Trainable } else { Storage::Mapped };
        // What was read of the program's own image to make trainable copies stays in memory.
        let read = match (&resolved.base, storage) {
            (Base::BuiltIn, Storage::Trainable) if !resolved.random_weights => embedded::weights_size(),
            _ => 0,
        };
        let mut ids = ids_met(&data.train, train)?;
        ids.extend(data.validation.iter().flat_map(|example| &example.ids));
        let init = estimates_gradient(adapter).then(|| {
            let chosen = adapter.init.select(data.train.len(), adapter.seed);
            ids.extend(chosen.iter().flat_map(|&index| &data.train[index].ids));
            let lengths = chosen.iter().map(|&index| data.train[index].ids.len());
            (lengths.sum(), largest_init_batch(resolved, &chosen))
        });
        let head = resolved.head()?;
        let size = |&parameter: &Parameter| model.parameter_shape(parameter).iter().product::<usize>();
        let request = MemoryRequest {
            config: model,
            storage,
            file_element,
            adapter,
            sites,
            head: &head,
            recompute: train.recompute(),
            train: largest_micro_batch(&data.train, train)?,
            evaluation: largest_eval_batch(&data.validation, train),
            init,
            ids: &ids,
            process: process + read,
        };
        Ok(Forecast {
            parameters: ParameterReport::new(model, adapter.method, adapter.rank, sites),
            head: head.iter().map(size).sum(),
            memory: MemoryPlan::new(&request),
            sites: sites.len(),
            file_element,
            storage,
            random_weights: resolved.random_weights,
        })
    }

    /// One line: what is trained beside what others would train.
    pub(crate) fn trained(&self, method: Method, rank: usize) -> String {
        let ParameterReport { trained, lora, full, .. } = self.parameters;
        let head = match self.head {
            0 => String::new(),
            head => format!("; besides, {} of the classification head", thousands(head)),
        };
        match method.kind() {
            Kind::Weights => format!("{}: all of the model", count(full, "parameter")),
            Kind::Product | Kind::Magnitude => {
                let share = percent(trained, full);
                format!("{} ({share} of full fine-tuning){head}", count(trained, "parameter"))
            }
            Kind::Latent => format!(
                "{}: {} of LoRA's {} at rank {rank}, {} of full fine-tuning's {}{head}",
                count(trained, "parameter"),
                percent(trained, lora),
                thousands(lora),
                percent(trained, full),
                thousands(full),
            ),
        }
    }

    /// The parameters, for machines.
    pub(crate) fn parameters_json(&self) -> Value {
        let ParameterReport { model, trained, lora, full } = self.parameters;
        json!({ "model": model, "trained": trained, "head": self.head, "lora": lora, "full": full })
    }

    /// The memory in bytes, for machines.
    pub(crate) fn memory_json(&self) -> Value {
        let memory = &self.memory;
        json!({
            "weights": memory.weights, "frozen": memory.frozen, "trained": memory.trained,
            "gradients": memory.gradients, "optimizer": memory.optimizer, "activations": memory.activations,
            "initialisation": memory.initialisation, "process": memory.process, "peak": memory.peak(),
        })
    }

    /// Memory by what it is for.
    pub(crate) fn memory_table(&self) -> String {
        let memory = &self.memory;
        let weights = match self.storage {
            Storage::Mapped => {
                let how = if self.random_weights { "random" } else { "mapped" };
                format!("{} ({how}, {} bytes a value)", bytes(memory.weights), self.file_element)
            }
            Storage::Trainable => format!("{} (f32, trained)", bytes(memory.weights)),
        };
        let mut rows = vec![
            ("weights", weights),
            ("adapter", format!("{} frozen, {} trained", bytes(memory.frozen), bytes(memory.trained))),
            ("gradients", bytes(memory.gradients)),
            ("optimizer", bytes(memory.optimizer)),
            ("activations", bytes(memory.activations)),
        ];
        if memory.initialisation > 0 {
            rows.push(("start", format!("{} at its largest", bytes(memory.initialisation))));
        }
        let peaks = match memory.initialisation {
            0 => bytes(memory.peak()),
            _ => format!(
                "{} ({} for the adapter's start, {} for training)",
                bytes(memory.peak()),
                bytes(memory.init_peak()),
                bytes(memory.train_peak())
            ),
        };
        rows.push(("peak", peaks));
        table(&rows)
    }

    /// How many layers are adapted.
    pub(crate) fn sites(&self) -> usize {
        self.sites
    }
}

/// The largest micro-batch of the estimation: greedy, at most `max_tokens`, as the initialisation packs it.
fn largest_init_batch(resolved: &Resolved, chosen: &[usize]) -> BatchSize {
    let mut largest = BatchSize::default();
    let (mut batch, mut tokens) = (Vec::new(), 0);
    for &index in chosen {
        let example = &resolved.data.train[index];
        if tokens + example.ids.len() > resolved.adapter.init.max_tokens && !batch.is_empty() {
            largest.include(std::mem::take(&mut batch));
            tokens = 0;
        }
        tokens += example.ids.len();
        batch.push(example);
    }
    largest.include(batch);
    largest
}

/// Prints what is known of a run before it starts: model, method, data, steps.
pub(crate) fn print_start(resolved: &Resolved, forecast: &Forecast) {
    let Resolved { base, model, train, adapter, data, .. } = resolved;
    let steps = train.total_steps(data.train.len());
    let per_step = train.examples_per_step();
    let method = method(resolved, forecast);
    let recompute = if train.recompute() == Recompute::Block { ", blocks recomputed" } else { "" };
    let mut rows = vec![
        (
            "model",
            format!(
                "{}: {} {}, {} layers, width {}, vocabulary {}",
                base.shown(),
                count(forecast.parameters.model, "parameter"),
                model.family.model_type(),
                model.num_hidden_layers,
                thousands(model.hidden_size),
                thousands(model.vocab_size),
            ),
        ),
        ("method", method),
        ("trained", forecast.trained(adapter.method, adapter.rank)),
        (
            "steps",
            format!(
                "{} of {} ({} x {}), peak learning rate {}, {}{recompute}",
                thousands(steps),
                count(per_step, "example"),
                train.per_device_train_batch_size,
                train.gradient_accumulation_steps,
                display::number(train.learning_rate),
                train.lr_scheduler_type,
            ),
        ),
        ("memory", format!("{} at its peak, as planned", bytes(forecast.memory.peak()))),
    ];
    rows.extend(resolved.reports.first().map(|report| ("data", report.clone())));
    let held_out = match resolved.reports.get(1) {
        Some(report) => report.clone(),
        None => match data.validation.len() {
            0 => "nothing: no held-out loss is measured (--val-set-size holds out a part)".into(),
            examples => format!("{} of these", count(examples, "example")),
        },
    };
    rows.push(("held out", held_out));
    display::line(&table(&rows));
}

/// What is trained, in a few words.
fn method(resolved: &Resolved, forecast: &Forecast) -> String {
    let (adapter, start) =
        (&resolved.adapter, if resolved.random_weights { ", from random weights" } else { "" });
    if adapter.method == Method::Full {
        return format!("full fine-tuning{start}");
    }
    let mut text = adapter.method.to_string();
    if adapter.method.kind() == Kind::Latent && adapter.init.bases != Bases::of(adapter.method) {
        text += &format!(" from {}", adapter.init.bases);
    }
    text += &format!(", rank {}, scale {}", adapter.rank, display::number(f64::from(adapter.scale())));
    if adapter.lora_dropout > 0.0 {
        text += &format!(", dropout {}", adapter.lora_dropout);
    }
    if let Some(ratio) = resolved.train.loraplus_lr_ratio {
        text += &format!(", B's learning rate {ratio} times A's");
    }
    text += &format!(", on {}", count(forecast.sites(), "linear layer"));
    if !adapter.modules_to_save.is_empty() {
        text += &format!(", and {} in full", adapter.modules_to_save.join(", "));
    }
    text + start
}

/// Held-out numbers before the training, for its end.
#[derive(Clone, Debug, Default)]
pub(crate) struct HeldOut {
    /// The base model's loss, where training did not start from it.
    pub(crate) loss: Option<f64>,
    /// Scores before the first step.
    pub(crate) metrics: BTreeMap<String, f64>,
}

/// Prints how a run ended.
pub(crate) fn print_end(summary: &Summary, before: &HeldOut, forecast: &Forecast, resolved: &Resolved) {
    let adapter = &resolved.adapter;
    let mut rows = vec![("trained", forecast.trained(adapter.method, adapter.rank))];
    if let (Some(first), Some(last)) = (before.loss.or(summary.first_eval_loss), summary.last_eval) {
        let mut losses = format!("{first:.4} before, {:.4} after", last.eval_loss);
        if !resolved.is_encoder() {
            let perplexity = |loss: f64| format!("{:.2}", loss.exp());
            losses +=
                &format!(" (perplexity {} before, {} after)", perplexity(first), perplexity(last.eval_loss));
        }
        rows.push(("held-out loss", losses));
        if let Some(best) = summary.best.filter(|best| best.step != last.step) {
            let what = resolved.train.metric_for_best_model.map_or("lowest", |_| "best");
            rows.push(("", format!("{what} at step {}: {:.4}", best.step, best.eval_loss)));
        }
        for metric in &resolved.metrics {
            let shown = |scores: &BTreeMap<String, f64>| match scores.get(metric.name()) {
                Some(score) => format!("{score:.4}"),
                None => "not defined".into(),
            };
            let scores = format!("{} before, {} after", shown(&before.metrics), shown(&summary.last_metrics));
            rows.push((metric.name(), scores));
        }
    }
    let speed = format!("{} in {}", count(summary.step, "step"), duration(summary.seconds));
    rows.push(("time", format!("{speed}, {} seen", count(summary.tokens as usize, "token"))));
    rows.push(("memory", peak_line(forecast)));
    display::line(&table(&rows));
}

fn peak_line(forecast: &Forecast) -> String {
    let planned = forecast.memory.peak();
    match peak_memory() {
        Some(peak) => format!("{} at its peak; planned {}", bytes(peak), bytes(planned)),
        None => format!("planned {}; this system does not tell the peak", bytes(planned)),
    }
}

/// The most memory that this process has had, in bytes; known on Linux.
pub(crate) fn peak_memory() -> Option<usize> {
    process_status("VmHWM:")
}

/// What this process takes at the moment, with everything that reading the data left behind given back.
pub(crate) fn memory_in_use() -> usize {
    lora_sb_kernels::heap::trim();
    process_status("VmRSS:").unwrap_or(PROCESS_OVERHEAD)
}

/// An entry of the process's memory, in bytes; known on Linux.
fn process_status(entry: &str) -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(entry))?;
    let kibibytes: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}
