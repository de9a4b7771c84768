//! Long texts, tokenised in overlapping windows that are joined where they provably agree.
//!
//! A tokenizer's account of a text takes some seventy bytes for each byte of it, so a book as one piece would take
//! more memory than training on it. Where two windows overlap, the join is a place that both of them begin a word
//! at (a piece of the pre-tokenizer), with the same tokens on both sides of it:
//!
//! * pre-tokenizers match from left to right and look ahead, not back, so what follows a word's beginning does
//!   not depend on what stands before it;
//! * BPE merges within a word. Two boundaries that windows share enclose merges that are the same in both, so
//!   the second of them is a boundary of the whole text as well, also where a tokenizer makes one word of all.
//!
//! Where windows do not agree (a run of one character, say) there is no join, and the text is tokenised whole.

use std::ops::Range;

use crate::Result;

/// Bytes of a window, without its overlap; texts up to here are tokenised whole.
pub(crate) const WINDOW: usize = 32 << 10;
/// Bytes that a window reaches into the next.
const OVERLAP: usize = 4 << 10;
/// Windows that are tokenised at a time, on all cores.
const AT_A_TIME: usize = 8;
/// Tokens in front of a join that have to agree.
const AGREEING: usize = 8;

/// Tokens of a text or a window of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Tokens {
    pub(crate) ids: Vec<u32>,
    /// The bytes of the text that each token stands for; `None` for tokens that the post-processor added.
    pub(crate) places: Vec<Option<Range<usize>>>,
    /// The number of the word that each is a part of, counted by the pre-tokenizer.
    pub(crate) words: Vec<Option<u32>>,
}

/// The tokens of a text without their words, window by window; `None` where two windows do not agree. `encode`
/// tokenises texts, places counted from the beginning of each.
pub(crate) fn encode(
    text: &str,
    encode: &mut dyn FnMut(&[&str]) -> Result<Vec<Tokens>>,
) -> Result<Option<Tokens>> {
    let windows: Vec<Range<usize>> = (0..text.len())
        .step_by(WINDOW)
        // The window before reaches as far.
        .filter(|&start| start == 0 || start + OVERLAP < text.len())
        .map(|start| at_char(text, start)..at_char(text, start + WINDOW + OVERLAP))
        .collect();
    let mut whole = Tokens::default();
    // The last window's tokens; those in front of `next` are in `whole` already.
    let mut open: Option<(Tokens, usize)> = None;
    for group in windows.chunks(AT_A_TIME) {
        let texts: Vec<&str> = group.iter().map(|window| &text[window.clone()]).collect();
        for (mut right, window) in encode(&texts)?.into_iter().zip(group) {
            right.shift(window.start);
            let mut from = 0;
            if let Some((left, next)) = open.take() {
                let Some((end, start)) = join(&left, &right, window.start) else { return Ok(None) };
                whole.append(&left, next..end);
                from = start;
            }
            open = Some((right, from));
        }
    }
    if let Some((last, next)) = open {
        let end = last.ids.len();
        whole.append(&last, next..end);
    }
    Ok(Some(whole))
}

/// The last beginning of a character up to `at`.
fn at_char(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0)
}

/// Where `left` ends and `right`, which begins at the byte `start`, goes on: the first place in the second quarter
/// of the overlap from which both agree through its third quarter.
fn join(left: &Tokens, right: &Tokens, start: usize) -> Option<(usize, usize)> {
    let within = start + OVERLAP / 4..start + OVERLAP / 2;
    let through = start + 3 * OVERLAP / 4;
    let agree = |l: usize, r: usize| left.ids[l] == right.ids[r] && left.places[l] == right.places[r];
    let candidates = right.places.iter().enumerate().filter_map(|(r, place)| {
        let at = place.as_ref()?.start;
        within.contains(&at).then_some((at, r))
    });
    for (at, r) in candidates {
        let Some(l) = left.starting_at(at) else { continue };
        if l < AGREEING || r < AGREEING || left.begins(l) != right.begins(r) || !left.begins(l) {
            continue;
        }
        if !(1..=AGREEING).all(|back| agree(l - back, r - back)) {
            continue;
        }
        let covers = |tokens: &Tokens, index: usize| {
            tokens.places.get(index).is_some_and(|place| place.as_ref().is_some_and(|p| p.end <= through))
        };
        let last = (0..).find(|&on| !covers(left, l + on) || !covers(right, r + on))?;
        let ended = !covers(left, l + last) && !covers(right, r + last);
        if ended && last > 0 && (0..last).all(|on| agree(l + on, r + on)) {
            return Some((l, r));
        }
    }
    None
}

impl Tokens {
    fn shift(&mut self, bytes: usize) {
        for place in self.places.iter_mut().flatten() {
            *place = place.start + bytes..place.end + bytes;
        }
    }

    fn append(&mut self, other: &Tokens, range: Range<usize>) {
        self.ids.extend_from_slice(&other.ids[range.clone()]);
        self.places.extend_from_slice(&other.places[range]);
    }

