//! Layers of settings: the built-in recipe, the plan of a resumed run, a recipe file, the command line.
//!
//! A key of a recipe is the name of a flag with underscores, and its value is read by the flag's own parser: the
//! two cannot drift apart.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, FromArgMatches};
use lora_sb_tune::run::ResolvedPlan;
use serde_json::Value;
use toml::de::{DeTable, DeValue};

use crate::args::{ELSEWHERE, SettingsArgs};
use crate::failure::{Failure, Result};

/// Where each setting that somebody gave comes from, by its key.
pub(crate) type Sources = BTreeMap<String, String>;

/// Settings of one or several layers: the flags that would say the same, and the source, by key.
#[derive(Debug, Default)]
pub(crate) struct Layer(BTreeMap<String, (Vec<OsString>, String)>);

/// What a resumption decides anew: the machine may be another, the directory may have been moved.
const NOT_FROM_PLANS: [&str; 2] = ["threads", "output_dir"];

/// Flags that say how this one call goes and not what the run is.
const NOT_IN_RECIPES: [&str; 3] = ["config", "resume", "quiet"];

/// A flag of `plan` alone, which is typed among the settings and is none.
const NO_SETTING: &str = "json";

impl Layer {
    /// Reads a recipe; `origin` is its name in sources and messages.
    pub(crate) fn recipe(text: &str, origin: &str) -> Result<Layer> {
        let table = DeTable::parse(text).map_err(|error| {
            let line = error.span().map_or(1, |span| line_of(text, span.start));
            Failure::usage(format!("{origin}:{line}: {}", error.message()))
                .hint("a recipe is TOML: `key = value` lines, text in quotes")
        })?;
        let mut layer = Layer::default();
        for (key, value) in table.get_ref() {
            let place = format!("{origin}:{}", line_of(text, key.span().start));
            let items = scalars(value.get_ref()).ok_or_else(|| {
                Failure::usage(format!("{place}: {}: expected a value or a list of values", key.get_ref()))
                    .hint("a recipe has no sections: write every key at the top level")
            })?;
            layer.insert(key.get_ref(), items, &place)?;
        }
        Ok(layer)
    }

    /// Reads a recipe file.
    pub(crate) fn file(path: &Path) -> Result<Layer> {
        let text = std::fs::read_to_string(path).map_err(|error| Failure::file(path, "read", &error))?;
        Layer::recipe(&text, &path.display().to_string())
    }

    /// The settings of a run, so that a resumption does not have to repeat them; each keeps its source.
    pub(crate) fn of_plan(plan: &ResolvedPlan, origin: &str) -> Result<Layer> {
        let mut layer = Layer::default();
        let known: Vec<String> = arguments().map(|(key, ..)| key).collect();
        for (key, found) in &plan.values {
            let items = match &found.value {
                _ if !known.contains(key) || NOT_FROM_PLANS.contains(&key.as_str()) => continue,
                // "None" was a choice too, as with modules_to_save.
                Value::Array(items) if items.is_empty() => vec![String::new()],
                Value::Array(items) => items.iter().filter_map(scalar_of_json).collect(),
                value => scalar_of_json(value).into_iter().collect::<Vec<_>>(),
            };
            if !items.is_empty() {
                layer.insert(key, items, origin)?;
                if let Some((_, source)) = layer.0.get_mut(key) {
                    source.clone_from(&found.source);
                }
            }
        }
        Ok(layer)
    }

    /// Lays `other` over this one.
    pub(crate) fn cover(&mut self, other: Layer) {
        self.0.extend(other.0);
    }

    /// Whether a key is set.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    fn insert(&mut self, key: &str, items: Vec<String>, place: &str) -> Result<()> {
        let written = key.replace('_', "-");
        let found = arguments().find(|(_, names, _)| names.contains(&written));
        let Some((key, names, append)) = found.filter(|(key, ..)| !NOT_IN_RECIPES.contains(&key.as_str()))
        else {
            return Err(unknown(key, place));
        };
        let items = if append { items } else { vec![items.join(",")] };
        let flags: Vec<OsString> = items.iter().map(|item| format!("--{}={item}", names[0]).into()).collect();
        parse(&flags).map_err(|error| {
            let text = error.to_string();
            let message = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
            let failure = Failure::usage(format!("{place}: {key}: {message}"));
            match error.get(ContextKind::ValidValue) {
                Some(ContextValue::Strings(values)) => failure.hint(format!("one of {}", values.join(", "))),
                _ => failure,
            }
        })?;
        self.0.insert(key, (flags, place.to_owned()));
        Ok(())
    }
}

