//! Which modules of a classification head are trained in full beside an adapter.

use std::collections::BTreeSet;

use lora_sb_model::{Config, Parameter};

use crate::target::matches;
use crate::{Error, Result};

/// What PEFT trains of a head where nothing is said (`task_type` SEQ_CLS); empty for a language model.
///
/// A BERT's pooler came out of its pre-training and stays frozen; RoBERTa's `classifier` holds both of its layers.
pub fn default_modules(config: &Config) -> Vec<String> {
    let has_head = config.parameters().into_iter().any(Parameter::of_classification);
    if has_head { vec!["classifier".into()] } else { Vec::new() }
}

/// The parameters of the modules that are named: those whose name is in `names` or ends with `.` and a name of it,
/// and everything below them. In the order of the forward pass.
///
/// # Errors
/// A name that matches nothing, or something that is no part of the head.
pub fn resolve(names: &[String], config: &Config) -> Result<Vec<Parameter>> {
    let parameters = config.parameters();
    let mut wanted = BTreeSet::new();
    for name in names {
        let named: Vec<Parameter> =
            parameters.iter().copied().filter(|&parameter| below(name, config, parameter)).collect();
        let outside = named.iter().copied().find(|parameter| !parameter.of_classification());
        let found = match outside {
            Some(outside) => format!("{name:?}, to which {} belongs", config.name(outside)),
            None if named.is_empty() => format!("{name:?}"),
            None => {
                wanted.extend(named);
                continue;
            }
        };
        return Err(Error::Config { name: "modules_to_save".into(), expected: expected(config), found });
    }
    Ok(parameters.into_iter().filter(|parameter| wanted.contains(parameter)).collect())
}

/// Whether a parameter belongs to a module of that name or to one inside it.
fn below(name: &str, config: &Config, parameter: Parameter) -> bool {
    let full = config.name(parameter);
    modules(&full).any(|module| matches(name, module))
}

/// The modules that a parameter is in, as `classifier.dense` and `classifier` of `classifier.dense.weight`.
fn modules(parameter: &str) -> impl Iterator<Item = &str> {
    parameter.match_indices('.').map(|(end, _)| &parameter[..end])
}

fn expected(config: &Config) -> String {
    let mut known = BTreeSet::new();
    let (head, body): (Vec<Parameter>, Vec<Parameter>) =
        config.parameters().into_iter().partition(|parameter| parameter.of_classification());
    let body: BTreeSet<String> =
        body.into_iter().flat_map(|parameter| names_of(&config.name(parameter))).collect();
    for parameter in head {
        known.extend(names_of(&config.name(parameter)).into_iter().filter(|module| !body.contains(module)));
    }
    match known.len() {
        0 => "no module: the model has no classification head".into(),
        _ => format!("modules of the classification head: {}", Vec::from_iter(known).join(", ")),
    }
}

fn names_of(parameter: &str) -> Vec<String> {
    modules(parameter).map(str::to_owned).collect()
}
