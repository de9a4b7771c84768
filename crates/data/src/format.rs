//! Records to text: the shapes of training data, their prompts, and which part of the text is the answer.

use std::ops::Range;

use serde_json::{Map, Value};

use crate::tokenizer::{AddSpecial, Tokenizer};
use crate::{Error, Format, Location, Result, chat};

/// The shapes that are read, as shown in hints.
pub(crate) const ACCEPTED: &str = r#"  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}
  {"instruction": "...", "input": "... (optional)", "output": "..."}
  {"instruction": "...", "context": "... (optional)", "response": "..."}
  {"question": "...", "answer": "..."} or {"query": "...", "response": "..."}
  {"prompt": "...", "completion": "..."} or {"prompt": "...", "response": "..."}
  {"text": "..."}"#;

/// Text before it is tokenised.
#[derive(Debug)]
pub(crate) struct Draft {
    pub(crate) location: Location,
    pub(crate) format: Format,
    pub(crate) text: String,
    /// Byte ranges of the answers, in order.
    pub(crate) trained: Vec<Range<usize>>,
    pub(crate) special: AddSpecial,
    pub(crate) end: End,
}

/// What closes the sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The end-of-sequence token, trained; an error if the tokenizer has none.
    Required,
    /// The end-of-sequence token if the tokenizer has one.
    IfKnown,
    /// Whatever the text ends with.
    AsWritten,
}

/// The fields of an instruction or a prompt with its answer.
#[derive(Debug, Clone, Copy)]
struct Pair {
    format: Format,
    prompt: &'static str,
    input: Option<&'static str>,
    answer: &'static str,
}

/// Earlier rows go before later ones. Questions and queries are put into the Alpaca prompt, since nothing but
/// a prompt parts them from their answers.
const PAIRS: [Pair; 7] = [
    Pair { format: Format::Alpaca, prompt: "instruction", input: Some("input"), answer: "output" },
    Pair { format: Format::Alpaca, prompt: "instruction", input: Some("context"), answer: "response" },
    Pair { format: Format::Alpaca, prompt: "instruction", input: Some("input"), answer: "response" },
    Pair { format: Format::PromptCompletion, prompt: "prompt", input: None, answer: "completion" },
    Pair { format: Format::PromptCompletion, prompt: "prompt", input: None, answer: "response" },
    Pair { format: Format::Alpaca, prompt: "question", input: None, answer: "answer" },
    Pair { format: Format::Alpaca, prompt: "query", input: None, answer: "response" },
];

/// How the records of one file are read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) format: Format,
    fields: Fields,
}

#[derive(Debug, Clone, Copy)]
enum Fields {
    Pair(Pair),
    /// OpenAI's `messages` of `role` and `content`.
    Messages(&'static str),
    Text,
}

impl Shape {
    /// A whole text file.
    pub(crate) const DOCUMENT: Shape = Shape { format: Format::Text, fields: Fields::Text };

    /// The shape of a record; with `wanted`, its fields under that format.
    pub(crate) fn detect(location: &Location, record: &Value, wanted: Option<Format>) -> Result<Self> {
        let Value::Object(record) = record else {
            return Err(Error::Shape {
                location: location.clone(),
                found: kind(record).into(),
                accepted: ACCEPTED,
            });
        };
        let is = |format| wanted.is_none_or(|wanted| wanted == format);
        if is(Format::Messages)
            && let Some(key) = ["messages", "conversations", "conversation"]
                .into_iter()
                .find(|key| record.contains_key(*key))
        {
            return Ok(Self { format: Format::Messages, fields: Fields::Messages(key) });
        }
        if is(Format::Text)
            && record.contains_key("text")
            && (wanted.is_some() || find_pair(record, None).is_none())
        {
            return Ok(Self { format: Format::Text, fields: Fields::Text });
        }
        if let Some(pair) = find_pair(record, wanted) {
            return Ok(Self { format: wanted.unwrap_or(pair.format), fields: Fields::Pair(pair) });
        }
        let mut found = keys_of(record);
        if let Some(wanted) = wanted {
            found.push_str(&format!(" (format {})", wanted.name()));
        }
        Err(Error::Shape { location: location.clone(), found, accepted: ACCEPTED })
    }

    /// The fields that are read, for the report.
    pub(crate) fn fields(&self) -> Vec<&'static str> {
        match self.fields {
            Fields::Pair(pair) => {
                [Some(pair.prompt), pair.input, Some(pair.answer)].into_iter().flatten().collect()
            }
            Fields::Messages(key) => vec![key, "tools"],
            Fields::Text => vec!["text"],
        }
    }

