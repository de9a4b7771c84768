//! Writes `tests/fixtures/tokenizer.json`, the small byte-level BPE tokenizer of this crate's tests:
//! `cargo run -p lora-sb-data --example make_test_tokenizer`.

use std::path::Path;

use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

const TEXT: &[&str] = &[
    "Below is an instruction that describes a task, paired with an input that provides further context.",
    "Write a response that appropriately completes the request. ### Instruction: ### Input: ### Response:",
    "The answer is the number of apples that the child has after the teacher takes the other half of them.",
    "A river runs to the sea, and the sea does not fill; the wind goes to the south and turns to the north.",
    "system user assistant message question answer prompt completion text hello world thank you very much",
    "one\n\n two\n\n three\n\n four\n\n five\n\n six\n\n seven\n\n eight",
    "You are a helpful assistant. What is the name of the tree in the garden? It is the old pear tree.",
];

fn main() -> tokenizers::Result<()> {
    let special = ["<|pad|>", "<|begin|>", "<|end|>", "<|turn|>"];
    let trainer = BpeTrainer::builder()
        .vocab_size(420)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(special.iter().map(|token| AddedToken::from(*token, true)).collect())
        .build();
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    // The offsets are trimmed as in most published byte-level tokenizers: the masks must not depend on it.
    tokenizer.with_post_processor(Some(ByteLevel::new(false, true, true)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    tokenizer.train(&mut TrainerWrapper::from(trainer), TEXT.iter().map(|text| text.to_string()))?;
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer.json");
    tokenizer.save(&file, false)?;
    println!("{} tokens to {}", tokenizer.get_vocab_size(true), file.display());
    Ok(())
}
