//! The data of encoders: texts with their classes or values, and the head that they ask for.

use lora_sb_data::{LabelKind, LabelOptions, Labelled, Labels, Tokenizer, load_labelled, split_examples};
use lora_sb_model::{Config, Task};
use lora_sb_tune::eval::{Metric, metrics_of};
use lora_sb_tune::train::{TrainingData, check_head_warmup};
use lora_sb_tune::{AdapterConfig, TrainConfig};

use super::Read;
use super::book::Book;
use super::text::{holdout, validation_files};
use crate::args::{EXCESS_LENGTH, PROBLEM_TYPES, ProblemType, SettingsArgs, name_of};
use crate::failure::{Failure, Result};

impl Book {
    /// Reads the data of an encoder; the same architecture with a head for it.
    pub(super) fn labelled(
        &mut self,
        settings: &SettingsArgs,
        tokenizer: &Tokenizer,
        train: &TrainConfig,
        model: Config,
    ) -> Result<(Read, Config)> {
        self.files(settings);
        let excess = settings.excess_length_strategy.map(|excess| name_of(&EXCESS_LENGTH, excess));
        self.set("excess_length_strategy", excess, "truncate");
        let options = LabelOptions {
            max_length: train.max_length,
            excess_length: settings.excess_length_strategy,
            kind: kind(settings)?,
            names: settings.label_names.clone(),
        };
        let load = |options: &LabelOptions| {
            let files = settings.data.as_deref().unwrap_or_default();
            load_labelled(files, tokenizer, options)
        };
        let (Labelled { examples, labels, report }, named_by) =
            read_classes(&options, settings, &model, load)?;
        let mut read = Read { reports: vec![report.to_string()], longest: report.longest, ..Read::default() };
        let (training, validation) = match validation_files(settings)? {
            Some(files) => {
                // By the training data's names: an unknown class is an error, and numbers mean the same.
                let held_out = load_labelled(files, tokenizer, &options.with_labels(&labels))?;
                read.reports.push(held_out.report.to_string());
                read.longest = read.longest.max(held_out.report.longest);
                (examples, held_out.examples)
            }
            None => split_examples(examples, holdout(settings)?, train.seed)?,
        };
        read.data = TrainingData { train: training, validation };
        self.set("val_set_size", settings.val_set_size.unwrap_or(0.0), "default");
        self.set("ignore_mismatched_sizes", settings.ignore_mismatched_sizes.unwrap_or(false), "default");
        Ok((read, self.head(&labels, named_by, model)?))
    }

    /// The architecture with a head for these labels.
    fn head(&mut self, labels: &Labels, named_by: &str, model: Config) -> Result<Config> {
        let problem = match labels {
            Labels::Classes(_) => ProblemType::Classification,
            Labels::Values => ProblemType::Regression,
        };
        self.set("problem_type", name_of(&PROBLEM_TYPES, problem), "data");
        self.set("num_labels", labels.outputs(), named_by);
        match labels {
            Labels::Classes(names) => {
                self.set("label_names", names.clone(), named_by);
                let model = model.with_task(Task::Classification { labels: names.len() })?;
                Ok(model.with_label_names(names)?)
            }
            Labels::Values => Ok(model.with_task(Task::Regression)?),
        }
    }

    /// The steps that train the head alone; a decoder's plan does not speak of them.
    pub(super) fn head_warmup(
        &mut self,
        settings: &SettingsArgs,
        adapter: &AdapterConfig,
        model: &Config,
    ) -> Result<usize> {
        let steps = settings.head_warmup_steps.unwrap_or(0);
        check_head_warmup(steps, adapter, model)?;
        if model.task != Task::LanguageModel {
            self.set("head_warmup_steps", steps, "default");
        }
        Ok(steps)
    }

    /// The scores that are shown.
    pub(super) fn metrics(&mut self, settings: &SettingsArgs, task: Task) -> Result<Vec<Metric>> {
        let known = metrics_of(task);
        let mut metrics = match (&settings.metrics, task) {
            (Some(metrics), _) => metrics.clone(),
            (None, Task::LanguageModel) => return Ok(Vec::new()),
            (None, Task::Classification { .. }) => vec![Metric::Accuracy],
            (None, Task::Regression) => vec![Metric::Pearson],
        };
        if let Some(metric) = metrics.iter().find(|metric| !known.contains(metric)) {
            let known: Vec<&str> = known.into_iter().map(Metric::name).collect();
            let message = format!("--metrics {metric}: says nothing of {}", described(task));
            return Err(Failure::usage(message).hint(format!("choose from {}", known.join(", "))));
        }
        metrics.dedup();
        let names: Vec<&str> = metrics.iter().map(|metric| metric.name()).collect();
        self.set("metrics", names, "default");
        Ok(metrics)
    }
}

