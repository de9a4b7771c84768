//! What a run will take, before the model is loaded, and how it is laid out so that it fits.

use std::sync::Arc;

use lora_sb_data::thousands;
use lora_sb_kernels::{Kernels, Place};
use lora_sb_model::{Parameter, Recompute, Site, Storage, Task};
use lora_sb_tune::config::{ByteSize, GradientCheckpointing, Precision};
use lora_sb_tune::method::Kind;
use lora_sb_tune::plan::{
    BatchSize, EstimateSize, Fitted, MemoryPlan, MemoryRequest, ParameterReport, estimates_gradient, fit,
    ids_met, largest_eval_batch, largest_micro_batch, system,
};
use lora_sb_tune::train::MemoryWatch;
use lora_sb_tune::{Error, Method};
use serde_json::{Value, json};

use crate::base::{Base, Reading};
use crate::device::processor;
use crate::display::{bytes, count, percent, table};
use crate::embedded;
use crate::failure::{Failure, Result};
use crate::resolve::Resolved;
use crate::room::Room;

/// Numbers of a run that are known before its first step.
#[derive(Debug)]
pub(crate) struct Forecast {
    pub(crate) parameters: ParameterReport,
    /// Values of a classification head that are trained beside an adapter.
    head: usize,
    pub(crate) memory: MemoryPlan,
    /// The most that the run may take; `None` where nobody says.
    pub(crate) limit: Option<usize>,
    sites: usize,
    /// How the weights are held, in words.
    weights: &'static str,
    /// Bytes of them that are pages of a file and no device's.
    mapped: usize,
}

impl Forecast {
    /// Adds up a run and lays it out to fit, which decides what `resolved` and its plan left open. Of the model only
    /// the type of its weights is read.
    ///
    /// # Errors
    /// A run that does not fit, with its table and what would make it fit.
    pub(crate) fn new(resolved: &mut Resolved) -> Result<Self> {
        let Room { taken, free } = Room::of(&*resolved.device.kernels)?;
        let limit = resolved.train.memory_limit.map_or(free, |ByteSize(limit)| Some(limit));
        let sites = resolved.sites()?;
        let facts = Facts::of(resolved, taken)?;
        let request = facts.request(resolved, &sites);
        let (checkpointing, loss_chunk) = (resolved.train.gradient_checkpointing, resolved.train.loss_chunk);
        let fitted = match fit(&request, checkpointing, loss_chunk, limit) {
            Err(Error::DoesNotFit { plan, limit }) => {
                return Err(does_not_fit(resolved, &facts, &sites, &plan, limit));
            }
            fitted => fitted?,
        };
        let Resolved { model, adapter, .. } = &*resolved;
        let size = |&parameter: &Parameter| model.parameter_shape(parameter).iter().product::<usize>();
        let forecast = Forecast {
            parameters: ParameterReport::new(model, adapter.method, adapter.rank, &sites),
            head: facts.head.iter().map(size).sum(),
            memory: fitted.memory,
            limit,
            sites: sites.len(),
            weights: facts.weights(resolved),
            mapped: match facts.storage {
                Storage::Mapped if facts.place.is_host() && !facts.is_rounded(resolved) => {
                    fitted.memory.weights
                }
                Storage::Mapped | Storage::Trainable => 0,
            },
        };
        settle(resolved, &fitted, limit)?;
        Ok(forecast)
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
            "idle": memory.idle(), "gradients": memory.gradients, "optimizer": memory.optimizer, "activations": memory.activations,
            "initialisation": memory.initialisation, "process": memory.process, "peak": memory.peak(),
            "limit": self.limit,
        })
    }

    /// Memory by what it is for.
    pub(crate) fn memory_table(&self) -> String {
        memory_table(&self.memory, self.weights)
    }

    /// How many layers are adapted.
    pub(crate) fn sites(&self) -> usize {
        self.sites
    }
}

