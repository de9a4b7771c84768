//! One text or a pair of texts to tokens, with the special tokens of the tokenizer's post-processor.
//!
//! BERT makes `[CLS] a [SEP]` and `[CLS] a [SEP] b [SEP]`, RoBERTa `<s> a </s>` and `<s> a </s></s> b </s>`.

use tokenizers::{
    EncodeInput, Encoding, PostProcessor, TruncationDirection, TruncationParams, TruncationStrategy,
};

use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// A text, and the second one where it is a pair.
pub(crate) type Texts<'a> = (&'a str, Option<&'a str>);

/// Tokens of one text or of a pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairTokens {
    /// Token ids with special tokens, `[T]`.
    pub ids: Vec<u32>,
    /// The index of the first token of type 1, from which on all are; `None` where all are of type 0.
    pub second: Option<usize>,
    /// How many tokens there were before truncation, special tokens included.
    pub whole: usize,
}

impl Tokenizer {
    /// The tokens of one text or a pair, cut to `max_length` as `truncation=True` does in transformers: special
    /// tokens stay, of a pair the longer text is cut until both are equally long (`longest_first`), each from its
    /// end.
    ///
    /// # Errors
    ///
    /// A `max_length` that leaves no token of the text, and token types other than a run of 0 and a run of 1.
    pub fn encode_pair(&self, first: &str, second: Option<&str>, max_length: usize) -> Result<PairTokens> {
        let mut encoder = PairEncoder::new(self, max_length);
        Ok(encoder.encode(&[(first, second)])?.remove(0))
    }
}

/// Encodes texts of one data set.
pub(crate) struct PairEncoder<'a> {
    tokenizer: &'a Tokenizer,
    max_length: usize,
    /// The same tokenizer with truncation: a copy, made when the first over-long text is met.
    truncating: Option<tokenizers::Tokenizer>,
}

impl<'a> PairEncoder<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer, max_length: usize) -> Self {
        Self { tokenizer, max_length, truncating: None }
    }

    /// The tokens of each of the texts, on all cores.
    pub(crate) fn encode(&mut self, texts: &[Texts<'_>]) -> Result<Vec<PairTokens>> {
        self.check_length(texts)?;
        let inputs: Vec<EncodeInput<'_>> = texts.iter().map(input).collect();
        let encodings =
            self.tokenizer.inner().encode_batch_fast(inputs, true).map_err(|error| self.failed(error))?;
        texts.iter().zip(encodings).map(|(texts, encoding)| self.tokens(texts, encoding)).collect()
    }

    fn tokens(&mut self, texts: &Texts<'_>, mut encoding: Encoding) -> Result<PairTokens> {
        let whole = encoding.get_ids().len();
        if whole > self.max_length {
            encoding = self.truncated(texts)?;
        }
        let types = encoding.get_type_ids();
        let first = types.iter().take_while(|&&kind| kind == 0).count();
        if first < types.len() && (first == 0 || types[first..].iter().any(|&kind| kind != 1)) {
            return Err(Error::Tokenizer {
                origin: self.tokenizer.origin().to_owned(),
                message: format!("expected token types that are a run of 0 and a run of 1, found {types:?}"),
                hint: Some("use the tokenizer of a BERT or RoBERTa model"),
            });
        }
        let second = (first < types.len()).then_some(first);
        Ok(PairTokens { ids: encoding.get_ids().to_vec(), second, whole })
    }

    fn truncated(&mut self, texts: &Texts<'_>) -> Result<Encoding> {
        let truncating = match self.truncating.take() {
            Some(truncating) => truncating,
            None => {
                let mut copy = self.tokenizer.inner().clone();
                let truncation = TruncationParams {
                    direction: TruncationDirection::Right,
                    max_length: self.max_length,
                    strategy: TruncationStrategy::LongestFirst,
                    stride: 0,
                };
                copy.with_truncation(Some(truncation)).map_err(|error| self.failed(error))?;
                copy
            }
        };
        let encoding = truncating.encode_fast(input(texts), true).map_err(|error| self.failed(error));
        self.truncating = Some(truncating);
        encoding
    }

    /// The truncation of `tokenizers` must be left a token of each text.
    fn check_length(&self, texts: &[Texts<'_>]) -> Result<()> {
        let processor = self.tokenizer.inner().get_post_processor();
        for second in [false, true] {
            let special = processor.map_or(0, |processor| processor.added_tokens(second));
            let (least, what) = if second { (special + 2, "two texts") } else { (special + 1, "a text") };
            if self.max_length < least && texts.iter().any(|texts| texts.1.is_some() == second) {
                return Err(Error::Option {
                    option: "max_length",
                    expected: format!("at least {least} tokens for {what} and {special} special tokens"),
                    found: self.max_length.to_string(),
                });
            }
        }
        Ok(())
    }

    fn failed(&self, error: tokenizers::Error) -> Error {
        self.tokenizer.failed("the text cannot be encoded", error)
    }
}

fn input<'a>(&(first, second): &Texts<'a>) -> EncodeInput<'a> {
    match second {
        Some(second) => EncodeInput::Dual(first.into(), second.into()),
        None => EncodeInput::Single(first.into()),
    }
}
