//! The tokenizer of a model directory: vocabulary, special tokens, chat template.

use std::ops::Range;
use std::path::Path;

use serde_json::{Map, Value};

use crate::pieces::{self, Tokens};
use crate::template::{ChatTemplate, Date};
use crate::{Error, Result};

/// Whether the tokenizer's own special tokens (a leading BOS, say) are put around the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddSpecial {
    /// As the tokenizer's post-processor does.
    Yes,
    /// Only what the text itself holds.
    No,
}

/// Whether special tokens are left out of decoded text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SkipSpecial {
    /// Left out.
    Yes,
    /// Written.
    No,
}

/// A Hugging Face tokenizer with its special tokens and chat template.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos: Option<u32>,
    eos: Option<u32>,
    stop: Vec<u32>,
    /// Texts of the added tokens, the longest first; runs of blanks, which some vocabularies add, left out.
    added: Vec<String>,
    special_tokens: Map<String, Value>,
    chat_template: Option<ChatTemplate>,
    template_source: Option<(String, String)>,
    date: Date,
    origin: String,
    looked_in: String,
}

/// Token ids of a text with the place of each in it.
#[derive(Debug)]
pub(crate) struct Encoded {
    pub(crate) ids: Vec<u32>,
    /// The bytes of the text that each token stands for; `None` for tokens that the post-processor added.
    pub(crate) places: Vec<Option<Range<usize>>>,
    /// The text begins with the BOS token that the post-processor adds as well; one of the two was taken away.
    pub(crate) bos_doubled: bool,
}

/// The files beside `tokenizer.json`, parsed; each may be missing.
#[derive(Default)]
struct Settings {
    tokenizer_config: Value,
    special_tokens_map: Value,
    generation_config: Value,
    model_config: Value,
    template: Option<(String, String)>,
    looked_in: String,
}

