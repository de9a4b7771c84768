//! Which blocks are computed again in the backward pass.

use std::fmt;
use std::str::FromStr;

use lora_sb_model::Recompute;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::Value;

use super::named;
use crate::{Error, Result};

/// Whether a block keeps what its backward pass reads, or its input alone and is computed again there: less memory,
/// up to a third more work, the same bits.
///
/// Written as `true` (all blocks are computed again), `false` (none), a number (so many, from the first on) or `auto`
/// (as few as fit into the memory, which the plan of a run decides; see [`fit`](crate::plan::fit)).
///
/// ```
/// use lora_sb_model::Recompute;
/// use lora_sb_tune::config::GradientCheckpointing;
///
/// let some: GradientCheckpointing = "3".parse()?;
/// assert_eq!(some, GradientCheckpointing::Fixed(Recompute::First(3)));
/// assert_eq!(serde_json::to_string(&GradientCheckpointing::Auto).unwrap(), "\"auto\"");
/// # Ok::<(), lora_sb_tune::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GradientCheckpointing {
    /// As few blocks as fit into the memory. Where no plan has decided yet, none.
    #[default]
    Auto,
    /// As it says.
    Fixed(Recompute),
}

impl GradientCheckpointing {
    const EXPECTED: &str = "true, false, auto, or the number of blocks that are computed again";

    /// What the model keeps for its backward pass.
    pub fn recompute(self) -> Recompute {
        match self {
            GradientCheckpointing::Auto => Recompute::None,
            GradientCheckpointing::Fixed(recompute) => recompute,
        }
    }
}

impl fmt::Display for GradientCheckpointing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GradientCheckpointing::Auto => f.write_str("auto"),
            GradientCheckpointing::Fixed(Recompute::None) => f.write_str("false"),
            GradientCheckpointing::Fixed(Recompute::Block) => f.write_str("true"),
            GradientCheckpointing::Fixed(Recompute::First(blocks)) => blocks.fmt(f),
        }
    }
}

impl FromStr for GradientCheckpointing {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(GradientCheckpointing::Auto),
            "false" => Ok(GradientCheckpointing::Fixed(Recompute::None)),
            "true" => Ok(GradientCheckpointing::Fixed(Recompute::Block)),
            number => match number.parse() {
                Ok(blocks @ 1..) => Ok(GradientCheckpointing::Fixed(Recompute::First(blocks))),
                _ => Err(named("gradient_checkpointing", GradientCheckpointing::EXPECTED, text)),
            },
        }
    }
}

impl Serialize for GradientCheckpointing {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            GradientCheckpointing::Auto => serializer.serialize_str("auto"),
            GradientCheckpointing::Fixed(Recompute::None) => serializer.serialize_bool(false),
            GradientCheckpointing::Fixed(Recompute::Block) => serializer.serialize_bool(true),
            GradientCheckpointing::Fixed(Recompute::First(blocks)) => blocks.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for GradientCheckpointing {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = match Value::deserialize(deserializer)? {
            Value::String(text) => text,
            other => other.to_string(),
        };
        text.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_choice_survives_text_and_json() {
        let choices = [
            ("auto", GradientCheckpointing::Auto),
            ("true", GradientCheckpointing::Fixed(Recompute::Block)),
            ("false", GradientCheckpointing::Fixed(Recompute::None)),
            ("7", GradientCheckpointing::Fixed(Recompute::First(7))),
        ];
        for (text, choice) in choices {
            assert_eq!(text.parse::<GradientCheckpointing>().unwrap(), choice);
            assert_eq!(choice.to_string(), text);
            let json = serde_json::to_string(&choice).unwrap();
            assert_eq!(json.trim_matches('"'), text);
            assert_eq!(serde_json::from_str::<GradientCheckpointing>(&json).unwrap(), choice);
        }
        for wrong in ["yes", "0", "-1", "1.5", ""] {
            let message = wrong.parse::<GradientCheckpointing>().unwrap_err().to_string();
            assert!(message.starts_with("gradient_checkpointing: expected true, false, auto"), "{message}");
        }
        assert!(serde_json::from_str::<GradientCheckpointing>("null").is_err());
    }
}
