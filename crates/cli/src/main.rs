//! The `lora-sb` command: arguments as typed, plan as resolved, run, exit code.
//!
//! | exit code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | the run failed |
//! | 2 | the arguments or the recipe make no sense |
//! | 130 | interrupted; the state is saved |

mod args;
mod base;
mod bench;
mod command;
mod config_file;
mod device;
mod directory;
mod display;
mod embedded;
mod failure;
mod forecast;
mod interrupt;
mod progress;
mod report;
mod resolve;
mod room;
mod text;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue};
use clap::{CommandFactory, FromArgMatches};

use crate::args::{Cli, Command};
use crate::failure::Result;

fn main() -> ExitCode {
    lora_sb_kernels::heap::map_large_blocks();
    let words: Vec<OsString> = std::env::args_os().collect();
    let parsed = Cli::command().try_get_matches_from(&words);
    let matches = parsed.unwrap_or_else(|error| with_own_names(error).exit());
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    dispatch(cli.command, &matches, &words).unwrap_or_else(|failure| failure.report())
}

/// Names this program's flag where that of another program was typed.
fn with_own_names(mut error: clap::Error) -> clap::Error {
    let typed = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(typed)) => typed.clone(),
        _ => return error,
    };
    if let Some((_, own)) = args::ELSEWHERE.iter().find(|(elsewhere, _)| *elsewhere == typed) {
        error.insert(ContextKind::SuggestedArg, ContextValue::String((*own).to_owned()));
    }
    error
}

fn dispatch(command: Command, matches: &clap::ArgMatches, words: &[OsString]) -> Result<ExitCode> {
    match command {
        Command::Train(typed) => {
            let (settings, sources) = settings(&typed, matches, words)?;
            command::train::run(settings, sources)
        }
        Command::Plan(typed) => {
            let (settings, sources) = settings(&typed.settings, matches, words)?;
            command::plan::run(settings, sources, typed.json)
        }
        Command::Generate(arguments) => command::generate::run(&arguments),
        Command::Predict(arguments) => command::predict::run(&arguments),
        Command::Merge(arguments) => command::merge::run(&arguments),
        Command::Export(arguments) => command::export::run(&arguments),
        Command::Verify(arguments) => command::verify::run(&arguments),
        Command::Average(arguments) => command::average::run(&arguments),
        Command::Doctor(arguments) => command::doctor::run(&arguments),
        Command::Inspect(arguments) => command::inspect::run(&arguments),
        Command::Bench(arguments) => command::bench::run(&arguments, words, std::time::SystemTime::now()),
    }
}

/// The settings of all layers. The words behind the subcommand are the uppermost one.
fn settings(
    typed: &args::SettingsArgs,
    matches: &clap::ArgMatches,
    words: &[OsString],
) -> Result<(args::SettingsArgs, config_file::Sources)> {
    let Some((_, matches)) = matches.subcommand() else { return Ok(Default::default()) };
    command::train::layered(typed, matches, words.get(2..).unwrap_or_default())
}
