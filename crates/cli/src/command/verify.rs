//! `verify`: whether an export computes what its native adapter computes.

use std::process::ExitCode;

use lora_sb_model::Storage;
use lora_sb_tune::export::verify::{Verification, random_sequences, verify};
use serde_json::json;

use crate::args::VerifyArgs;
use crate::device::DeviceChoice;
use crate::directory::{self, Kind, Loaded, Opened};
use crate::display::{self, number};
use crate::failure::{Failure, Result};

/// Of the tokens that are compared on: the same ones in every call.
const SEED: u64 = 0;

/// Runs the command.
pub(crate) fn run(arguments: &VerifyArgs) -> Result<ExitCode> {
    let VerifyArgs { source, adapter, exported, json } = arguments;
    let kind = Kind::of(exported)?;
    if !matches!(kind, Kind::Peft | Kind::Model) {
        return Err(Failure::new(format!("{}: expected a PEFT directory or a model", exported.display()))
            .hint("verify reads what `lora-sb export` and `lora-sb merge` write"));
    }
    let Opened { loaded, base, reading, .. } = directory::open(source, Some(adapter), DeviceChoice::Auto)?;
    let Loaded::Tuned(tuned) = loaded else {
        return Err(Failure::new(format!("{}: full fine-tuning has no adapter", adapter.display()))
            .hint("its model directory is the result itself; there is nothing to compare it with"));
    };
    let mut fresh = match kind {
        Kind::Peft => Some(base.load(tuned.model.kernels().clone(), Storage::Mapped, &reading)?),
        _ => None,
    };
    let sequences = random_sequences(tuned.model.config(), SEED);
    let mut tuned = tuned;
    tuned.model.prepare(sequences.iter().map(Vec::len).max().unwrap_or(0))?;
    let mut base = || {
        fresh.take().ok_or_else(|| lora_sb_tune::Error::Config {
            name: "base model".into(),
            expected: "to be asked for once".into(),
            found: "a second time".into(),
        })
    };
    let found = verify(exported, &tuned, &sequences, &mut base)?;
    found.warnings.iter().for_each(|warning| display::warn(warning));
    tell(&found, exported, *json)?;
    Ok(ExitCode::SUCCESS)
}

fn tell(found: &Verification, exported: &std::path::Path, json: bool) -> Result<()> {
    let Verification {
        tokens, max_abs_logit_difference, tolerance, max_abs_logit, max_abs_logit_change, ..
    } = found;
    if json {
        let line = json!({
            "exported": exported.display().to_string(),
            "equal": true,
            "tokens": tokens,
            "max_abs_logit_difference": max_abs_logit_difference,
            "tolerance": tolerance,
            "max_abs_logit": max_abs_logit,
            "max_abs_logit_change": max_abs_logit_change,
        });
        return display::output(&line.to_string());
    }
    let short = |value: &f64| number(format!("{value:.2e}").parse().unwrap_or(*value));
    let rows = [
        ("equal", format!("{} computes what the adapter computes", exported.display())),
        (
            "logits",
            format!(
                "of {}: {} apart at most, where rounding explains {}; the largest is {}",
                display::count(*tokens, "token"),
                short(max_abs_logit_difference),
                short(tolerance),
                short(max_abs_logit)
            ),
        ),
        ("adapter", format!("moves a logit by up to {} from the base model's", short(max_abs_logit_change))),
    ];
    display::output(&display::table(&rows))?;
    if max_abs_logit_change <= tolerance {
        display::warn(
            "the adapter moves no logit by more than rounding does: the comparison says nothing about it yet",
        );
    }
    Ok(())
}
