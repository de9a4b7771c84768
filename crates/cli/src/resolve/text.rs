//! The data of decoders: text, and what of it is trained.

use std::path::PathBuf;

use lora_sb_data::{Dataset, Format, Holdout, LoadOptions, Tokenizer, TrainOn, split_validation};
use lora_sb_tune::TrainConfig;
use lora_sb_tune::train::TrainingData;
use serde_json::Value;

use super::Read;
use super::book::Book;
use crate::args::{EXCESS_LENGTH, SettingsArgs, TRAIN_ON, name_of};
use crate::base::{self, Base};
use crate::embedded;
use crate::failure::{Failure, Result};

impl Book {
    /// Reads the data of a language model.
    pub(super) fn text(
        &mut self,
        settings: &SettingsArgs,
        base: &Base,
        tokenizer: &Tokenizer,
        train: &TrainConfig,
    ) -> Result<Read> {
        let options = LoadOptions {
            format: settings.format,
            max_length: train.max_length,
            excess_length: settings.excess_length_strategy,
            train_on: settings.train_on.unwrap_or(TrainOn::Completion),
        };
        self.set("format", settings.format.map(Format::name), "detected in each file");
        self.set("train_on", name_of(&TRAIN_ON, options.train_on), "default");
        let excess = options.excess_length.map(|excess| name_of(&EXCESS_LENGTH, excess));
        self.set("excess_length_strategy", excess, "split for text, truncate for the others");
        self.set("chat_template", settings.chat_template.as_deref().map(base::absolute), "tokenizer");
        self.set("sample_prompt", settings.sample_prompt.clone(), "default");
        self.files(settings);
        let Some(files) = &settings.data else {
            debug_assert_eq!(*base, Base::BuiltIn);
            return self.built_in(settings, tokenizer, &options);
        };
        let dataset = lora_sb_data::load(files, tokenizer, &options)?;
        let mut reports = vec![dataset.report.clone()];
        let (train, validation) = match validation_files(settings)? {
            Some(files) => {
                let Dataset { examples, report } = lora_sb_data::load(files, tokenizer, &options)?;
                reports.push(report);
                (dataset.examples, examples)
            }
            None => split_validation(dataset, holdout(settings)?, train.seed)?,
        };
        self.set("val_set_size", settings.val_set_size.unwrap_or(0.0), "default");
        Ok(read(TrainingData { train, validation }, &reports))
    }

    fn built_in(
        &mut self,
        settings: &SettingsArgs,
        tokenizer: &Tokenizer,
        options: &LoadOptions,
    ) -> Result<Read> {
        if settings.validation_data.is_some() || settings.val_set_size.is_some() {
            return Err(Failure::usage("--validation-data and --val-set-size need --data")
                .hint("the built-in text holds out its last tenth"));
        }
        self.set("val_set_size", Value::Null, "built-in: the last tenth of the text");
        let mut parts = Vec::new();
        for text in embedded::texts() {
            parts.push(lora_sb_data::load_texts(&[text], tokenizer, options)?);
        }
        let reports: Vec<_> = parts.iter().map(|part| part.report.clone()).collect();
        let mut examples = parts.into_iter().map(|part| part.examples);
        let (train, validation) = (examples.next().unwrap_or_default(), examples.next().unwrap_or_default());
        Ok(read(TrainingData { train, validation }, &reports))
    }

    /// Notes the files.
    pub(super) fn files(&mut self, settings: &SettingsArgs) {
        let paths = |files: &[PathBuf]| files.iter().map(|file| base::absolute(file)).collect::<Vec<_>>();
        self.set("data", settings.data.as_deref().map(paths), embedded::NAME);
        self.set("validation_data", settings.validation_data.as_deref().map(paths), "default");
    }
}

fn read(data: TrainingData, reports: &[lora_sb_data::Report]) -> Read {
    let longest = reports.iter().map(|report| report.longest).max().unwrap_or(0);
    Read { data, reports: reports.iter().map(ToString::to_string).collect(), longest }
}

/// The files that are held out, where it is not a part of the training files.
pub(super) fn validation_files(settings: &SettingsArgs) -> Result<Option<&Vec<PathBuf>>> {
    if settings.validation_data.is_some() && settings.val_set_size.is_some_and(|size| size > 0.0) {
        return Err(Failure::usage("--val-set-size beside --validation-data")
            .hint("give one of them: the first holds out a part of --data"));
    }
    Ok(settings.validation_data.as_ref())
}

/// The part of the training files that is held out.
pub(super) fn holdout(settings: &SettingsArgs) -> Result<Holdout> {
    match settings.val_set_size.unwrap_or(0.0) {
        size if (0.0..1.0).contains(&size) => Ok(Holdout::Fraction(size)),
        size if size >= 1.0 && size.fract() == 0.0 && size < 1e15 => Ok(Holdout::Count(size as usize)),
        size => Err(Failure::usage(format!(
            "val_set_size: expected a share below 1 or a whole number, found {size}"
        ))
        .hint("as 0.1 for a tenth of the examples, or 100 for a hundred of them")),
    }
}
