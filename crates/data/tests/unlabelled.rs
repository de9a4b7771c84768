//! Texts whose label is asked for.

mod common;

use common::*;
use lora_sb_data::*;
use serde_json::{Value, json};

fn read(records: &[Value], options: &LabelOptions) -> Result<Vec<TextToPredict>> {
    let files = Files::new();
    load_to_predict(&[files.write("a.jsonl", jsonl(records))], &wordpiece(), options)
}

fn options(kind: LabelKind, names: Option<&[&str]>) -> LabelOptions {
    let names = names.map(|names| names.iter().map(|&name| name.to_owned()).collect());
    LabelOptions { kind: Some(kind), names, ..LabelOptions::new(6) }
}

#[test]
fn labels_are_read_where_there_are_some() {
    let records = [
        json!({"sentence1": "the sea", "sentence2": "a river and the sea and a river", "label": "yes"}),
        json!({"sentence1": "the sea", "sentence2": "it"}),
        json!({"sentence1": "it", "sentence2": "it", "label": null}),
        json!({"sentence1": "it", "sentence2": "the sea", "label": -1}),
        json!({"sentence1": "it", "sentence2": "the sea", "label": 0}),
    ];
    let texts = read(&records, &options(LabelKind::Classes, Some(&["no", "yes"]))).unwrap();
    let labels: Vec<_> = texts.iter().map(|text| text.example.label).collect();
    assert_eq!(labels, [Some(Label::Class(1)), None, None, None, Some(Label::Class(0))]);
    assert_eq!(texts[0].second.as_deref(), Some("a river and the sea and a river"), "the text as it is");
    let cut = wordpiece().encode_pair("the sea", texts[0].second.as_deref(), 6).unwrap();
    assert_eq!((&texts[0].example.ids, texts[0].example.second), (&cut.ids, cut.second));
    assert_eq!(texts[3].example.source.line, 4);
    // A value of -1 is one.
    let records = [json!({"text": "the sea", "score": -1}), json!({"text": "it", "score": 2.5})];
    let texts = read(&records, &options(LabelKind::Values, None)).unwrap();
    let labels: Vec<_> = texts.iter().map(|text| text.example.label).collect();
    assert_eq!(labels, [Some(Label::Value(-1.0)), Some(Label::Value(2.5))]);
}

#[test]
fn what_is_wrong_is_named() {
    let classes = options(LabelKind::Classes, Some(&["no", "yes"]));
    let said = |records: &[Value]| read(records, &classes).unwrap_err().to_string();
    assert!(said(&[json!({"text": "it"}), json!({"text": "it", "label": "maybe"})]).contains("a.jsonl:2"));
    assert!(said(&[json!({"text": "it"}), json!({"content": "it"})]).contains("text"));
    assert!(said(&[json!({"label": 1})]).contains("a.jsonl:1"));
    assert!(said(&[]).contains("a.jsonl"));
}
