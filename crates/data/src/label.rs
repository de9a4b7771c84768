//! Labels of texts: classes with their names, or values. Written labels become [`Label`]s here.

use std::collections::{BTreeSet, HashMap};

use serde_json::Value;

use crate::format::kind;
use crate::{Error, ExcessLength, Label, Location, Result};

/// A class number above this is taken for something else, an identifier say.
const MOST_CLASSES: usize = 1 << 16;
/// How many class names an error lists.
const SHOWN: usize = 8;

const MISSING: &str = "every record needs a label: leave out those without one, or take another file (of GLUE the \
                       validation file: the labels of the test files were never published)";
const UNKNOWN: &str = "the classes are those that were named, or those of the training data: check them and the data \
                       for spelling, and that both are of the same task";
const MIXED: &str = "write the classes of all records as integers from 0, or all as names";
const NOT_A_NUMBER: &str =
    "write every label as a number to learn values, or every label as a name to learn classes";
const NOT_A_CLASS: &str = "numbers with a fraction are values: read them as values, not classes";

/// What the labels of a data set are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LabelKind {
    /// One of some classes (classification).
    Classes,
    /// A number (regression).
    Values,
}

impl LabelKind {
    /// The name used in options and records.
    pub fn name(self) -> &'static str {
        match self {
            LabelKind::Classes => "classes",
            LabelKind::Values => "values",
        }
    }
}

/// How labelled texts are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelOptions {
    /// The longest example in tokens, the tokenizer's special tokens included.
    pub max_length: usize,
    /// What becomes of longer ones; `None` truncates. [`ExcessLength::Split`] is refused: a label is of the
    /// whole text.
    pub excess_length: Option<ExcessLength>,
    /// What the labels are. `None` detects it: values if any label of any file is written as a number with a
    /// fraction (`3.8`, also `5.0`), classes if all are integers or names.
    pub kind: Option<LabelKind>,
    /// The names of the classes in the order of their numbers: those of the training data, or of the model's
    /// `id2label`. `None` takes them from the data.
    pub names: Option<Vec<String>>,
}

impl LabelOptions {
    /// Truncated at `max_length`, all else detected.
    pub fn new(max_length: usize) -> Self {
        Self { max_length, excess_length: None, kind: None, names: None }
    }

    /// The same options for data with these labels: for validation data, the labels of the training data.
    pub fn with_labels(self, labels: &Labels) -> Self {
        Self { kind: Some(labels.kind()), names: labels.names().map(<[String]>::to_vec), ..self }
    }
}

/// The labels that a data set has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Labels {
    /// The names of the classes, `[C]`, in the order of their numbers. Classes that are integers in the data are
    /// named `LABEL_0`, `LABEL_1` ..., as transformers names them.
    Classes(Vec<String>),
    /// Numbers.
    Values,
}

impl Labels {
    /// Classes or values.
    pub fn kind(&self) -> LabelKind {
        match self {
            Labels::Classes(_) => LabelKind::Classes,
            Labels::Values => LabelKind::Values,
        }
    }

    /// The names of the classes; `None` of values.
    pub fn names(&self) -> Option<&[String]> {
        match self {
            Labels::Classes(names) => Some(names),
            Labels::Values => None,
        }
    }

    /// The outputs of a head for them (`num_labels` in transformers): the classes, or 1 of values.
    pub fn outputs(&self) -> usize {
        self.names().map_or(1, <[String]>::len)
    }
}

/// A label as the file has it, with its place.
#[derive(Debug)]
pub(crate) struct Written {
    pub(crate) location: Location,
    pub(crate) field: &'static str,
    pub(crate) value: Spelling,
}

#[derive(Debug, PartialEq)]
pub(crate) enum Spelling {
    Integer(i64),
    Real(f64),
    Name(String),
}

