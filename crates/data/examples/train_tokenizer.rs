//! Trains the byte-level BPE tokenizer of the embedded base model.
//!
//! `cargo run --release -p lora-sb-data --example train_tokenizer -- VOCABULARY OUT_DIR FILE.jsonl...`
//! reads the `text` field of every line and writes `tokenizer.json` and `tokenizer_config.json`.

use std::error::Error;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper};
use tokenizers::{TokenizerBuilder, TokenizerImpl};

/// Ends every document, and is the one token that stands for no text.
const END: &str = "<|endoftext|>";

type Bpe = TokenizerImpl<BPE, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [vocabulary, out, files @ ..] = &arguments[..] else {
        return Err("usage: train_tokenizer VOCABULARY OUT_DIR FILE.jsonl...".into());
    };
    let mut tokenizer: Bpe = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None)
        .with_pre_tokenizer(Some(PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, true))))
        .with_post_processor(None)
        .with_decoder(Some(DecoderWrapper::ByteLevel(ByteLevel::default())))
        .build()?;
    let mut trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(vocabulary.parse()?)
        .special_tokens(vec![AddedToken::from(END, true)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    tokenizer.train(&mut trainer, texts(files)?.into_iter())?;
    let out = Path::new(out);
    std::fs::create_dir_all(out)?;
    tokenizer.save(out.join("tokenizer.json"), false)?;
    let config = serde_json::json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "clean_up_tokenization_spaces": false,
    });
    std::fs::write(out.join("tokenizer_config.json"), serde_json::to_string_pretty(&config)?)?;
    println!("{} tokens", tokenizer.get_vocab_size(true));
    Ok(())
}

fn texts(files: &[String]) -> Result<Vec<String>, Box<dyn Error + Send + Sync>> {
    let mut texts = Vec::new();
    for file in files {
        for line in BufReader::new(File::open(file)?).lines() {
            let record: serde_json::Value = serde_json::from_str(&line?)?;
            let text =
                record["text"].as_str().ok_or_else(|| format!("{file}: a line without a text field"))?;
            texts.push(text.to_owned());
        }
    }
    Ok(texts)
}
