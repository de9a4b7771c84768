//! Which linear layers are adapted.

use std::collections::BTreeSet;
use std::fmt;

use lora_sb_model::{Config, Parameter, Site};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The linear layers that an adapter sits on, in PEFT's words: `"all-linear"` or a list of names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub enum Targets {
    /// Every linear layer of the blocks; the output head is not one of them.
    AllLinear,
    /// A module is taken where its full name is in the list or ends with `.` and a name of the list.
    Names(Vec<String>),
}

const ALL_LINEAR: &str = "all-linear";

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Written {
    Word(String),
    Names(Vec<String>),
}

impl TryFrom<Written> for Targets {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        match written {
            Written::Word(word) if word == ALL_LINEAR => Ok(Targets::AllLinear),
            Written::Word(word) => {
                Err(format!("expected \"{ALL_LINEAR}\" or a list of names, found {word:?}"))
            }
            Written::Names(names) => Ok(Targets::Names(names)),
        }
    }
}

impl From<Targets> for Written {
    fn from(targets: Targets) -> Self {
        match targets {
            Targets::AllLinear => Written::Word(ALL_LINEAR.into()),
            Targets::Names(names) => Written::Names(names),
        }
    }
}

impl fmt::Display for Targets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Targets::AllLinear => f.write_str(ALL_LINEAR),
            Targets::Names(names) => f.write_str(&names.join(",")),
        }
    }
}

impl Targets {
    /// Reads `all-linear`, or names separated by commas.
    pub fn parse(text: &str) -> Self {
        match text.trim() {
            ALL_LINEAR => Targets::AllLinear,
            names => Targets::Names(
                names.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect(),
            ),
        }
    }

    /// The sites that are named, in the order of the forward pass; an architecture is enough to know them.
    ///
    /// # Errors
    /// A name that matches no linear layer, with the near matches; an empty list.
    pub fn resolve(&self, config: &Config) -> Result<Vec<Site>> {
        let modules: Vec<(Site, String)> =
            config.sites().into_iter().map(|site| (site, config.module(site))).collect();
        let Targets::Names(names) = self else {
            return Ok(modules.into_iter().map(|(site, _)| site).collect());
        };
        if names.is_empty() {
            let (expected, found) = ("at least one name".into(), "an empty list".into());
            return Err(Error::Config { name: "target_modules".into(), expected, found });
        }
        for name in names {
            if !modules.iter().any(|(_, module)| matches(name, module)) {
                return Err(unknown(name, &modules));
            }
        }
        let wanted = |module: &str| names.iter().any(|name| matches(name, module));
        Ok(modules.into_iter().filter(|(_, module)| wanted(module)).map(|(site, _)| site).collect())
    }

    /// Names for exactly `sites`: for each the shortest ending that no other layer has, adapted or not, the head's
    /// and the vocabulary's included.
    pub(crate) fn naming(config: &Config, sites: &[Site]) -> Vec<String> {
        let taken: BTreeSet<String> = sites.iter().map(|&site| config.module(site)).collect();
        let mut others: BTreeSet<String> =
            config.sites().into_iter().map(|site| config.module(site)).collect();
        for parameter in config.parameters() {
            if parameter.of_classification() || parameter == Parameter::Head {
                others.extend(config.name(parameter).rsplit_once('.').map(|(module, _)| module.to_owned()));
            }
        }
        others.retain(|module| !taken.contains(module));
        let ending = |module: &String| {
            let starts = module.rmatch_indices('.').map(|(dot, _)| dot + 1).chain([0]);
            let endings = starts.map(|start| &module[start..]);
            let mut alone = endings.filter(|ending| !others.iter().any(|other| matches(ending, other)));
            alone.next().unwrap_or(module).to_owned()
        };
        let names: BTreeSet<String> = taken.iter().map(ending).collect();
        names.into_iter().collect()
    }
}

/// PEFT's rule.
pub(crate) fn matches(name: &str, module: &str) -> bool {
    module == name || module.strip_suffix(name).is_some_and(|path| path.ends_with('.'))
}

fn last_name(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

/// Layers of other families that Phi-3 has in one.
const FUSED: [(&[&str], &str); 2] =
    [(&["q_proj", "k_proj", "v_proj"], "qkv_proj"), (&["gate_proj", "up_proj"], "gate_up_proj")];

fn unknown(name: &str, modules: &[(Site, String)]) -> Error {
    let depth = name.split('.').count();
    let mut candidates = BTreeSet::new();
    let mut known = Vec::new();
    for (_, module) in modules {
        let parts: Vec<&str> = module.split('.').collect();
        candidates.insert(parts[parts.len().saturating_sub(depth)..].join("."));
        candidates.insert(last_name(module).to_owned());
        if !known.iter().any(|other| other == last_name(module)) {
            known.push(last_name(module).to_owned());
        }
    }
    if let Some((_, fused)) = FUSED.iter().find(|(parts, _)| parts.contains(&last_name(name)))
        && known.iter().any(|other| other == fused)
    {
        return Error::UnknownTarget { name: name.into(), near: vec![(*fused).into()], known };
    }
    let allowed = (name.len() / 3).max(2);
    let mut near: Vec<(usize, String)> = candidates
        .into_iter()
        .map(|candidate| (edit_distance(&name.to_ascii_lowercase(), &candidate), candidate))
        .filter(|(distance, _)| *distance <= allowed)
        .collect();
    near.sort();
    let nearest = near.first().map_or(0, |(distance, _)| *distance);
    near.retain(|(distance, _)| *distance <= nearest + 1);
    near.truncate(3);
    Error::UnknownTarget { name: name.into(), near: near.into_iter().map(|(_, name)| name).collect(), known }
}

/// Levenshtein's distance: the fewest insertions, deletions and replacements of a character.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
