//! Files to labelled texts, for classification and regression.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::encode::BATCH_BYTES;
use crate::format::{keys_of, kind};
use crate::label::{self, Written};
use crate::pair::{PairEncoder, PairTokens};
use crate::report::FileReport;
use crate::source::{self, Records};
use crate::{
    Error, Example, ExcessLength, Label, LabelOptions, LabelReport, Labels, Location, Result, Tokenizer,
};

/// The shapes that are read, as shown in hints.
const ACCEPTED: &str = r#"  {"sentence": "...", "label": 0} or {"text": "...", "label": "positive"}
  {"sentence1": "...", "sentence2": "...", "label": 1}; a label of 3.8 or 5.0 is a value, not a class
  {"premise": "...", "hypothesis": "...", "label": "entailment"}
  {"question1": "...", "question2": "...", "label": 0}
  {"question": "...", "sentence": "...", "label": 0}, also with "passage" for "sentence"
  {"text": "...", "text_pair": "...", "label": 0}, also "text1" and "text2", "text_a" and "text_b""#;

/// Fields of two texts; earlier rows go before later ones, and all go before one text.
const PAIRS: [[&str; 2]; 8] = [
    ["sentence1", "sentence2"],
    ["premise", "hypothesis"],
    ["question1", "question2"],
    ["question", "sentence"],
    ["question", "passage"],
    ["text", "text_pair"],
    ["text1", "text2"],
    ["text_a", "text_b"],
];

/// Fields of one text.
const SINGLES: [&str; 3] = ["sentence", "text", "content"];

/// Fields of the label.
const LABELS: [&str; 3] = ["label", "labels", "score"];

/// Labelled texts with the account of how they were made.
#[derive(Debug, Clone)]
pub struct Labelled {
    /// The examples in the order of the files, each with a label.
    pub examples: Vec<Example>,
    /// What their labels are.
    pub labels: Labels,
    /// What was read and what was lost.
    pub report: LabelReport,
}

/// Reads `.jsonl` and `.json` files of texts, or pairs of texts, and their labels; `.gz` ones too.
///
/// The fields of the text are found by the first record of each file: `sentence`, `text` or `content` for one
/// text; for pairs `sentence1` and `sentence2`, `premise` and `hypothesis`, `question1` and `question2`,
/// `question` and `sentence` or `passage`, `text` and `text_pair` and some more. The label is `label`, `labels` or
/// `score`: the number of a class from 0, its name, or a value.
///
/// Integers are the numbers of classes as they are; names without [`LabelOptions::names`] are numbered in their
/// alphabetical order. Read validation data with the labels of the training data:
///
/// ```
/// use lora_sb_data::{Label, LabelOptions, Tokenizer, load_labelled};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let dir = tempfile::tempdir()?;
/// # let (train, validation) = (dir.path().join("train.jsonl"), dir.path().join("validation.jsonl"));
/// std::fs::write(&train, "{\"text\": \"a good film\", \"label\": \"positive\"}\n{\"text\": \"no\", \"label\": \"negative\"}")?;
/// std::fs::write(&validation, "{\"text\": \"the best\", \"label\": \"positive\"}")?;
/// # let tokenizer = Tokenizer::from_bytes(include_bytes!("../tests/fixtures/wordpiece.json"), None)?;
/// let options = LabelOptions::new(128);
/// let train = load_labelled(&[train], &tokenizer, &options)?;
/// assert_eq!(train.labels.names().unwrap(), ["negative", "positive"]);
///
/// let validation = load_labelled(&[validation], &tokenizer, &options.with_labels(&train.labels))?;
/// assert_eq!(validation.examples[0].label, Some(Label::Class(1)));
/// # Ok(())
/// # }
/// ```
///
/// # Errors
///
/// A file that cannot be read, a record of another shape than the first, a label that is missing (also `-1`),
/// unknown or out of range, an over-long text with [`ExcessLength::Raise`], fewer than two classes.
pub fn load_labelled(files: &[PathBuf], tokenizer: &Tokenizer, options: &LabelOptions) -> Result<Labelled> {
    label::check(options)?;
    let mut report = LabelReport { max_length: options.max_length, ..LabelReport::default() };
    let (mut texts, mut written) = (Vec::new(), Vec::new());
    for file in files {
        report.files.push(read(file, &mut texts, &mut written)?);
    }
    report.records = texts.len();
    if texts.is_empty() {
        let files: Vec<_> = files.iter().map(|path| path.display().to_string()).collect();
        let files = if files.is_empty() { "an empty list of files".into() } else { files.join(", ") };
        return Err(Error::Empty { files });
    }
    let (labels, numbers) = label::resolve(&written, options)?;
    let mut encoder = PairEncoder::new(tokenizer, options.max_length);
    let mut examples = Vec::with_capacity(texts.len());
    let mut at = 0;
    while at < texts.len() {
        let end = at + batch(&texts[at..]);
        let batch: Vec<_> = texts[at..end].iter().map(Texts::parts).collect();
        for (tokens, index) in encoder.encode(&batch)?.into_iter().zip(at..) {
            let kept =
                keep(&texts[index], &written[index].location, tokens, numbers[index], options, &mut report)?;
            examples.extend(kept);
        }
        at = end;
    }
    if let (true, Some(first)) = (examples.is_empty(), report.dropped.first.first()) {
        let (records, first) = (report.records, first.clone());
        return Err(Error::AllDropped { records, max_length: options.max_length, first });
    }
    report.count_labels(&labels, &examples);
    Ok(Labelled { examples, labels, report })
}

/// One text, or two.
pub(crate) struct Texts {
    pub(crate) first: String,
    pub(crate) second: Option<String>,
}

