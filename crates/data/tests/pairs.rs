//! Texts and pairs of texts to tokens, as transformers makes them.

mod common;

use common::*;
use lora_sb_data::{AddSpecial, Error, PairTokens, Tokenizer};
use serde_json::{Value, json};

const SAILORS: &str = "The sailors rode the breeze.";
const CHILD: &str = "A child is riding";

/// First text, second text, limit, and the ids, `second` and length before truncation that
/// `PreTrainedTokenizerFast(tokenizer_file=...)(..., truncation=True, max_length=...)` of transformers 5.23 gives.
type Golden = (&'static str, Option<&'static str>, usize, &'static [u32], Option<usize>, usize);

const BERT: [Golden; 13] = [
    (SAILORS, None, 64, &[2, 58, 81, 131, 72, 96, 58, 111, 133, 35, 6, 3], None, 12),
    (SAILORS, None, 7, &[2, 58, 81, 131, 72, 96, 3], None, 12),
    ("it", None, 3, &[2, 69, 3], None, 3),
    ("", None, 8, &[2, 3], None, 2),
    (
        SAILORS,
        Some(CHILD),
        64,
        &[2, 58, 81, 131, 72, 96, 58, 111, 133, 35, 6, 3, 9, 84, 141, 59, 73, 151, 3],
        Some(12),
        19,
    ),
    (SAILORS, Some(CHILD), 12, &[2, 58, 81, 131, 72, 96, 3, 9, 84, 141, 59, 3], Some(7), 19),
    (SAILORS, Some(CHILD), 11, &[2, 58, 81, 131, 72, 3, 9, 84, 141, 59, 3], Some(6), 19),
    (CHILD, Some(SAILORS), 11, &[2, 9, 84, 141, 59, 3, 58, 81, 131, 72, 3], Some(6), 19),
    (SAILORS, Some("it"), 9, &[2, 58, 81, 131, 72, 96, 3, 69, 3], Some(7), 14),
    ("it", Some(SAILORS), 8, &[2, 69, 3, 58, 81, 131, 72, 3], Some(3), 14),
    (SAILORS, Some(CHILD), 5, &[2, 58, 3, 9, 3], Some(3), 19),
    ("", Some(SAILORS), 6, &[2, 3, 58, 81, 131, 3], Some(2), 13),
    (
        "Crème brûlée 好?",
        Some("[SEP] the"),
        32,
        &[2, 11, 77, 54, 35, 10, 46, 33, 34, 35, 35, 1, 8, 3, 3, 58, 3],
        Some(14),
        17,
    ),
];

/// All token types of RoBERTa are 0.
const ROBERTA: [Golden; 4] = [
    ("The river", Some("the sea"), 64, &[1, 353, 407, 321, 2, 2, 87, 261, 337, 2], None, 10),
    ("The river", None, 64, &[1, 353, 407, 321, 2], None, 5),
    ("The river runs", Some("the sea"), 9, &[1, 353, 407, 321, 2, 2, 87, 261, 2], None, 12),
    ("The river runs", None, 5, &[1, 353, 407, 321, 2], None, 7),
];

fn assert_goldens(tokenizer: &Tokenizer, goldens: &[Golden]) {
    for &(first, second_text, limit, ids, second, whole) in goldens {
        let found = tokenizer.encode_pair(first, second_text, limit).unwrap();
        let expected = PairTokens { ids: ids.to_vec(), second, whole };
        assert_eq!(found, expected, "{first:?}, {second_text:?}, {limit}");
    }
}

#[test]
fn bert_pairs_are_those_of_transformers() {
    assert_goldens(&wordpiece(), &BERT);
}

#[test]
fn roberta_pairs_are_those_of_transformers() {
    assert_goldens(&roberta(), &ROBERTA);
}

#[test]
fn an_older_bert_post_processor_gives_the_same() {
    let processor = json!({"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]});
    assert_goldens(&wordpiece_with(&[("post_processor", processor)]), &BERT);
}

#[test]
fn truncation_and_padding_of_the_file_have_no_effect() {
    let file: Value = serde_json::from_slice(include_bytes!("fixtures/wordpiece.json")).unwrap();
    assert_eq!(
        (&file["truncation"]["max_length"], &file["padding"]["strategy"]["Fixed"]),
        (&json!(12), &json!(20))
    );
    let without = wordpiece_with(&[("truncation", Value::Null), ("padding", Value::Null)]);
    let long = [SAILORS, CHILD, SAILORS].join(" ");
    for (first, second) in [("it", None), (long.as_str(), None), ("it", Some("a")), (&long, Some(CHILD))] {
        let tokens = wordpiece().encode_pair(first, second, 512).unwrap();
        assert_eq!(tokens, without.encode_pair(first, second, 512).unwrap());
        assert_eq!(tokens.whole, tokens.ids.len());
        assert!(!tokens.ids.contains(&0), "padded: {tokens:?}");
    }
    assert_eq!(wordpiece().encode("it", AddSpecial::Yes).unwrap(), [2, 69, 3]);
}

#[test]
fn of_a_pair_the_longer_text_is_cut() {
    let tokenizer = wordpiece();
    let words = |count: usize| vec!["the"; count].join(" ");
    for first in [1, 2, 5, 13, 29] {
        for second in [1, 3, 13, 17] {
            for limit in 5..=52 {
                let tokens = tokenizer.encode_pair(&words(first), Some(&words(second)), limit).unwrap();
                assert_eq!(tokens.whole, first + second + 3);
                assert_eq!(tokens.ids.len(), tokens.whole.min(limit));
                let start = tokens.second.unwrap();
                let (kept_first, kept_second) = (start - 2, tokens.ids.len() - start - 1);
                assert_eq!((tokens.ids[0], tokens.ids[start - 1], tokens.ids.last()), (2, 3, Some(&3)));
                // A text is cut only down to the other's length, or to one more.
                assert!(kept_first == first || kept_first + 1 >= kept_second, "{first} {second} {limit}");
                assert!(kept_second == second || kept_second + 1 >= kept_first, "{first} {second} {limit}");
            }
        }
    }
}

#[test]
fn one_text_is_encoded_as_for_language_modelling() {
    for tokenizer in [wordpiece(), roberta(), tokenizer()] {
        let prose = include_str!("../../../assets/shakespeare.txt");
        for text in prose[..20_000].split("\n\n").chain(["naïve 🙂", "好"]) {
            let tokens = tokenizer.encode_pair(text, None, 100_000).unwrap();
            assert_eq!(tokens.ids, tokenizer.encode(text, AddSpecial::Yes).unwrap(), "{text:?}");
        }
    }
}

#[test]
fn a_limit_that_leaves_no_text_is_refused() {
    for (tokenizer, second, least) in [
        (wordpiece(), None, 3),
        (wordpiece(), Some("a"), 5),
        (roberta(), Some("a"), 6),
        (tokenizer(), None, 1),
    ] {
        tokenizer.encode_pair(SAILORS, second, least).unwrap();
        let error = tokenizer.encode_pair(SAILORS, second, least - 1).unwrap_err();
        assert!(matches!(error, Error::Option { option: "max_length", .. }), "{error}");
        assert!(error.to_string().contains(&format!("expected at least {least} tokens")), "{error}");
    }
}

#[test]
fn token_types_other_than_two_runs_are_refused() {
    let sequence = |id: &str, kind: u32| json!({"Sequence": {"id": id, "type_id": kind}});
    let template = |pair: [(&str, u32); 3]| {
        json!({
            "type": "TemplateProcessing",
            "single": [sequence("A", 0)],
            "pair": pair.map(|(id, kind)| sequence(id, kind)),
            "special_tokens": {},
        })
    };
    for (pair, accepted) in [
        ([("A", 0), ("A", 0), ("B", 1)], true),
        ([("A", 0), ("B", 1), ("A", 0)], false),
        ([("A", 0), ("A", 0), ("B", 2)], false),
        ([("A", 1), ("A", 1), ("B", 1)], false),
    ] {
        let tokenizer = wordpiece_with(&[("post_processor", template(pair))]);
        let result = tokenizer.encode_pair("the", Some("the"), 64);
        match result {
            Ok(tokens) => assert!(accepted && tokens.second == Some(2), "{pair:?}"),
            Err(error) => {
                assert!(!accepted, "{pair:?}: {error}");
                assert!(error.to_string().contains("a run of 0 and a run of 1"), "{error}");
                assert!(error.hint().is_some());
            }
        }
    }
}
