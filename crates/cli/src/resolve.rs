//! Settings as they were given to settings as they are used: every value decided, each with its source.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lora_sb_data::{Dataset, Format, Holdout, LoadOptions, Report, Tokenizer, TrainOn, split_validation};
use lora_sb_model::{Config, Model, Site};
use lora_sb_tune::run::ResolvedPlan;
use lora_sb_tune::train::TrainingData;
use lora_sb_tune::{AdapterConfig, Convention, InitConfig, Method, Targets, TrainConfig};
use serde_json::Value;

use crate::args::{self, InitConvention, InitEta, SettingsArgs};
use crate::base::{self, Base};
use crate::config_file::Sources;
use crate::embedded;
use crate::failure::{Failure, Result};

/// Rank where none is given: the middle one of the paper's runs on 3B to 9B models.
const RANK: usize = 64;
/// Share of the training examples that the first update is estimated on, and the least number of them.
const INIT_SHARE: f64 = 0.001;
const INIT_FLOOR: usize = 32;
/// Where a run is written when no directory is given.
const OUTPUT_DIR: &str = "lora-sb-run";

/// A run with every value decided and its data read; the model's weights are not.
#[derive(Debug)]
pub(crate) struct Resolved {
    /// The base model.
    pub(crate) base: Base,
    /// Its architecture.
    pub(crate) model: Config,
    /// Its tokenizer.
    pub(crate) tokenizer: Tokenizer,
    /// Whether training starts from random weights.
    pub(crate) random_weights: bool,
    /// Examples to train on and held-out ones.
    pub(crate) data: TrainingData,
    /// What was read and lost, of the training files and of the validation files.
    pub(crate) reports: Vec<Report>,
    /// How it is trained.
    pub(crate) train: TrainConfig,
    /// What is trained.
    pub(crate) adapter: AdapterConfig,
    /// Where it is written.
    pub(crate) output_dir: PathBuf,
    /// Threads.
    pub(crate) threads: usize,
    /// The text whose continuation is shown.
    pub(crate) sample_prompt: Option<String>,
    /// Every value with its source.
    pub(crate) plan: ResolvedPlan,
    /// What the user should know before the run.
    pub(crate) warnings: Vec<String>,
}

/// Where a run is written.
pub(crate) fn output_dir(settings: &SettingsArgs) -> PathBuf {
    settings.output_dir.clone().unwrap_or_else(|| OUTPUT_DIR.into())
}

/// Decides every value and reads the data.
pub(crate) fn resolve(settings: SettingsArgs, sources: Sources) -> Result<Resolved> {
    let mut book = Book { sources, plan: ResolvedPlan::default(), derived: BTreeMap::new() };
    let base = book.base(&settings)?;
    let model = base.config()?;
    let method = settings.method.unwrap_or(Method::LoraSb);
    let random_weights = book.random_weights(&settings, method)?;
    let mut tokenizer = base.tokenizer()?;
    if let Some(file) = &settings.chat_template {
        tokenizer.load_chat_template(file)?;
    }
    let mut train = book.train_config(&settings, method, &model);
    train.validate()?;
    let (data, reports) = book.data(&settings, &base, &tokenizer, &train)?;
    check_vocabulary(&data, &tokenizer, &model)?;
    // Known before the run, and a part of it: a schedule that cannot be is an error now.
    train.schedule(data.train.len())?;
    if settings.max_steps.is_some() {
        book.derived.insert("num_train_epochs", "not read: max_steps is set".into());
    }
    let adapter = book.adapter_config(&settings, method, &train, &data)?;
    adapter.validate()?;
    let threads = settings.threads.unwrap_or_else(base::all_cores);
    let output_dir = output_dir(&settings);
    book.set("threads", threads, "all cores");
    book.set("output_dir", base::absolute(&output_dir), "default");
    book.set("sample_prompt", settings.sample_prompt.clone(), "default");
    // A seed set once serves the order of the examples and the adapter alike.
    train.seed = adapter.seed;
    let mut warnings = Vec::new();
    let longest = reports.iter().map(|report| report.longest).max().unwrap_or(0);
    if longest > model.max_position_embeddings {
        warnings.push(format!(
            "the longest example has {longest} tokens, and the model was trained on at most {}",
            model.max_position_embeddings
        ));
    }
    let plan = book.finish(&train, &adapter)?;
    Ok(Resolved {
        base,
        model,
        tokenizer,
        random_weights,
        data,
        reports,
        train,
        adapter,
        output_dir,
        threads,
        sample_prompt: settings.sample_prompt,
        plan,
        warnings,
    })
}