    fn accepted(&self) -> String {
        match self.fields {
            Fields::Pair(Pair { prompt, input: Some(input), answer, .. }) => {
                format!(r#"{{"{prompt}": "...", "{input}": "... (optional)", "{answer}": "..."}}"#)
            }
            Fields::Pair(Pair { prompt, answer, .. }) => {
                format!(r#"{{"{prompt}": "...", "{answer}": "..."}}"#)
            }
            Fields::Messages(key) => format!(
                r#"{{"{key}": [{{"role": "system|user|assistant|tool", "content": "..."}}]}}, content also as [{{"type": "text", "text": "..."}}], or {{"{key}": [{{"from": "system|human|gpt", "value": "..."}}]}}"#
            ),
            Fields::Text => r#"{"text": "..."}"#.into(),
        }
    }

    /// The text of a record.
    pub(crate) fn draft(&self, location: Location, record: Value, tokenizer: &Tokenizer) -> Result<Draft> {
        let Value::Object(record) = record else {
            return Err(Error::Shape { location, found: kind(&record).into(), accepted: ACCEPTED });
        };
        let reader = Reader { location: &location, shape: self, record: &record };
        match self.fields {
            Fields::Pair(pair) => {
                let prompt = reader.text(pair.prompt)?;
                let answer = reader.text(pair.answer)?;
                let mut text = match (self.format, pair.input) {
                    (Format::Alpaca, Some(input)) => alpaca_prompt(prompt, reader.optional_text(input)?),
                    (Format::Alpaca, None) => alpaca_prompt(prompt, ""),
                    _ => prompt.to_owned(),
                };
                let start = text.len();
                text.push_str(answer);
                let trained = Vec::from_iter([Range { start, end: text.len() }]);
                let special = AddSpecial::Yes;
                Ok(Draft { format: self.format, text, trained, special, end: End::Required, location })
            }
            Fields::Messages(key) => {
                let messages = reader.messages(key)?;
                let tools = record.get("tools").filter(|tools| tools.is_array());
                chat_draft(location, tokenizer, &messages, tools)
            }
            Fields::Text => Ok(document(location.clone(), reader.text("text")?.to_owned())),
        }
    }
}

fn find_pair(record: &Map<String, Value>, wanted: Option<Format>) -> Option<Pair> {
    let held = |pair: &&Pair| record.contains_key(pair.prompt) && record.contains_key(pair.answer);
    match wanted {
        None => PAIRS.iter().find(held).copied(),
        Some(Format::Alpaca) => PAIRS.iter().find(held).copied(),
        // Joined as they are, an input between the two has no place.
        Some(Format::PromptCompletion) => {
            PAIRS.iter().filter(|pair| pair.input.is_none()).find(held).copied()
        }
        Some(_) => None,
    }
}

/// The Alpaca prompt (Taori et al., 2023, `train.py`, `PROMPT_DICT`), ending where the answer begins. A line
/// break follows `### Response:`, as in Alpaca-LoRA, LLM-Adapters and Axolotl. A blank `input` is left out.
pub fn alpaca_prompt(instruction: &str, input: &str) -> String {
    if input.trim().is_empty() {
        format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the \
             request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
        )
    } else {
        format!(
            "Below is an instruction that describes a task, paired with an input that provides further context. \
             Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n\
             ### Input:\n{input}\n\n### Response:\n"
        )
    }
}

/// A text that is trained whole, between the tokenizer's beginning and end.
pub(crate) fn document(location: Location, text: String) -> Draft {
    // A blank text would be trained as nothing but an end token.
    let (trained, end) = match text.trim().is_empty() {
        true => (vec![], End::AsWritten),
        false => (Vec::from_iter([Range { start: 0, end: text.len() }]), End::IfKnown),
    };
    Draft { location, format: Format::Text, text, trained, special: AddSpecial::Yes, end }
}

/// transformers tokenises a rendered chat without adding special tokens: the template writes them all, and a
/// server does the same. A BOS is therefore there once or never, as the template says.
fn chat_draft(
    location: Location,
    tokenizer: &Tokenizer,
    messages: &[Value],
    tools: Option<&Value>,
) -> Result<Draft> {
    let Some(template) = tokenizer.chat_template() else {
        return Err(Error::NoTemplate { location, looked_in: tokenizer.looked_in().to_owned() });
    };
    let rendered =
        chat::render(template, tokenizer.added(), messages, tools).map_err(|error| match error {
            Error::Chat { location: None, message } => {
                Error::Chat { location: Some(location.clone()), message }
            }
            other => other,
        })?;
    let end = if rendered.needs_end { End::Required } else { End::AsWritten };
    let (text, trained) = (rendered.text, rendered.trained);
    Ok(Draft { format: Format::Messages, text, trained, special: AddSpecial::No, end, location })
}

/// The keys of a record, in words.
pub(crate) fn keys_of(record: &Map<String, Value>) -> String {
    let keys: Vec<_> = record.keys().map(|key| format!("{key:?}")).collect();
    if keys.is_empty() { "an empty object".into() } else { format!("the keys {}", keys.join(", ")) }
}

/// What a JSON value is, in words.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// Typed access to a record's fields.
struct Reader<'a> {
    location: &'a Location,
    shape: &'a Shape,
    record: &'a Map<String, Value>,
}

