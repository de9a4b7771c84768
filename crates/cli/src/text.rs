//! Token ids to text, as they come.

use lora_sb_data::{AddSpecial, SkipSpecial, Tokenizer};
use lora_sb_kernels::{Generator, Stream};
use lora_sb_model::{Generation, LinearHook, Model, Sampling, generate};

use crate::failure::{Failure, Result};

/// Tokens of the sample that `train` shows.
pub(crate) const SAMPLE_TOKENS: usize = 100;

/// What has been generated, decoded piece by piece: a character may take several tokens, and how a token reads
/// may depend on the one before it.
#[derive(Debug)]
pub(crate) struct TokenStream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// Where the text that is decoded again begins.
    window: usize,
    /// How many tokens have been written.
    written: usize,
}

/// Tokens before the first new one that are decoded with it.
const CONTEXT: usize = 6;

impl<'a> TokenStream<'a> {
    /// Begins behind a prompt.
    pub(crate) fn after(tokenizer: &'a Tokenizer, prompt: &[u32]) -> Self {
        let ids = prompt[prompt.len().saturating_sub(CONTEXT)..].to_vec();
        TokenStream { tokenizer, written: ids.len(), window: 0, ids }
    }

    /// Takes a token; the text that is complete with it, perhaps empty.
    pub(crate) fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.pending()?;
        // A character of several bytes decodes to replacement characters until its last one is there.
        if text.is_empty() || text.ends_with('\u{fffd}') {
            return Ok(String::new());
        }
        self.window = self.written;
        self.written = self.ids.len();
        Ok(text)
    }

    /// What is left at the end, incomplete characters included.
    pub(crate) fn finish(self) -> Result<String> {
        self.pending()
    }

    fn pending(&self) -> Result<String> {
        let decode = |ids: &[u32]| self.tokenizer.decode(ids, SkipSpecial::Yes);
        let before = decode(&self.ids[self.window..self.written])?;
        let all = decode(&self.ids[self.window..])?;
        Ok(all.get(before.len()..).unwrap_or_default().to_owned())
    }
}

/// The token ids of a prompt, checked against the model.
pub(crate) fn prompt_ids(tokenizer: &Tokenizer, model: &Model, prompt: &str) -> Result<Vec<u32>> {
    let ids = tokenizer.encode(prompt, AddSpecial::Yes)?;
    if ids.is_empty() {
        return Err(Failure::new("the prompt has no token").hint("give --prompt with at least one character"));
    }
    let rows = model.config().vocab_size;
    match ids.iter().find(|&&id| id as usize >= rows) {
        None => Ok(ids),
        Some(id) => Err(Failure::new(format!(
            "token {id} of the prompt is outside the model's vocabulary: the tokenizer has {} tokens, the model's \
             embedding {rows} rows",
            tokenizer.vocab_size()
        ))
        .hint("take tokenizer.json and config.json from the same model")),
    }
}

/// How a model continues a prompt, for `train` to show before and after: same settings, same draws. The model must
/// be prepared for the prompt and [`SAMPLE_TOKENS`].
pub(crate) fn continuation(
    model: &Model,
    hook: &dyn LinearHook,
    tokenizer: &Tokenizer,
    prompt: &str,
    seed: u64,
) -> Result<String> {
    let ids = prompt_ids(tokenizer, model, prompt)?;
    let sampling = Sampling::Random { temperature: 0.8, top_k: None, top_p: None };
    let options =
        Generation { max_new_tokens: SAMPLE_TOKENS, sampling, stop: tokenizer.stop_tokens().to_vec() };
    let mut generator = Generator::new(seed, Stream::Sampling, 0);
    let mut stream = TokenStream::after(tokenizer, &ids);
    let new = generate(model, hook, &[ids], &options, &mut generator, &mut |_, _| {})?;
    let mut text = String::new();
    for &id in new.iter().flatten() {
        text.push_str(&stream.push(id)?);
    }
    text.push_str(&stream.finish()?);
    Ok(text)
}
