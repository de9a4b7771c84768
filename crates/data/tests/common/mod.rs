//! What the tests share.
#![allow(dead_code)]

use std::path::PathBuf;

use lora_sb_data::{Dataset, Error, Example, LoadOptions, Result, SkipSpecial, Tokenizer, load};
use serde_json::{Value, json};

pub(crate) const TOKENIZER: &[u8] = include_bytes!("../fixtures/tokenizer.json");
pub(crate) const CONFIG: &[u8] = br#"{"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}}"#;

/// The fixture: no BOS is added.
pub(crate) fn tokenizer() -> Tokenizer {
    Tokenizer::from_bytes(TOKENIZER, Some(CONFIG)).unwrap()
}

/// The fixture with a post-processor that writes a leading BOS, and a trailing EOS where `eos` is set.
pub(crate) fn tokenizer_with_bos(eos: bool) -> Tokenizer {
    let mut file: Value = serde_json::from_slice(TOKENIZER).unwrap();
    let special = |token: &str| json!({"SpecialToken": {"id": token, "type_id": 0}});
    let mut single = vec![special("<|begin|>"), json!({"Sequence": {"id": "A", "type_id": 0}})];
    if eos {
        single.push(special("<|end|>"));
    }
    let template = json!({
        "type": "TemplateProcessing",
        "single": single,
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|begin|>": {"id": "<|begin|>", "ids": [1], "tokens": ["<|begin|>"]},
            "<|end|>": {"id": "<|end|>", "ids": [2], "tokens": ["<|end|>"]},
        },
    });
    let byte_level = file["post_processor"].take();
    file["post_processor"] = json!({"type": "Sequence", "processors": [byte_level, template]});
    Tokenizer::from_bytes(file.to_string().as_bytes(), Some(CONFIG)).unwrap()
}

/// A BERT tokenizer whose file asks for truncation at 12 tokens and padding to 20.
pub(crate) fn wordpiece() -> Tokenizer {
    Tokenizer::from_bytes(include_bytes!("../fixtures/wordpiece.json"), None).unwrap()
}

/// The wordpiece fixture with changes.
pub(crate) fn wordpiece_with(changes: &[(&str, Value)]) -> Tokenizer {
    let mut file: Value = serde_json::from_slice(include_bytes!("../fixtures/wordpiece.json")).unwrap();
    for (key, value) in changes {
        file[*key] = value.clone();
    }
    Tokenizer::from_bytes(file.to_string().as_bytes(), None).unwrap()
}

/// The byte-level fixture as a RoBERTa tokenizer.
pub(crate) fn roberta() -> Tokenizer {
    let mut file: Value = serde_json::from_slice(TOKENIZER).unwrap();
    file["post_processor"] = json!({
        "type": "RobertaProcessing",
        "sep": ["<|end|>", 2],
        "cls": ["<|begin|>", 1],
        "trim_offsets": true,
        "add_prefix_space": false,
    });
    Tokenizer::from_bytes(file.to_string().as_bytes(), Some(CONFIG)).unwrap()
}

pub(crate) fn gzip(text: impl AsRef<[u8]>) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    std::io::Write::write_all(&mut encoder, text.as_ref()).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn with_template(source: &str) -> Tokenizer {
    let mut tokenizer = tokenizer();
    tokenizer.set_chat_template(source, "test").unwrap();
    tokenizer
}

/// A folder of files that lives as long as the value.
pub(crate) struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    pub(crate) fn path(&self) -> &std::path::Path {
        self.dir.path()
    }
}

pub(crate) fn jsonl(records: &[Value]) -> String {
    records.iter().map(|record| format!("{record}\n")).collect()
}

pub(crate) fn load_text(
    name: &str,
    text: impl AsRef<[u8]>,
    tokenizer: &Tokenizer,
    options: &LoadOptions,
) -> Result<Dataset> {
    let files = Files::new();
    load(&[files.write(name, text)], tokenizer, options)
}

pub(crate) fn load_records(records: &[Value], tokenizer: &Tokenizer) -> Dataset {
    load_text("data.jsonl", jsonl(records), tokenizer, &LoadOptions::new(4096)).unwrap()
}

/// The error of a file, its text without the folder it lies in.
pub(crate) fn error_of(name: &str, text: impl AsRef<[u8]>, tokenizer: &Tokenizer) -> (Error, String) {
    let files = Files::new();
    let error = load(&[files.write(name, text)], tokenizer, &LoadOptions::new(64)).unwrap_err();
    let said = error.to_string().replace(&format!("{}/", files.path().display()), "");
    (error, said)
}

/// The runs of trained tokens as text.
pub(crate) fn trained(tokenizer: &Tokenizer, example: &Example) -> Vec<String> {
    assert_eq!(example.ids.len(), example.trained.len());
    assert!(!example.trained[0], "nothing predicts the first token");
    let mut start = 0;
    let mut runs = Vec::new();
    for run in example.trained.chunk_by(|a, b| a == b) {
        if run[0] {
            runs.push(tokenizer.decode(&example.ids[start..start + run.len()], SkipSpecial::No).unwrap());
        }
        start += run.len();
    }
    runs
}

pub(crate) fn text(tokenizer: &Tokenizer, example: &Example) -> String {
    tokenizer.decode(&example.ids, SkipSpecial::No).unwrap()
}
