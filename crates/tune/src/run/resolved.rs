//! The resolved plan of a run: every value, and where it came from.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::tensors::sha256;
use crate::config::CHANGEABLE_ON_RESUME;
use crate::{Error, PlanChange, Result};

/// Every value of a run by its name, with where it came from (`default`, `--rank`, `recipe.toml`).
///
/// ```
/// use lora_sb_tune::run::ResolvedPlan;
///
/// let mut plan = ResolvedPlan::default();
/// plan.set("rank", 64, "--rank");
/// plan.set("seed", 42, "default");
///
/// let mut other = plan.clone();
/// other.set("rank", 32, "--rank");
/// assert_eq!(other.changes_since(&plan)[0].to_string(), "rank: 64, now 32");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ResolvedPlan {
    /// The values by name.
    pub values: BTreeMap<String, PlanValue>,
}

/// One value of a plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanValue {
    /// The value.
    pub value: Value,
    /// Where it came from.
    pub source: String,
}

impl ResolvedPlan {
    /// Sets a value.
    pub fn set(&mut self, name: &str, value: impl Into<Value>, source: &str) {
        self.values.insert(name.into(), PlanValue { value: value.into(), source: source.into() });
    }

    /// Sets every field of a settings struct; `source` says for each name where it came from.
    ///
    /// # Errors
    /// Settings that are no struct, which is the caller's mistake.
    pub fn set_all(&mut self, settings: &impl Serialize, source: &dyn Fn(&str) -> String) -> Result<()> {
        for (name, value) in fields(settings)? {
            let source = source(&name);
            self.values.insert(name, PlanValue { value, source });
        }
        Ok(())
    }

    /// The values that differ from an earlier plan and that a result depends on; those of
    /// [`CHANGEABLE_ON_RESUME`] are left out.
    pub fn changes_since(&self, earlier: &ResolvedPlan) -> Vec<PlanChange> {
        let names: std::collections::BTreeSet<&String> =
            self.values.keys().chain(earlier.values.keys()).collect();
        let shown = |plan: &ResolvedPlan, name: &str| match plan.values.get(name) {
            Some(found) => found.value.to_string(),
            None => "not set".into(),
        };
        let change = |name: &String| PlanChange {
            key: name.clone(),
            old: shown(earlier, name),
            new: shown(self, name),
        };
        let fixed = names.into_iter().filter(|name| !CHANGEABLE_ON_RESUME.contains(&name.as_str()));
        fixed.map(change).filter(|change| change.old != change.new).collect()
    }

    /// A hash over every value that a result depends on, and not over where it came from.
    pub fn sha256(&self) -> String {
        let mut text = String::new();
        for (name, PlanValue { value, .. }) in &self.values {
            if !CHANGEABLE_ON_RESUME.contains(&name.as_str()) {
                text.push_str(&format!("{}={value}\n", Value::from(name.as_str())));
            }
        }
        sha256(text.as_bytes())
    }

    /// Checks that the plan says of each field of `settings` what `settings` says.
    ///
    /// # Errors
    /// The first name that is missing from the plan or has another value there.
    pub(crate) fn check_says(&self, settings: &impl Serialize) -> Result<()> {
        for (name, value) in fields(settings)? {
            let planned = self.values.get(&name).map(|found| &found.value);
            if planned != Some(&value) {
                let found = planned.map_or("no such value".into(), Value::to_string);
                return Err(Error::Config {
                    name: format!("plan: {name}"),
                    expected: format!("{value}, the value that is used"),
                    found,
                });
            }
        }
        Ok(())
    }
}

fn fields(settings: &impl Serialize) -> Result<serde_json::Map<String, Value>> {
    let invalid = |found| Error::Config { name: "plan".into(), expected: "named values".into(), found };
    match serde_json::to_value(settings) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(other) => Err(invalid(other.to_string())),
        Err(error) => Err(invalid(error.to_string())),
    }
}
