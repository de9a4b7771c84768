//! Labelled texts: records, labels, lengths and their account.

mod common;

use common::*;
use lora_sb_data::*;
use serde_json::{Value, json};

fn read(name: &str, text: impl AsRef<[u8]>, options: &LabelOptions) -> Result<Labelled> {
    let files = Files::new();
    load_labelled(&[files.write(name, text)], &wordpiece(), options)
}

fn records(records: &[Value]) -> Labelled {
    read("a.jsonl", jsonl(records), &LabelOptions::new(64)).unwrap()
}

/// The labels of texts that are labelled so.
fn labels(written: &[Value], options: &LabelOptions) -> Result<(Labels, Vec<Label>)> {
    let lines: Vec<_> = written.iter().map(|label| json!({"text": "the sea", "label": label})).collect();
    let data = read("a.jsonl", jsonl(&lines), options)?;
    Ok((data.labels, data.examples.iter().map(|example| example.label.unwrap()).collect()))
}

fn refused(written: &[Value], options: &LabelOptions) -> (String, String) {
    let error = labels(written, options).unwrap_err();
    let said = error.to_string();
    (said[said.find("a.jsonl").unwrap_or(0)..].to_owned(), error.hint().unwrap_or_default())
}

fn classes(numbers: &[u32]) -> Vec<Label> {
    numbers.iter().map(|&number| Label::Class(number)).collect()
}

