//! What was read, and what was lost on the way: shown before the first step.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::{Format, Location};

/// How many locations of lost examples are kept to be shown.
const SHOWN: usize = 3;

/// One file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileReport {
    /// The file as it was given.
    pub file: Arc<Path>,
    /// The shape of its records; `None` for a file without records and for labelled texts.
    pub format: Option<Format>,
    /// The fields that were read.
    pub fields: Vec<String>,
    /// The other fields of its first record.
    pub ignored: Vec<String>,
    /// Its records.
    pub records: usize,
}

/// Examples that were lost for one reason: their number and the first few places.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lost {
    /// How many.
    pub count: usize,
    /// Where the first of them are.
    pub first: Vec<Location>,
}

impl Lost {
    pub(crate) fn add(&mut self, location: &Location) {
        self.count += 1;
        if self.first.len() < SHOWN {
            self.first.push(location.clone());
        }
    }
}

/// The account of a [`load`](crate::load). It is shown in a few lines.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The files in order.
    pub files: Vec<FileReport>,
    /// Records read.
    pub records: usize,
    /// Examples kept.
    pub examples: usize,
    /// Tokens of the examples kept.
    pub tokens: usize,
    /// Tokens the loss is taken over.
    pub trained_tokens: usize,
    /// The longest example kept, in tokens.
    pub longest: usize,
    /// The longest example before its length was limited, in tokens.
    pub longest_found: usize,
    /// The limit.
    pub max_length: usize,
    /// Examples cut at the limit.
    pub truncated: usize,
    /// Tokens cut away.
    pub tokens_lost: usize,
    /// Of these, tokens that would have been trained.
    pub trained_tokens_lost: usize,
    /// Examples cut into windows.
    pub split: usize,
    /// The windows they became.
    pub windows: usize,
    /// Over-long examples left out.
    pub dropped: Lost,
    /// Examples (or windows) left out because no token of them is trained.
    pub without_trained_token: Lost,
    /// Texts that began with the BOS token that the tokenizer adds as well: one was taken away.
    pub bos_doubled: usize,
}

/// A number with its thousands parted by commas.
pub fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// `1 record`, `2,000 records`.
pub(crate) fn count(number: usize, noun: &str) -> String {
    format!("{} {noun}{}", thousands(number), if number == 1 { "" } else { "s" })
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let places: Vec<_> = self.first.iter().map(Location::to_string).collect();
        let more = if self.count > places.len() { ", ..." } else { "" };
        write!(f, "({}{more})", places.join(", "))
    }
}

impl fmt::Display for FileReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.file.display(), count(self.records, "record"))?;
        if let Some(format) = self.format {
            write!(f, ", {}", format.name())?;
        }
        if !self.fields.is_empty() {
            write!(f, " from {}", self.fields.join(", "))?;
        }
        if !self.ignored.is_empty() {
            write!(f, "; not read: {}", self.ignored.join(", "))?;
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for file in &self.files {
            writeln!(f, "{file}")?;
        }
        let share = 100.0 * self.trained_tokens as f64 / self.tokens.max(1) as f64;
        write!(
            f,
            "{}, {}, of them {} trained ({share:.1} %); longest {}, mean {}",
            count(self.examples, "example"),
            count(self.tokens, "token"),
            thousands(self.trained_tokens),
            thousands(self.longest),
            thousands(self.tokens / self.examples.max(1)),
        )?;
        let limit = thousands(self.max_length);
        if self.truncated > 0 {
            write!(
                f,
                "\n{} truncated to {limit} tokens: {} lost, {} of them trained (the longest had {})",
                count(self.truncated, "example"),
                count(self.tokens_lost, "token"),
                thousands(self.trained_tokens_lost),
                thousands(self.longest_found),
            )?;
        }
        if self.split > 0 {
            let (texts, windows) = (count(self.split, "text"), count(self.windows, "window"));
            write!(f, "\n{texts} split into {windows} of at most {limit} tokens")?;
        }
        if self.dropped.count > 0 {
            let examples = count(self.dropped.count, "example");
            write!(f, "\n{examples} dropped as longer than {limit} tokens {}", self.dropped)?;
        }
        if self.without_trained_token.count > 0 {
            let examples = count(self.without_trained_token.count, "example");
            write!(f, "\n{examples} dropped without a trained token {}", self.without_trained_token)?;
        }
        if self.bos_doubled > 0 {
            let texts = count(self.bos_doubled, "text");
            write!(f, "\n{texts} began with the tokenizer's own BOS: one of the two was taken away")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_parted() {
        for (number, expected) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(thousands(number), expected);
        }
    }

    #[test]
    fn only_the_first_places_are_kept() {
        let mut lost = Lost::default();
        for line in 1..=5 {
            lost.add(&Location { file: Path::new("a.jsonl").into(), line, element: None });
        }
        assert_eq!(lost.to_string(), "(a.jsonl:1, a.jsonl:2, a.jsonl:3, ...)");
        assert_eq!(lost.count, 5);
    }
}
