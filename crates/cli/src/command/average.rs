//! `average`: one adapter out of several that share A and B.

use std::path::Path;
use std::process::ExitCode;

use lora_sb_tune::export::average::{Averaged, Member, average};

use crate::args::AverageArgs;
use crate::base;
use crate::directory::native_adapter;
use crate::display;
use crate::failure::{Failure, Result};

/// Runs the command.
pub(crate) fn run(arguments: &AverageArgs) -> Result<ExitCode> {
    let AverageArgs { adapter, weight, out } = arguments;
    if adapter.len() < 2 {
        return Err(Failure::usage("--adapter: an average needs at least two adapters, found 1")
            .hint("give --adapter once for each of them"));
    }
    if !weight.is_empty() && weight.len() != adapter.len() {
        let message = format!("--weight: {} for {} adapters", weight.len(), adapter.len());
        return Err(Failure::usage(message)
            .hint("give --weight once for each --adapter in their order, or not at all"));
    }
    base::must_be_new(out, "--out")?;
    let weights = weight.iter().copied().chain(std::iter::repeat(1.0));
    let member = |(dir, weight): (&std::path::PathBuf, f64)| Ok(Member { dir: native_adapter(dir)?, weight });
    let members = adapter.iter().zip(weights).map(member).collect::<Result<Vec<_>>>()?;
    let Averaged { modules, head } = average(&members, out)?;
    let of = |dir: &Path| dir.display().to_string();
    let from: Vec<String> = members.iter().map(|member| of(&member.dir)).collect();
    display::line(&format!("averaged R of {} from {}", display::count(modules, "module"), from.join(", ")));
    if !head.is_empty() {
        display::line(&format!("and of the classification head, as plain parameters: {}", head.join(", ")));
    }
    display::line(&format!("wrote {}", out.display()));
    Ok(ExitCode::SUCCESS)
}