fn memory_table(memory: &MemoryPlan, weights: &str) -> String {
    let process = if memory.place.is_host() { "process" } else { "driver" };
    let mut rows = vec![
        (process, bytes(memory.process)),
        ("weights", format!("{} ({weights})", bytes(memory.weights))),
        ("adapter", format!("{} frozen, {} trained", bytes(memory.frozen), bytes(memory.trained))),
        ("gradients", bytes(memory.gradients)),
        ("optimizer", bytes(memory.optimizer)),
        ("activations", bytes(memory.activations)),
        ("kept idle", bytes(memory.idle())),
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

/// What the memory of a run follows from, gathered once.
struct Facts {
    place: Place,
    file_element: usize,
    storage: Storage,
    head: Vec<Parameter>,
    train: BatchSize,
    evaluation: BatchSize,
    init: Option<EstimateSize>,
    ids: Vec<u32>,
    process: usize,
}

impl Facts {
    fn of(resolved: &Resolved, process: usize) -> Result<Facts> {
        let Resolved { train, adapter, data, .. } = resolved;
        let (storage, place) = (storage(adapter.method), resolved.device.kernels.place());
        // What was read of the program's own image to make other copies stays in memory.
        let copied = storage == Storage::Trainable && place.is_host();
        let read = match &resolved.base {
            Base::BuiltIn if copied && !resolved.random_weights => embedded::weights_size(),
            _ => 0,
        };
        let mut ids = ids_met(&data.train, train)?;
        ids.extend(data.validation.iter().flat_map(|example| &example.ids));
        let init = estimates_gradient(adapter).then(|| {
            let chosen = adapter.init.select(data.train.len(), adapter.seed);
            ids.extend(chosen.iter().flat_map(|&index| &data.train[index].ids));
            EstimateSize::of(chosen.iter().map(|&index| &data.train[index]), adapter.init.max_tokens)
        });
        // Every plan goes over them.
        ids.sort_unstable();
        ids.dedup();
        Ok(Facts {
            place,
            file_element: file_element(resolved)?,
            storage,
            head: resolved.head()?,
            train: largest_micro_batch(&data.train, train)?,
            evaluation: largest_eval_batch(&data.validation, train),
            init,
            ids,
            process: process + read,
        })
    }

    fn request<'a>(&'a self, resolved: &'a Resolved, sites: &'a [Site]) -> MemoryRequest<'a> {
        MemoryRequest {
            config: &resolved.model,
            storage: self.storage,
            file_element: self.file_element,
            adapter: &resolved.adapter,
            sites,
            head: &self.head,
            dtype: resolved.train.dtype.dtype(),
            recompute: Recompute::None,
            loss_chunk: 1,
            place: self.place,
            train: self.train,
            evaluation: self.evaluation,
            init: self.init,
            ids: &self.ids,
            process: self.process,
        }
    }

    fn weights(&self, resolved: &Resolved) -> &'static str {
        match (self.storage, resolved.random_weights, self.file_element) {
            (Storage::Trainable, ..) => "f32, trained",
            (Storage::Mapped, true, _) => "random, 2 bytes a value",
            _ if self.is_rounded(resolved) => "rounded to bf16",
            (Storage::Mapped, false, 2) if !self.place.is_host() => "2 bytes a value",
            (Storage::Mapped, false, _) if !self.place.is_host() => "4 bytes a value",
            (Storage::Mapped, false, 2) => "mapped, 2 bytes a value",
            (Storage::Mapped, false, _) => "mapped, 4 bytes a value",
        }
    }

    /// Whether frozen weights are held in another type than that of their file.
    fn is_rounded(&self, resolved: &Resolved) -> bool {
        resolved.train.dtype == Precision::Bf16 && self.file_element != Precision::Bf16.dtype().size()
    }
}

/// How a method needs the weights.
pub(crate) fn storage(method: Method) -> Storage {
    if method == Method::Full { Storage::Trainable } else { Storage::Mapped }
}

/// Bytes of a weight's element in the file that the model is in; of random ones, as they are drawn.
fn file_element(resolved: &Resolved) -> Result<usize> {
    if resolved.random_weights {
        return Ok(if resolved.adapter.method == Method::Full { 4 } else { 2 });
    }
    let model =
        resolved.base.load(processor(Some(1))?, Storage::Mapped, &Reading::of_plan(&resolved.plan))?;
    Ok(model.weight(Parameter::Embedding).map_or(4, |weight| weight.dtype().size()))
}

/// Writes the layout into the run's settings and its plan.
fn settle(resolved: &mut Resolved, fitted: &Fitted, limit: Option<usize>) -> Result<()> {
    let source = match limit {
        Some(limit) => format!("auto: the run fits into {}", bytes(limit)),
        None => "auto".to_owned(),
    };
    let Resolved { train, plan, model, adapter, .. } = resolved;
    adapter.init.blocks_at_once = fitted.blocks_at_once;
    if train.gradient_checkpointing == GradientCheckpointing::Auto {
        train.gradient_checkpointing = GradientCheckpointing::Fixed(fitted.recompute);
        plan.set("gradient_checkpointing", json!(train.gradient_checkpointing), &source);
    }
    // A few classes are not computed in chunks.
    if train.loss_chunk.is_none() && model.task == Task::LanguageModel {
        train.loss_chunk = Some(fitted.loss_chunk);
        plan.set("loss_chunk", fitted.loss_chunk, &source);
    }
    Ok(())
}

