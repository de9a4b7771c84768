//! Drafts to examples: tokens, loss mask, end token, length.

use std::ops::Range;

use crate::format::{Draft, End};
use crate::tokenizer::{AddSpecial, Encoded, Tokenizer};
use crate::{Error, Example, ExcessLength, Format, LoadOptions, Location, Report, Result, TrainOn};

/// Drafts are tokenised together once they hold so much text: enough for every core, and some 20 MiB of memory.
pub(crate) const BATCH_BYTES: usize = 1 << 18;

/// Collects drafts and turns them into examples, in order.
pub(crate) struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    options: &'a LoadOptions,
    waiting: Vec<Draft>,
    waiting_bytes: usize,
    pub(crate) examples: Vec<Example>,
    pub(crate) report: Report,
}

impl<'a> Encoder<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer, options: &'a LoadOptions) -> Self {
        let report = Report { max_length: options.max_length, ..Report::default() };
        Self { tokenizer, options, waiting: Vec::new(), waiting_bytes: 0, examples: Vec::new(), report }
    }

    pub(crate) fn push(&mut self, draft: Draft) -> Result<()> {
        self.report.records += 1;
        self.waiting_bytes += draft.text.len();
        self.waiting.push(draft);
        if self.waiting_bytes >= BATCH_BYTES { self.flush() } else { Ok(()) }
    }

    pub(crate) fn flush(&mut self) -> Result<()> {
        self.waiting_bytes = 0;
        let drafts = std::mem::take(&mut self.waiting);
        // Drafts of one file share a format, and with it the treatment of special tokens.
        for drafts in drafts.chunk_by(|a, b| a.special == b.special) {
            let special = drafts.first().map_or(AddSpecial::No, |draft| draft.special);
            let texts = drafts.iter().map(|draft| draft.text.as_str()).collect();
            for (draft, encoded) in drafts.iter().zip(self.tokenizer.encode_batch(texts, special)?) {
                self.report.bos_doubled += usize::from(encoded.bos_doubled);
                let (ids, trained) = self.mask(draft, encoded)?;
                self.keep(draft.format, &draft.location, ids, trained)?;
            }
        }
        Ok(())
    }

    /// The tokens of a draft and which of them are trained.
    ///
    /// The whole text is tokenised at once, as the model sees it at inference. A token belongs to the answer if
    /// it *starts* in it. Of tokens that straddle the beginning of an answer, those that take only blanks from
    /// the prompt (`"A: "` and `"yes"` make the token `" yes"`) belong to the answer; those that take more of the
    /// prompt, or are all blank, are context. A token that straddles the end of an answer is trained.
    fn mask(&self, draft: &Draft, encoded: Encoded) -> Result<(Vec<u32>, Vec<bool>)> {
        let Encoded { mut ids, places, .. } = encoded;
        let everything = self.options.train_on == TrainOn::Everything && !draft.trained.is_empty();
        let in_answer = |at: usize| {
            let next = draft.trained.partition_point(|span| span.start <= at);
            next > 0 && at < draft.trained[next - 1].end
        };
        let answers = |place: &Range<usize>| {
            let words = draft.text.get(place.clone()).unwrap_or("").trim_start();
            in_answer(place.start) || (!words.is_empty() && in_answer(place.end - words.len()))
        };
        let mut trained: Vec<bool> =
            places.iter().map(|place| everything || place.as_ref().is_some_and(answers)).collect();
        let eos = match (draft.end, self.tokenizer.eos()) {
            (End::AsWritten, _) | (End::IfKnown, None) => return Ok((ids, trained)),
            (End::Required, None) => return Err(Error::NoEndToken { location: draft.location.clone() }),
            (_, Some(eos)) => eos,
        };
        if ids.last() != Some(&eos) {
            ids.push(eos);
            trained.push(true);
        } else if let Some(last) = trained.last_mut() {
            *last = true;
        }
        Ok((ids, trained))
    }

    /// Applies the length limit and keeps what has something to train.
    fn keep(&mut self, format: Format, location: &Location, ids: Vec<u32>, trained: Vec<bool>) -> Result<()> {
        let max_length = self.options.max_length;
        let report = &mut self.report;
        report.longest_found = report.longest_found.max(ids.len());
        if ids.len() <= max_length {
            self.finish(location, ids, trained);
            return Ok(());
        }
        match self.options.excess_length(format) {
            ExcessLength::Truncate => {
                report.truncated += 1;
                report.tokens_lost += ids.len() - max_length;
                report.trained_tokens_lost +=
                    trained[max_length..].iter().filter(|&&trained| trained).count();
                self.finish(location, ids[..max_length].to_vec(), trained[..max_length].to_vec());
            }
            ExcessLength::Split => {
                report.split += 1;
                for (ids, trained) in ids.chunks(max_length).zip(trained.chunks(max_length)) {
                    if ids.len() >= 2 {
                        self.report.windows += 1;
                        self.finish(location, ids.to_vec(), trained.to_vec());
                    }
                }
            }
            ExcessLength::Drop => report.dropped.add(location),
            ExcessLength::Raise => {
                return Err(Error::TooLong { location: location.clone(), found: ids.len(), max_length });
            }
        }
        Ok(())
    }

    fn finish(&mut self, location: &Location, ids: Vec<u32>, mut trained: Vec<bool>) {
        if let Some(first) = trained.first_mut() {
            *first = false;
        }
        let example = Example::text(ids, trained, location.clone());
        let trained_tokens = example.trained_tokens();
        if trained_tokens == 0 {
            self.report.without_trained_token.add(location);
            return;
        }
        self.report.examples += 1;
        self.report.tokens += example.ids.len();
        self.report.trained_tokens += trained_tokens;
        self.report.longest = self.report.longest.max(example.ids.len());
        self.examples.push(example);
    }
}
