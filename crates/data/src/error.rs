//! The crate's error: the file and line, what was expected, what was found.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

/// Where a record comes from. Shown as `file:line`, and `file:line (element 3)` inside a JSON array.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The file as it was given.
    pub file: Arc<Path>,
    /// The line the record starts on, counted from 1.
    pub line: usize,
    /// The record's index in its JSON array, counted from 0; `None` for JSON lines and plain text.
    pub element: Option<usize>,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)?;
        match self.element {
            Some(element) => write!(f, " (element {element})"),
            None => Ok(()),
        }
    }
}

/// What can be wrong with data, a tokenizer or a chat template.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file that cannot be opened or read.
    #[error("{}: cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A data file whose extension is not known.
    #[error("{}: the extension {found:?} is not one of .jsonl, .json, .txt (or these with .gz)", path.display())]
    Extension {
        /// The file.
        path: PathBuf,
        /// Its extension, empty where there is none.
        found: String,
    },
    /// A `.gz` file that is no gzip file, or a broken one.
    #[error("{}: cannot be unpacked as gzip: {message}", path.display())]
    Gzip {
        /// The file.
        path: PathBuf,
        /// What the decoder found.
        message: String,
    },
    /// Bytes that are not UTF-8.
    #[error("{location}: expected UTF-8 text, found the byte 0x{byte:02x}")]
    Encoding {
        /// The line of the byte.
        location: Location,
        /// The byte.
        byte: u8,
    },
    /// Broken JSON.
    #[error("{location}: column {column}: broken JSON: {message}")]
    Json {
        /// The line, or the element that starts there.
        location: Location,
        /// The column of the break in its line, counted from 1.
        column: usize,
        /// What the parser expected.
        message: String,
    },
    /// A field that is missing or of another type.
    #[error("{location}: field {field:?}: expected {expected}, found {found}")]
    Field {
        /// The record.
        location: Location,
        /// The path of the field, as `messages[2].content`.
        field: String,
        /// What was expected.
        expected: &'static str,
        /// What was found.
        found: String,
        /// The records that are taken.
        accepted: Box<str>,
    },
    /// A record of no known shape.
    #[error("{location}: expected a record of a known shape, found {found}")]
    Shape {
        /// The record.
        location: Location,
        /// Its keys, or what it is if it is no object.
        found: String,
        /// The shapes that are taken, one a line.
        accepted: &'static str,
    },
    /// A label that is missing, of another kind or out of range.
    #[error("{location}: field {field:?}: expected {expected}, found {found}")]
    Label {
        /// The record.
        location: Location,
        /// The field of the label.
        field: &'static str,
        /// What was expected.
        expected: Box<str>,
        /// What was found.
        found: Box<str>,
        /// How to mend it.
        hint: &'static str,
    },
    /// Every record has the same class, and no names say that there are others.
    #[error("expected at least 2 classes, found only {only:?} in all {records} records (the first: {first})")]
    OneClass {
        /// The class.
        only: String,
        /// How many records were read.
        records: usize,
        /// The first of them.
        first: Location,
    },
    /// A chat without a chat template.
    #[error(
        "{location}: the record is a chat, but the tokenizer has no chat template (looked for in {looked_in})"
    )]
    NoTemplate {
        /// The first chat.
        location: Location,
        /// The files that were searched.
        looked_in: String,
    },
    /// A chat template that cannot be parsed.
    #[error("chat template {origin}: {message}")]
    Template {
        /// The file the template comes from.
        origin: String,
        /// The parser's complaint, with its line.
        message: String,
    },
    /// A chat that the template refuses or that cannot be found again in the text it renders.
    #[error("{}{message}", match location { Some(at) => format!("{at}: "), None => String::new() })]
    Chat {
        /// The record, where there is one.
        location: Option<Location>,
        /// What the template said.
        message: String,
    },
    /// A tokenizer that cannot be loaded or used.
    #[error("{origin}: {message}")]
    Tokenizer {
        /// The file or folder.
        origin: String,
        /// What was expected and found.
        message: String,
        /// How to mend it.
        hint: Option<&'static str>,
    },
    /// An answer has to end with the end-of-sequence token, and the tokenizer names none.
    #[error("{location}: the answer needs an end-of-sequence token, and the tokenizer names none")]
    NoEndToken {
        /// The first example that needs it.
        location: Location,
    },
    /// An example longer than the limit, with [`ExcessLength::Raise`](crate::ExcessLength::Raise).
    #[error("{location}: expected at most {max_length} tokens, found {found}")]
    TooLong {
        /// The record.
        location: Location,
        /// Its length in tokens.
        found: usize,
        /// The limit.
        max_length: usize,
    },
    /// Not one text is short enough, with [`ExcessLength::Drop`](crate::ExcessLength::Drop).
    #[error("all {records} texts are longer than {max_length} tokens and were dropped (the first: {first})")]
    AllDropped {
        /// How many records were read.
        records: usize,
        /// The limit.
        max_length: usize,
        /// The first of them.
        first: Location,
    },
    /// A text without a single token.
    #[error("{location}: the text is empty, and the tokenizer adds no token to it")]
    NoToken {
        /// The record.
        location: Location,
    },
    /// No record at all.
    #[error("no record in {files}")]
    Empty {
        /// The files that were read.
        files: String,
    },
    /// Not one example holds a token to train on.
    #[error("none of the {records} records has a token to train on: {reason} (the first: {first})")]
    NothingTrained {
        /// How many records were read.
        records: usize,
        /// How they were lost.
        reason: String,
        /// The first of them.
        first: Location,
    },
    /// An option outside its range.
    #[error("{option}: expected {expected}, found {found}")]
    Option {
        /// The option.
        option: &'static str,
        /// Its range.
        expected: String,
        /// What was given.
        found: String,
    },
}