impl Written {
    /// A number, a name, or a boolean, which is the name `false` or `true`.
    pub(crate) fn new(location: Location, field: &'static str, value: Option<&Value>) -> Result<Self> {
        let value = match value {
            Some(Value::Number(number)) => match (number.as_i64(), number.as_f64()) {
                (Some(integer), _) => Spelling::Integer(integer),
                (None, real) => Spelling::Real(real.unwrap_or(f64::INFINITY)),
            },
            Some(Value::String(name)) if !name.trim().is_empty() => Spelling::Name(name.clone()),
            Some(Value::Bool(flag)) => Spelling::Name(flag.to_string()),
            other => {
                let found = match other {
                    Some(Value::String(_)) => "an empty string",
                    other => other.map_or("no such field", kind),
                };
                let expected = "a class (an integer or a name) or a number".into();
                return Err(Error::Label { location, field, expected, found: found.into(), hint: MISSING });
            }
        };
        Ok(Self { location, field, value })
    }

    fn wrong(&self, expected: impl Into<Box<str>>, hint: &'static str) -> Error {
        let found = match &self.value {
            Spelling::Integer(-1) => "-1, which stands for no label".to_owned(),
            Spelling::Integer(integer) => integer.to_string(),
            Spelling::Real(real) => format!("{real:?}"),
            Spelling::Name(name) => format!("{name:?}"),
        };
        let hint = if self.value == Spelling::Integer(-1) { MISSING } else { hint };
        let (location, expected) = (self.location.clone(), expected.into());
        Error::Label { location, field: self.field, expected, found: found.into(), hint }
    }

    /// The integer that is written, also as `1.0`: Python writes a column of integers so where one is missing.
    fn integer(&self) -> Option<i64> {
        match self.value {
            Spelling::Integer(integer) => Some(integer),
            Spelling::Real(real) if real.fract() == 0.0 && real.abs() < 1e15 => Some(real as i64),
            _ => None,
        }
    }

    /// The number of a class of `names`: an integer is it, a name is looked up.
    fn class(&self, names: &[String], numbers: &HashMap<&str, u32>) -> Result<Label> {
        let count = names.len();
        match (&self.value, self.integer()) {
            (Spelling::Name(name), _) => match numbers.get(name.as_str()) {
                Some(&number) => Ok(Label::Class(number)),
                None => Err(self.wrong(format!("one of the classes {}", listed(names)), UNKNOWN)),
            },
            (_, Some(integer)) => match u32::try_from(integer).ok().filter(|&class| (class as usize) < count)
            {
                Some(class) => Ok(Label::Class(class)),
                None => Err(self.wrong(format!("a class from 0 to {}", count - 1), UNKNOWN)),
            },
            (_, None) => Err(self.wrong("a class (an integer or a name)", NOT_A_CLASS)),
        }
    }
}

fn listed(names: &[String]) -> String {
    let shown: Vec<_> = names.iter().take(SHOWN).map(|name| format!("{name:?}")).collect();
    let more = if names.len() > SHOWN { format!(" ... ({} classes)", names.len()) } else { String::new() };
    shown.join(", ") + &more
}

/// Refuses options that contradict each other.
pub(crate) fn check(options: &LabelOptions) -> Result<()> {
    let refused = |option, expected: &str, found: String| {
        Err(Error::Option { option, expected: expected.into(), found })
    };
    if options.excess_length == Some(ExcessLength::Split) {
        return refused("excess_length", "truncate, drop or raise for labelled texts", "split".into());
    }
    let Some(names) = &options.names else { return Ok(()) };
    if options.kind == Some(LabelKind::Values) {
        return refused("label_names", "no class names for labels that are values", listed(names));
    }
    let distinct: BTreeSet<_> = names.iter().collect();
    if distinct.len() < names.len() || !(2..=MOST_CLASSES).contains(&names.len()) {
        return refused("label_names", "at least 2 class names, each another", listed(names));
    }
    Ok(())
}