fn named(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

fn options_named(names: &[&str]) -> LabelOptions {
    LabelOptions { names: Some(named(names)), ..LabelOptions::new(64) }
}

#[test]
fn the_fields_of_glue_and_hugging_face_are_read() {
    let tokenizer = wordpiece();
    let single = tokenizer.encode_pair("the sea", None, 64).unwrap();
    let pair = tokenizer.encode_pair("the sea", Some("a river"), 64).unwrap();
    for first in ["sentence", "text", "content"] {
        for label in ["label", "labels", "score"] {
            let data =
                records(&[json!({first: "the sea", label: 1, "idx": 7}), json!({first: "it", label: 0})]);
            let example = &data.examples[0];
            assert_eq!((&example.ids, example.second), (&single.ids, None));
            assert_eq!(example.label, Some(Label::Class(1)));
            assert_eq!(example.trained, vec![false; single.ids.len()]);
            assert_eq!(example.source.line, 1);
            assert_eq!(data.report.files[0].fields, [first, label]);
            assert_eq!(data.report.files[0].ignored, ["idx"]);
            assert_eq!(data.report.pairs, 0);
        }
    }
    for [first, second] in [
        ["sentence1", "sentence2"],
        ["premise", "hypothesis"],
        ["question1", "question2"],
        ["question", "sentence"],
        ["question", "passage"],
        ["text", "text_pair"],
        ["text1", "text2"],
        ["text_a", "text_b"],
    ] {
        // The order of the keys does not matter.
        let data = records(&[
            json!({"label": 0, second: "a river", first: "the sea"}),
            json!({first: "it", second: "is", "label": 1}),
        ]);
        assert_eq!(data.examples[0].ids, pair.ids, "{first}, {second}");
        assert_eq!(data.examples[0].second, Some(4));
        assert_eq!(data.examples[1].second, Some(3));
        assert_eq!((data.report.pairs, data.report.examples), (2, 2));
    }
}

#[test]
fn integers_keep_their_number_and_names_are_sorted() {
    let options = LabelOptions::new(64);
    let (found, numbers) = labels(&[json!(2), json!(0)], &options).unwrap();
    assert_eq!(found, Labels::Classes(named(&["LABEL_0", "LABEL_1", "LABEL_2"])));
    assert_eq!((found.outputs(), found.kind(), numbers), (3, LabelKind::Classes, classes(&[2, 0])));

    let (found, numbers) =
        labels(&[json!("no"), json!("maybe"), json!("yes"), json!("no")], &options).unwrap();
    assert_eq!((found, numbers), (Labels::Classes(named(&["maybe", "no", "yes"])), classes(&[1, 0, 2, 1])));
    // Names that are numbers have the order of numbers.
    let (found, numbers) = labels(&[json!("10"), json!("9"), json!("-1")], &options).unwrap();
    assert_eq!((found, numbers), (Labels::Classes(named(&["-1", "9", "10"])), classes(&[2, 1, 0])));
    let (found, numbers) = labels(&[json!(true), json!(false)], &options).unwrap();
    assert_eq!((found, numbers), (Labels::Classes(named(&["false", "true"])), classes(&[1, 0])));
}

#[test]
fn given_names_fix_the_numbers() {
    let options = options_named(&["yes", "no", "maybe"]);
    let (found, numbers) = labels(&[json!("no"), json!("no"), json!("yes"), json!(2)], &options).unwrap();
    assert_eq!((found, numbers), (Labels::Classes(named(&["yes", "no", "maybe"])), classes(&[1, 1, 0, 2])));

    // One class is enough where others are known; the numbers of training hold whatever occurs.
    let training = records(&[json!({"text": "a", "label": "x"}), json!({"text": "b", "label": "y"})]);
    let options = LabelOptions::new(64).with_labels(&training.labels);
    assert_eq!(labels(&[json!("y")], &options).unwrap(), (training.labels, classes(&[1])));

    let (found, numbers) = labels(&[json!(0), json!(1)], &LabelOptions::new(64)).unwrap();
    assert_eq!(numbers, classes(&[0, 1]));
    let options = LabelOptions::new(64).with_labels(&found);
    let (said, hint) = refused(&[json!(1), json!(2)], &options);
    assert_eq!(said, "a.jsonl:2: field \"label\": expected a class from 0 to 1, found 2");
    assert!(hint.contains("training data"), "{hint}");
    assert_eq!(labels(&[json!("LABEL_1")], &options).unwrap().1, classes(&[1]));

    let (said, hint) = refused(&[json!("yes"), json!("Yes")], &options_named(&["yes", "no"]));
    assert_eq!(
        said,
        "a.jsonl:2: field \"label\": expected one of the classes \"yes\", \"no\", found \"Yes\""
    );
    assert!(hint.contains("spelling"), "{hint}");
    let many: Vec<String> = (0..20).map(|number| format!("c{number}")).collect();
    let options = LabelOptions { names: Some(many), ..LabelOptions::new(64) };
    let (said, _) = refused(&[json!("c20")], &options);
    assert!(said.contains("\"c7\" ... (20 classes), found \"c20\"") && !said.contains("c8"), "{said}");
}

#[test]
fn a_single_fraction_makes_values_of_all() {
    let options = LabelOptions::new(64);
    let expected = [5.0, 3.75, -1.0].map(Label::Value).to_vec();
    let written = [json!(5), json!(3.75), json!(-1)];
    assert_eq!(labels(&written, &options).unwrap(), (Labels::Values, expected));
    // Written as 5.0, an integer is a value.
    let (found, _) = labels(&[json!(5.0), json!(1)], &options).unwrap();
    assert_eq!((found.outputs(), found.names()), (1, None));

    let values = LabelOptions { kind: Some(LabelKind::Values), ..LabelOptions::new(64) };
    assert_eq!(labels(&[json!(0)], &values).unwrap(), (Labels::Values, vec![Label::Value(0.0)]));
    let of_classes = LabelOptions { kind: Some(LabelKind::Classes), ..LabelOptions::new(64) };
    assert_eq!(labels(&[json!(1.0), json!(0)], &of_classes).unwrap().1, classes(&[1, 0]));
    assert_eq!(labels(&[json!(1.0)], &options_named(&["a", "b"])).unwrap().1, classes(&[1]));
    let with = LabelOptions::new(64).with_labels(&Labels::Values);
    assert_eq!(labels(&[json!(1)], &with).unwrap().0, Labels::Values);
}

#[test]
fn kinds_that_do_not_go_together() {
    let options = LabelOptions::new(64);
    let values = LabelOptions { kind: Some(LabelKind::Values), ..LabelOptions::new(64) };
    let of_classes = LabelOptions { kind: Some(LabelKind::Classes), ..LabelOptions::new(64) };
    for (written, options, expected, hint) in [
        (
            vec![json!("a"), json!(0.5)],
            &options,
            "a.jsonl:1: field \"label\": expected a number, as ",
            "values",
        ),
        (
            vec![json!(1), json!("a")],
            &values,
            "a.jsonl:2: field \"label\": expected a number, found \"a\"",
            "classes",
        ),
        (
            vec![json!(1), json!("a")],
            &options,
            "a.jsonl:2: field \"label\": expected an integer, as the first record has, found \"a\"",
            "or all as names",
        ),
        (
            vec![json!("a"), json!(1)],
            &options,
            "a.jsonl:2: field \"label\": expected the name of a class, as the first record has, found 1",
            "or all as names",
        ),
        (
            vec![json!(1), json!(3.8)],
            &of_classes,
            "a.jsonl:2: field \"label\": expected an integer, as the first record has, found 3.8",
            "values, not classes",
        ),
        (
            vec![json!("a"), json!(3.8)],
            &options_named(&["a", "b"]),
            "a.jsonl:2: field \"label\": expected a class (an integer or a name), found 3.8",
            "values, not classes",
        ),
        (
            vec![json!(1), json!(1e300)],
            &values,
            "a.jsonl:2: field \"label\": expected a number that fits 32 bits",
            "",
        ),
    ] {
        let (said, found_hint) = refused(&written, options);
        assert!(said.starts_with(expected), "{said:?} should start with {expected:?}");
        assert!(found_hint.contains(hint), "{found_hint}");
    }
}

#[test]
fn records_without_a_label_are_refused() {
    let options = LabelOptions::new(64);
    for (text, found) in [
        ("{\"text\": \"x\", \"label\": null}", "null"),
        ("{\"text\": \"x\"}", "no such field"),
        ("{\"text\": \"x\", \"label\": \" \"}", "an empty string"),
        ("{\"text\": \"x\", \"label\": [0, 1]}", "an array"),
    ] {
        for lines in [text.to_owned(), format!("{{\"text\": \"x\", \"label\": 0}}\n\n{text}")] {
            let line = lines.lines().count();
            let error = read("a.jsonl", &lines, &options).unwrap_err();
            let expected = format!(
                "a.jsonl:{line}: field \"label\": expected a class (an integer or a name) or a number, found {found}"
            );
            assert!(error.to_string().ends_with(&expected), "{error} should end with {expected}");
            assert!(error.hint().unwrap().contains("leave out those without one"));
        }
    }
    for options in [options, options_named(&["a", "b"])] {
        let (said, hint) = refused(&[json!(0), json!(1), json!(-1)], &options);
        assert!(
            said.starts_with("a.jsonl:3: ") && said.ends_with("found -1, which stands for no label"),
            "{said}"
        );
        assert!(hint.contains("GLUE"), "{hint}");
    }
    let (said, hint) = refused(&[json!(0), json!(-7)], &LabelOptions::new(64));
    assert_eq!(said, "a.jsonl:2: field \"label\": expected a class from 0 to at most 65535, found -7");
    assert!(hint.contains("from 0"));
    let (said, _) = refused(&[json!(0), json!(4_000_000_000_u32)], &LabelOptions::new(64));
    assert!(said.ends_with("found 4000000000"), "{said}");
}

#[test]
fn classes_need_another_class() {
    for (label, only) in [(json!(0), "LABEL_0"), (json!("spam"), "spam")] {
        let error = labels(&[label.clone(), label], &LabelOptions::new(64)).unwrap_err();
        assert!(matches!(error, Error::OneClass { records: 2, .. }), "{error}");
        assert!(error.to_string().contains(&format!("found only {only:?} in all 2 records")), "{error}");
        assert!(error.hint().is_some());
    }
    // A number says that there are smaller ones.
    assert_eq!(labels(&[json!(1)], &LabelOptions::new(64)).unwrap().0.outputs(), 2);
}

#[test]
fn options_that_contradict_each_other_are_refused() {
    let values_with_names = LabelOptions { kind: Some(LabelKind::Values), ..options_named(&["a", "b"]) };
    let split = LabelOptions { excess_length: Some(ExcessLength::Split), ..LabelOptions::new(64) };
    for (options, name) in [
        (options_named(&["a", "a"]), "label_names"),
        (options_named(&["a"]), "label_names"),
        (options_named(&[]), "label_names"),
        (values_with_names, "label_names"),
        (split, "excess_length"),
        (LabelOptions::new(2), "max_length"),
    ] {
        let error = labels(&[json!(0), json!(1)], &options).unwrap_err();
        assert!(matches!(&error, Error::Option { option, .. } if *option == name), "{error}");
    }
}

#[test]
fn records_of_another_shape_are_refused() {
    let options = LabelOptions::new(64);
    for (text, found) in [
        (
            "{\"prompt\": \"x\", \"completion\": \"y\", \"label\": 0}",
            "the keys \"prompt\", \"completion\", \"label\"",
        ),
        ("{}", "an empty object"),
        ("[1]", "a number"),
    ] {
        let error = read("a.jsonl", text, &options).unwrap_err();
        assert!(error.to_string().ends_with(&format!("found {found}")), "{error}");
        let hint = error.hint().unwrap();
        for shape in ["sentence1", "premise", "question1", "text"] {
            assert!(hint.contains(&format!("{{\"{shape}\":")), "{hint}");
        }
    }
    let error = read("a.txt", "a text", &options).unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("a.txt:1: expected a record of a known shape, found plain text without labels")
    );
    let pair = "{\"sentence1\": \"x\", \"sentence2\": \"y\", \"label\": 0}\n";
    for (text, expected) in [
        (
            "{\"sentence1\": \"x\", \"label\": 0}",
            "a.jsonl:2: field \"sentence2\": expected a string, found no such field",
        ),
        (
            "{\"sentence1\": null, \"sentence2\": \"y\", \"label\": 0}",
            "a.jsonl:2: field \"sentence1\": expected a string, found null",
        ),
        ("3", "a.jsonl:2: expected a record of a known shape, found a number"),
    ] {
        let error = read("a.jsonl", format!("{pair}{text}"), &options).unwrap_err();
        assert!(error.to_string().ends_with(expected), "{error}");
        assert!(
            error.hint().unwrap().contains("{\"sentence1\": \"...\", \"sentence2\": \"...\", \"label\": ")
        );
    }
    let error = read("a.json", "[{\"text\": \"x\", \"label\": 0},\n {\"text\": 1, \"label\": 0}]", &options)
        .unwrap_err();
    assert!(error.to_string().contains("a.json:2 (element 1): field \"text\""), "{error}");
    assert!(matches!(read("a.jsonl", "\n", &options).unwrap_err(), Error::Empty { .. }));
    assert!(matches!(load_labelled(&[], &wordpiece(), &options).unwrap_err(), Error::Empty { .. }));
}

