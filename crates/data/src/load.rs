//! Files to a data set.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::encode::Encoder;
use crate::format::{self, Shape};
use crate::report::FileReport;
use crate::source::{self, Records};
use crate::{Error, Example, Format, LoadOptions, Location, Report, Result, Tokenizer};

/// Examples with the account of how they were made.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// The examples, in the order of the files.
    pub examples: Vec<Example>,
    /// What was read and what was lost.
    pub report: Report,
}

/// Reads `.jsonl`, `.json` and `.txt` files into tokens with their loss masks.
///
/// The shape of the records is detected from the first record of each file, unless
/// [`LoadOptions::format`] says it; a `.txt` file is one document.
///
/// # Errors
///
/// A file that cannot be read, a record of another shape than the first, a chat that the template refuses, an
/// over-long example with [`ExcessLength::Raise`](crate::ExcessLength::Raise), and a data set in which nothing
/// is left to train.
pub fn load(files: &[PathBuf], tokenizer: &Tokenizer, options: &LoadOptions) -> Result<Dataset> {
    let paths: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
    load_all(&paths, &mut |index| source::read(paths[index]), tokenizer, options)
}

/// Plain texts that are in memory already, as [`load`] reads them from `.txt` files. A text's path is its name
/// in locations and reports; nothing is read from there.
///
/// # Errors
///
/// As [`load`].
pub fn load_texts(texts: &[(&Path, &str)], tokenizer: &Tokenizer, options: &LoadOptions) -> Result<Dataset> {
    let paths: Vec<&Path> = texts.iter().map(|(path, _)| *path).collect();
    let mut read = |index: usize| {
        let (path, text) = texts[index];
        Ok(Records::Document(Location { file: path.into(), line: 1, element: None }, text.to_owned()))
    };
    load_all(&paths, &mut read, tokenizer, options)
}

fn load_all(
    paths: &[&Path],
    read: &mut dyn FnMut(usize) -> Result<Records>,
    tokenizer: &Tokenizer,
    options: &LoadOptions,
) -> Result<Dataset> {
    if options.max_length < 2 {
        return Err(Error::Option {
            option: "max_length",
            expected: "at least 2 tokens, one to predict from and one to predict".into(),
            found: options.max_length.to_string(),
        });
    }
    let mut encoder = Encoder::new(tokenizer, options);
    for (index, path) in paths.iter().enumerate() {
        let report = load_records(path, read(index)?, tokenizer, options, &mut encoder)?;
        encoder.report.files.push(report);
    }
    encoder.flush()?;
    let (examples, report) = (encoder.examples, encoder.report);
    if report.records == 0 {
        let files: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
        let files = if files.is_empty() { "an empty list of files".into() } else { files.join(", ") };
        return Err(Error::Empty { files });
    }
    if examples.is_empty() {
        return Err(nothing_trained(&report));
    }
    Ok(Dataset { examples, report })
}

fn load_records(
    path: &Path,
    records: Records,
    tokenizer: &Tokenizer,
    options: &LoadOptions,
    encoder: &mut Encoder<'_>,
) -> Result<FileReport> {
    let mut report =
        FileReport { file: path.into(), format: None, fields: vec![], ignored: vec![], records: 0 };
    match records {
        Records::Document(location, text) => {
            if let Some(format) = options.format.filter(|&format| format != Format::Text) {
                return Err(Error::Option {
                    option: "format",
                    expected: format!("\"text\" for {}", path.display()),
                    found: format!("{:?}", format.name()),
                });
            }
            report.format = Some(Shape::DOCUMENT.format);
            if !text.trim().is_empty() {
                report.records = 1;
                encoder.push(format::document(location, text))?;
            }
        }
        Records::Json(records) => {
            report.records = records.len();
            if let Some((location, first)) = records.first() {
                let shape = Shape::detect(location, first, options.format)?;
                let keys: Vec<&String> =
                    first.as_object().map(|record| record.keys().collect()).unwrap_or_default();
                let known: BTreeSet<&str> = shape.fields().into_iter().collect();
                let (fields, ignored): (Vec<&String>, Vec<&String>) =
                    keys.into_iter().partition(|key| known.contains(key.as_str()));
                report.format = Some(shape.format);
                report.fields = fields.into_iter().cloned().collect();
                report.ignored = ignored.into_iter().cloned().collect();
                for (location, record) in records {
                    encoder.push(shape.draft(location, record, tokenizer)?)?;
                }
            }
        }
    }
    Ok(report)
}

fn nothing_trained(report: &Report) -> Error {
    let (dropped, untrained) = (&report.dropped, &report.without_trained_token);
    let mut reasons = Vec::new();
    if untrained.count > 0 {
        reasons.push(format!("{} without a trained token", untrained.count));
    }
    if report.truncated > 0 {
        reasons.push(format!("{} truncated to {} tokens", report.truncated, report.max_length));
    }
    if dropped.count > 0 {
        reasons.push(format!("{} dropped as longer than {} tokens", dropped.count, report.max_length));
    }
    let first = untrained.first.first().or(dropped.first.first()).cloned();
    match first {
        Some(first) => Error::NothingTrained { records: report.records, reason: reasons.join(", "), first },
        None => Error::Empty { files: String::from("the files given") },
    }
}
