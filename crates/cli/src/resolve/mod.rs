//! Settings as they were given to settings as they are used: every value decided, each with its source.
//!
//! `book` notes each decision, `text` and `labelled` read the data of decoders and encoders, `adapter` decides what is
//! trained.

mod adapter;
mod book;
mod labelled;
mod text;

use std::path::{Path, PathBuf};

use lora_sb_data::Tokenizer;
use lora_sb_model::{Config, Parameter, Positions, Site, Task};
use lora_sb_tune::eval::Metric;
use lora_sb_tune::plan::check_rank;
use lora_sb_tune::run::ResolvedPlan;
use lora_sb_tune::train::TrainingData;
use lora_sb_tune::{AdapterConfig, Method, TrainConfig, head};

use crate::args::{MethodChoice, Ranks, SettingsArgs};
use crate::base::{self, Base};
use crate::config_file::Sources;
use crate::device::{Device, all_cores};
use crate::failure::{Failure, Result};
pub(crate) use adapter::{default_targets, list};
use book::Book;

/// Rank where none is given: the middle one of the paper's runs on 3B to 9B models.
pub(crate) const RANK: usize = 64;
/// Where a run is written when no directory is given.
const OUTPUT_DIR: &str = "lora-sb-run";

/// A run with every value decided and its data read; the model's weights are not.
#[derive(Debug)]
pub(crate) struct Resolved {
    /// The base model.
    pub(crate) base: Base,
    /// Its architecture, with the head that the data asks for.
    pub(crate) model: Config,
    /// Its tokenizer.
    pub(crate) tokenizer: Tokenizer,
    /// Whether training starts from random weights.
    pub(crate) random_weights: bool,
    /// Examples to train on and held-out ones.
    pub(crate) data: TrainingData,
    /// What was read and lost, of the training files and of the validation files.
    pub(crate) reports: Vec<String>,
    /// How it is trained.
    pub(crate) train: TrainConfig,
    /// What is trained.
    pub(crate) adapter: AdapterConfig,
    /// Steps that train the classification head alone before the adapter is made.
    pub(crate) head_warmup_steps: usize,
    /// The scores that are shown.
    pub(crate) metrics: Vec<Metric>,
    /// Where it is written.
    pub(crate) output_dir: PathBuf,
    /// What computes it.
    pub(crate) device: Device,
    /// The text whose continuation is shown.
    pub(crate) sample_prompt: Option<String>,
    /// Every value with its source.
    pub(crate) plan: ResolvedPlan,
    /// What the user should know before the run.
    pub(crate) warnings: Vec<String>,
}

/// Examples with the account of how they were made.
#[derive(Debug, Default)]
struct Read {
    data: TrainingData,
    /// Of the training files and of the validation files.
    reports: Vec<String>,
    /// The longest example in tokens.
    longest: usize,
}

/// Where a run is written.
pub(crate) fn output_dir(settings: &SettingsArgs) -> PathBuf {
    settings.output_dir.clone().unwrap_or_else(|| OUTPUT_DIR.into())
}