#[test]
fn gzip_files_are_read_as_the_others() {
    let options = LabelOptions::new(64);
    let text = jsonl(&[json!({"text": "the sea", "label": 0}), json!({"text": "a film", "label": 1})]);
    let plain = read("a.jsonl", &text, &options).unwrap();
    let ids = |data: &Labelled| data.examples.iter().map(|example| example.ids.clone()).collect::<Vec<_>>();
    let array = json!([{"text": "the sea", "label": 0}, {"text": "a film", "label": 1}]).to_string();
    let (first, second) = text.split_at(text.find('\n').unwrap() + 1);
    for (name, bytes) in [
        ("a.jsonl.gz", gzip(&text)),
        ("A.JSONL.GZ", gzip(&text)),
        ("a.json.gz", gzip(array)),
        // `cat a.gz b.gz` is a gzip file.
        ("a.jsonl.gz", [gzip(first), gzip(second)].concat()),
    ] {
        let data = read(name, bytes, &options).unwrap();
        assert_eq!(ids(&data), ids(&plain), "{name}");
    }
    let whole = gzip(&text);
    let mut spoiled = whole.clone();
    let middle = spoiled.len() / 2;
    spoiled[middle] ^= 0x55;
    for bytes in [text.as_bytes(), &whole[..whole.len() - 9], &spoiled, b""] {
        let error = read("a.jsonl.gz", bytes, &options).unwrap_err();
        assert!(error.to_string().contains("a.jsonl.gz: cannot be unpacked as gzip: "), "{error}");
        assert!(error.hint().unwrap().contains("gzip -t"));
    }
    let error = read("a.jsonl.gz", gzip("{\"text\": \"x\", \"label\": 0}\n{"), &options).unwrap_err();
    assert!(error.to_string().contains("a.jsonl.gz:2: column 1: broken JSON"), "{error}");
    let error = read("a.jsonl.gz", gzip(b"{\"text\": \"x\"}\n\xff"), &options).unwrap_err();
    assert!(error.to_string().contains("a.jsonl.gz:2: expected UTF-8"), "{error}");
    let missing = load_labelled(&["no/such.jsonl.gz".into()], &wordpiece(), &options).unwrap_err();
    assert!(missing.to_string().starts_with("no/such.jsonl.gz: cannot be read"), "{missing}");

    // Text for language modelling too.
    let book = load_text("a.txt.gz", gzip("The river runs to the sea."), &tokenizer(), &LoadOptions::new(64))
        .unwrap();
    assert_eq!(text_of(&book), "The river runs to the sea.<|end|>");
}

