//! A sequence of tokens with its loss mask, and the options that make one.

use crate::Location;

/// One training sequence, never padded.
///
/// `trained[i]` says whether the *prediction of* `ids[i]` counts in the loss, as `labels[i] = ids[i]`
/// against `labels[i] = -100` does in transformers; the shift by one is the model's. Nothing predicts the
/// first token, so `trained[0]` is always false.
///
/// An example with a [`Label`] is for a classification head: no token of it is trained, the label is.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// Token ids, `[T]`.
    pub ids: Vec<u32>,
    /// The loss mask, `[T]`; all false where there is a label.
    pub trained: Vec<bool>,
    /// The index of the first token of the second text of a pair, from which on token types are 1; `None` for
    /// one text, and for tokenizers that give all tokens the type 0.
    pub second: Option<usize>,
    /// The class or value of the text; `None` in language modelling.
    pub label: Option<Label>,
    /// The record it was made from.
    pub source: Location,
}

/// What a classification head learns of an example.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Label {
    /// The number of a class, counted from 0.
    Class(u32),
    /// A number to be predicted (regression).
    Value(f32),
}

impl Example {
    /// Text for language modelling: no pair, no label.
    pub fn text(ids: Vec<u32>, trained: Vec<bool>, source: Location) -> Self {
        Self { ids, trained, second: None, label: None, source }
    }

    /// How many tokens the loss is taken over.
    pub fn trained_tokens(&self) -> usize {
        self.trained.iter().filter(|&&trained| trained).count()
    }
}

/// The shapes of training text. [`load`](crate::load) detects the shape from the first record of each file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// An instruction, an optional input, and an answer, put into the Alpaca prompt.
    Alpaca,
    /// A prompt and its continuation, joined as they are.
    PromptCompletion,
    /// A chat, rendered by the tokenizer's chat template.
    Messages,
    /// Plain text, all of it trained.
    Text,
}

impl Format {
    /// The name used in options and reports.
    pub fn name(self) -> &'static str {
        match self {
            Format::Alpaca => "alpaca",
            Format::PromptCompletion => "prompt-completion",
            Format::Messages => "messages",
            Format::Text => "text",
        }
    }
}

/// What becomes of an example longer than `max_length`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExcessLength {
    /// Keep the first `max_length` tokens.
    Truncate,
    /// Cut into consecutive windows of `max_length`, without overlap; a last window of one token is left out,
    /// since nothing predicts it.
    Split,
    /// Leave the example out.
    Drop,
    /// Stop with [`Error::TooLong`](crate::Error::TooLong).
    Raise,
}

/// Which tokens the loss is taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrainOn {
    /// The answer and its end token; in a chat every assistant turn with its end-of-turn token.
    Completion,
    /// Every token but the first.
    Everything,
}

/// How files are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadOptions {
    /// The shape of the records; `None` detects it.
    pub format: Option<Format>,
    /// The longest example in tokens, at least 2.
    pub max_length: usize,
    /// What becomes of longer ones; `None` splits [`Format::Text`] and truncates the others.
    pub excess_length: Option<ExcessLength>,
    /// Which tokens are trained. [`Format::Text`] is trained whole in either case.
    pub train_on: TrainOn,
}

impl LoadOptions {
    /// Detected format, the default treatment of excess length, answers trained.
    pub fn new(max_length: usize) -> Self {
        Self { format: None, max_length, excess_length: None, train_on: TrainOn::Completion }
    }

    /// The treatment of over-long examples of a format.
    pub fn excess_length(&self, format: Format) -> ExcessLength {
        self.excess_length.unwrap_or(match format {
            Format::Text => ExcessLength::Split,
            _ => ExcessLength::Truncate,
        })
    }
}