impl Texts {
    pub(crate) fn parts(&self) -> (&str, Option<&str>) {
        (&self.first, self.second.as_deref())
    }

    fn is_blank(&self) -> bool {
        self.first.trim().is_empty() || self.second.as_ref().is_some_and(|second| second.trim().is_empty())
    }
}

/// How many of the texts are tokenised together.
pub(crate) fn batch(texts: &[Texts]) -> usize {
    let mut bytes = 0;
    let fits = |texts: &&Texts| {
        bytes += texts.first.len() + texts.second.as_ref().map_or(0, String::len);
        bytes <= BATCH_BYTES
    };
    texts.iter().take_while(fits).count().max(1)
}

/// The example of a text, or nothing where it is dropped.
fn keep(
    texts: &Texts,
    location: &Location,
    tokens: PairTokens,
    label: Label,
    options: &LabelOptions,
    report: &mut LabelReport,
) -> Result<Option<Example>> {
    let PairTokens { ids, second, whole } = tokens;
    let max_length = options.max_length;
    if ids.is_empty() {
        return Err(Error::NoToken { location: location.clone() });
    }
    report.longest_found = report.longest_found.max(whole);
    if whole > max_length {
        match options.excess_length.unwrap_or(ExcessLength::Truncate) {
            ExcessLength::Drop => {
                report.dropped.add(location);
                return Ok(None);
            }
            ExcessLength::Raise => {
                return Err(Error::TooLong { location: location.clone(), found: whole, max_length });
            }
            ExcessLength::Truncate | ExcessLength::Split => {
                report.truncated += 1;
                report.tokens_lost += whole - ids.len();
            }
        }
    }
    if texts.is_blank() {
        report.blank.add(location);
    }
    report.examples += 1;
    report.pairs += usize::from(texts.second.is_some());
    report.tokens += ids.len();
    report.longest = report.longest.max(ids.len());
    let trained = vec![false; ids.len()];
    Ok(Some(Example { ids, trained, second, label: Some(label), source: location.clone() }))
}

/// The fields of the records of one file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fields {
    first: &'static str,
    second: Option<&'static str>,
    pub(crate) label: &'static str,
}

fn read(path: &Path, texts: &mut Vec<Texts>, written: &mut Vec<Written>) -> Result<FileReport> {
    let mut report =
        FileReport { file: path.into(), format: None, fields: vec![], ignored: vec![], records: 0 };
    let records = records(path)?;
    let Some((location, first)) = records.first() else { return Ok(report) };
    let record = object(location, first)?;
    let fields = Fields::detect(location, record)?;
    let known: BTreeSet<&str> = fields.names().collect();
    let (read, ignored): (Vec<_>, Vec<_>) =
        record.keys().cloned().partition(|key| known.contains(key.as_str()));
    (report.records, report.fields, report.ignored) = (records.len(), read, ignored);
    for (location, record) in &records {
        let record = object(location, record)?;
        texts.push(fields.texts(location, record)?);
        written.push(Written::new(location.clone(), fields.label, record.get(fields.label))?);
    }
    Ok(report)
}

/// The records of a file, which must not be plain text.
pub(crate) fn records(path: &Path) -> Result<Vec<(Location, Value)>> {
    match source::read(path)? {
        Records::Json(records) => Ok(records),
        Records::Document(location, _) => {
            Err(Error::Shape { location, found: "plain text without labels".into(), accepted: ACCEPTED })
        }
    }
}

pub(crate) fn object<'a>(location: &Location, record: &'a Value) -> Result<&'a Map<String, Value>> {
    let found = || kind(record).to_owned();
    record.as_object().ok_or_else(|| Error::Shape {
        location: location.clone(),
        found: found(),
        accepted: ACCEPTED,
    })
}

impl Fields {
    pub(crate) fn detect(location: &Location, record: &Map<String, Value>) -> Result<Self> {
        let holds = |key: &str| record.contains_key(key);
        let label = LABELS.into_iter().find(|key| holds(key)).unwrap_or(LABELS[0]);
        if let Some([first, second]) = PAIRS.into_iter().find(|[first, second]| holds(first) && holds(second))
        {
            return Ok(Self { first, second: Some(second), label });
        }
        match SINGLES.into_iter().find(|key| holds(key)) {
            Some(first) => Ok(Self { first, second: None, label }),
            None => {
                Err(Error::Shape { location: location.clone(), found: keys_of(record), accepted: ACCEPTED })
            }
        }
    }

    fn names(self) -> impl Iterator<Item = &'static str> {
        [Some(self.first), self.second, Some(self.label)].into_iter().flatten()
    }

    pub(crate) fn texts(self, location: &Location, record: &Map<String, Value>) -> Result<Texts> {
        let first = self.text(location, record, self.first)?;
        let second = self.second.map(|key| self.text(location, record, key)).transpose()?;
        Ok(Texts { first, second })
    }

    fn text(self, location: &Location, record: &Map<String, Value>, key: &str) -> Result<String> {
        match record.get(key) {
            Some(Value::String(text)) => Ok(text.clone()),
            other => {
                let mut accepted: Vec<_> = [Some(self.first), self.second]
                    .into_iter()
                    .flatten()
                    .map(|key| format!("\"{key}\": \"...\""))
                    .collect();
                accepted.push(format!("\"{}\": 0", self.label));
                Err(Error::Field {
                    location: location.clone(),
                    field: key.to_owned(),
                    expected: "a string",
                    found: other.map_or("no such field", kind).into(),
                    accepted: format!("{{{}}}", accepted.join(", ")).into(),
                })
            }
        }
    }
}