fn text_of(book: &Dataset) -> String {
    text(&tokenizer(), &book.examples[0])
}

#[test]
fn over_long_texts_are_truncated_dropped_or_refused() {
    let text = jsonl(&[
        json!({"text": "the the the the the", "label": 0}),
        json!({"text": "the", "label": 1}),
        json!({"text": "the the the", "label": 1}),
    ]);
    let with = |excess_length| LabelOptions { excess_length, ..LabelOptions::new(4) };
    for excess in [None, Some(ExcessLength::Truncate)] {
        let data = read("a.jsonl", &text, &with(excess)).unwrap();
        let lengths: Vec<_> = data.examples.iter().map(|example| example.ids.len()).collect();
        assert_eq!(lengths, [4, 3, 4]);
        assert_eq!(data.examples[0].ids, [2, 58, 58, 3]);
        let report = &data.report;
        assert_eq!(
            (report.truncated, report.tokens_lost, report.longest, report.longest_found),
            (2, 4, 4, 7)
        );
        assert!(
            report
                .to_string()
                .contains("2 examples truncated to 4 tokens: 4 tokens lost (the longest had 7)")
        );
    }
    let data = read("a.jsonl", &text, &with(Some(ExcessLength::Drop))).unwrap();
    assert_eq!((data.examples.len(), data.report.dropped.count, data.report.records), (1, 2, 3));
    // What is dropped still has a class.
    assert_eq!(data.report.classes_without_example(), ["LABEL_0"]);
    assert!(data.report.to_string().contains("\nno example of \"LABEL_0\""), "{}", data.report);
    let error = read("a.jsonl", &text, &with(Some(ExcessLength::Raise))).unwrap_err();
    assert!(error.to_string().ends_with("a.jsonl:1: expected at most 4 tokens, found 7"), "{error}");
    let long = jsonl(&[json!({"text": "the the", "label": 0}), json!({"text": "the the", "label": 1})]);
    let options = LabelOptions { excess_length: Some(ExcessLength::Drop), ..LabelOptions::new(3) };
    let error = read("a.jsonl", long, &options).unwrap_err();
    assert!(
        error.to_string().starts_with("all 2 texts are longer than 3 tokens and were dropped"),
        "{error}"
    );
    assert!(error.hint().is_some());
}