impl<'a> Reader<'a> {
    fn wrong(&self, field: String, expected: &'static str, found: Option<&Value>) -> Error {
        let found = found.map_or("no such field", kind).to_owned();
        self.wrong_value(field, expected, found)
    }

    fn wrong_value(&self, field: String, expected: &'static str, found: String) -> Error {
        let accepted = self.shape.accepted().into();
        Error::Field { location: self.location.clone(), field, expected, found, accepted }
    }

    fn text(&self, key: &str) -> Result<&'a str> {
        match self.record.get(key) {
            Some(Value::String(text)) => Ok(text),
            other => Err(self.wrong(key.to_owned(), "a string", other)),
        }
    }

    fn optional_text(&self, key: &str) -> Result<&'a str> {
        match self.record.get(key) {
            None | Some(Value::Null) => Ok(""),
            Some(_) => self.text(key),
        }
    }

    /// The messages with `role` and a `content` of plain text; other keys are handed to the template.
    fn messages(&self, key: &str) -> Result<Vec<Value>> {
        let messages = match self.record.get(key) {
            Some(Value::Array(messages)) if !messages.is_empty() => messages,
            Some(Value::Array(_)) => {
                return Err(self.wrong_value(key.into(), "at least one message", "an empty array".into()));
            }
            other => return Err(self.wrong(key.into(), "an array of messages", other)),
        };
        messages
            .iter()
            .enumerate()
            .map(|(index, message)| self.message(&format!("{key}[{index}]"), message))
            .collect()
    }

    fn message(&self, at: &str, message: &Value) -> Result<Value> {
        let Value::Object(fields) = message else {
            return Err(self.wrong(at.to_owned(), "an object", Some(message)));
        };
        if fields.contains_key("from") && !fields.contains_key("role") {
            return self.sharegpt_message(at, fields);
        }
        let role = match fields.get("role") {
            Some(Value::String(role)) => role.as_str(),
            other => return Err(self.wrong(format!("{at}.role"), "a string", other)),
        };
        let mut fields = fields.clone();
        let calls_tools = role == "assistant" && fields.get("tool_calls").is_some_and(Value::is_array);
        match fields.get("content") {
            Some(Value::String(_)) => {}
            Some(Value::Array(parts)) => {
                let text = self.parts(&format!("{at}.content"), parts)?;
                fields.insert("content".into(), text.into());
            }
            None | Some(Value::Null) if calls_tools => {
                fields.insert("content".into(), Value::Null);
            }
            other => return Err(self.wrong(format!("{at}.content"), "a string", other)),
        }
        Ok(Value::Object(fields))
    }

    /// OpenAI's list content: the texts, one after the other. Some tools write `value` for `text`.
    fn parts(&self, at: &str, parts: &[Value]) -> Result<String> {
        let mut text = String::new();
        for (index, part) in parts.iter().enumerate() {
            let at = format!("{at}[{index}]");
            if part["type"] != "text" {
                return Err(self.wrong_value(format!("{at}.type"), "\"text\"", part["type"].to_string()));
            }
            match part.get("text").or_else(|| part.get("value")) {
                Some(Value::String(words)) => text.push_str(words),
                other => return Err(self.wrong(format!("{at}.text"), "a string", other)),
            }
        }
        Ok(text)
    }

    /// ShareGPT's `from` and `value`.
    fn sharegpt_message(&self, at: &str, fields: &Map<String, Value>) -> Result<Value> {
        let role = match fields["from"].as_str() {
            Some("human" | "user") => "user",
            Some("gpt" | "assistant") => "assistant",
            Some("system") => "system",
            Some(other) => {
                let expected = "\"human\", \"gpt\" or \"system\"";
                return Err(self.wrong_value(format!("{at}.from"), expected, format!("{other:?}")));
            }
            None => return Err(self.wrong(format!("{at}.from"), "a string", fields.get("from"))),
        };
        match fields.get("value") {
            Some(Value::String(words)) => Ok(serde_json::json!({"role": role, "content": words})),
            other => Err(self.wrong(format!("{at}.value"), "a string", other)),
        }
    }
}
