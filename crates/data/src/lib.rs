//! Text files to token sequences with their loss masks, and batches of them.
//!
//! Files of JSON lines, JSON arrays or plain text become [`Example`]s: token ids, and for each whether its
//! prediction counts in the loss. The answer and its end token are trained, the prompt is not. What was
//! truncated, split or dropped is counted in a [`Report`]. Texts with a class or a value, for encoders, are read
//! by [`load_labelled`]. The crate knows no numbers: no tensors, no model.
//!
//! ```
//! use lora_sb_data::{Color, LoadOptions, Order, Sampler, Tokenizer, load, preview};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let dir = tempfile::tempdir()?;
//! let file = dir.path().join("sums.jsonl");
//! std::fs::write(&file, "{\"prompt\": \"2 + 3 =\", \"completion\": \" 5\"}\n")?;
//!
//! # let tokenizer_json = include_bytes!("../tests/fixtures/tokenizer.json");
//! # let config = br#"{"eos_token": "<|end|>"}"#;
//! // or Tokenizer::from_dir, for the directory of a model
//! let tokenizer = Tokenizer::from_bytes(tokenizer_json, Some(config))?;
//! let dataset = load(&[file], &tokenizer, &LoadOptions::new(512))?;
//!
//! let example = &dataset.examples[0];
//! assert_eq!(preview(&tokenizer, example, Color::Never)?, "2 + 3 =⟦ 5<|end|>⟧");
//! println!("{}", dataset.report);
//!
//! let sampler = Sampler::new(dataset.examples.len(), 4, Order::Shuffled { seed: 42 })?;
//! assert_eq!(sampler.batches(0), [[0]]);
//! # Ok(())
//! # }
//! ```
//!
//! From top to bottom: `source` reads records with their lines, `format` makes text of them and marks the
//! answer, `chat` and `template` do so for chats, `tokenizer` (with `pieces` for long texts) and `encode` turn text into
//! tokens and masks. `labelled` does so for texts with labels, by `label` and `pair`, `unlabelled` for texts whose label is
//! asked for. `batch` orders examples.

mod batch;
mod chat;
mod encode;
mod error;
mod example;
mod format;
mod label;
mod label_report;
mod labelled;
mod load;
mod pair;
mod pieces;
mod preview;
mod report;
mod source;
mod template;
mod tokenizer;
mod unlabelled;

pub use batch::{Holdout, Order, Sampler, split_examples, split_validation};
pub use error::{Error, Location, Result};
pub use example::{Example, ExcessLength, Format, Label, LoadOptions, TrainOn};
pub use format::alpaca_prompt;
pub use label::{LabelKind, LabelOptions, Labels};
pub use label_report::{LabelCounts, LabelReport};
pub use labelled::{Labelled, load_labelled};
pub use load::{Dataset, load, load_texts};
pub use pair::PairTokens;
pub use preview::{Color, preview};
pub use report::{FileReport, Lost, Report, thousands};
pub use template::{ChatTemplate, Date};
pub use tokenizer::{AddSpecial, SkipSpecial, Tokenizer};
pub use unlabelled::{TextToPredict, load_to_predict};
