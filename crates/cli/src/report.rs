//! What a run will take, and what it came to.

use std::collections::BTreeMap;

use lora_sb_data::thousands;
use lora_sb_kernels::DType;
use lora_sb_model::Recompute;
use lora_sb_tune::config::Precision;
use lora_sb_tune::method::Kind;
use lora_sb_tune::train::{PeakMemory, Summary};
use lora_sb_tune::{Bases, Method};

use crate::display::{self, bytes, count, duration, percent, table};
use crate::forecast::Forecast;
use crate::resolve::Resolved;

pub(crate) use lora_sb_tune::plan::system::peak_memory;

/// Prints what is known of a run before it starts: model, method, data, steps, device.
pub(crate) fn print_start(resolved: &Resolved, forecast: &Forecast) {
    let Resolved { base, model, train, adapter, data, device, .. } = resolved;
    let steps = train.total_steps(data.train.len());
    let per_step = train.examples_per_step();
    let method = method(resolved, forecast);
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
                "{} of {} ({} x {}), peak learning rate {}, {}",
                thousands(steps),
                count(per_step, "example"),
                train.per_device_train_batch_size,
                train.gradient_accumulation_steps,
                display::number(train.learning_rate),
                train.lr_scheduler_type,
            ),
        ),
    ];
    rows.push(("device", device.described()));
    rows.extend(computes_in(train.dtype, device.kernels.prefers()).map(|text| ("dtype", text)));
    rows.push(("memory", memory(resolved, forecast)));
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

/// What the model computes in, where that is not the usual or should not be.
fn computes_in(dtype: Precision, prefers: DType) -> Option<String> {
    match (dtype, prefers) {
        (Precision::Bf16, _) => Some("bf16; sums, the residual stream and what is trained are f32".into()),
        (Precision::F32, DType::Bf16) => {
            Some("f32; this device multiplies bf16 faster and in less memory: --dtype bf16".into())
        }
        (Precision::F32, _) => None,
    }
}

/// The memory at its peak, and what was done to get there.
fn memory(resolved: &Resolved, forecast: &Forecast) -> String {
    let Resolved { train, model, device, .. } = resolved;
    let mut text = format!("{} at its peak, as planned", bytes(forecast.memory.peak()));
    if let Some(limit) = forecast.limit {
        let whose = if train.memory_limit.is_some() { "that it may take" } else { "that are free" };
        let place = match forecast.memory.place.is_host() {
            true => String::new(),
            false => format!(" on {}", device.choice),
        };
        text += &format!(", of {} {whose}{place}", bytes(limit));
    }
    let layers = model.num_hidden_layers;
    text += &match train.recompute() {
        Recompute::None => String::new(),
        Recompute::First(some) if some < layers => format!("; {some} of {layers} blocks computed again"),
        Recompute::First(_) | Recompute::Block => "; all blocks computed again".into(),
    };
    let usual = forecast.memory.place.loss_rows(model.vocab_size, model.hidden_size);
    match train.loss_chunk {
        Some(rows) if rows != usual => text + &format!("; the loss of {} at a time", count(rows, "token")),
        _ => text,
    }
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
    rows.extend(summary.memory.map(|memory| ("peak memory", peak_line(memory))));
    display::line(&table(&rows));
}

/// `peak memory 612.0 MiB, planned 640.0 MiB`, without its first words.
pub(crate) fn peak_line(memory: PeakMemory) -> String {
    let planned = bytes(memory.planned);
    match memory.peak {
        Some(peak) => format!("{}, planned {planned}", bytes(peak)),
        None => format!("planned {planned}; this system does not tell the peak"),
    }
}

/// What is wrong with a plan that the run did not keep to; nothing where it did.
pub(crate) fn beyond_plan(memory: PeakMemory) -> Option<String> {
    let peak = memory.peak.filter(|_| memory.exceeds_plan())?;
    let more = percent(peak - memory.planned, memory.planned);
    Some(format!(
        "the run has taken {} at its peak, {more} more than the {} that were planned: leave that much room, and \
         take `plan` with care for this model and these settings",
        bytes(peak),
        bytes(memory.planned)
    ))
}
