//! What was decided, value by value, and where each value came from.

use std::collections::BTreeMap;

use lora_sb_model::{Config, Positions, Task};
use lora_sb_tune::run::ResolvedPlan;
use lora_sb_tune::{AdapterConfig, Method, TrainConfig};
use serde_json::Value;

use super::longest_text;
use crate::args::{BestMetric, SettingsArgs};
use crate::base::Base;
use crate::config_file::Sources;
use crate::device::Device;
use crate::embedded;
use crate::failure::{Failure, Result};

/// Settings of texts that are continued.
const OF_DECODERS: [&str; 5] = ["format", "train_on", "chat_template", "sample_prompt", "loss_chunk"];
/// Settings of texts that are classified.
const OF_ENCODERS: [&str; 8] = [
    "num_labels",
    "label_names",
    "problem_type",
    "ignore_mismatched_sizes",
    "modules_to_save",
    "head_warmup_steps",
    "metrics",
    "metric_for_best_model",
];

/// Notes each decision.
pub(super) struct Book {
    sources: Sources,
    plan: ResolvedPlan,
    /// Where a value came from that nobody gave and that is no fixed default.
    derived: BTreeMap<&'static str, String>,
}

impl Book {
    pub(super) fn new(sources: Sources) -> Self {
        Book { sources, plan: ResolvedPlan::default(), derived: BTreeMap::new() }
    }

    /// Notes a value: what was given goes before `otherwise`.
    pub(super) fn set(&mut self, key: &str, value: impl Into<Value>, otherwise: &str) {
        let source = self.sources.get(key).map_or(otherwise, String::as_str);
        self.plan.set(key, value, source);
    }

    /// Notes where a value comes from that nobody gave.
    pub(super) fn derived(&mut self, key: &'static str, source: impl Into<String>) {
        self.derived.insert(key, source.into());
    }

    pub(super) fn base(&mut self, settings: &SettingsArgs) -> Result<Base> {
        let base = match &settings.model {
            Some(name) => Base::named(name),
            None => Base::BuiltIn,
        };
        if settings.data.is_none() && base != Base::BuiltIn {
            return Err(Failure::usage("--model without --data: there is nothing to train it on")
                .hint("give --data FILE...; without --model and --data the built-in ones are used"));
        }
        self.set("model", base.name(), embedded::NAME);
        Ok(base)
    }

    /// What computes the run.
    pub(super) fn device(&mut self, settings: &SettingsArgs) -> Result<Device> {
        let device = Device::open(settings.device.unwrap_or_default(), settings.threads)?;
        let reason = device.reason.as_deref().unwrap_or_default();
        self.set("device", device.choice.to_string(), &format!("auto: {reason}"));
        Ok(device)
    }

    /// Refuses settings that were given and that the model has no use for.
    pub(super) fn check_use(&self, settings: &SettingsArgs, model: &Config) -> Result<()> {
        let family = model.family.model_type();
        let (without_use, reason, hint) = match model.task {
            Task::LanguageModel => (
                &OF_ENCODERS[..],
                "predicts tokens and has no classification head",
                "leave it out, or take a BERT or RoBERTa model",
            ),
            Task::Classification { .. } | Task::Regression => {
                (&OF_DECODERS[..], "classifies texts and writes none", "leave it out, or take a decoder")
            }
        };
        let harmless = settings.metric_for_best_model == Some(BestMetric::Loss);
        let given =
            |key: &&&str| self.sources.contains_key(**key) && !(harmless && **key == "metric_for_best_model");
        let Some(key) = without_use.iter().find(given) else { return Ok(()) };
        let source = &self.sources[*key];
        Err(Failure::usage(format!("--{} ({source}): a {family} model {reason}", key.replace('_', "-")))
            .hint(hint))
    }

    /// How the model is trained.
    pub(super) fn train_config(
        &mut self,
        settings: &SettingsArgs,
        method: Method,
        model: &Config,
        device: &Device,
    ) -> Result<TrainConfig> {
        let defaults = TrainConfig::defaults_for(method, model.task);
        let mut config = TrainConfig { dtype: device.precision(), ..defaults.clone() };
        if config.dtype != defaults.dtype {
            self.derived("dtype", format!("what {} multiplies fastest", device.choice));
        }
        macro_rules! given {
            ($($field:ident),*) => { $( if let Some(value) = settings.$field { config.$field = value; } )* };
        }
        given!(
            learning_rate,
            lr_scheduler_type,
            warmup_ratio,
            warmup_steps,
            weight_decay,
            adam_beta1,
            adam_beta2,
            adam_epsilon,
            max_grad_norm,
            per_device_train_batch_size,
            per_device_eval_batch_size,
            gradient_accumulation_steps,
            num_train_epochs,
            max_length,
            eval_steps,
            save_steps,
            logging_steps,
            seed,
            dtype,
            gradient_checkpointing
        );
        config.max_steps = settings.max_steps;
        (config.loss_chunk, config.memory_limit) = (settings.loss_chunk, settings.memory_limit);
        config.loraplus_lr_ratio = settings.loraplus_lr_ratio;
        config.metric_for_best_model = match settings.metric_for_best_model {
            Some(BestMetric::Score(metric)) => Some(metric),
            Some(BestMetric::Loss) | None => None,
        };
        if settings.save_total_limit.is_some() {
            config.save_total_limit = settings.save_total_limit;
        }
        let whose = if model.task == Task::LanguageModel { "" } else { " on encoders" };
        self.derived("learning_rate", format!("default for {method}{whose}"));
        let longest = longest_text(model);
        if settings.max_length.is_none() && longest < config.max_length {
            config.max_length = longest;
            self.derived("max_length", "model");
        }
        if matches!(model.positions, Positions::Learned { .. }) && config.max_length > longest {
            return Err(Failure::usage(format!(
                "max_length: the model has positions for {longest} tokens, found {}",
                config.max_length
            ))
            .hint(format!("give --max-length {longest} or less: longer texts are cut")));
        }
        config.validate()?;
        Ok(config)
    }

    /// The plan, complete.
    pub(super) fn finish(mut self, train: &TrainConfig, adapter: &AdapterConfig) -> Result<ResolvedPlan> {
        let (sources, derived) = (&self.sources, &self.derived);
        let source = |name: &str| match (sources.get(name), derived.get(name)) {
            (Some(given), _) => given.clone(),
            (None, Some(derived)) => derived.clone(),
            (None, None) => "default".to_owned(),
        };
        self.plan.set_all(train, &source)?;
        if adapter.method == Method::Full {
            self.plan.set("method", adapter.method.name(), &source("method"));
            return Ok(self.plan);
        }
        // Said value by value, under the names of the flags.
        let init = self.plan.values.remove("init");
        self.plan.set_all(adapter, &source)?;
        self.plan.values.remove("init");
        self.plan.values.extend(init.map(|value| ("init".to_owned(), value)));
        // Of a language model there is nothing to say; of an encoder "none" is a choice, which a resumed run needs.
        if !self.plan.values.contains_key("num_labels") {
            self.plan.values.remove("modules_to_save");
        }
        Ok(self.plan)
    }
}
