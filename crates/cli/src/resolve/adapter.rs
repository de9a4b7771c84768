//! What is trained, and where it starts.

use lora_sb_kernels::Place;
use lora_sb_model::{Config, Task};
use lora_sb_tune::head;
use lora_sb_tune::method::Kind;
use lora_sb_tune::plan::estimates_gradient;
use lora_sb_tune::train::TrainingData;
use lora_sb_tune::{AdapterConfig, Bases, Convention, InitConfig, Method, Targets, TrainConfig};

use super::book::Book;
use crate::args::{InitConvention, InitEta, SettingsArgs};
use crate::failure::{Failure, Result};

/// Share of the training examples that the first update is estimated on, and the least number of them.
const INIT_SHARE: f64 = 0.001;
const INIT_FLOOR: usize = 32;
/// The modules of an encoder's block that arXiv 2411.19557 adapts (its code and parameter counts). The last name stands
/// for the third as well, as PEFT matches ends of names.
const ENCODER_TARGETS: [&str; 4] = ["query", "value", "attention.output.dense", "output.dense"];

impl Book {
    /// Decides the adapter of a method and rank.
    pub(super) fn adapter_config(
        &mut self,
        settings: &SettingsArgs,
        (method, rank): (Method, usize),
        train: &TrainConfig,
        data: &TrainingData,
        model: &Config,
        place: Place,
    ) -> Result<AdapterConfig> {
        if settings.lora_alpha.is_none() {
            let scale = if method == Method::RsLora { "sqrt(rank)" } else { "1" };
            self.derived("lora_alpha", format!("the rank: scale {scale}"));
        }
        let modules_to_save = match &settings.modules_to_save {
            // Everything is trained in any case.
            _ if method == Method::Full => Vec::new(),
            Some(names) => list(names),
            None => head::default_modules(model),
        };
        let mut adapter = AdapterConfig {
            method,
            rank,
            lora_alpha: settings.lora_alpha.unwrap_or(rank as f64),
            lora_dropout: settings.lora_dropout.unwrap_or(0.0),
            target_modules: self.targets(settings, model),
            init: InitConfig { bases: self.bases(settings, method)?, ..InitConfig::NONE },
            modules_to_save,
            seed: train.seed,
        };
        if estimates_gradient(&adapter) {
            adapter.init = self.estimate(settings, &adapter, train, data, place)?;
        }
        Ok(adapter)
    }

    fn targets(&mut self, settings: &SettingsArgs, model: &Config) -> Targets {
        if let Some(names) = settings.target_modules.as_deref() {
            return Targets::parse(names);
        }
        if model.task != Task::LanguageModel {
            self.derived("target_modules", "default for encoders");
        }
        default_targets(model)
    }

    /// Where B, R and A of the r x r family start.
    fn bases(&mut self, settings: &SettingsArgs, method: Method) -> Result<Bases> {
        if method.kind() == Kind::Latent {
            let bases = settings.init.unwrap_or(Bases::of(method));
            self.set("init", bases.name(), "the method's own");
            return Ok(bases);
        }
        match settings.init {
            None => Ok(InitConfig::NONE.bases),
            Some(bases) => Err(Failure::usage(format!("--init {bases} with --method {method}"))
                .hint("--init is a choice of lora-sb and lora-xs; the other methods have one start each")),
        }
    }

    /// How the first gradient is estimated. The size eta of LoRA-SB's step is the learning rate that the schedule gives
    /// the first step: the update is the one that full fine-tuning would have made.
    fn estimate(
        &mut self,
        settings: &SettingsArgs,
        adapter: &AdapterConfig,
        train: &TrainConfig,
        data: &TrainingData,
        place: Place,
    ) -> Result<InitConfig> {
        let examples = data.train.len();
        let share = (INIT_SHARE * examples as f64).ceil() as usize;
        let samples = settings.init_samples.unwrap_or(share.max(INIT_FLOOR)).min(examples);
        self.set("init_samples", samples, "data: 0.1 %, at least 32");
        let batch_size = train.per_device_train_batch_size;
        let convention = settings.init_convention.unwrap_or(InitConvention::PerSample);
        let convention = match convention {
            InitConvention::PerSample => Convention::PerSample,
            InitConvention::Reference => Convention::Reference { batch_size },
        };
        let name = if convention == Convention::PerSample { "per-sample" } else { "reference" };
        self.set("init_convention", name, "default");
        let eta = match settings.init_eta {
            Some(InitEta::Number(eta)) => eta,
            Some(InitEta::Reference) => reference_eta(train, examples)?,
            None => train.schedule(examples)?.first(),
        };
        // LoRA-GA scales its start by the gradient alone.
        if adapter.method.kind() == Kind::Latent {
            self.set("init_eta", eta, "the first step's learning rate");
        }
        // A micro-batch of the estimation takes no more memory than one of the training. More tokens than make a pass over
        // the weights worth its reading would only add to the peak.
        let enough = train.max_length.max(place.tokens_of_a_pass());
        let max_tokens = batch_size.saturating_mul(train.max_length).min(enough);
        Ok(InitConfig {
            bases: adapter.init.bases,
            samples,
            convention,
            eta,
            max_tokens,
            blocks_at_once: None,
        })
    }
}

/// The modules that are adapted where nothing is said.
pub(crate) fn default_targets(model: &Config) -> Targets {
    match model.task {
        Task::LanguageModel => Targets::AllLinear,
        Task::Classification { .. } | Task::Regression => {
            Targets::Names(ENCODER_TARGETS.map(str::to_owned).to_vec())
        }
    }
}

/// Names parted by commas.
pub(crate) fn list(names: &str) -> Vec<String> {
    names.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// The authors' step size, `lr / (warmup_ratio * total_steps)` with steps counted at the estimation batch size.
fn reference_eta(train: &TrainConfig, examples: usize) -> Result<f64> {
    let total = train.num_train_epochs * examples.div_ceil(train.per_device_train_batch_size) as f64;
    let warmup = train.warmup_ratio * total;
    if warmup > 0.0 {
        return Ok(train.learning_rate / warmup);
    }
    Err(Failure::usage("--init-eta reference with a warmup_ratio of 0: the formula divides by it")
        .hint("give --warmup-ratio, or --init-eta as a number"))
}
