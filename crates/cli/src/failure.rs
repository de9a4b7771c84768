//! What ends the program early: the message, how to mend it, the exit code.

use std::fmt::Display;
use std::path::Path;
use std::process::ExitCode;

use anstyle::{AnsiColor, Style};

/// The result of a command.
pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

/// A command that could not do what it was asked.
#[derive(Debug)]
pub(crate) struct Failure {
    message: String,
    hint: Option<String>,
    code: u8,
}

impl Failure {
    /// A run that failed: exit code 1.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Failure { message: message.into(), hint: None, code: 1 }
    }

    /// Arguments or a recipe that make no sense: exit code 2, as clap's own errors.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Failure { code: 2, ..Failure::new(message) }
    }

    /// A file that cannot be read or written.
    pub(crate) fn file(path: &Path, action: &str, error: &std::io::Error) -> Self {
        let failure = Failure::new(format!("{}: cannot be {action}: {error}", path.display()));
        match error.kind() {
            std::io::ErrorKind::NotFound => failure.hint("check the path"),
            _ => failure,
        }
    }

    /// With a way out.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same of a `config.json` that the library was given without its path.
    pub(crate) fn in_file(mut self, path: &Path) -> Self {
        let rest = self.message.strip_prefix("config.json").unwrap_or(&self.message);
        self.message = format!("{}{rest}", path.display());
        self
    }

    fn library(error: impl Display, hint: Option<String>) -> Self {
        Failure { message: error.to_string(), hint, code: 1 }
    }

    /// Prints it to the standard error; the exit code.
    pub(crate) fn report(&self) -> ExitCode {
        let bold = |color: AnsiColor| Style::new().bold().fg_color(Some(color.into()));
        let (red, cyan) = (bold(AnsiColor::Red), bold(AnsiColor::Cyan));
        anstream::eprintln!("{red}error:{red:#} {}", self.message);
        if let Some(hint) = &self.hint {
            anstream::eprintln!("\n{cyan}hint:{cyan:#} {hint}");
        }
        ExitCode::from(self.code)
    }
}

/// Where a value that is out of range can be looked up.
const VALUES: &str = "`lora-sb plan` with the same arguments shows every value and where it comes from";

/// The way out that the command knows where a library, which does not know the command, has none.
fn data_hint(error: &lora_sb_data::Error) -> Option<&'static str> {
    match error {
        lora_sb_data::Error::Json { .. } => {
            Some("a .jsonl file holds one JSON object a line, a .json file an array")
        }
        lora_sb_data::Error::Empty { .. } => Some("give --data with at least one record"),
        lora_sb_data::Error::Option { .. } => Some(VALUES),
        _ => None,
    }
}

fn model_hint(error: &lora_sb_model::Error) -> Option<&'static str> {
    match error {
        lora_sb_model::Error::UnknownArchitecture { .. } => Some("give a model of a known family"),
        lora_sb_model::Error::MissingFile { .. } => {
            Some("give a whole model directory; only --random-weights, for measuring, does without weights")
        }
        lora_sb_model::Error::Json { .. } | lora_sb_model::Error::Config { .. } => {
            Some("take the file from the model's release again")
        }
        _ => None,
    }
}

/// The flags that do what a device's hint can only describe.
fn device_hint(error: &lora_sb_kernels::Error) -> Option<String> {
    match error {
        lora_sb_kernels::Error::OutOfMemory { .. } => Some(
            "lower --per-device-train-batch-size, --max-length, --loss-chunk or --rank, or compute blocks again with \
             --gradient-checkpointing true; of `generate`, --batch-size or --max-new-tokens. Other programs on the GPU take \
             of the same memory, and --device cpu does without it"
                .into(),
        ),
        lora_sb_kernels::Error::Driver { .. } => Some(
            "begin again, a run with --resume; where it comes back, update the GPU's driver or compute with --device cpu"
                .into(),
        ),
        _ => None,
    }
}

/// The flag that does what a library's hint can only describe.
fn flag_hint(error: &lora_sb_model::Error) -> Option<String> {
    if let lora_sb_model::Error::Kernels(error) = error {
        return device_hint(error);
    }
    matches!(error, lora_sb_model::Error::Head { .. }).then(|| {
        "`lora-sb train --ignore-mismatched-sizes` draws this layer anew and trains it; otherwise take data with as many \
         labels as the head that is there, or a model without one"
            .into()
    })
}

impl From<lora_sb_kernels::Error> for Failure {
    fn from(error: lora_sb_kernels::Error) -> Self {
        Failure::library(&error, device_hint(&error).or_else(|| error.hint()))
    }
}

impl From<lora_sb_data::Error> for Failure {
    fn from(error: lora_sb_data::Error) -> Self {
        Failure::library(&error, error.hint().or(data_hint(&error).map(str::to_owned)))
    }
}

impl From<lora_sb_model::Error> for Failure {
    fn from(error: lora_sb_model::Error) -> Self {
        let hint = flag_hint(&error).or_else(|| error.hint());
        Failure::library(&error, hint.or(model_hint(&error).map(str::to_owned)))
    }
}

impl From<lora_sb_tune::Error> for Failure {
    fn from(error: lora_sb_tune::Error) -> Self {
        let own = match &error {
            lora_sb_tune::Error::Data(error) => data_hint(error),
            lora_sb_tune::Error::Model(error) => model_hint(error),
            lora_sb_tune::Error::Config { .. } => Some(VALUES),
            _ => None,
        };
        let flag = match &error {
            lora_sb_tune::Error::Model(error) => flag_hint(error),
            lora_sb_tune::Error::Kernels(error) => device_hint(error),
            _ => None,
        };
        let hint = flag.or_else(|| error.hint());
        Failure::library(&error, hint.or(own.map(str::to_owned)))
    }
}