/// The settings of the layers below with the command line above them. `matches` are the subcommand's, `typed` its
/// arguments as they were typed.
pub(crate) fn merge(
    below: Layer,
    matches: &ArgMatches,
    typed: &[OsString],
) -> Result<(SettingsArgs, Sources)> {
    let mut flags = Vec::new();
    let mut sources = Sources::new();
    for (key, (layered, source)) in below.0 {
        if !is_typed(matches, &key) {
            flags.extend(layered);
            sources.insert(key, source);
        }
    }
    for (key, ..) in arguments().filter(|(key, ..)| is_typed(matches, key)) {
        sources.insert(key, "command line".into());
    }
    flags.extend_from_slice(typed);
    let settings = parse(&flags).map_err(|error| Failure::usage(error.to_string()))?;
    Ok((settings, sources))
}

/// Whether a flag stands on the command line.
pub(crate) fn is_typed(matches: &ArgMatches, key: &str) -> bool {
    matches.value_source(key) == Some(ValueSource::CommandLine)
}

fn command() -> clap::Command {
    let command = clap::Command::new("settings").no_binary_name(true).args_override_self(true);
    let other = Arg::new(NO_SETTING).long(NO_SETTING).action(ArgAction::SetTrue);
    SettingsArgs::augment_args(command).arg(other)
}

fn parse(flags: &[OsString]) -> Result<SettingsArgs, clap::Error> {
    SettingsArgs::from_arg_matches(&command().try_get_matches_from(flags)?)
}

/// Key, long names (the first is the main one) and whether it may be repeated, of every setting.
fn arguments() -> impl Iterator<Item = (String, Vec<String>, bool)> {
    let arguments: Vec<_> =
        command().get_arguments().filter(|one| one.get_id() != NO_SETTING).cloned().collect();
    arguments.into_iter().filter_map(|argument| {
        let mut names = vec![argument.get_long()?.to_owned()];
        names.extend(argument.get_all_aliases().unwrap_or_default().into_iter().map(str::to_owned));
        let append = matches!(argument.get_action(), ArgAction::Append);
        Some((argument.get_id().to_string(), names, append))
    })
}

fn unknown(key: &str, place: &str) -> Failure {
    let failure = Failure::usage(format!("{place}: unknown key {key:?}"));
    let attempt = parse(&[format!("--{}=", key.replace('_', "-")).into()]);
    let typed = format!("--{}", key.replace('_', "-"));
    if let Some((_, own)) = ELSEWHERE.iter().find(|(elsewhere, _)| *elsewhere == typed) {
        let key = |flag: &str| flag.trim_start_matches('-').replace('-', "_");
        return failure.hint(match own.split_once(' ') {
            Some((flag, value)) => format!("write `{} = \"{value}\"`", key(flag)),
            None => format!("write `{}`", key(own)),
        });
    }
    let near = match attempt.err().filter(|error| error.kind() == ErrorKind::UnknownArgument) {
        Some(error) => match error.get(ContextKind::SuggestedArg) {
            Some(ContextValue::String(near)) => vec![near.clone()],
            Some(ContextValue::Strings(near)) => near.clone(),
            _ => Vec::new(),
        },
        None => Vec::new(),
    };
    let near: Vec<String> =
        near.iter().map(|flag| format!("`{}`", flag.trim_start_matches('-').replace('-', "_"))).collect();
    if near.is_empty() {
        failure.hint("the keys are the flags of `lora-sb train --help` with underscores")
    } else {
        failure.hint(format!("did you mean {}?", near.join(" or ")))
    }
}

fn line_of(text: &str, at: usize) -> usize {
    1 + text.as_bytes()[..at.min(text.len())].iter().filter(|&&byte| byte == b'\n').count()
}

