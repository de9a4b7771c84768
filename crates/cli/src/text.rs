//! Token ids to text, as they come.

use lora_sb_data::{AddSpecial, SkipSpecial, Tokenizer};
use lora_sb_kernels::{Generator, Stream};
use lora_sb_model::{Generation, LinearHook, Model, Next, Sampling, generate};

use crate::base;
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

/// Texts that end a continuation. What may be the beginning of one is held back until it is known.
#[derive(Clone, Debug)]
pub(crate) struct StopTexts<'a> {
    texts: &'a [String],
    held: String,
    found: bool,
}

impl<'a> StopTexts<'a> {
    /// Begins behind a prompt, which is not searched; no text is empty.
    pub(crate) fn new(texts: &'a [String]) -> Self {
        StopTexts { texts, held: String::new(), found: false }
    }

    /// Takes a piece; what certainly stands before any of the texts.
    pub(crate) fn push(&mut self, piece: &str) -> String {
        if self.found {
            return String::new();
        }
        self.held.push_str(piece);
        if let Some(at) = self.texts.iter().filter_map(|text| self.held.find(text.as_str())).min() {
            self.found = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        // The longest end that one of the texts begins with.
        let begins = |at: &usize| self.texts.iter().any(|text| text.starts_with(&self.held[*at..]));
        let kept = self.held.char_indices().map(|(at, _)| at).find(begins).unwrap_or(self.held.len());
        let rest = self.held.split_off(kept);
        std::mem::replace(&mut self.held, rest)
    }

    /// Whether one of the texts has come.
    pub(crate) fn found(&self) -> bool {
        self.found
    }

    /// What was held back, at the end.
    pub(crate) fn finish(self) -> String {
        self.held
    }
}

/// A continuation as it grows: tokens to text, up to the first of the texts that end it.
#[derive(Debug)]
pub(crate) struct Continuation<'a> {
    tokens: TokenStream<'a>,
    stop: StopTexts<'a>,
    failed: Option<Failure>,
}

impl<'a> Continuation<'a> {
    /// Begins behind a prompt.
    pub(crate) fn after(tokenizer: &'a Tokenizer, prompt: &[u32], stop: &'a [String]) -> Self {
        Continuation {
            tokens: TokenStream::after(tokenizer, prompt),
            stop: StopTexts::new(stop),
            failed: None,
        }
    }

    /// Takes a token; the text that is certain with it, and whether the continuation goes on. A failure ends it and
    /// is told by [`finish`](Continuation::finish).
    pub(crate) fn push(&mut self, id: u32) -> (String, Next) {
        match self.tokens.push(id) {
            Ok(piece) => {
                let text = self.stop.push(&piece);
                (text, if self.stop.found() { Next::Stop } else { Next::Continue })
            }
            Err(error) => {
                self.failed = Some(error);
                (String::new(), Next::Stop)
            }
        }
    }

    /// What is left at the end.
    pub(crate) fn finish(mut self) -> Result<String> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        let mut text = self.stop.push(&self.tokens.finish()?);
        text.push_str(&self.stop.finish());
        Ok(text)
    }
}

/// The token ids of a prompt, checked against the model.
pub(crate) fn prompt_ids(tokenizer: &Tokenizer, model: &Model, prompt: &str) -> Result<Vec<u32>> {
    let ids = tokenizer.encode(prompt, AddSpecial::Yes)?;
    if ids.is_empty() {
        return Err(Failure::new("the prompt has no token").hint("give --prompt with at least one character"));
    }
    base::check_ids(&ids, "the prompt", tokenizer, model.config())?;
    Ok(ids)
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
    let mut generators = [Generator::new(seed, Stream::Sampling, 0)];
    let mut growing = Continuation::after(tokenizer, &ids, &[]);
    let mut text = String::new();
    let mut on_token = |_, id| {
        let (piece, next) = growing.push(id);
        text.push_str(&piece);
        next
    };
    generate(model, hook, &[ids], &options, &mut generators, &mut on_token)?;
    text.push_str(&growing.finish()?);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Texts = &'static [&'static str];

    /// The pieces that come out, and whether the text ended.
    fn pushed(stop: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let stop: Vec<String> = stop.iter().map(|&text| text.to_owned()).collect();
        let mut texts = StopTexts::new(&stop);
        let mut out: Vec<String> = pieces.iter().map(|piece| texts.push(piece)).collect();
        let found = texts.found();
        out.push(texts.finish());
        (out, found)
    }

    #[test]
    fn a_stop_text_is_found_across_pieces_and_never_printed() {
        let cases: [(Texts, Texts, Texts, bool); 8] = [
            (&[], &["a", "b"], &["a", "b", ""], false),
            (&["Q:"], &["4\n", "Q", ": 2"], &["4\n", "", "", ""], true),
            (&["Q:"], &["Q", "uick"], &["", "Quick", ""], false),
            (&["Q:"], &["x Q"], &["x ", "Q"], false),
            (&["aab"], &["a", "a", "a", "b", "c"], &["", "", "a", "", "", ""], true),
            // The first of them, whichever it is.
            (&["late", "ear"], &["an early late"], &["an ", ""], true),
            (&["\n\n"], &["one\n", "\ntwo"], &["one", "", ""], true),
            (&["übe"], &["ein ü", "b", "el"], &["ein ", "", "", ""], true),
        ];
        for (stop, pieces, expected, found) in cases {
            assert_eq!(
                pushed(stop, pieces),
                (expected.iter().map(|&text| text.into()).collect(), found),
                "{stop:?}"
            );
        }
    }
}
