//! Writes `tests/fixtures/wordpiece.json`, the small BERT tokenizer of this crate's tests:
//! `cargo run -p lora-sb-data --example make_test_wordpiece`.

use std::path::Path;

use tokenizers::models::TrainerWrapper;
use tokenizers::models::wordpiece::{WordPiece, WordPieceTrainer};
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, PaddingParams, PaddingStrategy, Tokenizer, TruncationParams};

const TEXT: &[&str] = &[
    "This film is a charming and often affecting journey. It is not a good film, it is the best of the year.",
    "The weights made the rope stretch over the pulley. The sailors rode the breeze clear of the rocks.",
    "A man is playing a large flute. A young child is riding a horse; the horses are running to the river.",
    "What is the first major city in the stream of the river? The city is at the sea, and the sea is cold.",
    "He said that the company does not fit its growth strategy, and nobody believed what he said.",
];

fn main() -> tokenizers::Result<()> {
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
    let trainer = WordPieceTrainer::builder()
        .vocab_size(160)
        .show_progress(false)
        .special_tokens(special.iter().map(|token| AddedToken::from(*token, true)).collect())
        .build();
    let model = WordPiece::builder().unk_token("[UNK]".into()).build()?;
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_normalizer(Some(BertNormalizer::new(true, true, None, true)))?;
    tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
    tokenizer.train(&mut TrainerWrapper::from(trainer), TEXT.iter().map(|text| text.to_string()))?;
    let template = TemplateProcessing::builder()
        .try_single("[CLS]:0 $A:0 [SEP]:0")?
        .try_pair("[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1")?
        .special_tokens(vec![("[CLS]", 2), ("[SEP]", 3)])
        .build()?;
    tokenizer.with_post_processor(Some(template));
    // As in the files of sentence-transformers: neither may have any effect.
    let strategy = PaddingStrategy::Fixed(20);
    tokenizer.with_padding(Some(PaddingParams { strategy, ..PaddingParams::default() }));
    tokenizer.with_truncation(Some(TruncationParams { max_length: 12, ..TruncationParams::default() }))?;
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/wordpiece.json");
    tokenizer.save(&file, false)?;
    println!("{} tokens to {}", tokenizer.get_vocab_size(true), file.display());
    Ok(())
}
