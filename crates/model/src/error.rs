//! The crate's error.

use std::path::{Path, PathBuf};

use lora_sb_kernels::DType;

/// What can go wrong between a directory on disk and a gradient.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file that a model directory must hold is not there.
    #[error("{}: not found; {needed_for}", path.display())]
    MissingFile {
        /// The file looked for.
        path: PathBuf,
        /// Who needs it.
        needed_for: String,
        /// How to mend it.
        hint: Option<String>,
    },
    /// The system refused to read or write.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A JSON file that is not JSON.
    #[error("{file}:{line}: {message}")]
    Json {
        /// The file.
        file: String,
        /// The line, from 1.
        line: usize,
        /// What the parser says.
        message: String,
    },
    /// A key of `config.json` that is missing or holds what this program cannot compute.
    #[error("{file}: `{key}`: expected {expected}, found {found}")]
    Config {
        /// The file.
        file: String,
        /// The key, with a dot between levels.
        key: String,
        /// What is accepted.
        expected: String,
        /// What the file holds.
        found: String,
    },
    /// A model family that is not built in.
    #[error("{file}: architecture {found} is not supported; known: {known}")]
    UnknownArchitecture {
        /// The file.
        file: String,
        /// What the file says.
        found: String,
        /// The families that are.
        known: String,
        /// How to mend it.
        hint: Option<String>,
    },
    /// A task that the model has no head for, or labels that do not fit its head.
    #[error("{message}")]
    Task {
        /// What does not fit what.
        message: String,
        /// How to mend it.
        hint: Option<String>,
    },
    /// A weight file that breaks the safetensors format.
    #[error("{file}: {message}")]
    WeightFile {
        /// The file.
        file: String,
        /// Which law of the format it breaks, with the numbers.
        message: String,
    },
    /// A tensor that the configuration asks for and no file holds.
    #[error("{file}: no tensor `{tensor}`; the configuration asks for one of shape {expected:?}")]
    MissingTensor {
        /// The file that should hold it.
        file: String,
        /// Its name.
        tensor: String,
        /// The shape it should have.
        expected: Vec<usize>,
    },
    /// A tensor of another shape than the configuration gives it.
    #[error("{file}: tensor `{tensor}` has shape {found:?}; the configuration asks for {expected:?}")]
    TensorShape {
        /// The file.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// The shape it should have.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A classification head of another number of labels than the task has.
    #[error(
        "{file}: the classification head `{tensor}` has shape {found:?}; a task of {} needs {expected:?}",
        labels(expected)
    )]
    Head {
        /// The file.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// The shape that the task asks for; its first axis are the labels.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A tensor of an element type that is not read.
    #[error("{file}: tensor `{tensor}` holds {found}; F32, BF16 and F16 are read")]
    TensorType {
        /// The file.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// The type in the file.
        found: String,
    },
    /// A value that the element type asked for cannot hold.
    #[error("tensor `{tensor}`: {value} does not fit into {dtype}")]
    Overflow {
        /// The tensor's name.
        tensor: String,
        /// The first value that overflows.
        value: f32,
        /// The element type asked for.
        dtype: &'static str,
    },
    /// Sequences that make no batch.
    #[error("sequence {sequence} of the batch: {message}")]
    Batch {
        /// Its index.
        sequence: usize,
        /// What is wrong with it.
        message: String,
    },
    /// A sequence longer than the rotation table.
    #[error("a sequence of {needed} tokens, but the model is prepared for {prepared}")]
    Positions {
        /// Positions that are needed.
        needed: usize,
        /// Positions that there are.
        prepared: usize,
    },
    /// A sequence longer than a model with learned positions can read.
    #[error("a sequence of {needed} tokens, but the model learned {learned} positions and has no more")]
    LearnedPositions {
        /// Positions that are needed.
        needed: usize,
        /// Positions that there are.
        learned: usize,
    },
    /// Labels of another kind than the model predicts.
    #[error("the model predicts {expected}, but the batch's labels are {found}")]
    Target {
        /// What the model predicts.
        expected: &'static str,
        /// What the labels are.
        found: &'static str,
    },
    /// A parameter that this model does not have.
    #[error("the model has no {parameter}")]
    NoParameter {
        /// The parameter.
        parameter: String,
    },
    /// Settings of a generation that make no sense.
    #[error("generation: {message}")]
    Generation {
        /// The setting, the accepted range and what was found.
        message: String,
    },
    /// A hook reads a layer's input that it did not ask for.
    #[error("block {layer}: a hook reads an input that its `needs_input` did not ask for")]
    Dropped {
        /// The block.
        layer: usize,
    },
    /// A type that no model computes in.
    #[error("dtype: expected f32 or bf16, found {found}")]
    Compute {
        /// What was asked for.
        found: DType,
    },
    /// An operation failed.
    #[error(transparent)]
    Kernels(#[from] lora_sb_kernels::Error),
}

impl Error {
    /// What the user can do about it, where there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::MissingFile { hint, .. }
            | Error::UnknownArchitecture { hint, .. }
            | Error::Task { hint, .. } => hint.clone(),
            Error::Head { .. } => Some(
                "draw a new head instead, or choose a task with as many labels as the head that is there"
                    .into(),
            ),
            Error::WeightFile { .. } => Some("download or copy the file again".into()),
            Error::TensorShape { .. } | Error::MissingTensor { .. } => {
                Some("check that config.json and the weights belong to the same model".into())
            }
            Error::TensorType { .. } => {
                Some("quantised weights are not read; use the model's bf16, f16 or f32 release".into())
            }
            Error::Overflow { .. } => Some("save as bf16 or f32, whose range is larger".into()),
            Error::Positions { .. } => Some("call Model::prepare with the longest sequence first".into()),
            Error::LearnedPositions { learned, .. } => Some(format!(
                "lower max_length to {learned} or less, or choose a model with rotary positions"
            )),
            Error::Kernels(error) => error.hint(),
            _ => None,
        }
    }

    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Error::Io { path: path.to_path_buf(), source }
    }
}

/// The number of labels of a head's shape, in words.
fn labels(shape: &[usize]) -> String {
    match shape.first() {
        Some(1) => "one label".into(),
        count => format!("{} labels", count.unwrap_or(&0)),
    }
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;
