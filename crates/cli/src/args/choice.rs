//! Values that are chosen from a list, and others that are more than a number or a text.

use std::ffi::OsStr;
use std::fmt;
use std::str::FromStr;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{Arg, Command};
use lora_sb_data::{ExcessLength, Format, TrainOn};
use lora_sb_model::SaveType;
use lora_sb_tune::config::{ByteSize, GradientCheckpointing, Precision};
use lora_sb_tune::eval::Metric;
use lora_sb_tune::optim::Scheduler;
use lora_sb_tune::{Bases, Error, Method};

/// `--method` as it is typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MethodChoice {
    /// One method.
    One(Method),
    /// Every method, for the table of `plan`.
    All,
}

impl MethodChoice {
    const ALL: &str = "all";
}

/// `--rank` as it is typed: one, or for the table of `plan` several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ranks(pub(crate) Vec<usize>);

impl FromStr for Ranks {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let rank = |word: &str| {
            word.trim().parse().map_err(|_| format!("expected a whole number, found {:?}", word.trim()))
        };
        text.split(',').map(rank).collect::<Result<_, _>>().map(Ranks)
    }
}

impl fmt::Display for Ranks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranks: Vec<String> = self.0.iter().map(usize::to_string).collect();
        f.write_str(&ranks.join(","))
    }
}

/// `--init-eta` as it is typed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum InitEta {
    /// A number.
    Number(f64),
    /// The authors' formula.
    Reference,
}

impl FromStr for InitEta {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "reference" => Ok(InitEta::Reference),
            _ => text.parse().map(InitEta::Number).map_err(|_| "expected a number or `reference`".into()),
        }
    }
}

/// `--init-convention` as it is typed; the batch size of `reference` is that of the training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InitConvention {
    /// Every sample weighs the same.
    PerSample,
    /// The authors' code.
    Reference,
}

/// `--problem-type` as it is typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProblemType {
    /// One of several classes.
    Classification,
    /// A number.
    Regression,
}

/// `--metric-for-best-model` as it is typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BestMetric {
    /// The held-out loss.
    Loss,
    /// A score.
    Score(Metric),
}

/// A parser of names out of a list, each understood in more spellings than the one that is shown.
#[derive(Clone)]
struct Choice<F> {
    names: Vec<&'static str>,
    read: F,
}

impl<T: Clone + Send + Sync + 'static, F> TypedValueParser for Choice<F>
where
    F: Fn(&str) -> Option<T> + Clone + Send + Sync + 'static,
{
    type Value = T;

    fn parse_ref(&self, cmd: &Command, arg: Option<&Arg>, value: &OsStr) -> Result<T, clap::Error> {
        if let Some(found) = value.to_str().and_then(|text| (self.read)(text)) {
            return Ok(found);
        }
        // What is not read is not in the list: clap words the error.
        PossibleValuesParser::new(self.names.clone()).parse_ref(cmd, arg, value)?;
        Err(clap::Error::new(ErrorKind::InvalidValue).with_cmd(cmd))
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(self.names.iter().map(|name| PossibleValue::new(*name))))
    }
}

/// A fixed list; underscores are understood for dashes and the other way round.
fn choice<T: Copy + Send + Sync + 'static>(
    list: &'static [(&'static str, T)],
) -> impl TypedValueParser<Value = T> {
    let dashed = |text: &str| text.replace('_', "-");
    let read = move |text: &str| {
        let found = list.iter().find(|(name, _)| dashed(name) == dashed(text));
        found.map(|(_, value)| *value)
    };
    Choice { names: list.iter().map(|(name, _)| *name).collect(), read }
}

/// All methods, however they are parted and whatever their case, as `rs-lora` or `LoRA_Pro`.
pub(super) fn method() -> impl TypedValueParser<Value = MethodChoice> {
    let read = |text: &str| match text {
        MethodChoice::ALL => Some(MethodChoice::All),
        name => name.parse().ok().map(MethodChoice::One),
    };
    Choice { names: Method::ALL.map(Method::name).into_iter().chain([MethodChoice::ALL]).collect(), read }
}

pub(super) fn init() -> impl TypedValueParser<Value = Bases> {
    Choice { names: Bases::ALL.map(Bases::name).to_vec(), read: |text: &str| text.parse().ok() }
}

