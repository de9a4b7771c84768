//! `export`: an adapter for other tools.

use std::process::ExitCode;

use lora_sb_tune::export::peft;

use crate::args::ExportArgs;
use crate::base::{self, Base};
use crate::device::DeviceChoice;
use crate::directory::{self, Loaded, Opened};
use crate::display;
use crate::failure::{Failure, Result};

/// Runs the command.
pub(crate) fn run(arguments: &ExportArgs) -> Result<ExitCode> {
    base::must_be_new(&arguments.out, "--out")?;
    let Opened { loaded, base, .. } =
        directory::open(&arguments.source, Some(&arguments.adapter), DeviceChoice::Cpu)?;
    let Loaded::Tuned(tuned) = &loaded else {
        return Err(Failure::new(format!(
            "{}: full fine-tuning has no adapter",
            arguments.adapter.display()
        ))
        .hint("its model directory is loaded by other tools as it is; `lora-sb merge` changes its type"));
    };
    let options = peft::Options { dtype: arguments.dtype, pad_rank: arguments.pad_rank };
    let warnings = peft::export(&arguments.out, tuned, &base.name(), &options)?;
    warnings.iter().for_each(|warning| display::warn(warning));
    display::line(&format!("wrote a {} adapter to {}", arguments.format, arguments.out.display()));
    if base == Base::BuiltIn {
        display::line(
            "its base is the built-in model; other tools need it as files, which `lora-sb merge` writes",
        );
    }
    Ok(ExitCode::SUCCESS)
}
