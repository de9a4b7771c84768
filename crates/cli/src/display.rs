//! Words and numbers on a terminal or in a pipe.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::path::Path;

use anstyle::{AnsiColor, Style};
use lora_sb_data::{Color, thousands};
use lora_sb_tune::config::ByteSize;
use lora_sb_tune::run::ResolvedPlan;
use serde_json::Value;

use crate::failure::{Failure, Result};

/// Headings.
pub(crate) const HEADING: Style = Style::new().bold();
/// What is less important.
pub(crate) const DIM: Style = Style::new().dimmed();
/// What should be looked at.
pub(crate) const WARNING: Style = Style::new().bold().fg_color(Some(anstyle::Color::Ansi(AnsiColor::Yellow)));

/// Prints a line to the standard output, its colours left out where they are not wanted (a pipe, `NO_COLOR`).
///
/// Whoever reads may stop reading (`lora-sb plan | head`): a run is not ended by that.
pub(crate) fn line(text: &str) {
    let _ = writeln!(anstream::stdout(), "{text}");
}

/// Prints a line of a command's result to the standard output: what another program reads must be whole.
///
/// # Errors
/// Where it cannot be written, except to a reader that has gone away.
pub(crate) fn output(text: &str) -> Result<()> {
    written(writeln!(anstream::stdout(), "{text}"))
}

/// A failure to write to the standard output; none where its reader has gone away (`| head`), who wants no more.
pub(crate) fn written(outcome: std::io::Result<()>) -> Result<()> {
    match outcome {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            let failure = Failure::file(Path::new("the standard output"), "written", &error);
            Err(failure.hint("send it to where there is room"))
        }
        _ => Ok(()),
    }
}

/// Prints a warning to the standard error.
pub(crate) fn warn(text: &str) {
    let _ = writeln!(anstream::stderr(), "{WARNING}warning:{WARNING:#} {text}");
}

/// Prints a heading with an empty line above it.
pub(crate) fn heading(text: &str) {
    line(&format!("\n{HEADING}{text}{HEADING:#}"));
}

/// Whether the standard output shows colours.
pub(crate) fn color() -> Color {
    match anstream::AutoStream::choice(&std::io::stdout()) {
        anstream::ColorChoice::Never => Color::Never,
        _ => Color::Always,
    }
}

/// Whether a person watches both streams.
pub(crate) fn is_live() -> bool {
    std::io::stdout().is_terminal() && std::io::stderr().is_terminal()
}

/// Text of a model, without the control characters that a terminal would obey.
pub(crate) fn printable(text: &str) -> String {
    let tame = |c: char| if c.is_control() && !matches!(c, '\n' | '\t') { '\u{fffd}' } else { c };
    text.chars().map(tame).collect()
}

/// Lines as `  label      value`, the labels padded to the longest.
pub(crate) fn table(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(label, _)| label.len()).max().unwrap_or(0);
    let indent = " ".repeat(width + 4);
    let row = |(label, value): &(&str, String)| {
        format!("  {label:width$}  {}", value.replace('\n', &format!("\n{indent}")))
    };
    rows.iter().map(row).collect::<Vec<_>>().join("\n")
}

/// A table with headings; all but the first column are numbers and stand to the right.
pub(crate) fn columns(headings: &[&str], lines: &[Vec<String>]) -> String {
    let width =
        |at: usize| lines.iter().map(|line| line[at].len()).chain([headings[at].len()]).max().unwrap_or(0);
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let row = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (at, (cell, width)) in cells.zip(&widths).enumerate() {
            let _ = match at {
                0 => write!(text, "  {cell:width$}"),
                _ => write!(text, "  {cell:>width$}"),
            };
        }
        text
    };
    let mut rows = vec![format!("{HEADING}{}{HEADING:#}", row(&mut headings.iter().copied()))];
    rows.extend(lines.iter().map(|line| row(&mut line.iter().map(String::as_str))));
    rows.join("\n")
}