fn described(task: Task) -> String {
    match task {
        Task::LanguageModel => "a language model".into(),
        Task::Classification { labels } => format!("{labels} classes"),
        Task::Regression => "numbers".into(),
    }
}

/// What the labels are, where somebody said it.
fn kind(settings: &SettingsArgs) -> Result<Option<LabelKind>> {
    let SettingsArgs { num_labels, label_names, problem_type, .. } = settings;
    let refused = |message: String, hint: &str| Err(Failure::usage(message).hint(hint));
    match (num_labels, label_names, problem_type) {
        (Some(0), ..) => refused("--num-labels 0: a head has at least one label".into(), "leave it out"),
        (Some(number), Some(names), _) if *number != names.len() => refused(
            format!("--num-labels {number} beside {} --label-names", names.len()),
            "the number follows from the names: leave --num-labels out",
        ),
        (Some(1), _, Some(ProblemType::Classification)) => refused(
            "--num-labels 1 with --problem-type single_label_classification".into(),
            "one label is a number to be predicted: --problem-type regression",
        ),
        (Some(2..), _, Some(ProblemType::Regression))
        | (_, Some(_), Some(ProblemType::Regression))
        | (Some(1), Some(_), _) => refused(
            "a regression beside classes: --problem-type regression or --num-labels 1 with more labels or names".into(),
            "a regression predicts one number, which has no name: leave --num-labels and --label-names out",
        ),
        (Some(1), ..) | (.., Some(ProblemType::Regression)) => Ok(Some(LabelKind::Values)),
        (Some(_), ..) | (_, Some(_), _) | (.., Some(ProblemType::Classification)) => Ok(Some(LabelKind::Classes)),
        (None, None, None) => Ok(None),
    }
}

/// Reads the training data. Its classes are named by the setting, or else by the model where it knows all of them,
/// or else by the data; beside it who named them.
fn read_classes(
    options: &LabelOptions,
    settings: &SettingsArgs,
    model: &Config,
    load: impl Fn(&LabelOptions) -> lora_sb_data::Result<Labelled>,
) -> Result<(Labelled, &'static str)> {
    let of_model = names_of_model(model, settings.num_labels);
    let with = |names: Vec<String>| load(&LabelOptions { names: Some(names), ..options.clone() });
    let found = match (load(options), of_model) {
        (Err(lora_sb_data::Error::OneClass { only, .. }), Some(names)) if names.contains(&only) => {
            return Ok((with(names)?, "model"));
        }
        (found, Some(names)) => {
            let found = found?;
            if options.names.is_none() && fits(&found.labels, &names) {
                return Ok((with(names)?, "model"));
            }
            found
        }
        (found, None) => found?,
    };
    match (found.labels.names(), settings.num_labels) {
        (Some(names), Some(number)) if names.len() < number && is_numbered(names) => {
            let names = (0..number).map(numbered).collect();
            Ok((with(names)?, "data"))
        }
        (Some(names), Some(number)) if names.len() != number => Err(Failure::usage(format!(
            "--num-labels {number}, and the data has {}: {}",
            names.len(),
            names.join(", ")
        ))
        .hint("leave it out, or give all of them with --label-names")),
        _ => Ok((found, "data")),
    }
}

/// The names that a model gives its labels, where somebody chose them and there are as many as are asked for.
fn names_of_model(model: &Config, number: Option<usize>) -> Option<Vec<String>> {
    let names = model.label_names();
    let wanted = number.is_none_or(|number| number == names.len());
    (names.len() > 1 && wanted && !is_numbered(&names)).then_some(names)
}

/// Whether the classes of the data are those of the names: all known by name, or as many by number.
fn fits(labels: &Labels, names: &[String]) -> bool {
    match labels.names() {
        Some(found) if is_numbered(found) => found.len() == names.len(),
        Some(found) => found.iter().all(|name| names.contains(name)),
        None => false,
    }
}

/// As transformers names a class without a name.
fn numbered(class: usize) -> String {
    format!("LABEL_{class}")
}

fn is_numbered(names: &[String]) -> bool {
    names.iter().enumerate().all(|(class, name)| *name == numbered(class))
}
