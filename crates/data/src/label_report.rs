//! What was read of labelled texts, and what was lost on the way: shown before the first step.

use std::fmt;

use crate::report::{FileReport, Lost, count};
use crate::{Example, Label, Labels, thousands};

/// Data with more classes than this is summed up, not listed.
const LISTED: usize = 10;
/// How many classes without an example are named.
const NAMED: usize = 5;

/// How the labels are spread.
#[derive(Debug, Clone, PartialEq)]
pub enum LabelCounts {
    /// Each class with the number of its examples, in the order of the classes.
    Classes(Vec<(String, usize)>),
    /// Values.
    Values {
        /// The smallest.
        smallest: f32,
        /// The largest.
        largest: f32,
        /// Their mean.
        mean: f64,
        /// Their standard deviation (of the population).
        deviation: f64,
    },
}

impl Default for LabelCounts {
    fn default() -> Self {
        LabelCounts::Classes(vec![])
    }
}

/// The account of a [`load_labelled`](crate::load_labelled). It is shown in a few lines.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LabelReport {
    /// The files in order.
    pub files: Vec<FileReport>,
    /// Records read.
    pub records: usize,
    /// Examples kept.
    pub examples: usize,
    /// Of these, pairs of texts.
    pub pairs: usize,
    /// Tokens of the examples kept.
    pub tokens: usize,
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
    /// Over-long examples left out.
    pub dropped: Lost,
    /// Examples with a blank text: kept, their label is learned from special tokens alone.
    pub blank: Lost,
    /// The labels of the examples kept.
    pub labels: LabelCounts,
}

impl LabelReport {
    /// The classes without an example.
    pub fn classes_without_example(&self) -> Vec<&str> {
        match &self.labels {
            LabelCounts::Classes(classes) => {
                classes.iter().filter(|(_, count)| *count == 0).map(|(name, _)| name.as_str()).collect()
            }
            LabelCounts::Values { .. } => vec![],
        }
    }

    pub(crate) fn count_labels(&mut self, labels: &Labels, examples: &[Example]) {
        self.labels = match labels {
            Labels::Classes(names) => {
                let mut counts: Vec<_> = names.iter().map(|name| (name.clone(), 0)).collect();
                for example in examples {
                    if let Some(Label::Class(class)) = example.label {
                        counts[class as usize].1 += 1;
                    }
                }
                LabelCounts::Classes(counts)
            }
            Labels::Values => spread(examples),
        };
    }
}

fn spread(examples: &[Example]) -> LabelCounts {
    let values = examples.iter().filter_map(|example| match example.label {
        Some(Label::Value(value)) => Some(value),
        _ => None,
    });
    let number = values.clone().count().max(1) as f64;
    let mean = values.clone().map(f64::from).sum::<f64>() / number;
    let variance = values.clone().map(|value| (f64::from(value) - mean).powi(2)).sum::<f64>() / number;
    let smallest = values.clone().fold(f32::INFINITY, f32::min);
    let largest = values.fold(f32::NEG_INFINITY, f32::max);
    LabelCounts::Values { smallest, largest, mean, deviation: variance.sqrt() }
}

impl fmt::Display for LabelCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let classes = match self {
            LabelCounts::Values { smallest, largest, mean, deviation } => {
                let spread = format!("mean {mean:.3}, standard deviation {deviation:.3}");
                return write!(f, "values from {smallest} to {largest}, {spread}");
            }
            LabelCounts::Classes(classes) => classes,
        };
        write!(f, "{} classes: ", thousands(classes.len()))?;
        if classes.len() <= LISTED {
            let total = classes.iter().map(|(_, count)| count).sum::<usize>().max(1);
            let share = |count: usize| 100.0 * count as f64 / total as f64;
            let listed = classes
                .iter()
                .map(|(name, count)| format!("{name} {} ({:.1} %)", thousands(*count), share(*count)));
            return f.write_str(&listed.collect::<Vec<_>>().join(", "));
        }
        let rarest = classes.iter().min_by_key(|(_, count)| count);
        // Of equally frequent ones the first, as `min_by_key` takes it.
        let commonest = classes.iter().rev().max_by_key(|(_, count)| count);
        for (what, class) in [("from ", rarest), (" to ", commonest)] {
            if let Some((name, examples)) = class {
                write!(f, "{what}{} ({name})", count(*examples, "example"))?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for LabelReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for file in &self.files {
            writeln!(f, "{file}")?;
        }
        write!(f, "{}", count(self.examples, "example"))?;
        match self.pairs {
            0 => {}
            pairs if pairs == self.examples => write!(f, " (pairs of texts)")?,
            pairs => write!(f, " ({} of them pairs of texts)", thousands(pairs))?,
        }
        let (longest, mean) = (thousands(self.longest), thousands(self.tokens / self.examples.max(1)));
        write!(f, ", {}; longest {longest}, mean {mean}", count(self.tokens, "token"))?;
        write!(f, "\n{}", self.labels)?;
        let without = self.classes_without_example();
        if !without.is_empty() {
            let mut named: Vec<_> = without.iter().take(NAMED).map(|name| format!("{name:?}")).collect();
            if without.len() > NAMED {
                named.push(format!("{} more", without.len() - NAMED));
            }
            write!(f, "\nno example of {}", named.join(", "))?;
        }
        let limit = thousands(self.max_length);
        if self.truncated > 0 {
            let examples = count(self.truncated, "example");
            let (lost, longest) = (count(self.tokens_lost, "token"), thousands(self.longest_found));
            write!(f, "\n{examples} truncated to {limit} tokens: {lost} lost (the longest had {longest})")?;
        }
        if self.dropped.count > 0 {
            let examples = count(self.dropped.count, "example");
            write!(f, "\n{examples} dropped as longer than {limit} tokens {}", self.dropped)?;
        }
        if self.blank.count > 0 {
            write!(f, "\n{} with a blank text {}", count(self.blank.count, "example"), self.blank)?;
        }
        Ok(())
    }
}
