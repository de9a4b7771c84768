//! `plan`: everything about a run but the run.

use std::process::ExitCode;

use lora_sb_data::{Example, Tokenizer, preview};
use lora_sb_model::Storage;

use crate::args::SettingsArgs;
use crate::base;
use crate::config_file::Sources;
use crate::display;
use crate::failure::{Failure, Result};
use crate::report::{self, Forecast};
use crate::resolve::{Resolved, resolve};

/// Examples that are shown with their mask.
const SHOWN_EXAMPLES: usize = 2;
/// Characters of an example that are shown.
const SHOWN_CHARACTERS: usize = 1200;

/// Runs the command.
pub(crate) fn run(settings: SettingsArgs, sources: Sources) -> Result<ExitCode> {
    if settings.resume.is_some() {
        return Err(Failure::usage("plan --resume: a resumed run has its plan already")
            .hint("`lora-sb inspect RUN` shows it"));
    }
    let resolved = resolve(settings, sources)?;
    let Resolved { base, model, .. } = &resolved;
    for warning in &resolved.warnings {
        display::warn(warning);
    }
    let process = report::memory_in_use();
    let (sites, element) = if resolved.random_weights {
        (model.sites(), 4)
    } else {
        let model = base.load(base::device(Some(resolved.threads))?, Storage::Mapped)?;
        (resolved.sites(&model)?, report::element_size(&model))
    };
    let forecast = Forecast::new(&resolved, &sites, element, process)?;
    display::line(&format!("{}Run{:#}", display::HEADING, display::HEADING));
    report::print_start(&resolved, &forecast);
    display::heading("Memory");
    display::line(&forecast.memory_table());
    display::heading("Values and where they come from");
    display::line(&display::plan_table(&resolved.plan));
    for example in resolved.data.train.iter().take(SHOWN_EXAMPLES) {
        print_example(&resolved.tokenizer, example)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// An example as the model will see it, the trained tokens marked.
fn print_example(tokenizer: &Tokenizer, example: &Example) -> Result<()> {
    let color = display::color();
    let mark = match color {
        lora_sb_data::Color::Always => "trained tokens are green",
        lora_sb_data::Color::Never => "trained tokens stand in ⟦ ⟧",
    };
    display::heading(&format!("Example {} ({mark})", example.source));
    // Whole tokens are left out at the end, so that no mark stays open.
    let mut shown = example.clone();
    let mut text = preview(tokenizer, &shown, color)?;
    while text.chars().count() > SHOWN_CHARACTERS && shown.ids.len() > 1 {
        let kept = shown.ids.len() * SHOWN_CHARACTERS / text.chars().count();
        let kept = kept.clamp(1, shown.ids.len() - 1);
        shown.ids.truncate(kept);
        shown.trained.truncate(kept);
        text = preview(tokenizer, &shown, color)?;
    }
    let left = example.ids.len() - shown.ids.len();
    display::line(&text);
    if left > 0 {
        display::line(&format!(
            "{}... and {}{:#}",
            display::DIM,
            display::count(left, "more token"),
            display::DIM
        ));
    }
    Ok(())
}