impl Tokenizer {
    /// Loads the tokenizer of a model directory: `tokenizer.json`, and where they exist
    /// `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json`, `config.json` and the chat
    /// template (`chat_template.jinja`, `chat_template.json`, or the one in `tokenizer_config.json`).
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let file = dir.join("tokenizer.json");
        let origin = file.display().to_string();
        let bytes = std::fs::read(&file).map_err(|error| {
            let hint = if error.kind() != std::io::ErrorKind::NotFound {
                None
            } else if dir.join("tokenizer.model").exists() {
                Some(
                    "tokenizer.model alone is not read: `AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)` \
                     in Python writes tokenizer.json",
                )
            } else {
                Some("give the directory of a Hugging Face model, with its tokenizer.json")
            };
            Error::Tokenizer { origin: origin.clone(), message: format!("cannot be read: {error}"), hint }
        })?;
        let tokenizer_config = json_file(&dir.join("tokenizer_config.json"))?;
        let legacy = json_file(&dir.join("chat_template.json"))?;
        let jinja = dir.join("chat_template.jinja");
        let template = if jinja.exists() {
            Some((read_text(&jinja)?, jinja.display().to_string()))
        } else if let Some(source) = template_of(&legacy) {
            Some((source, dir.join("chat_template.json").display().to_string()))
        } else {
            template_of(&tokenizer_config)
                .map(|source| (source, dir.join("tokenizer_config.json").display().to_string()))
        };
        let settings = Settings {
            tokenizer_config,
            special_tokens_map: json_file(&dir.join("special_tokens_map.json"))?,
            generation_config: json_file(&dir.join("generation_config.json"))?,
            model_config: json_file(&dir.join("config.json"))?,
            template,
            looked_in: format!(
                "{}/{{chat_template.jinja, chat_template.json, tokenizer_config.json}}",
                dir.display()
            ),
        };
        Self::build(&bytes, origin, settings)
    }

    /// Builds a tokenizer from the contents of `tokenizer.json` and, where given, `tokenizer_config.json`.
    pub fn from_bytes(tokenizer_json: &[u8], config_json: Option<&[u8]>) -> Result<Self> {
        let origin = "tokenizer_config.json (embedded)";
        let tokenizer_config = match config_json {
            Some(bytes) => parse_json(bytes, origin)?,
            None => Value::Null,
        };
        let template = template_of(&tokenizer_config).map(|source| (source, origin.to_owned()));
        let settings =
            Settings { tokenizer_config, template, looked_in: origin.to_owned(), ..Settings::default() };
        Self::build(tokenizer_json, "tokenizer.json (embedded)".into(), settings)
    }

    fn build(bytes: &[u8], origin: String, settings: Settings) -> Result<Self> {
        let broken = |error: tokenizers::Error| Error::Tokenizer {
            origin: origin.clone(),
            message: format!("expected a Hugging Face tokenizer.json: {error}"),
            hint: Some("take the file from the model's release again"),
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(broken)?;
        // Files saved after training often keep the truncation and padding of their last use.
        inner.with_truncation(None).map_err(broken)?;
        inner.with_padding(None);
        exact_offsets(&mut inner).map_err(broken)?;

        let mut special_tokens = Map::new();
        let names =
            ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];
        for name in names {
            let text = [&settings.tokenizer_config, &settings.special_tokens_map]
                .into_iter()
                .find_map(|file| token_text(&file[name]));
            if let Some(text) = text {
                special_tokens.insert(name.into(), text.into());
            }
        }
        let mut added: Vec<String> =
            inner.get_added_tokens_decoder().into_values().map(|token| token.content).collect();
        added.retain(|text| !text.trim().is_empty());
        added.sort_by(|a, b| b.len().cmp(&a.len()).then(a.cmp(b)));

        let mut tokenizer = Self {
            inner,
            bos: None,
            eos: None,
            stop: Vec::new(),
            added,
            special_tokens,
            chat_template: None,
            template_source: settings.template,
            date: Date::default(),
            origin,
            looked_in: settings.looked_in,
        };
        tokenizer.bos = tokenizer.special("bos_token")?;
        tokenizer.eos = tokenizer.special("eos_token")?;
        tokenizer.find_stop_tokens([&settings.generation_config, &settings.model_config]);
        tokenizer.compile_template()?;
        Ok(tokenizer)
    }

    fn special(&self, name: &str) -> Result<Option<u32>> {
        let Some(text) = self.special_tokens.get(name).and_then(Value::as_str) else { return Ok(None) };
        match self.id_of(text) {
            Some(id) => Ok(Some(id)),
            None => Err(Error::Tokenizer {
                origin: self.origin.clone(),
                message: format!("expected the {name} {text:?} in the vocabulary, found no such token"),
                hint: Some("tokenizer.json and tokenizer_config.json should be of the same model"),
            }),
        }
    }

    /// `generation_config.json` goes before `config.json`; both name ids, one or a list.
    fn find_stop_tokens(&mut self, configs: [&Value; 2]) {
        let listed =
            configs.into_iter().map(|config| ids_of(&config["eos_token_id"])).find(|ids| !ids.is_empty());
        let size = self.vocab_size();
        let listed = listed.unwrap_or_default().into_iter().filter(|&id| (id as usize) < size);
        self.stop = self.eos.into_iter().chain(listed).collect();
        let mut seen = Vec::new();
        self.stop.retain(|id| {
            !seen.contains(id) && {
                seen.push(*id);
                true
            }
        });
        if self.eos.is_none() {
            self.eos = self.stop.first().copied();
            if let Some(text) = self.eos.and_then(|id| self.inner.id_to_token(id)) {
                self.special_tokens.insert("eos_token".into(), text.into());
            }
        }
    }

    fn compile_template(&mut self) -> Result<()> {
        self.chat_template = match &self.template_source {
            Some((source, origin)) => {
                Some(ChatTemplate::new(source, origin, self.special_tokens.clone(), self.date)?)
            }
            None => None,
        };
        Ok(())
    }

    /// Takes the chat template from a file instead of the model directory.
    pub fn load_chat_template(&mut self, file: &Path) -> Result<()> {
        self.set_chat_template(&read_text(file)?, &file.display().to_string())
    }

    /// Replaces the chat template; `origin` names it in errors.
    pub fn set_chat_template(&mut self, source: &str, origin: &str) -> Result<()> {
        self.template_source = Some((source.to_owned(), origin.to_owned()));
        self.compile_template()
    }

    /// The day that templates with `strftime_now` write; a fixed one if it is not set.
    pub fn set_date(&mut self, date: Date) -> Result<()> {
        self.date = date;
        self.compile_template()
    }

    /// The token ids of a text. A BOS or EOS that the text itself writes is not doubled.
    pub fn encode(&self, text: &str, special: AddSpecial) -> Result<Vec<u32>> {
        Ok(self.encode_batch(vec![text], special)?.pop().map(|encoded| encoded.ids).unwrap_or_default())
    }

    /// Texts to tokens with their places, on all cores; long texts in windows.
    pub(crate) fn encode_batch(&self, texts: Vec<&str>, special: AddSpecial) -> Result<Vec<Encoded>> {
        let mut encoded = Vec::with_capacity(texts.len());
        let mut encode = |texts: &[&str]| self.tokens(texts, special);
        for group in texts.chunk_by(|a, b| a.len().max(b.len()) <= pieces::WINDOW) {
            let long = group.iter().find(|text| text.len() > pieces::WINDOW);
            let in_windows = long.map(|text| pieces::encode(text, &mut encode)).transpose()?.flatten();
            match in_windows {
                Some(tokens) => encoded.push(self.once(tokens)),
                None => encoded.extend(encode(group)?.into_iter().map(|tokens| self.once(tokens))),
            }
        }
        Ok(encoded)
    }

    /// Texts to tokens, each as one piece.
    pub(crate) fn tokens(&self, texts: &[&str], special: AddSpecial) -> Result<Vec<Tokens>> {
        let encodings = self
            .inner
            .encode_batch(texts.to_vec(), special == AddSpecial::Yes)
            .map_err(|error| self.failed("the text cannot be encoded", error))?;
        let tokens = |encoding: tokenizers::Encoding| {
            let by_post_processor = encoding.get_special_tokens_mask();
            let places = encoding.get_offsets().iter().zip(by_post_processor);
            Tokens {
                ids: encoding.get_ids().to_vec(),
                places: places
                    .map(|(&(start, end), &special)| (special == 0).then_some(start..end))
                    .collect(),
                words: encoding.get_word_ids().to_vec(),
            }
        };
        Ok(encodings.into_iter().map(tokens).collect())
    }

    /// Tokens without a BOS or EOS that the text and the post-processor both wrote.
    fn once(&self, tokens: Tokens) -> Encoded {
        let Tokens { mut ids, mut places, .. } = tokens;
        let added_beside = |at: usize, text: usize, token: Option<u32>| {
            ids.len() >= 2
                && Some(ids[at]) == token
                && ids[at] == ids[text]
                && places[at].is_none()
                && places[text].is_some()
        };
        let last = ids.len().saturating_sub(1);
        let bos_doubled = added_beside(0, 1, self.bos);
        if added_beside(last, last.saturating_sub(1), self.eos) {
            ids.pop();
            places.pop();
        }
        if bos_doubled {
            ids.remove(0);
            places.remove(0);
        }
        Encoded { ids, places, bos_doubled }
    }

    /// The text of token ids.
    pub fn decode(&self, ids: &[u32], special: SkipSpecial) -> Result<String> {
        self.inner
            .decode(ids, special == SkipSpecial::Yes)
            .map_err(|error| self.failed("the tokens cannot be decoded", error))
    }

    pub(crate) fn failed(&self, what: &str, error: tokenizers::Error) -> Error {
        Error::Tokenizer { origin: self.origin.clone(), message: format!("{what}: {error}"), hint: None }
    }

    /// One more than the largest token id, added tokens included: the rows an embedding needs.
    pub fn vocab_size(&self) -> usize {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        let largest = added.keys().max().map_or(0, |&id| id as usize + 1);
        self.inner.get_vocab_size(false).max(largest)
    }

    /// The beginning-of-sequence token.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The end-of-sequence token, which ends a trained answer.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The tokens that end a generation: the end-of-sequence token and those of `generation_config.json`.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop
    }

    /// The id of a token by its text.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The chat template, where there is one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// The tokenizer itself, its file's truncation and padding switched off.
    pub(crate) fn inner(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }

    pub(crate) fn added(&self) -> &[String] {
        &self.added
    }

    pub(crate) fn origin(&self) -> &str {
        &self.origin
    }

    pub(crate) fn looked_in(&self) -> &str {
        &self.looked_in
    }
}