impl Resolved {
    /// The layers that are adapted: the targets, found in the model and checked against the rank; all layers for
    /// full fine-tuning.
    pub(crate) fn sites(&self, model: &Model) -> Result<Vec<Site>> {
        let AdapterConfig { method, rank, target_modules, .. } = &self.adapter;
        let sites = target_modules.resolve(model)?;
        for &site in sites.iter().filter(|_| *method != Method::Full) {
            let ((out, input), module, rank) = (model.shape(site), model.module(site), *rank);
            if rank > out.min(input) {
                return Err(lora_sb_tune::Error::RankTooLarge { rank, module, out, input }.into());
            }
        }
        Ok(sites)
    }
}

/// Notes each decision.
struct Book {
    sources: Sources,
    plan: ResolvedPlan,
    /// Where a value came from that nobody gave and that is no fixed default.
    derived: BTreeMap<&'static str, String>,
}

impl Book {
    /// Notes a value: what was given goes before `otherwise`.
    fn set(&mut self, key: &str, value: impl Into<Value>, otherwise: &str) {
        let source = self.sources.get(key).map_or(otherwise, String::as_str);
        self.plan.set(key, value, source);
    }

    fn base(&mut self, settings: &SettingsArgs) -> Result<Base> {
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

    fn random_weights(&mut self, settings: &SettingsArgs, method: Method) -> Result<bool> {
        let random = settings.random_weights.unwrap_or(false);
        if random && method != Method::Full {
            return Err(Failure::usage(format!("--random-weights with --method {method}"))
                .hint("an adapter on random weights learns nothing: use --method full"));
        }
        self.set("random_weights", random, "default");
        Ok(random)
    }

    fn train_config(&mut self, settings: &SettingsArgs, method: Method, model: &Config) -> TrainConfig {
        let mut config = TrainConfig::defaults(method);
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
            gradient_checkpointing
        );
        config.max_steps = settings.max_steps;
        if settings.save_total_limit.is_some() {
            config.save_total_limit = settings.save_total_limit;
        }
        self.derived.insert("learning_rate", format!("default for {method}"));
        if settings.max_length.is_none() && model.max_position_embeddings < config.max_length {
            config.max_length = model.max_position_embeddings;
            self.derived.insert("max_length", "model".into());
        }
        config
    }

    fn data(
        &mut self,
        settings: &SettingsArgs,
        base: &Base,
        tokenizer: &Tokenizer,
        train: &TrainConfig,
    ) -> Result<(TrainingData, Vec<Report>)> {
        let options = LoadOptions {
            format: settings.format,
            max_length: train.max_length,
            excess_length: settings.excess_length_strategy,
            train_on: settings.train_on.unwrap_or(TrainOn::Completion),
        };
        self.set("format", settings.format.map(Format::name), "detected in each file");
        self.set("train_on", name_of(&args::TRAIN_ON, options.train_on), "default");
        let excess = options.excess_length.map(|excess| name_of(&args::EXCESS_LENGTH, excess));
        self.set("excess_length_strategy", excess, "split for text, truncate for the others");
        self.set("chat_template", settings.chat_template.as_deref().map(base::absolute), "tokenizer");
        let paths = |files: &[PathBuf]| files.iter().map(|file| base::absolute(file)).collect::<Vec<_>>();
        self.set("data", settings.data.as_deref().map(paths), embedded::NAME);
        self.set("validation_data", settings.validation_data.as_deref().map(paths), "default");
        let Some(files) = &settings.data else {
            debug_assert_eq!(*base, Base::BuiltIn);
            return self.built_in_data(settings, tokenizer, &options);
        };
        let dataset = lora_sb_data::load(files, tokenizer, &options)?;
        let mut reports = vec![dataset.report.clone()];
        let (training, validation) = match &settings.validation_data {
            Some(files) => {
                if settings.val_set_size.is_some_and(|size| size > 0.0) {
                    return Err(Failure::usage("--val-set-size beside --validation-data")
                        .hint("give one of them: the first holds out a part of --data"));
                }
                let Dataset { examples, report } = lora_sb_data::load(files, tokenizer, &options)?;
                reports.push(report);
                (dataset.examples, examples)
            }
            None => split_validation(dataset, holdout(settings)?, train.seed)?,
        };
        self.set("val_set_size", settings.val_set_size.unwrap_or(0.0), "default");
        Ok((TrainingData { train: training, validation }, reports))
    }

    fn built_in_data(
        &mut self,
        settings: &SettingsArgs,
        tokenizer: &Tokenizer,
        options: &LoadOptions,
    ) -> Result<(TrainingData, Vec<Report>)> {
        if settings.validation_data.is_some() || settings.val_set_size.is_some() {
            return Err(Failure::usage("--validation-data and --val-set-size need --data")
                .hint("the built-in text holds out its last tenth"));
        }
        self.set("val_set_size", Value::Null, "built-in: the last tenth of the text");
        let mut parts = Vec::new();
        for text in embedded::texts() {
            parts.push(lora_sb_data::load_texts(&[text], tokenizer, options)?);
        }
        let reports = parts.iter().map(|part| part.report.clone()).collect();
        let mut examples = parts.into_iter().map(|part| part.examples);
        let (train, validation) = (examples.next().unwrap_or_default(), examples.next().unwrap_or_default());
        Ok((TrainingData { train, validation }, reports))
    }