/// The failure of a run that does not fit: its table, and what would make it fit.
fn does_not_fit(
    resolved: &Resolved,
    facts: &Facts,
    sites: &[Site],
    plan: &MemoryPlan,
    limit: usize,
) -> Failure {
    let error = Error::DoesNotFit { plan: Box::new(*plan), limit };
    let table = memory_table(plan, facts.weights(resolved));
    let ways = ways_out(resolved, facts, sites, limit);
    let ways = match ways.is_empty() {
        true => "no single setting is enough: lower --per-device-train-batch-size, --max-length and --rank together, \
                 or take a smaller model"
            .to_owned(),
        false => format!("enough is {}", ways.join("; or ")),
    };
    let more = match resolved.train.memory_limit {
        Some(_) => "raise --memory-limit",
        None => "if there is more memory than is said to be free, give --memory-limit",
    };
    let elsewhere =
        if facts.place.is_host() { "" } else { "; --device cpu takes the system's memory instead" };
    Failure::new(format!("{error}\n\n{table}")).hint(format!("{ways}; {more}{elsewhere}"))
}

/// Settings that would make a run fit, each by itself, with what it would take.
fn ways_out(resolved: &Resolved, facts: &Facts, sites: &[Site], limit: usize) -> Vec<String> {
    let request = facts.request(resolved, sites);
    let train = &resolved.train;
    let (given, chunk) = (train.gradient_checkpointing, train.loss_chunk);
    let mut ways = Vec::new();
    let mut attempt = |flags: String, request: &MemoryRequest<'_>, checkpointing| {
        if let Ok(fitted) = fit(request, checkpointing, chunk, Some(limit)) {
            ways.push(format!("{flags} ({})", bytes(fitted.memory.peak())));
        }
    };
    if given != GradientCheckpointing::Auto {
        attempt("--gradient-checkpointing auto".into(), &request, GradientCheckpointing::Auto);
    }
    if train.dtype == Precision::F32 {
        let request = MemoryRequest { dtype: Precision::Bf16.dtype(), ..request };
        attempt("--dtype bf16".into(), &request, given);
    }
    let batch = train.per_device_train_batch_size;
    let halves = std::iter::successors(Some(batch / 2), |size| Some(size / 2)).take_while(|&size| size > 0);
    let fits = halves
        .map(|size| (size, smaller(resolved, &request, size)))
        .find(|(_, request)| request.is_some_and(|request| fit(&request, given, chunk, Some(limit)).is_ok()));
    if let Some((size, Some(request))) = fits {
        let steps = train.gradient_accumulation_steps * batch.div_ceil(size);
        let flags =
            format!("--per-device-train-batch-size {size} with --gradient-accumulation-steps {steps}");
        attempt(flags, &request, given);
    }
    let rank = resolved.adapter.rank / 2;
    if resolved.adapter.method != Method::Full && rank > 0 {
        let adapter = lora_sb_tune::AdapterConfig { rank, ..resolved.adapter.clone() };
        attempt(format!("--rank {rank}"), &MemoryRequest { adapter: &adapter, ..request }, given);
    }
    ways
}

/// The same run with fewer examples in a micro-batch.
fn smaller<'a>(
    resolved: &Resolved,
    request: &MemoryRequest<'a>,
    batch_size: usize,
) -> Option<MemoryRequest<'a>> {
    let batch = resolved.train.per_device_train_batch_size;
    let train = lora_sb_tune::TrainConfig {
        per_device_train_batch_size: batch_size,
        gradient_accumulation_steps: resolved.train.gradient_accumulation_steps * batch.div_ceil(batch_size),
        ..resolved.train.clone()
    };
    let train = largest_micro_batch(&resolved.data.train, &train).ok()?;
    Some(MemoryRequest { train, ..*request })
}

/// Holds a run to its plan.
#[derive(Debug)]
pub(crate) struct Watch {
    planned: usize,
    /// Bytes that the device does not know of: the process, and weights in mapped files.
    uncounted: usize,
    kernels: Arc<dyn Kernels>,
}

impl Watch {
    pub(crate) fn new(forecast: &Forecast, kernels: Arc<dyn Kernels>) -> Watch {
        let Forecast { memory, mapped, .. } = forecast;
        Watch { planned: memory.peak(), uncounted: memory.process + mapped, kernels }
    }
}

impl MemoryWatch for Watch {
    fn planned(&self) -> usize {
        self.planned
    }

    /// What the system counted for the process; of another memory, or where it does not tell, what the device counted of
    /// its tensors and the rest as planned.
    fn peak(&self) -> Option<usize> {
        let counted = || Some(self.kernels.usage().peak_bytes + self.uncounted);
        match self.kernels.place().is_host() {
            true => system::peak_memory().or_else(counted),
            false => counted(),
        }
    }
}
