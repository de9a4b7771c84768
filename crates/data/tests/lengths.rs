//! Over-long examples, and what the report says of them.

mod common;

use common::*;
use lora_sb_data::{Error, ExcessLength, Holdout, LoadOptions, split_validation};
use serde_json::{Value, json};

fn options(max_length: usize, excess_length: ExcessLength) -> LoadOptions {
    LoadOptions { excess_length: Some(excess_length), ..LoadOptions::new(max_length) }
}

/// Records whose every byte is a token: digits are not in the text that the vocabulary was made from.
fn digits(prompt: usize, answer: usize) -> Value {
    json!({"prompt": "7".repeat(prompt), "completion": "8".repeat(answer)})
}

#[test]
fn truncation_keeps_the_start_and_counts_what_is_lost() {
    let records = [digits(3, 2), digits(3, 9), digits(10, 4), digits(7, 1)];
    let data =
        load_text("a.jsonl", jsonl(&records), &tokenizer(), &options(7, ExcessLength::Truncate)).unwrap();
    let report = &data.report;
    assert_eq!((report.records, report.examples, report.truncated), (4, 2, 3));
    assert_eq!((report.tokens_lost, report.trained_tokens_lost), (6 + 8 + 2, 6 + 5 + 2));
    assert_eq!((report.longest, report.longest_found), (7, 15));
    assert_eq!(report.without_trained_token.count, 2);
    let lines: Vec<_> = report.without_trained_token.first.iter().map(|place| place.line).collect();
    assert_eq!(lines, [3, 4]);
    assert_eq!(text(&tokenizer(), &data.examples[1]), "7778888");
    assert_eq!((report.tokens, report.trained_tokens), (6 + 7, 3 + 4));
    let said = report.to_string();
    assert!(said.contains("3 examples truncated to 7 tokens: 16 tokens lost, 13 of them trained"), "{said}");
    assert!(said.contains("2 examples dropped without a trained token ("), "{said}");
}

#[test]
fn splitting_loses_nothing_but_a_last_single_token() {
    for length in [1, 6, 7, 8, 13, 14, 20] {
        let windows = (length + 1_usize).div_ceil(7);
        // `length` digits and the end token.
        let whole = load_text("a.txt", "7".repeat(length), &tokenizer(), &LoadOptions::new(100)).unwrap();
        let split = load_text("a.txt", "7".repeat(length), &tokenizer(), &LoadOptions::new(7)).unwrap();
        let lost = usize::from((length + 1) % 7 == 1 && length + 1 > 7);
        assert_eq!(split.examples.len(), windows - lost, "{length}");
        let joined: Vec<u32> = split.examples.iter().flat_map(|example| example.ids.clone()).collect();
        assert_eq!(joined, whole.examples[0].ids[..length + 1 - lost]);
        for example in &split.examples {
            assert_eq!(example.trained_tokens(), example.ids.len() - 1);
        }
        assert_eq!(split.report.split, usize::from(length + 1 > 7));
    }
}

#[test]
fn dropping_and_raising_name_the_record() {
    let records = [digits(3, 2), digits(3, 9)];
    let data = load_text("a.jsonl", jsonl(&records), &tokenizer(), &options(7, ExcessLength::Drop)).unwrap();
    assert_eq!(
        (data.examples.len(), data.report.dropped.count, data.report.dropped.first[0].line),
        (1, 1, 2)
    );
    assert!(
        data.report.to_string().contains("1 example dropped as longer than 7 tokens ("),
        "{}",
        data.report
    );
    let error =
        load_text("a.jsonl", jsonl(&records), &tokenizer(), &options(7, ExcessLength::Raise)).unwrap_err();
    assert!(
        matches!(&error, Error::TooLong { found: 13, max_length: 7, location } if location.line == 2),
        "{error}"
    );
    assert!(error.hint().is_some());
}

#[test]
fn a_data_set_without_a_trained_token_is_an_error() {
    let cases = [
        (digits(9, 1), ExcessLength::Truncate, "1 without a trained token, 1 truncated to 4 tokens"),
        (digits(9, 1), ExcessLength::Drop, "1 dropped as longer than 4 tokens"),
        (json!({"text": "  \n"}), ExcessLength::Split, "1 without a trained token"),
    ];
    for (record, excess, expected) in cases {
        let error = load_text("a.jsonl", jsonl(&[record]), &tokenizer(), &options(4, excess)).unwrap_err();
        assert!(matches!(error, Error::NothingTrained { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
        assert!(error.hint().is_some());
    }
    let error = load_text("a.jsonl", jsonl(&[digits(1, 1)]), &tokenizer(), &LoadOptions::new(1)).unwrap_err();
    assert!(error.to_string().starts_with("max_length: expected at least 2 tokens"), "{error}");
}

#[test]
fn many_records_keep_their_order_across_batches() {
    let records: Vec<Value> =
        (0..3001).map(|n| json!({"prompt": "7".repeat(500), "completion": n.to_string()})).collect();
    let data = load_text("a.jsonl", jsonl(&records), &tokenizer(), &LoadOptions::new(1000)).unwrap();
    assert_eq!(data.examples.len(), 3001);
    for (n, example) in data.examples.iter().enumerate() {
        assert_eq!(trained(&tokenizer(), example), [format!("{n}<|end|>")]);
        assert_eq!(example.source.line, n + 1);
    }
    assert!(data.report.to_string().contains("3,001 examples, "), "{}", data.report);
}

#[test]
fn validation_is_a_seeded_partition_in_order() {
    let records: Vec<Value> = (0..53).map(|n| digits(1, n + 1)).collect();
    let data = load_text("a.jsonl", jsonl(&records), &tokenizer(), &LoadOptions::new(100)).unwrap();
    let lines =
        |examples: &[lora_sb_data::Example]| examples.iter().map(|e| e.source.line).collect::<Vec<_>>();
    let split = |holdout, seed| {
        let (training, validation) = split_validation(data.clone(), holdout, seed).unwrap();
        (lines(&training), lines(&validation))
    };
    let (training, validation) = split(Holdout::Count(11), 3);
    assert_eq!(validation.len(), 11);
    assert!(training.is_sorted() && validation.is_sorted());
    let mut all = [training, validation.clone()].concat();
    all.sort_unstable();
    assert_eq!(all, (1..=53).collect::<Vec<_>>());
    assert_eq!(split(Holdout::Count(11), 3).1, validation);
    assert_ne!(split(Holdout::Count(11), 4).1, validation);
    assert_eq!(split(Holdout::Fraction(0.1), 3).1.len(), 5);
    assert_eq!(split(Holdout::Fraction(0.001), 3).1.len(), 1);
    assert_eq!(split(Holdout::Fraction(0.0), 3).0.len(), 53);
    for refused in
        [Holdout::Count(53), Holdout::Fraction(1.0), Holdout::Fraction(-0.1), Holdout::Fraction(0.999)]
    {
        let error = split_validation(data.clone(), refused, 0).unwrap_err();
        assert!(error.to_string().starts_with("val_set_size: expected"), "{error}");
    }
}
