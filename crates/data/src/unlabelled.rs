//! Files to texts whose class or value is asked for, with their labels where there are some.

use std::path::PathBuf;

use serde_json::Value;

use crate::label::{self, Written};
use crate::labelled::{self, Fields, Texts};
use crate::pair::PairEncoder;
use crate::{Error, Example, Label, LabelKind, LabelOptions, Result, Tokenizer};

/// A text, or a pair of texts, whose class or value is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct TextToPredict {
    /// The text as the file has it.
    pub first: String,
    /// The second one of a pair.
    pub second: Option<String>,
    /// Its tokens, and its label where the file has one.
    pub example: Example,
    /// How many tokens there were before the text was cut, special tokens included.
    pub whole: usize,
}

/// Reads files as [`load_labelled`](crate::load_labelled) does, but for the labels: a record without one, with `null`
/// or with the class -1, as the unpublished ones of GLUE, is read too. The labels that there are must be of `options.names`, or
/// values. Longer texts are cut to `options.max_length`.
///
/// # Errors
///
/// As of [`load_labelled`](crate::load_labelled), but for a missing label.
pub fn load_to_predict(
    files: &[PathBuf],
    tokenizer: &Tokenizer,
    options: &LabelOptions,
) -> Result<Vec<TextToPredict>> {
    label::check(options)?;
    let (mut texts, mut places, mut written) = (Vec::new(), Vec::new(), Vec::new());
    for file in files {
        let records = labelled::records(file)?;
        let Some((location, first)) = records.first() else { continue };
        let fields = Fields::detect(location, labelled::object(location, first)?)?;
        for (location, record) in &records {
            let record = labelled::object(location, record)?;
            texts.push(fields.texts(location, record)?);
            places.push(location.clone());
            let value = record.get(fields.label).filter(|value| !is_missing(value, options));
            if let Some(value) = value {
                let label = Written::new(location.clone(), fields.label, Some(value))?;
                written.push((texts.len() - 1, label));
            }
        }
    }
    if texts.is_empty() {
        let files: Vec<_> = files.iter().map(|path| path.display().to_string()).collect();
        return Err(Error::Empty { files: files.join(", ") });
    }
    let (indices, written): (Vec<usize>, Vec<Written>) = written.into_iter().unzip();
    let mut labels: Vec<Option<Label>> = vec![None; texts.len()];
    if !written.is_empty() {
        let (_, found) = label::resolve(&written, options)?;
        indices.into_iter().zip(found).for_each(|(index, label)| labels[index] = Some(label));
    }
    let mut encoder = PairEncoder::new(tokenizer, options.max_length);
    let mut encoded = Vec::with_capacity(texts.len());
    while encoded.len() < texts.len() {
        let rest = &texts[encoded.len()..];
        let together: Vec<_> = rest[..labelled::batch(rest)].iter().map(Texts::parts).collect();
        encoded.extend(encoder.encode(&together)?);
    }
    let parts = texts.into_iter().zip(encoded).zip(places).zip(labels);
    parts
        .map(|(((Texts { first, second }, tokens), source), label)| {
            if tokens.ids.is_empty() {
                return Err(Error::NoToken { location: source });
            }
            let trained = vec![false; tokens.ids.len()];
            let example = Example { ids: tokens.ids, trained, second: tokens.second, label, source };
            Ok(TextToPredict { first, second, example, whole: tokens.whole })
        })
        .collect()
}

/// Whether a record says that its label is not known.
fn is_missing(value: &Value, options: &LabelOptions) -> bool {
    let of_classes = options.kind != Some(LabelKind::Values);
    value.is_null() || of_classes && value.as_i64() == Some(-1)
}
