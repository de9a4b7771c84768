//! The model and the text that are built in, so that a first run needs no files.

use std::path::Path;
use std::sync::Arc;

use lora_sb_kernels::{Kernels, SharedBytes};
use lora_sb_model::{Config, Model, Storage};

use crate::failure::Result;

/// What plans and adapters call the built-in model.
pub(crate) const NAME: &str = "built-in";

/// `config.json` of the base model.
const CONFIG: &[u8] = include_bytes!("../../../assets/base/config.json");
/// Its weights, bf16, placed so that they can be read where they are.
static WEIGHTS: &Aligned<[u8]> = &Aligned(*include_bytes!("../../../assets/base/model.safetensors"));
/// `tokenizer.json`.
const TOKENIZER: &[u8] = include_bytes!("../../../assets/base/tokenizer.json");
/// `tokenizer_config.json`.
const TOKENIZER_CONFIG: &[u8] = include_bytes!("../../../assets/base/tokenizer_config.json");
/// Plays of Shakespeare, public domain.
const TEXT: &str = include_str!("../../../assets/shakespeare.txt");
/// The settings of a run without a model and data.
pub(crate) const RECIPE: &str = include_str!("default.toml");

/// Bytes at an address that suits every element type.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

/// The share of the text that is trained on; the rest is held out.
const TRAINED_SHARE: f64 = 0.9;

/// The architecture.
pub(crate) fn config() -> Result<Config> {
    Ok(Config::from_json(CONFIG)?)
}

/// The model.
pub(crate) fn model(kernels: Arc<dyn Kernels>, storage: Storage) -> Result<Model> {
    let weights = SharedBytes::new(Arc::new(&WEIGHTS.0), 0..WEIGHTS.0.len())?;
    Ok(Model::from_files(CONFIG, vec![weights], kernels, storage)?)
}

/// Bytes of the weights in the program's image.
pub(crate) fn weights_size() -> usize {
    WEIGHTS.0.len()
}

/// The tokenizer.
pub(crate) fn tokenizer() -> Result<lora_sb_data::Tokenizer> {
    Ok(lora_sb_data::Tokenizer::from_bytes(TOKENIZER, Some(TOKENIZER_CONFIG))?)
}

/// The tokenizer's files by name.
pub(crate) const TOKENIZER_FILES: [(&str, &[u8]); 2] =
    [("tokenizer.json", TOKENIZER), ("tokenizer_config.json", TOKENIZER_CONFIG)];

/// The text to train on and the text held out, each with its name. The held-out part is the end, from a
/// paragraph on: no sentence of it has been seen, nor its neighbours.
pub(crate) fn texts() -> [(&'static Path, &'static str); 2] {
    let (train, held_out) = split_at_paragraph(TEXT, TRAINED_SHARE);
    [(Path::new("built-in text"), train), (Path::new("built-in text, held out"), held_out)]
}

/// Parts a text behind the first empty line at or after a share of it.
fn split_at_paragraph(text: &str, share: f64) -> (&str, &str) {
    let mut wanted = (text.len() as f64 * share) as usize;
    while !text.is_char_boundary(wanted) {
        wanted += 1;
    }
    match text[wanted..].find("\n\n") {
        Some(offset) => text.split_at(wanted + offset + 2),
        None => text.split_at(text.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_held_out_text_starts_at_a_paragraph() {
        let [(_, train), (_, held_out)] = texts();
        assert!(train.ends_with("\n\n") && !held_out.starts_with('\n'));
        assert_eq!(train.len() + held_out.len(), TEXT.len());
        let share = held_out.len() as f64 / TEXT.len() as f64;
        assert!((0.09..=0.1).contains(&share), "{share}");
        assert_eq!(split_at_paragraph("aé\n\nb", 0.4), ("aé\n\n", "b"));
        assert_eq!(split_at_paragraph("no paragraph", 0.5), ("no paragraph", ""));
    }

    #[test]
    fn the_built_in_parts_belong_together() {
        let config = config().unwrap();
        assert!(tokenizer().unwrap().vocab_size() <= config.vocab_size);
        let kernels = Arc::new(lora_sb_kernels::Cpu::new(1).unwrap());
        let model = model(kernels, Storage::Mapped).unwrap();
        assert!(model.warnings().is_empty(), "{:?}", model.warnings());
        assert!(WEIGHTS.0.len() < 16 << 20 && (&raw const WEIGHTS.0).addr().is_multiple_of(64));
    }
}