impl Error {
    /// What the user can do about it, where there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                Some("check the path".into())
            }
            Error::Extension { found, .. } if found == "gz" => {
                Some("name it after what is in it, as data.jsonl.gz".into())
            }
            Error::Extension { found, .. } if matches!(found.as_str(), "zst" | "zip" | "xz" | "bz2") => {
                Some("unpack the file first; of the compressed ones, only gzip (.gz) is read".into())
            }
            Error::Extension { .. } => Some(
                "write one JSON object a line (.jsonl), a JSON array (.json) or plain text (.txt)".into(),
            ),
            Error::Gzip { .. } => Some(
                "fetch the file again (`gzip -t FILE` checks it), or leave out .gz if it is not compressed"
                    .into(),
            ),
            Error::Encoding { .. } => Some("convert the file to UTF-8, as with `iconv -t UTF-8`".into()),
            Error::Field { accepted, .. } => Some(format!("accepted: {accepted}")),
            Error::Shape { accepted, .. } => Some(format!("accepted shapes:\n{accepted}")),
            Error::Label { hint, .. } => Some((*hint).into()),
            Error::OneClass { .. } => {
                Some("give the names of all classes, or data in which more than one occurs".into())
            }
            Error::AllDropped { .. } => {
                Some("raise the maximum length, or let the texts be truncated".into())
            }
            Error::NoToken { .. } => Some("leave the record out".into()),
            Error::NoTemplate { .. } => Some(
                "give one with --chat-template FILE, or use the tokenizer of the model's chat variant".into(),
            ),
            Error::Chat { .. } => {
                Some("change the record, or give another template with --chat-template FILE".into())
            }
            Error::Tokenizer { hint, .. } => hint.map(str::to_owned),
            Error::NoEndToken { .. } => {
                Some("name it in tokenizer_config.json, as {\"eos_token\": \"</s>\"}".into())
            }
            Error::TooLong { .. } => Some(
                "raise the maximum length, or let over-long examples be truncated, split or dropped".into(),
            ),
            Error::NothingTrained { .. } => {
                Some("raise the maximum length, or check that the answers are not empty".into())
            }
            _ => None,
        }
    }
}
