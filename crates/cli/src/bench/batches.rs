//! What the steps are trained on: synthetic tokens of one length by a formula, or real examples.
//!
//! Synthetic row n holds the ids `5 + splitmix64(n * length + t) mod (vocabulary - 5)`, all trained; of an encoder its
//! class is `splitmix64(2^49 + n) mod classes`. Step k takes the rows from `k * batch` on. splitmix64 is the generator of
//! Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.

use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lora_sb_data::{
    Example, Label, LabelOptions, Labels, LoadOptions, Location, Tokenizer, load, load_labelled,
};
use lora_sb_model::{Config, Task};
use lora_sb_tune::TrainConfig;
use lora_sb_tune::train::Cursor;
use serde_json::json;

use crate::base::check_ids;
use crate::failure::{Failure, Result};

/// The examples of every step, those of the warm-up first.
#[derive(Debug)]
pub(crate) struct Batches {
    /// In the order in which they are trained on.
    pub(crate) steps: Vec<Vec<Example>>,
    /// In words.
    pub(crate) described: String,
    /// Whether every step is like every other.
    pub(crate) even: bool,
}

impl Batches {
    /// `steps` steps of synthetic tokens.
    pub(crate) fn synthetic(config: &Config, steps: usize, batch: usize, length: usize) -> Result<Batches> {
        if config.vocab_size <= 5 {
            return Err(Failure::new(format!(
                "a vocabulary of {} tokens; synthetic ones need 6",
                config.vocab_size
            ))
            .hint("take another model, or give --data"));
        }
        let step = |step: usize| (0..batch).map(|b| row(config, step * batch + b, length)).collect();
        let described = format!("{batch} x {length} synthetic tokens");
        Ok(Batches { steps: (0..steps).map(step).collect(), described, even: true })
    }

    /// Real examples in the order of a training run; beside them the architecture with a head for their labels.
    pub(crate) fn read(
        files: &[PathBuf],
        tokenizer: &Tokenizer,
        config: Config,
        train: &TrainConfig,
        steps: usize,
    ) -> Result<(Batches, Config)> {
        let max_length = train.max_length;
        let (examples, config) = match config.task {
            Task::LanguageModel => (load(files, tokenizer, &LoadOptions::new(max_length))?.examples, config),
            Task::Classification { .. } | Task::Regression => {
                let options = LabelOptions { max_length, excess_length: None, kind: None, names: None };
                let read = load_labelled(files, tokenizer, &options)?;
                let task = match read.labels {
                    Labels::Classes(names) => Task::Classification { labels: names.len() },
                    Labels::Values => Task::Regression,
                };
                (read.examples, config.with_task(task)?)
            }
        };
        for example in &examples {
            check_ids(&example.ids, &example.source.to_string(), tokenizer, &config)?;
        }
        let mut cursor = Cursor::new(examples.len(), train)?;
        let step = |step| cursor.step(step).indices.iter().map(|&index| examples[index].clone()).collect();
        let names: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
        let batch = train.per_device_train_batch_size;
        let described = format!("{batch} examples of {}, at most {max_length} tokens", names.join(", "));
        Ok((Batches { steps: (0..steps).map(step).collect(), described, even: false }, config))
    }

    /// Tokens of a step, on the average.
    pub(crate) fn tokens_per_step(&self) -> usize {
        let tokens: usize = self.steps.iter().flatten().map(|example| example.ids.len()).sum();
        tokens / self.steps.len().max(1)
    }

    /// The longest example in tokens.
    pub(crate) fn longest(&self) -> usize {
        self.steps.iter().flatten().map(|example| example.ids.len()).max().unwrap_or(0)
    }
}

fn row(config: &Config, number: usize, length: usize) -> Example {
    let id =
        |t: usize| 5 + (splitmix64((number * length + t) as u64) % (config.vocab_size as u64 - 5)) as u32;
    let ids: Vec<u32> = (0..length).map(id).collect();
    let source = Location { file: Arc::from(Path::new("synthetic")), line: number + 1, element: None };
    let draw = splitmix64((2 << 48) + number as u64);
    let label = match config.task {
        Task::LanguageModel => return Example::text(ids, vec![true; length], source),
        Task::Classification { labels } => Label::Class((draw % labels as u64) as u32),
        Task::Regression => Label::Value((draw % 6) as f32),
    };
    Example { trained: vec![false; length], ids, second: None, label: Some(label), source }
}

fn splitmix64(x: u64) -> u64 {
    let z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Writes the examples as JSON lines: `step`, `ids`, `trained` (0 or 1 for each token) or `label`, and `second`, where
/// the second text of a pair begins.
pub(crate) fn write_batches(file: &Path, batches: &Batches) -> Result<()> {
    let failed = |error| Failure::file(file, "written", &error);
    let mut out = BufWriter::new(std::fs::File::create(file).map_err(failed)?);
    for (step, examples) in batches.steps.iter().enumerate() {
        for Example { ids, trained, second, label, .. } in examples {
            let mut line = json!({ "step": step, "ids": ids, "second": second });
            match label {
                Some(Label::Class(class)) => line["label"] = json!(class),
                Some(Label::Value(value)) => line["label"] = json!(value),
                None => line["trained"] = trained.iter().map(|&trained| u8::from(trained)).collect(),
            }
            writeln!(out, "{line}").map_err(failed)?;
        }
    }
    out.flush().map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> Config {
        Config::from_json(json.as_bytes()).unwrap()
    }

    /// Values of the formula computed in Python.
    #[test]
    fn synthetic_tokens_are_those_of_the_formula() {
        assert_eq!(splitmix64(0), 0xE220_A839_7B1D_CDAF);
        let llama = config(
            r#"{"model_type": "llama", "vocab_size": 1000, "hidden_size": 8, "intermediate_size": 8,
                "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 32}"#,
        );
        let batches = Batches::synthetic(&llama, 3, 2, 7).unwrap();
        assert_eq!((batches.steps.len(), batches.steps[0].len(), batches.longest()), (3, 2, 7));
        let last = &batches.steps[2][1];
        assert_eq!(last.ids[6], 5 + (splitmix64(5 * 7 + 6) % 995) as u32);
        assert!(last.trained.iter().all(|&trained| trained) && last.label.is_none());
        let bert = config(
            r#"{"model_type": "bert", "vocab_size": 50, "hidden_size": 8, "intermediate_size": 8,
                "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 32}"#,
        );
        let classes: Vec<_> = Batches::synthetic(&bert, 1, 20, 3).unwrap().steps[0]
            .iter()
            .map(|example| example.label)
            .collect();
        assert!(classes.contains(&Some(Label::Class(0))) && classes.contains(&Some(Label::Class(1))));
    }
}
