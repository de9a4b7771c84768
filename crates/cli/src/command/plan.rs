//! `plan`: everything about a run but the run.

use std::process::ExitCode;

use lora_sb_data::{Color, Example, Label, SkipSpecial, preview};
use serde_json::json;

use super::table;
use crate::args::SettingsArgs;
use crate::config_file::Sources;
use crate::display;
use crate::failure::{Failure, Result};
use crate::forecast::Forecast;
use crate::report;
use crate::resolve::{Resolved, resolve};

/// Examples that are shown with their mask or label.
const SHOWN_EXAMPLES: usize = 2;
/// Characters of an example that are shown.
const SHOWN_CHARACTERS: usize = 1200;

/// Runs the command.
pub(crate) fn run(settings: SettingsArgs, sources: Sources, json: bool) -> Result<ExitCode> {
    if settings.resume.is_some() {
        return Err(Failure::usage("plan --resume: a resumed run has its plan already")
            .hint("`lora-sb inspect RUN` shows it"));
    }
    if table::is_asked(&settings) {
        return table::run(&settings, json);
    }
    let mut resolved = resolve(settings, sources)?;
    resolved.warnings.iter().for_each(|warning| display::warn(warning));
    let forecast = Forecast::new(&mut resolved)?;
    if json {
        let values = resolved.plan.values.iter();
        let values: serde_json::Map<_, _> = values
            .map(|(name, found)| (name.clone(), json!({ "value": found.value, "source": found.source })))
            .collect();
        let printed = json!({ "plan": values, "parameters": forecast.parameters_json(), "memory": forecast.memory_json() });
        display::output(&printed.to_string())?;
        return Ok(ExitCode::SUCCESS);
    }
    display::line(&format!("{}Run{:#}", display::HEADING, display::HEADING));
    report::print_start(&resolved, &forecast);
    display::heading("Memory");
    display::line(&forecast.memory_table());
    display::heading("Values and where they come from");
    display::line(&display::plan_table(&resolved.plan));
    for example in resolved.data.train.iter().take(SHOWN_EXAMPLES) {
        print_example(&resolved, example)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// An example as the model will see it, with its label or with the trained tokens marked.
fn print_example(resolved: &Resolved, example: &Example) -> Result<()> {
    let tokenizer = &resolved.tokenizer;
    let color = display::color();
    let mark = match (example.label, color) {
        (Some(label), _) => format!("label: {}", written(label, &resolved.model.label_names())),
        (None, Color::Always) => "trained tokens are green".into(),
        (None, Color::Never) => "trained tokens stand in ⟦ ⟧".into(),
    };
    display::heading(&format!("Example {} ({mark})", example.source));
    let text = |shown: &Example| match example.label {
        Some(_) => Ok(tokenizer.decode(&shown.ids, SkipSpecial::No)?),
        None => Ok::<_, Failure>(preview(tokenizer, shown, color)?),
    };
    // Whole tokens are left out at the end, so that no mark stays open.
    let mut shown = example.clone();
    let mut shown_text = text(&shown)?;
    while shown_text.chars().count() > SHOWN_CHARACTERS && shown.ids.len() > 1 {
        let kept = shown.ids.len() * SHOWN_CHARACTERS / shown_text.chars().count();
        let kept = kept.clamp(1, shown.ids.len() - 1);
        shown.ids.truncate(kept);
        shown.trained.truncate(kept);
        shown_text = text(&shown)?;
    }
    let left = example.ids.len() - shown.ids.len();
    display::line(&shown_text);
    if left > 0 {
        let dim = display::DIM;
        display::line(&format!("{dim}... and {}{dim:#}", display::count(left, "more token")));
    }
    Ok(())
}

/// A label as a person reads it.
fn written(label: Label, names: &[String]) -> String {
    match label {
        Label::Class(class) => match names.get(class as usize) {
            Some(name) => format!("{name}, class {class}"),
            None => format!("class {class}"),
        },
        Label::Value(value) => value.to_string(),
    }
}