/// A TOML value as the texts that a flag would be given; `None` for a table.
fn scalars(value: &DeValue<'_>) -> Option<Vec<String>> {
    let scalar = |value: &DeValue<'_>| match value {
        DeValue::String(text) => Some(text.to_string()),
        // Rust reads no `1_000`.
        DeValue::Integer(number) => Some(number.as_str().replace('_', "")),
        DeValue::Float(number) => Some(number.as_str().replace('_', "")),
        DeValue::Boolean(value) => Some(value.to_string()),
        DeValue::Datetime(_) | DeValue::Array(_) | DeValue::Table(_) => None,
    };
    match value {
        DeValue::Array(items) => items.iter().map(|item| scalar(item.get_ref())).collect(),
        value => Some(vec![scalar(value)?]),
    }
}

fn scalar_of_json(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use lora_sb_model::Recompute;
    use lora_sb_tune::config::{ByteSize, GradientCheckpointing, Precision};

    use super::*;
    use crate::args::{MethodChoice, Ranks};

    fn merged(recipe: &str, typed: &[&str]) -> Result<(SettingsArgs, Sources)> {
        let typed: Vec<OsString> = typed.iter().map(OsString::from).collect();
        let matches = command().try_get_matches_from(&typed).unwrap();
        merge(Layer::recipe(recipe, "r.toml")?, &matches, &typed)
    }

    #[test]
    fn the_command_line_goes_before_the_recipe_and_each_value_keeps_its_source() {
        let recipe =
            "rank = 8\nlearning_rate = 1e-3\n\ndata = [\"a.jsonl\", \"b.jsonl\"]\nlora_alpha = 1_6\n";
        let (settings, sources) = merged(recipe, &["--learning-rate", "2e-3", "-q"]).unwrap();
        assert_eq!(
            (settings.rank, settings.learning_rate, settings.quiet),
            (Some(Ranks(vec![8])), Some(2e-3), true)
        );
        assert_eq!(settings.data.unwrap().len(), 2);
        assert_eq!(settings.lora_alpha, Some(16.0));
        assert_eq!(sources["rank"], "r.toml:1");
        assert_eq!(sources["data"], "r.toml:4");
        assert_eq!(sources["learning_rate"], "command line");
        assert!(!sources.contains_key("seed"));
    }

    #[test]
    fn aliases_booleans_and_lists_of_names_are_read() {
        let recipe = "lora_r = 4\ngradient_checkpointing = true\ntarget_modules = [\"q_proj\", \"v_proj\"]\n";
        let (settings, sources) = merged(recipe, &[]).unwrap();
        let all = GradientCheckpointing::Fixed(Recompute::Block);
        assert_eq!((settings.rank, settings.gradient_checkpointing), (Some(Ranks(vec![4])), Some(all)));
        assert_eq!(settings.target_modules.as_deref(), Some("q_proj,v_proj"));
        assert_eq!(sources["rank"], "r.toml:1");
    }

    #[test]
    fn lists_of_a_recipe_are_read_as_those_that_are_typed() {
        let recipe = "metrics = [\"accuracy\", \"mcc\"]\nlabel_names = [\"no\", \"yes\"]\nrank = [4, 8]\n\
                      method = \"RS-LoRA\"\nloraplus_lr_ratio = 16\n";
        let typed = ["--metrics", "accuracy,matthews", "--label-names", "no,yes", "--rank=4,8"];
        let typed = [&typed[..], &["--method", "rs_lora", "--loraplus-lr-ratio", "16"]].concat();
        let (read, _) = merged(recipe, &[]).unwrap();
        let (typed, _) = merged("", &typed).unwrap();
        assert_eq!(format!("{read:?}"), format!("{typed:?}"));
        assert_eq!(read.rank, Some(Ranks(vec![4, 8])));
        assert_eq!(read.method, Some(MethodChoice::One(lora_sb_tune::Method::RsLora)));
        // What is typed goes before the whole list.
        let (settings, _) = merged(recipe, &["--metrics", "f1"]).unwrap();
        assert_eq!(settings.metrics.unwrap().len(), 1);
    }

    #[test]
    fn a_recipe_says_where_it_is_wrong() {
        let cases = [
            ("rank = 8\nlerning_rate = 1e-3\n", "r.toml:2", "`learning_rate`"),
            ("zzz = 1\n", "r.toml:1", "--help"),
            ("resume = \"latest\"\n", "r.toml:1", "--help"),
            ("rank = \"many\"\n", "r.toml:1: rank", ""),
            ("method = \"lora-bs\"\n", "r.toml:1: method", "lora-sb"),
            ("use_rslora = true\n", "r.toml:1", "method = \\\"rslora\\\""),
            ("max_seq_length = 9\n", "r.toml:1", "`max_length`"),
            ("json = true\n", "r.toml:1", "--help"),
            ("dtype = \"f16\"\n", "r.toml:1: dtype", "one of f32, bf16"),
            ("memory_limit = \"4 gigs\"\n", "r.toml:1: memory_limit", "as 4GiB or 800MiB"),
            ("gradient_checkpointing = \"some\"\n", "r.toml:1: gradient_checkpointing", "true, false, auto"),
            ("\n\nrank = = 3\n", "r.toml:3", "TOML"),
            ("[adapter]\nrank = 3\n", "r.toml:1", "top level"),
        ];
        for (recipe, place, hint) in cases {
            let failure = format!("{:?}", merged(recipe, &[]).unwrap_err());
            assert!(failure.contains(place) && failure.contains(hint), "{recipe:?}: {failure}");
            assert!(failure.contains("code: 2"), "{failure}");
        }
    }

    #[test]
    fn speed_and_memory_are_read_in_every_spelling() {
        let recipe =
            "dtype = \"bfloat16\"\nmemory_limit = \"1.5 GiB\"\ngradient_checkpointing = 3\nloss_chunk = 64\n";
        let (settings, _) = merged(recipe, &[]).unwrap();
        assert_eq!(settings.dtype, Some(Precision::Bf16));
        assert_eq!((settings.memory_limit, settings.loss_chunk), (Some(ByteSize(3 << 29)), Some(64)));
        let first = |blocks| Some(GradientCheckpointing::Fixed(Recompute::First(blocks)));
        assert_eq!(settings.gradient_checkpointing, first(3));
        let typed = ["--gradient-checkpointing", "auto", "--memory-limit", "4096", "--dtype", "float32"];
        let (settings, _) = merged(recipe, &typed).unwrap();
        assert_eq!(settings.gradient_checkpointing, Some(GradientCheckpointing::Auto));
        assert_eq!((settings.dtype, settings.memory_limit), (Some(Precision::F32), Some(ByteSize(4096))));
        let (settings, _) = merged("", &["--gradient-checkpointing"]).unwrap();
        assert_eq!(settings.gradient_checkpointing, Some(GradientCheckpointing::Fixed(Recompute::Block)));
    }

    #[test]
    fn a_plan_gives_its_settings_back() {
        let mut plan = ResolvedPlan::default();
        plan.set("rank", 5, "--rank");
        plan.set("data", vec!["x.txt", "y.txt"], "r.toml:1");
        plan.set("max_steps", Value::Null, "default");
        plan.set("gradient_checkpointing", 2, "auto");
        plan.set("memory_limit", "2GiB", "r.toml:3");
        plan.set("dtype", "bf16", "--dtype");
        plan.set("init", serde_json::json!({ "eta": 0.1 }), "default");
        let layer = Layer::of_plan(&plan, "plan.json").unwrap();
        let matches = command().try_get_matches_from(Vec::<OsString>::new()).unwrap();
        let (settings, sources) = merge(layer, &matches, &[]).unwrap();
        assert_eq!((settings.rank, settings.max_steps), (Some(Ranks(vec![5])), None));
        assert_eq!(settings.data.unwrap().len(), 2);
        assert_eq!(sources["data"], "r.toml:1");
        let first = GradientCheckpointing::Fixed(Recompute::First(2));
        assert_eq!(settings.gradient_checkpointing, Some(first));
        assert_eq!((settings.dtype, settings.memory_limit), (Some(Precision::Bf16), Some(ByteSize(2 << 30))));
    }
}
