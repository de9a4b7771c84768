//! A chat to text, and where in the text the assistant speaks.
//!
//! A template is a program: what it writes for a turn can depend on the turns around it. The spans are found
//! by rendering the chat up to each assistant turn, once with the generation prompt. Where that text is a true
//! prefix of the whole (the law every simple template obeys), the assistant's turn begins at its end: exactly
//! where the model begins at inference. Where the law is broken, the message's words are searched in the text,
//! in order. A turn ends with its end-of-turn token.

use std::ops::Range;

use serde_json::Value;

use crate::template::ChatTemplate;
use crate::{Error, Result};

/// A rendered chat.
#[derive(Debug)]
pub(crate) struct Rendered {
    pub(crate) text: String,
    /// Byte ranges of the assistant's words with their end-of-turn tokens, in order.
    pub(crate) trained: Vec<Range<usize>>,
    /// The chat ends with the assistant's words and the template writes no end-of-turn: the tokenizer's
    /// end-of-sequence token has to follow.
    pub(crate) needs_end: bool,
}

/// Renders a chat and finds the assistant's spans. `added` are the texts of the tokenizer's added tokens, the
/// longest first.
pub(crate) fn render(
    template: &ChatTemplate,
    added: &[String],
    messages: &[Value],
    tools: Option<&Value>,
) -> Result<Rendered> {
    let text = template.render(messages, tools, false)?;
    let mut finder = Finder { template, added, messages, tools, text: &text, cursor: 0, spoken: 0 };
    let mut trained = Vec::new();
    let mut cut = None;
    for (index, message) in messages.iter().enumerate() {
        if message["role"] != "assistant" {
            finder.pass(message);
            continue;
        }
        let (span, ended) = finder.turn(index)?;
        (finder.cursor, finder.spoken) = (span.end, span.end);
        if !ended && index + 1 == messages.len() {
            cut = Some(span.end);
        }
        trained.push(span);
    }
    let needs_end = cut.is_some();
    let mut text = text;
    text.truncate(cut.unwrap_or(text.len()));
    Ok(Rendered { text, trained, needs_end })
}

struct Finder<'a> {
    template: &'a ChatTemplate,
    added: &'a [String],
    messages: &'a [Value],
    tools: Option<&'a Value>,
    text: &'a str,
    /// Everything before it belongs to earlier messages, as far as their words were found.
    cursor: usize,
    /// The end of the assistant's last turn.
    spoken: usize,
}