/// Byte-level post-processors cut blanks off a token's offsets (`trim_offsets`), so that a line break before an
/// answer would seem to start in it. The ids do not depend on it.
fn exact_offsets(tokenizer: &mut tokenizers::Tokenizer) -> tokenizers::Result<()> {
    fn switch_off(value: &mut Value) {
        match value {
            Value::Object(fields) => {
                if let Some(trim) = fields.get_mut("trim_offsets") {
                    *trim = Value::Bool(false);
                }
                fields.values_mut().for_each(switch_off);
            }
            Value::Array(items) => items.iter_mut().for_each(switch_off),
            _ => {}
        }
    }
    if let Some(post_processor) = tokenizer.get_post_processor() {
        let mut value = serde_json::to_value(post_processor)?;
        switch_off(&mut value);
        let exact: tokenizers::PostProcessorWrapper = serde_json::from_value(value)?;
        tokenizer.with_post_processor(Some(exact));
    }
    Ok(())
}

/// A special token is written as its text or as an object with `content`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

fn ids_of(value: &Value) -> Vec<u32> {
    let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(items) => items.iter().filter_map(one).collect(),
        other => one(other).into_iter().collect(),
    }
}

/// `chat_template` is a text, or a list of named ones of which `default` is taken.
fn template_of(config: &Value) -> Option<String> {
    match &config["chat_template"] {
        Value::String(source) => Some(source.clone()),
        Value::Array(named) => {
            let default = named.iter().find(|entry| entry["name"] == "default").or(named.first());
            default.and_then(|entry| entry["template"].as_str()).map(str::to_owned)
        }
        _ => None,
    }
}

fn read_text(file: &Path) -> Result<String> {
    std::fs::read_to_string(file).map_err(|source| Error::Read { path: file.into(), source })
}

/// A JSON file, or null where it does not exist.
fn json_file(file: &Path) -> Result<Value> {
    match std::fs::read(file) {
        Ok(bytes) => parse_json(&bytes, &file.display().to_string()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(source) => Err(Error::Read { path: file.into(), source }),
    }
}

fn parse_json(bytes: &[u8], origin: &str) -> Result<Value> {
    serde_json::from_slice(bytes).map_err(|error| Error::Tokenizer {
        origin: origin.to_owned(),
        message: format!("broken JSON: {error}"),
        hint: None,
    })
}
