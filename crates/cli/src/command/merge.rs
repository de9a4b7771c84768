//! `merge`: a model with its adapter added to the weights.

use std::process::ExitCode;

use lora_sb_model::{SaveType, save_model};
use lora_sb_tune::export::merge;

use crate::args::MergeArgs;
use crate::base;
use crate::device::DeviceChoice;
use crate::directory::{self, Loaded, Opened};
use crate::display;
use crate::failure::Result;

/// Runs the command.
pub(crate) fn run(arguments: &MergeArgs) -> Result<ExitCode> {
    base::must_be_new(&arguments.out, "--out")?;
    let Opened { loaded, base, adapter, .. } =
        directory::open(&arguments.source, Some(&arguments.adapter), DeviceChoice::Cpu)?;
    match &loaded {
        Loaded::Tuned(tuned) => merge::merge(&arguments.out, tuned, arguments.dtype)?,
        // A fully fine-tuned run: its weights are a model already, perhaps wanted in another type.
        Loaded::Plain(model) => {
            let dtype = arguments.dtype.unwrap_or(SaveType::F32);
            save_model(&arguments.out, model, dtype, &mut |_, values| Ok(values))?;
        }
    }
    base.add_tokenizer(&arguments.out)?;
    let from = adapter.as_deref().unwrap_or(&arguments.adapter);
    display::line(&format!("merged {} into {}", from.display(), arguments.out.display()));
    Ok(ExitCode::SUCCESS)
}