/// Decides every value and reads the data.
pub(crate) fn resolve(settings: SettingsArgs, sources: Sources) -> Result<Resolved> {
    let mut book = Book::new(sources);
    let base = book.base(&settings)?;
    let mut model = base.config()?;
    let method = one_method(&settings)?;
    let rank = one_rank(&settings)?;
    book.check_use(&settings, &model)?;
    let random_weights = settings.random_weights.unwrap_or(false);
    book.set("random_weights", random_weights, "default");
    let mut tokenizer = base.tokenizer()?;
    if let Some(file) = &settings.chat_template {
        tokenizer.load_chat_template(file)?;
    }
    let device = book.device(&settings)?;
    let train = book.train_config(&settings, method, &model, &device)?;
    let read = match model.task {
        Task::LanguageModel => book.text(&settings, &base, &tokenizer, &train)?,
        Task::Classification { .. } | Task::Regression => {
            let (read, labelled) = book.labelled(&settings, &tokenizer, &train, model)?;
            model = labelled;
            read
        }
    };
    train.check_for(method, model.task)?;
    let metrics = book.metrics(&settings, model.task)?;
    let Read { data, reports, longest } = read;
    check_vocabulary(&data, &tokenizer, &model)?;
    // Known before the run, and a part of it: a schedule that cannot be is an error now.
    train.schedule(data.train.len())?;
    if settings.max_steps.is_some() {
        book.derived("num_train_epochs", "not read: max_steps is set");
    }
    let place = device.kernels.place();
    let adapter = book.adapter_config(&settings, (method, rank), &train, &data, &model, place)?;
    adapter.validate()?;
    let head_warmup_steps = book.head_warmup(&settings, &adapter, &model)?;
    let output_dir = output_dir(&settings);
    book.set("threads", settings.threads.unwrap_or_else(all_cores), "all cores");
    book.set("output_dir", base::absolute(&output_dir), "default");
    let mut warnings = Vec::new();
    if longest > longest_text(&model) {
        warnings.push(format!(
            "the longest example has {longest} tokens, and the model was trained on at most {}",
            longest_text(&model)
        ));
    }
    if random_weights && method != Method::Full {
        warnings.push(format!(
            "{method} on random weights: nothing meaningful is learnt; this is for planning and measuring"
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
        head_warmup_steps,
        metrics,
        output_dir,
        device,
        sample_prompt: settings.sample_prompt,
        plan,
        warnings,
    })
}

impl Resolved {
    /// The layers that are adapted: the targets, found in the model and checked against the rank; all layers for
    /// full fine-tuning.
    pub(crate) fn sites(&self) -> Result<Vec<Site>> {
        let (AdapterConfig { method, rank, target_modules, .. }, config) = (&self.adapter, &self.model);
        let sites = target_modules.resolve(config)?;
        if *method != Method::Full {
            check_rank(config, &sites, *method, *rank)?;
        }
        Ok(sites)
    }

    /// The parameters of a classification head that are trained beside an adapter.
    pub(crate) fn head(&self) -> Result<Vec<Parameter>> {
        Ok(head::resolve(&self.adapter.modules_to_save, &self.model)?)
    }

    /// Whether the model classifies texts and writes none.
    pub(crate) fn is_encoder(&self) -> bool {
        self.model.task != Task::LanguageModel
    }
}

/// The longest text in tokens that a model knows: of rotated positions those of its pre-training, of learned ones
/// those that it has.
pub(crate) fn longest_text(config: &Config) -> usize {
    match config.positions {
        Positions::Learned { offset } => config.max_position_embeddings.saturating_sub(offset),
        Positions::Rotary { .. } => config.max_position_embeddings,
    }
}

/// What is trained; `all` is for the table of `plan`.
fn one_method(settings: &SettingsArgs) -> Result<Method> {
    match settings.method {
        None => Ok(Method::LoraSb),
        Some(MethodChoice::One(method)) => Ok(method),
        Some(MethodChoice::All) => Err(Failure::usage("--method all: a run trains by one method")
            .hint("`lora-sb plan --method all` without --data prints the table of all")),
    }
}

/// The rank; several are for the table of `plan`.
fn one_rank(settings: &SettingsArgs) -> Result<usize> {
    match &settings.rank {
        None => Ok(RANK),
        Some(Ranks(ranks)) if ranks.len() == 1 => Ok(ranks[0]),
        Some(ranks) => Err(Failure::usage(format!("--rank {ranks}: a run has one rank"))
            .hint("`lora-sb plan --rank ...` without --data prints the table of several")),
    }
}

/// A token that the model has no embedding for would be read from elsewhere.
fn check_vocabulary(data: &TrainingData, tokenizer: &Tokenizer, model: &Config) -> Result<()> {
    for example in data.train.iter().chain(&data.validation) {
        base::check_ids(&example.ids, &example.source.to_string(), tokenizer, model)?;
    }
    Ok(())
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
