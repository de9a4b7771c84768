//! Amounts of memory as they are written in settings.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::Value;

use super::named;
use crate::{Error, Result};

/// A number of bytes, written with a unit: `4GiB`, `1.5 GB`, `800MiB`; a number alone is bytes.
///
/// KB, MB, GB and TB are powers of 1000, KiB, MiB, GiB and TiB of 1024; case does not matter.
///
/// ```
/// use lora_sb_tune::config::ByteSize;
///
/// assert_eq!("1.5GiB".parse::<ByteSize>()?, ByteSize(3 << 29));
/// assert_eq!(ByteSize(800 << 20).to_string(), "800MiB");
/// # Ok::<(), lora_sb_tune::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub usize);

/// Units by their names; the larger ones first, as a size is written in the largest that divides it.
const UNITS: [(&str, usize); 9] = [
    ("TiB", 1 << 40),
    ("TB", 1_000_000_000_000),
    ("GiB", 1 << 30),
    ("GB", 1_000_000_000),
    ("MiB", 1 << 20),
    ("MB", 1_000_000),
    ("KiB", 1 << 10),
    ("KB", 1_000),
    ("B", 1),
];

impl ByteSize {
    /// The amount for a person to read, in the largest binary unit that leaves at least 1: `1.50 GiB`.
    pub fn rounded(self) -> String {
        let units = ["KiB", "MiB", "GiB", "TiB"];
        if self.0 < 1024 {
            return format!("{} B", self.0);
        }
        let (mut value, mut unit) = (self.0 as f64 / 1024.0, 0);
        while value >= 1024.0 && unit + 1 < units.len() {
            (value, unit) = (value / 1024.0, unit + 1);
        }
        let digits = if value < 10.0 { 2 } else { 1 };
        format!("{value:.digits$} {}", units[unit])
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = |(_, unit): &&(&str, usize)| self.0 >= *unit && self.0.is_multiple_of(*unit);
        let (name, unit) = UNITS.iter().find(whole).unwrap_or(&("B", 1));
        write!(f, "{}{name}", self.0 / unit)
    }
}

impl FromStr for ByteSize {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || named("memory_limit", "an amount of memory, as 4GiB or 800MiB", text);
        let trimmed = text.trim();
        let end = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = (&trimmed[..end], trimmed[end..].trim_start());
        let number: f64 = number.parse().map_err(|_| wrong())?;
        let named = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit));
        let factor = match unit {
            "" => 1,
            _ => named.ok_or_else(wrong)?.1,
        };
        let bytes = number * factor as f64;
        match bytes >= 1.0 && bytes < usize::MAX as f64 {
            true => Ok(ByteSize(bytes as usize)),
            false => Err(wrong()),
        }
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
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
    fn amounts_are_rounded_for_persons() {
        let sizes =
            [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (10 << 20, "10.0 MiB"), (3 << 30, "3.00 GiB")];
        for (count, expected) in sizes {
            assert_eq!(ByteSize(count).rounded(), expected);
        }
    }

    #[test]
    fn units_of_both_systems_are_read_and_the_largest_whole_one_is_written() {
        let sizes = [
            ("4GiB", 4 << 30, "4GiB"),
            ("4 gb", 4_000_000_000, "4GB"),
            ("800MiB", 800 << 20, "800MiB"),
            ("0.5KiB", 512, "512B"),
            ("1536", 1536, "1536B"),
            (" 2048 ", 2048, "2KiB"),
            ("1.5kb", 1500, "1500B"),
            ("2TB", 2_000_000_000_000, "2TB"),
            ("7B", 7, "7B"),
        ];
        for (text, bytes, written) in sizes {
            let size: ByteSize = text.parse().unwrap();
            assert_eq!((size, size.to_string().as_str()), (ByteSize(bytes), written), "{text}");
            let json = serde_json::to_string(&size).unwrap();
            assert_eq!(serde_json::from_str::<ByteSize>(&json).unwrap(), size);
        }
        assert_eq!(serde_json::from_str::<ByteSize>("4096").unwrap(), ByteSize(4096));
        for wrong in
            ["", "GiB", "4G", "-1GiB", "1e400GiB", "4GiBs", "0", "0.1", "1.2.3MB", "nan", "99999999999TiB"]
        {
            let message = wrong.parse::<ByteSize>().unwrap_err().to_string();
            assert!(message.starts_with("memory_limit: expected an amount of memory, as 4GiB"), "{message}");
            assert!(message.ends_with(&format!("found {wrong:?}")), "{message}");
        }
    }
}