/// Bytes in the largest binary unit that leaves at least 1.
pub(crate) fn bytes(count: usize) -> String {
    ByteSize(count).rounded()
}

/// `8 s`, `3 min 05 s`, `2 h 07 min`.
pub(crate) fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    match whole {
        _ if seconds < 9.95 => format!("{seconds:.1} s"),
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

/// A small number as it is written in papers: `2e-3`, `0.02`, `1`.
pub(crate) fn number(value: f64) -> String {
    match value {
        0.0 => "0".into(),
        _ if (0.01..100_000.0).contains(&value.abs()) => format!("{value}"),
        _ => format!("{value:e}"),
    }
}

/// A share of a whole as `3.1 %`, with enough digits to be told from 0.
pub(crate) fn percent(part: usize, whole: usize) -> String {
    let share = 100.0 * part as f64 / whole.max(1) as f64;
    match share {
        _ if share >= 10.0 => format!("{share:.1} %"),
        _ if share >= 0.1 => format!("{share:.2} %"),
        _ => format!("{share:.2e} %"),
    }
}

/// `1 example`, `2,000 examples`.
pub(crate) fn count(number: usize, noun: &str) -> String {
    format!("{} {noun}{}", thousands(number), if number == 1 { "" } else { "s" })
}

/// Every value of a plan with its source.
pub(crate) fn plan_table(plan: &ResolvedPlan) -> String {
    let shown: Vec<(&str, String, &str)> = plan
        .values
        .iter()
        .map(|(name, found)| (name.as_str(), json_value(&found.value), found.source.as_str()))
        .collect();
    let name_width = shown.iter().map(|(name, ..)| name.len()).max().unwrap_or(0);
    // A long path does not push all sources to the right.
    let value_width =
        shown.iter().map(|(_, value, _)| value.len()).filter(|&len| len <= 24).max().unwrap_or(0);
    let mut text = String::new();
    for (name, value, source) in shown {
        let _ = writeln!(text, "  {name:name_width$}  {value:value_width$}  {DIM}{source}{DIM:#}");
    }
    text.truncate(text.trim_end_matches('\n').len());
    text
}

fn json_value(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        Value::Number(found) => match found.as_f64() {
            Some(found) if value.is_f64() => number(found),
            _ => found.to_string(),
        },
        Value::Array(items) => items.iter().map(json_value).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_exact() {
        let times = [
            (0.04, "0.0 s"),
            (9.96, "10 s"),
            (59.6, "1 min 00 s"),
            (185.0, "3 min 05 s"),
            (7620.0, "2 h 07 min"),
        ];
        for (seconds, expected) in times {
            assert_eq!(duration(seconds), expected, "{seconds}");
        }
        let numbers =
            [(0.0, "0"), (2e-3, "2e-3"), (1.33e-5, "1.33e-5"), (0.02, "0.02"), (64.0, "64"), (1e-8, "1e-8")];
        for (value, expected) in numbers {
            assert_eq!(number(value), expected);
        }
        assert_eq!(
            [percent(1, 2), percent(31, 1000), percent(1, 1_000_000)],
            ["50.0 %", "3.10 %", "1.00e-4 %"]
        );
        assert_eq!([count(1, "token"), count(1200, "token")], ["1 token", "1,200 tokens"]);
    }

    #[test]
    fn a_model_does_not_command_the_terminal() {
        assert_eq!(printable("a\tb\n\u{1b}[31mç\r"), "a\tb\n\u{fffd}[31mç\u{fffd}");
    }

    #[test]
    fn a_plan_is_shown_with_its_sources() {
        let mut plan = ResolvedPlan::default();
        plan.set("learning_rate", 0.002, "recipe.toml:4");
        plan.set("max_steps", Value::Null, "default");
        let text = anstream::adapter::strip_str(&plan_table(&plan)).to_string();
        assert_eq!(text, "  learning_rate  2e-3  recipe.toml:4\n  max_steps      -     default");
    }
}