#[test]
fn the_report_counts_labels_and_names_what_is_odd() {
    let data = records(&[
        json!({"sentence": "the sea", "label": 0, "idx": 0}),
        json!({"sentence": " ", "label": 3, "idx": 1}),
        json!({"sentence": "a film", "label": 3, "idx": 2}),
    ]);
    let said = data.report.to_string();
    let lines: Vec<&str> = said.lines().collect();
    assert!(lines[0].ends_with("a.jsonl: 3 records from sentence, label; not read: idx"), "{said}");
    assert_eq!(
        lines[1..3],
        [
            "3 examples, 10 tokens; longest 4, mean 3",
            "4 classes: LABEL_0 1 (33.3 %), LABEL_1 0 (0.0 %), LABEL_2 0 (0.0 %), LABEL_3 2 (66.7 %)",
        ]
    );
    assert_eq!(lines[3], "no example of \"LABEL_1\", \"LABEL_2\"");
    assert!(
        lines[4].starts_with("1 example with a blank text (") && lines[4].ends_with("a.jsonl:2)"),
        "{said}"
    );
    assert_eq!(lines.len(), 5);

    let data = records(&[
        json!({"sentence1": "a", "sentence2": "b", "label": 1.0}),
        json!({"sentence1": "a", "sentence2": "b", "label": 4.5}),
    ]);
    let said = data.report.to_string();
    assert!(said.contains("\n2 examples (pairs of texts), 10 tokens"), "{said}");
    assert!(said.ends_with("\nvalues from 1 to 4.5, mean 2.750, standard deviation 1.750"), "{said}");

    let many: Vec<_> = (0..30).map(|label| json!({"text": "a", "label": label % 29 + label / 29})).collect();
    let said = records(&many).report.to_string();
    assert!(said.contains("29 classes: from 1 example (LABEL_0) to 2 examples (LABEL_1)"), "{said}");
    let far =
        records(&[json!({"text": "a", "label": 19}), json!({"text": "a", "label": 0})]).report.to_string();
    assert!(
        far.ends_with(
            "\nno example of \"LABEL_1\", \"LABEL_2\", \"LABEL_3\", \"LABEL_4\", \"LABEL_5\", 13 more"
        ),
        "{far}"
    );
}