    /// The first token that starts at a byte.
    fn starting_at(&self, byte: usize) -> Option<usize> {
        // Places grow; tokens without one stand at the two ends.
        let head = self.places.iter().take_while(|place| place.is_none()).count();
        let placed = &self.places[head..];
        let before = placed.partition_point(|place| place.as_ref().is_some_and(|place| place.start < byte));
        let found = placed.get(before)?.as_ref()?;
        (found.start == byte).then_some(head + before)
    }

    /// Whether a word begins with a token, or, where the words around it are one, a token that shares no character
    /// with the one before.
    fn begins(&self, index: usize) -> bool {
        let (Some(before), Some(place)) = (&self.places[index - 1], &self.places[index]) else {
            return false;
        };
        let one_word = self.words[index.saturating_sub(AGREEING)] == self.words[index];
        before.end <= place.start && (self.words[index - 1] != self.words[index] || one_word)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::tokenizer::{AddSpecial, Tokenizer};

    /// The fixture's vocabulary behind some pre-tokenizer and normalizer.
    fn tokenizer(changes: &[(&str, Value)]) -> Tokenizer {
        let mut file: Value =
            serde_json::from_slice(include_bytes!("../tests/fixtures/tokenizer.json")).unwrap();
        for (key, value) in changes {
            file[*key] = value.clone();
        }
        Tokenizer::from_bytes(file.to_string().as_bytes(), None).unwrap()
    }

    fn tokenizers() -> Vec<(&'static str, Tokenizer)> {
        let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false });
        // As in cl100k: line breaks join punctuation, numbers are cut into threes, blanks look ahead.
        let pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        let split = json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
        let split = json!({ "type": "Sequence", "pretokenizers": [split, byte_level] });
        let prefixed = json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true });
        let prepend = json!({ "type": "Prepend", "prepend": "_" });
        vec![
            ("GPT-2's words", tokenizer(&[])),
            ("a blank in front", tokenizer(&[("pre_tokenizer", prefixed)])),
            ("cl100k's words", tokenizer(&[("pre_tokenizer", split)])),
            ("no words", tokenizer(&[("pre_tokenizer", byte_level), ("normalizer", prepend)])),
        ]
    }

    /// Prose, then lines with numbers, indentation, signs and letters of two to four bytes.
    fn mixed() -> String {
        let prose = include_str!("../../../assets/shakespeare.txt");
        let mut text = prose[..2 * WINDOW].to_owned();
        for line in 0..3000 {
            let indent = " ".repeat(line % 13);
            text += &format!(
                "{indent}x[{}] = {}; // größer … 好 🙂{}\n",
                line * 977,
                line % 7,
                "\n".repeat(line % 3)
            );
        }
        text + &prose[2 * WINDOW..3 * WINDOW]
    }

    #[test]
    fn windows_give_the_tokens_of_the_whole() {
        let text = mixed();
        for (name, tokenizer) in tokenizers() {
            let ends = [text.len(), WINDOW + 1, WINDOW + OVERLAP, WINDOW + OVERLAP + 1, 2 * WINDOW + 100];
            for end in ends.map(|end| at_char(&text, end)) {
                let whole = tokenizer.tokens(&[&text[..end]], AddSpecial::Yes).unwrap().remove(0);
                let mut longest = 0;
                let mut counted = |texts: &[&str]| {
                    longest = texts.iter().map(|text| text.len()).max().unwrap_or(0).max(longest);
                    tokenizer.tokens(texts, AddSpecial::Yes)
                };
                let pieces = encode(&text[..end], &mut counted).unwrap();
                let pieces = pieces.unwrap_or_else(|| panic!("{name}: no join in {end} bytes"));
                assert!(longest < WINDOW + OVERLAP + 4, "{name}: {longest}"); // a character more
                assert!(pieces.ids == whole.ids && pieces.places == whole.places, "{name}, {end} bytes");
            }
        }
    }

    #[test]
    fn without_a_join_the_text_is_tokenised_whole() {
        // Runs that are longer than the overlap, cut by each window at another phase.
        let run = "7".repeat(2 * WINDOW + 5);
        for (name, tokenizer) in tokenizers() {
            let mut encode_all = |texts: &[&str]| tokenizer.tokens(texts, AddSpecial::Yes);
            let whole = encode_all(&[&run]).unwrap().remove(0);
            if let Some(pieces) = encode(&run, &mut encode_all).unwrap() {
                assert_eq!(pieces.ids, whole.ids, "{name}");
            }
            assert_eq!(tokenizer.encode(&run, AddSpecial::Yes).unwrap(), whole.ids, "{name}");
        }
        // Windows that contradict each other.
        let mut calls = 0;
        let mut contrary = |texts: &[&str]| {
            let tokens = |text: &&str| {
                calls += 1;
                let places = (0..text.len()).map(|at| Some(at..at + 1)).collect();
                let words = (0..text.len()).map(|at| Some(at as u32)).collect();
                Tokens { ids: vec![calls; text.len()], places, words }
            };
            Ok(texts.iter().map(tokens).collect())
        };
        assert_eq!(encode(&run, &mut contrary).unwrap(), None);
    }
}