impl Finder<'_> {
    /// Moves past the words of a message that is not the assistant's, where they are found.
    fn pass(&mut self, message: &Value) {
        // Trimmed words are found no later than whole ones, which may by chance come again further on.
        let rest = &self.text[self.cursor..];
        let found = spellings(words(message)).filter_map(|words| Some((rest.find(words)?, words.len())));
        if let Some((at, length)) = found.min() {
            self.cursor += at + length;
        }
    }

    /// The span of an assistant turn, and whether it includes an end-of-turn.
    fn turn(&self, index: usize) -> Result<(Range<usize>, bool)> {
        let message = &self.messages[index];
        let start = self.start(index)?;
        // A prefix that the template refuses (a chat of no messages, say) only means that the law is not kept.
        let closed = self.template.render(&self.messages[..=index], self.tools, false).ok();
        let closed =
            closed.filter(|closed| self.text.starts_with(closed.as_str())).map(|closed| closed.len());
        let closed = closed.filter(|&closed| closed >= start);
        let blank = words(message).trim().is_empty();
        let calls_tools = message.get("tool_calls").is_some_and(|calls| !calls.is_null());
        let words_end = if calls_tools {
            None
        } else if blank {
            Some(start)
        } else if let Some(closed) = closed {
            // The last occurrence: a template may write a thinking block before the words.
            self.locate_last(message, start..closed).map(|found| found.end)
        } else {
            self.locate(message, start..self.text.len()).map(|found| found.end)
        };
        match (words_end, closed) {
            (Some(words_end), _) => Ok(match self.end_of_turn(words_end, closed) {
                Some(end) => (start..end, true),
                None => (start..words_end, false),
            }),
            // Tool calls and rewritten words: all that the template writes for the turn, to its last added token.
            (None, Some(closed)) => {
                let turn = &self.text[start..closed];
                let last = self
                    .added
                    .iter()
                    .filter_map(|token| turn.rfind(token.as_str()).map(|at| at + token.len()));
                Ok(match last.max() {
                    Some(end) => (start..start + end, true),
                    None => (start..start + turn.trim_end().len(), false),
                })
            }
            (None, None) => Err(self.lost(index)),
        }
    }

    /// Where the model takes over in assistant turn `index`.
    fn start(&self, index: usize) -> Result<usize> {
        let before = self.template.render(&self.messages[..index], self.tools, false).unwrap_or_default();
        let opened = self.template.render(&self.messages[..index], self.tools, true).unwrap_or_default();
        if opened.len() > before.len() && opened.len() >= self.spoken && self.text.starts_with(&opened) {
            return Ok(opened.len());
        }
        // No generation prompt, or not this turn's header: the header ends where the words begin.
        let from = self.cursor.max(common_prefix(&opened, self.text));
        if words(&self.messages[index]).trim().is_empty() {
            return Ok(from);
        }
        let found = self.locate(&self.messages[index], from..self.text.len());
        let found = found.ok_or_else(|| self.lost(index))?;
        // One space before the words is the model's to write: most vocabularies join it to the first word.
        let space = usize::from(self.text[from..found.start].ends_with(' '));
        Ok(found.start - space)
    }

    /// The end of the end-of-turn marker that follows the words, if the template writes one.
    fn end_of_turn(&self, words_end: usize, closed: Option<usize>) -> Option<usize> {
        let rest = &self.text[words_end..closed.unwrap_or(self.text.len())];
        // Without the turn's own end, a token on the next line may be the next turn's header.
        let gap = match closed {
            Some(_) => rest.len() - rest.trim_start().len(),
            None => rest.len() - rest.trim_start_matches(' ').len(),
        };
        if let Some(token) = self.added.iter().find(|token| rest[gap..].starts_with(token.as_str())) {
            return Some(words_end + gap + token.len());
        }
        closed?;
        let first =
            self.added.iter().filter_map(|token| rest.find(token.as_str()).map(|at| (at, at + token.len())));
        if let Some((_, end)) = first.min() {
            return Some(words_end + end);
        }
        // A marker that this vocabulary spells in ordinary tokens.
        let marker = rest.trim_end();
        (!marker.is_empty()).then_some(words_end + marker.len())
    }

    fn locate(&self, message: &Value, within: Range<usize>) -> Option<Range<usize>> {
        let part = self.text.get(within.clone())?;
        spellings(words(message)).find_map(|spelling| {
            let at = part.find(spelling)? + within.start;
            Some(at..at + spelling.len())
        })
    }

    fn locate_last(&self, message: &Value, within: Range<usize>) -> Option<Range<usize>> {
        let part = self.text.get(within.clone())?;
        spellings(words(message)).find_map(|spelling| {
            let at = part.rfind(spelling)? + within.start;
            Some(at..at + spelling.len())
        })
    }

    fn lost(&self, index: usize) -> Error {
        let message = format!(
            "messages[{index}]: the assistant's words cannot be found in the text that the chat template renders, \
             so that the loss mask is unknown"
        );
        Error::Chat { location: None, message }
    }
}

fn words(message: &Value) -> &str {
    message["content"].as_str().unwrap_or("")
}

/// The ways a template may write a message: as it is, trimmed, without its thinking block.
fn spellings(words: &str) -> impl Iterator<Item = &str> {
    let answer = words.rsplit("</think>").next().unwrap_or(words).trim();
    [words, words.trim(), answer].into_iter().filter(|spelling| !spelling.trim().is_empty())
}

/// The length of the longest common prefix, on a character's boundary.
fn common_prefix(a: &str, b: &str) -> usize {
    let mut length = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    while !a.is_char_boundary(length) {
        length -= 1;
    }
    length
}
