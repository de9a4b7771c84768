//! The table of `plan`: what each method trains and stores at each rank, from an architecture alone.

use std::process::ExitCode;

use lora_sb_data::thousands;
use lora_sb_model::{Config, Task};
use lora_sb_tune::plan::{ParameterRow, ParameterTable};
use lora_sb_tune::{Method, Targets, head};
use serde_json::{Value, json};

use crate::args::{MethodChoice, Ranks, SettingsArgs};
use crate::base::Base;
use crate::display;
use crate::failure::Result;
use crate::resolve::{RANK, default_targets, list};

/// Whether the table is asked for, and not the plan of a run.
pub(crate) fn is_asked(settings: &SettingsArgs) -> bool {
    let several = settings.rank.as_ref().is_some_and(|Ranks(ranks)| ranks.len() > 1);
    let all = settings.method == Some(MethodChoice::All);
    settings.data.is_none() && (settings.model.is_some() || several || all)
}

/// Prints it.
pub(crate) fn run(settings: &SettingsArgs, json: bool) -> Result<ExitCode> {
    let base = settings.model.as_deref().map_or(Base::BuiltIn, Base::named);
    let config = with_labels(base.architecture()?, settings)?;
    let targets = settings.target_modules.as_deref().map_or_else(|| default_targets(&config), Targets::parse);
    let modules = settings.modules_to_save.as_deref().map_or_else(|| head::default_modules(&config), list);
    let methods = match settings.method {
        Some(MethodChoice::One(method)) => vec![method],
        Some(MethodChoice::All) | None => Method::ALL.to_vec(),
    };
    let ranks = settings.rank.as_ref().map_or(vec![RANK], |Ranks(ranks)| ranks.clone());
    let table = ParameterTable::new(&config, &targets, &modules, &methods, &ranks)?;
    if json {
        display::output(&as_json(&base, &config, &targets, &table).to_string())?;
    } else {
        print(&base, &config, &targets, &table)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// An encoder's head has as many labels as are asked for.
fn with_labels(config: Config, settings: &SettingsArgs) -> Result<Config> {
    Ok(match settings.num_labels {
        None => config,
        Some(1) => config.with_task(Task::Regression)?,
        Some(labels) => config.with_task(Task::Classification { labels })?,
    })
}

fn print(base: &Base, config: &Config, targets: &Targets, table: &ParameterTable) -> Result<()> {
    let (family, body) = (config.family.model_type(), table.model - table.head);
    let head = match table.head {
        0 => String::new(),
        head => format!(" and {} of its classification head", thousands(head)),
    };
    let rows = [
        ("model", format!("{}: {} {family}{head}", base.shown(), display::count(body, "parameter"))),
        ("modules", format!("{} ({targets})", display::count(table.sites, "linear layer"))),
    ];
    display::output(&display::table(&rows))?;
    display::output("")?;
    let mut columns = vec!["method", "rank", "trained", "of full", "stored", "total"];
    if table.head > 0 {
        columns.insert(4, "and head");
    }
    let lines = table.rows.iter().map(|row| cells(row, body, table.head > 0)).collect::<Vec<_>>();
    display::output(&display::columns(&columns, &lines))
}

fn cells(row: &ParameterRow, body: usize, with_head: bool) -> Vec<String> {
    let ParameterRow { method, rank, trained, head, stored, total } = *row;
    let mut cells = vec![
        method.name().to_owned(),
        rank.map_or("-".into(), |rank| rank.to_string()),
        thousands(trained),
        display::percent(trained, body),
        thousands(stored),
        thousands(total),
    ];
    if with_head {
        cells.insert(4, thousands(head));
    }
    cells
}

fn as_json(base: &Base, config: &Config, targets: &Targets, table: &ParameterTable) -> Value {
    let rows: Vec<Value> = table
        .rows
        .iter()
        .map(|row| {
            let ParameterRow { method, rank, trained, head, stored, total } = *row;
            json!({
                "method": method.name(), "rank": rank, "trained": trained, "head": head, "stored": stored,
                "total": total,
            })
        })
        .collect();
    json!({
        "model": base.name(),
        "family": config.family.model_type(),
        "parameters": table.model,
        "head": table.head,
        "target_modules": targets,
        "modules": table.sites,
        "rows": rows,
    })
}
