//! One example as text with its loss mask.

use crate::{Example, Result, SkipSpecial, Tokenizer};

/// How the mask is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Color {
    /// ANSI colours: trained tokens green, context dim.
    Always,
    /// Trained spans between `⟦` and `⟧`.
    Never,
}

/// The decoded text of an example, special tokens included, with the trained tokens marked.
pub fn preview(tokenizer: &Tokenizer, example: &Example, color: Color) -> Result<String> {
    let mut out = String::new();
    let mut before = String::new();
    let mut start = 0;
    for run in example.trained.chunk_by(|a, b| a == b) {
        let end = start + run.len();
        let whole = tokenizer.decode(&example.ids[..end], SkipSpecial::No)?;
        // Decoding a run alone loses its leading space in some vocabularies: take what it adds to the text.
        let text = match whole.strip_prefix(&before) {
            Some(text) => text.to_owned(),
            None => tokenizer.decode(&example.ids[start..end], SkipSpecial::No)?,
        };
        let (open, close) = match (color, run[0]) {
            (Color::Always, true) => ("\x1b[32m", "\x1b[0m"),
            (Color::Always, false) => ("\x1b[2m", "\x1b[0m"),
            (Color::Never, true) => ("⟦", "⟧"),
            (Color::Never, false) => ("", ""),
        };
        out.push_str(open);
        out.push_str(&text);
        out.push_str(close);
        before = whole;
        start = end;
    }
    Ok(out)
}