/// A metric by its name, or by one that evaluation libraries have for it.
pub(super) fn metric() -> impl TypedValueParser<Value = Metric> {
    Choice { names: Metric::ALL.map(Metric::name).to_vec(), read: metric_of }
}

fn metric_of(text: &str) -> Option<Metric> {
    match text {
        "matthews" | "mcc" => Some(Metric::Matthews),
        "spearmanr" => Some(Metric::Spearman),
        name => Metric::from_name(name),
    }
}

/// As `transformers` has it, with and without `eval_` before the name.
pub(super) fn best_metric() -> impl TypedValueParser<Value = BestMetric> {
    const LOSS: &str = "loss";
    let read = |text: &str| match text.strip_prefix("eval_").unwrap_or(text) {
        LOSS => Some(BestMetric::Loss),
        name => metric_of(name).map(BestMetric::Score),
    };
    Choice { names: [LOSS].into_iter().chain(Metric::ALL.map(Metric::name)).collect(), read }
}

const FORMATS: [(&str, Format); 4] = [
    ("alpaca", Format::Alpaca),
    ("prompt-completion", Format::PromptCompletion),
    ("messages", Format::Messages),
    ("text", Format::Text),
];

pub(crate) const TRAIN_ON: [(&str, TrainOn); 2] =
    [("completion", TrainOn::Completion), ("everything", TrainOn::Everything)];

pub(crate) const EXCESS_LENGTH: [(&str, ExcessLength); 4] = [
    ("truncate", ExcessLength::Truncate),
    ("split", ExcessLength::Split),
    ("drop", ExcessLength::Drop),
    ("raise", ExcessLength::Raise),
];

const SCHEDULERS: [(&str, Scheduler); 3] =
    [("constant", Scheduler::Constant), ("linear", Scheduler::Linear), ("cosine", Scheduler::Cosine)];

const CONVENTIONS: [(&str, InitConvention); 2] =
    [("per-sample", InitConvention::PerSample), ("reference", InitConvention::Reference)];

/// With underscores, as in `config.json`.
pub(crate) const PROBLEM_TYPES: [(&str, ProblemType); 2] =
    [("single_label_classification", ProblemType::Classification), ("regression", ProblemType::Regression)];

const DTYPES: [(&str, SaveType); 3] =
    [("f32", SaveType::F32), ("bf16", SaveType::Bf16), ("f16", SaveType::F16)];

/// The name of a value in its list.
pub(crate) fn name_of<T: PartialEq>(names: &'static [(&'static str, T)], value: T) -> &'static str {
    names.iter().find(|(_, named)| *named == value).map_or("", |(name, _)| name)
}

pub(super) fn format() -> impl TypedValueParser<Value = Format> {
    choice(&FORMATS)
}

pub(super) fn train_on() -> impl TypedValueParser<Value = TrainOn> {
    choice(&TRAIN_ON)
}

pub(super) fn excess_length() -> impl TypedValueParser<Value = ExcessLength> {
    choice(&EXCESS_LENGTH)
}

pub(super) fn scheduler() -> impl TypedValueParser<Value = Scheduler> {
    choice(&SCHEDULERS)
}

pub(super) fn init_convention() -> impl TypedValueParser<Value = InitConvention> {
    choice(&CONVENTIONS)
}

pub(super) fn problem_type() -> impl TypedValueParser<Value = ProblemType> {
    choice(&PROBLEM_TYPES)
}

/// What a run computes in, also by PyTorch's names.
pub(super) fn precision() -> impl TypedValueParser<Value = Precision> {
    Choice { names: Precision::ALL.map(|(name, _)| name).to_vec(), read: |text: &str| text.parse().ok() }
}

/// `--gradient-checkpointing`, in its own words of what it expects.
pub(super) fn gradient_checkpointing(text: &str) -> Result<GradientCheckpointing, String> {
    text.parse().map_err(expected)
}

/// `--memory-limit`.
pub(super) fn memory_limit(text: &str) -> Result<ByteSize, String> {
    text.parse().map_err(expected)
}

/// What a library expected of a value; clap says what was found, and of which flag.
fn expected(error: Error) -> String {
    match error {
        Error::Config { expected, .. } => format!("expected {expected}"),
        other => other.to_string(),
    }
}

pub(super) fn dtype() -> impl TypedValueParser<Value = SaveType> {
    choice(&DTYPES)
}