    fn adapter_config(
        &mut self,
        settings: &SettingsArgs,
        method: Method,
        train: &TrainConfig,
        data: &TrainingData,
    ) -> Result<AdapterConfig> {
        let rank = settings.rank.unwrap_or(RANK);
        if settings.lora_alpha.is_none() {
            self.derived.insert("lora_alpha", "the rank: scale 1".into());
        }
        let init = match method {
            Method::LoraSb => self.init_config(settings, train, data)?,
            _ => InitConfig::NONE,
        };
        let target_modules = settings.target_modules.as_deref().map_or(Targets::AllLinear, Targets::parse);
        Ok(AdapterConfig {
            method,
            rank,
            lora_alpha: settings.lora_alpha.unwrap_or(rank as f64),
            target_modules,
            init,
            seed: train.seed,
        })
    }

    /// How LoRA-SB estimates the first update. Its size eta is the learning rate that the schedule gives the first step:
    /// the update is the step that full fine-tuning would have taken.
    fn init_config(
        &mut self,
        settings: &SettingsArgs,
        train: &TrainConfig,
        data: &TrainingData,
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
        self.set("init_eta", eta, "the first step's learning rate");
        // A micro-batch of the estimation takes no more memory than one of the training.
        // Enough tokens to make a pass over the weights worth its reading; more would only add to the peak.
        let max_tokens = batch_size.saturating_mul(train.max_length).min(train.max_length.max(512));
        Ok(InitConfig { samples, convention, eta, max_tokens })
    }

    fn finish(mut self, train: &TrainConfig, adapter: &AdapterConfig) -> Result<ResolvedPlan> {
        let (sources, derived) = (&self.sources, &self.derived);
        let source = |name: &str| match (sources.get(name), derived.get(name)) {
            (Some(given), _) => given.clone(),
            (None, Some(derived)) => derived.clone(),
            (None, None) => "default".to_owned(),
        };
        self.plan.set_all(train, &source)?;
        if adapter.method == Method::Full {
            self.plan.set("method", adapter.method.name(), &source("method"));
        } else {
            self.plan.set_all(adapter, &source)?;
            // Said value by value, under the names of the flags.
            self.plan.values.remove("init");
        }
        Ok(self.plan)
    }
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

/// The part of the training files that is held out.
fn holdout(settings: &SettingsArgs) -> Result<Holdout> {
    match settings.val_set_size.unwrap_or(0.0) {
        size if (0.0..1.0).contains(&size) => Ok(Holdout::Fraction(size)),
        size if size >= 1.0 && size.fract() == 0.0 && size < 1e15 => Ok(Holdout::Count(size as usize)),
        size => Err(Failure::usage(format!(
            "val_set_size: expected a share below 1 or a whole number, found {size}"
        ))
        .hint("as 0.1 for a tenth of the examples, or 100 for a hundred of them")),
    }
}

/// A token that the model has no embedding for would be read from elsewhere.
fn check_vocabulary(data: &TrainingData, tokenizer: &Tokenizer, model: &Config) -> Result<()> {
    let too_large = |id: &&u32| **id as usize >= model.vocab_size;
    for example in data.train.iter().chain(&data.validation) {
        if let Some(id) = example.ids.iter().find(too_large) {
            return Err(Failure::new(format!(
                "{}: token {id} is outside the model's vocabulary: the tokenizer has {} tokens, the model's \
                 embedding {} rows",
                example.source,
                tokenizer.vocab_size(),
                model.vocab_size
            ))
            .hint("take tokenizer.json and config.json from the same model"));
        }
    }
    Ok(())
}

fn name_of<T: PartialEq>(names: &'static [(&'static str, T)], value: T) -> &'static str {
    names.iter().find(|(_, named)| *named == value).map_or("", |(name, _)| name)
}

/// The path of a checkpoint and the run that it belongs to, from `--resume`.
pub(crate) fn resumed_run(resume: &Path, output_dir: PathBuf) -> (PathBuf, Option<PathBuf>) {
    if resume == Path::new("latest") {
        return (output_dir, None);
    }
    // run/checkpoints/step-N, or the run itself
    match resume.parent().and_then(Path::parent) {
        Some(run) if resume.join("manifest.json").exists() => (run.into(), Some(resume.into())),
        _ => (resume.into(), None),
    }
}