#[test]
fn batches_of_many_texts_keep_their_order() {
    // More text than is tokenised at once, a long text among it.
    let text = |index: usize| match index {
        77 => "the sea ".repeat(40_000),
        _ => format!("the {}sea", "river ".repeat(index % 7)),
    };
    let lines: Vec<_> = (0..40_000).map(|index| json!({"text": text(index), "label": index % 3})).collect();
    let data = read("a.jsonl", jsonl(&lines), &LabelOptions::new(16)).unwrap();
    assert_eq!(data.examples.len(), lines.len());
    for (index, example) in data.examples.iter().enumerate() {
        assert_eq!(example.label, Some(Label::Class(index as u32 % 3)));
        assert_eq!(example.source.line, index + 1);
        assert_eq!(example.ids.len(), if index == 77 { 16 } else { 4 + index % 7 });
    }
    let (training, validation) = split_examples(data.examples, Holdout::Count(100), 1).unwrap();
    assert_eq!((training.len(), validation.len()), (39_900, 100));
}

#[test]
fn a_text_without_a_token_is_refused() {
    // The byte-level fixture adds no token of its own.
    let files = Files::new();
    let path =
        files.write("a.jsonl", jsonl(&[json!({"text": "x", "label": 0}), json!({"text": "", "label": 1})]));
    let error = load_labelled(&[path], &tokenizer(), &LabelOptions::new(8)).unwrap_err();
    assert!(matches!(&error, Error::NoToken { location } if location.line == 2), "{error}");
    assert!(error.hint().is_some());
}