/// What the labels of a data set are, and the label of each record.
pub(crate) fn resolve(written: &[Written], options: &LabelOptions) -> Result<(Labels, Vec<Label>)> {
    let real = written.iter().find(|label| matches!(label.value, Spelling::Real(_)));
    let kind = match (options.kind, &options.names, real) {
        (Some(kind), _, _) => kind,
        (None, None, Some(_)) => LabelKind::Values,
        _ => LabelKind::Classes,
    };
    if kind == LabelKind::Values {
        let expected = match real {
            Some(real) if options.kind.is_none() => format!("a number, as {} has", real.location),
            _ => "a number".into(),
        };
        let labels = written.iter().map(|label| value(label, &expected)).collect::<Result<_>>()?;
        return Ok((Labels::Values, labels));
    }
    let names = match &options.names {
        Some(names) => names.clone(),
        None => names_of(written)?,
    };
    let numbers: HashMap<&str, u32> = names.iter().map(String::as_str).zip(0..).collect();
    let labels = written.iter().map(|label| label.class(&names, &numbers)).collect::<Result<_>>()?;
    Ok((Labels::Classes(names), labels))
}

fn value(label: &Written, expected: &str) -> Result<Label> {
    let value = match label.value {
        Spelling::Integer(integer) => integer as f32,
        Spelling::Real(real) => real as f32,
        Spelling::Name(_) => return Err(label.wrong(expected, NOT_A_NUMBER)),
    };
    match value.is_finite() {
        true => Ok(Label::Value(value)),
        false => Err(label.wrong("a number that fits 32 bits", NOT_A_NUMBER)),
    }
}

/// The classes of data that nobody has named: the first record says whether they are integers or names.
fn names_of(written: &[Written]) -> Result<Vec<String>> {
    let Some(first) = written.first() else { return Ok(vec![]) };
    let names = match first.value {
        Spelling::Name(_) => distinct_names(written)?,
        _ => numbered_names(written)?,
    };
    match names.len() {
        0 | 1 => Err(Error::OneClass {
            only: names.into_iter().next().unwrap_or_default(),
            records: written.len(),
            first: first.location.clone(),
        }),
        _ => Ok(names),
    }
}

fn numbered_names(written: &[Written]) -> Result<Vec<String>> {
    let mut largest = 0;
    for label in written {
        let Some(integer) = label.integer() else {
            let hint = if matches!(label.value, Spelling::Name(_)) { MIXED } else { NOT_A_CLASS };
            return Err(label.wrong("an integer, as the first record has", hint));
        };
        match usize::try_from(integer) {
            Ok(class) if class < MOST_CLASSES => largest = largest.max(class),
            _ => {
                let expected = format!("a class from 0 to at most {}", MOST_CLASSES - 1);
                return Err(label.wrong(expected, "number the classes from 0, or write their names as text"));
            }
        }
    }
    // transformers' own names for classes without one (`PretrainedConfig.id2label`).
    Ok((0..=largest).map(|class| format!("LABEL_{class}")).collect())
}

/// The names in their alphabetical order, or in that of their numbers where all are numbers.
fn distinct_names(written: &[Written]) -> Result<Vec<String>> {
    let mut names = BTreeSet::new();
    for label in written {
        match &label.value {
            Spelling::Name(name) => names.insert(name.as_str()),
            _ => return Err(label.wrong("the name of a class, as the first record has", MIXED)),
        };
        if names.len() > MOST_CLASSES {
            let expected = format!("at most {MOST_CLASSES} different classes");
            return Err(
                label.wrong(expected, "the field holds no classes: rename it, and call the label `label`")
            );
        }
    }
    let mut names: Vec<String> = names.into_iter().map(str::to_owned).collect();
    let numbers: Option<Vec<f64>> =
        names.iter().map(|name| name.parse().ok().filter(|number: &f64| number.is_finite())).collect();
    if let Some(numbers) = numbers {
        let mut numbered: Vec<_> = numbers.into_iter().zip(names).collect();
        numbered.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        names = numbered.into_iter().map(|(_, name)| name).collect();
    }
    Ok(names)
}
