//! What a run will take, and what it came to.

use lora_sb_data::thousands;
use lora_sb_model::{Model, Parameter, Recompute, Site, Storage};
use lora_sb_tune::Method;
use lora_sb_tune::plan::{
    BatchSize, MemoryPlan, MemoryRequest, PROCESS_OVERHEAD, ParameterReport, ids_met, largest_eval_batch,
    largest_micro_batch,
};
use lora_sb_tune::train::Summary;

use crate::base::Base;
use crate::display::{self, bytes, count, duration, percent, table};
use crate::embedded;
use crate::failure::Result;
use crate::resolve::Resolved;

/// Numbers of a run that are known before its first step.
pub(crate) struct Forecast {
    pub(crate) parameters: ParameterReport,
    pub(crate) memory: MemoryPlan,
    sites: usize,
    file_element: usize,
    storage: Storage,
}

/// The elements' size in the file that a model was read from.
pub(crate) fn element_size(model: &Model) -> usize {
    model.weight(Parameter::Embedding).map_or(4, |weight| weight.dtype().size())
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
        let storage = match adapter.method {
            _ if resolved.random_weights => Storage::Trainable,
            Method::Full => Storage::Trainable,
            _ => Storage::Mapped,
        };
        // What was read of the program's own image to make trainable copies stays in memory.
        let read = match (&resolved.base, storage) {
            (Base::BuiltIn, Storage::Trainable) if !resolved.random_weights => embedded::weights_size(),
            _ => 0,
        };
        let mut ids = ids_met(&data.train, train)?;
        ids.extend(data.validation.iter().flat_map(|example| &example.ids));
        let init = (adapter.method == Method::LoraSb).then(|| {
            let chosen = adapter.init.select(data.train.len(), adapter.seed);
            ids.extend(chosen.iter().flat_map(|&index| &data.train[index].ids));
            let lengths = chosen.iter().map(|&index| data.train[index].ids.len());
            (lengths.sum(), largest_init_batch(resolved, &chosen))
        });
        let request = MemoryRequest {
            config: model,
            storage,
            file_element,
            method: adapter.method,
            rank: adapter.rank,
            sites,
            recompute: train.recompute(),
            train: largest_micro_batch(&data.train, train)?,
            evaluation: largest_eval_batch(&data.validation, train),
            init,
            ids: &ids,
            process: process + read,
        };
        Ok(Forecast {
            parameters: ParameterReport::new(model, adapter.method, adapter.rank, sites),
            memory: MemoryPlan::new(&request),
            sites: sites.len(),
            file_element,
            storage,
        })
    }

    /// One line: what is trained beside what others would train.
    pub(crate) fn trained(&self, method: Method, rank: usize) -> String {
        let ParameterReport { trained, lora, full, .. } = self.parameters;
        match method {
            Method::Full => format!("{}: all of the model", count(full, "parameter")),
            Method::Lora => {
                format!("{} ({} of full fine-tuning)", count(trained, "parameter"), percent(trained, full))
            }
            _ => format!(
                "{}: {} of LoRA's {} at rank {rank}, {} of full fine-tuning's {}",
                count(trained, "parameter"),
                percent(trained, lora),
                thousands(lora),
                percent(trained, full),
                thousands(full),
            ),
        }
    }

    /// Memory by what it is for.
    pub(crate) fn memory_table(&self) -> String {
        let memory = &self.memory;
        let weights = match self.storage {
            Storage::Mapped => {
                format!("{} (mapped, {} bytes a value)", bytes(memory.weights), self.file_element)
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
            rows.push(("first update", format!("{} at its largest", bytes(memory.initialisation))));
        }
        let peaks = match memory.initialisation {
            0 => bytes(memory.peak()),
            _ => format!(
                "{} ({} for the first update, {} for training)",
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
    let origin = match base {
        Base::BuiltIn => "built-in".to_owned(),
        Base::Directory(dir) => dir.display().to_string(),
    };
    let start = if resolved.random_weights { ", from random weights" } else { "" };
    let method = match adapter.method {
        Method::Full => format!("full fine-tuning{start}"),
        method => format!(
            "{method}, rank {}, scale {}, on {}",
            adapter.rank,
            adapter.scale(),
            count(forecast.sites(), "linear layer"),
        ),
    };
    let recompute = if train.recompute() == Recompute::Block { ", blocks recomputed" } else { "" };
    let mut rows = vec![
        (
            "model",
            format!(
                "{origin}: {} {}, {} layers, width {}, vocabulary {}",
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
    rows.push(("data", resolved.reports[0].to_string()));
    let held_out = match resolved.reports.get(1) {
        Some(report) => report.to_string(),
        None => match data.validation.len() {
            0 => "nothing: no held-out loss is measured (--val-set-size holds out a part)".into(),
            examples => format!("{} of these", count(examples, "example")),
        },
    };
    rows.push(("held out", held_out));
    display::line(&table(&rows));
}

/// Prints how a run ended; `base` is the held-out loss of the base model, where training did not start from it.
pub(crate) fn print_end(
    summary: &Summary,
    base: Option<f64>,
    forecast: &Forecast,
    method: Method,
    rank: usize,
) {
    let mut rows = vec![("trained", forecast.trained(method, rank))];
    if let (Some(first), Some(last)) = (base.or(summary.first_eval_loss), summary.last_eval) {
        let perplexity = |loss: f64| format!("{:.2}", loss.exp());
        rows.push((
            "held-out loss",
            format!(
                "{first:.4} before, {:.4} after (perplexity {} before, {} after)",
                last.eval_loss,
                perplexity(first),
                perplexity(last.eval_loss)
            ),
        ));
        if let Some(best) = summary.best.filter(|best| best.step != last.step) {
            rows.push(("", format!("lowest at step {}: {:.4}", best.step, best.eval_loss)));
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
