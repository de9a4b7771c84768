//! Bad input: the error names the place, what was expected and what was found, and how to mend it.

mod common;

use std::path::PathBuf;

use common::*;
use lora_sb_data::{Error, Format, LoadOptions, Tokenizer, load};

#[test]
fn bad_records_are_named_by_file_line_and_field() {
    let cases = [
        (
            "a.jsonl",
            "{\"instruction\": \"x\", \"output\": \"y\"}\n\n{\"instruction\": \"x\", \"output\": 3}\n",
            "a.jsonl:3: field \"output\": expected a string, found a number",
        ),
        (
            "a.jsonl",
            "{\"prompt\": \"x\", \"completion\": \"y\"}\n{\"prompt\": \"x\", \"text\": \"y\"}",
            "a.jsonl:2: field \"completion\": expected a string, found no such field",
        ),
        (
            "a.json",
            "[\n {\"text\": \"x\"},\n\n {\"text\": [\"y\"]}]",
            "a.json:4 (element 1): field \"text\": expected a string, found an array",
        ),
        (
            "a.jsonl",
            "{\"messages\": []}",
            "a.jsonl:1: field \"messages\": expected at least one message, found an empty array",
        ),
        (
            "a.jsonl",
            "{\"messages\": {}}",
            "a.jsonl:1: field \"messages\": expected an array of messages, found an object",
        ),
        (
            "a.jsonl",
            "{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}, {\"role\": \"assistant\", \"content\": null}]}",
            "a.jsonl:1: field \"messages[1].content\": expected a string, found null",
        ),
        (
            "a.jsonl",
            "{\"messages\": [{\"content\": \"x\"}]}",
            "a.jsonl:1: field \"messages[0].role\": expected a string, found no such field",
        ),
        (
            "a.jsonl",
            "{\"messages\": [\"x\"]}",
            "a.jsonl:1: field \"messages[0]\": expected an object, found a string",
        ),
        (
            "a.jsonl",
            "{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image_url\"}]}]}",
            "a.jsonl:1: field \"messages[0].content[0].type\": expected \"text\", found \"image_url\"",
        ),
        (
            "a.jsonl",
            "{\"conversations\": [{\"from\": \"robot\", \"value\": \"x\"}]}",
            "a.jsonl:1: field \"conversations[0].from\": expected \"human\", \"gpt\" or \"system\", found \"robot\"",
        ),
    ];
    for (name, content, expected) in cases {
        let (error, said) = error_of(name, content, &with_template(include_str!("fixtures/turns.jinja")));
        assert_eq!(said, expected);
        assert!(error.hint().unwrap().starts_with("accepted: {\""), "{:?}", error.hint());
    }
}

#[test]
fn unknown_shapes_list_their_keys_and_the_accepted_shapes() {
    for (content, found) in [
        ("{\"inputs\": 1, \"labels\": 2}", "the keys \"inputs\", \"labels\""),
        ("{}", "an empty object"),
        ("7", "a number"),
        ("{\"prompt\": \"only\"}", "the keys \"prompt\""),
    ] {
        let (error, said) = error_of("a.jsonl", content, &tokenizer());
        assert_eq!(said, format!("a.jsonl:1: expected a record of a known shape, found {found}"));
        let hint = error.hint().unwrap();
        for shape in ["messages", "instruction", "prompt", "text"] {
            assert!(hint.contains(&format!("{{\"{shape}\":")), "{hint}");
        }
    }
    let files = Files::new();
    let path = files.write("a.jsonl", "{\"text\": \"x\"}");
    let options = LoadOptions { format: Some(Format::Alpaca), ..LoadOptions::new(9) };
    let error = load(&[path], &tokenizer(), &options).unwrap_err().to_string();
    assert!(error.ends_with("found the keys \"text\" (format alpaca)"), "{error}");
    let path = files.write("a.txt", "x");
    let error = load(&[path], &tokenizer(), &options).unwrap_err().to_string();
    assert!(error.contains("format: expected \"text\"") && error.contains("found \"alpaca\""), "{error}");
}

#[test]
fn broken_json_is_named_by_line_and_column() {
    let cases = [
        ("a.jsonl", "{\"text\": \"x\"}\n{\"text\": \"x\"", "a.jsonl:2: column 12: broken JSON: EOF"),
        ("a.jsonl", "{\"text\": 'x'}", "a.jsonl:1: column 10: broken JSON: expected value"),
        (
            "a.json",
            "[{\"text\": \"x\"},\n  {\"text\": }]",
            "a.json:2 (element 1): column 12: broken JSON: expected value",
        ),
        (
            "a.json",
            "[{\"text\":\n\n  1 2}]",
            "a.json:3 (element 0): column 5: broken JSON: expected `,` or `}`",
        ),
        (
            "a.json",
            "[{\"text\": \"x\"}\n {\"text\": \"y\"}]",
            "a.json:2 (element 0): column 2: broken JSON: expected `,` or `]`",
        ),
        ("a.json", "[{\"text\": \"x\"}", "a.json:1 (element 0): column 15: broken JSON: expected `,` or `]`"),
        ("a.json", "[{\"text\": \"x\"},", "a.json:1 (element 1): column 16: broken JSON: expected a value"),
        ("a.json", "[]\n]", "a.json:2: column 1: broken JSON: expected the end of the file"),
        ("a.json", "{\"text\": \"x\"}\n{\"text\" \"x\"}", "a.json:2: column 9: broken JSON: expected `:`"),
    ];
    for (name, content, expected) in cases {
        let (error, said) = error_of(name, content, &tokenizer());
        assert!(matches!(error, Error::Json { .. }), "{error}");
        assert!(said.starts_with(expected), "{said:?} should start with {expected:?}");
        assert!(!said.contains(" at line "), "{said}");
    }
}

#[test]
fn files_that_are_missing_empty_or_of_another_kind() {
    let tokenizer = tokenizer();
    let options = LoadOptions::new(64);
    for missing in ["no/such/file.jsonl", "no/such/file.bin"] {
        let error = load(&[PathBuf::from(missing)], &tokenizer, &options).unwrap_err();
        assert!(error.to_string().starts_with(&format!("{missing}: cannot be read: ")), "{error}");
        assert!(error.hint().is_some());
    }
    for (name, content) in [("a.jsonl", "\n \n"), ("a.json", " []"), ("a.json", ""), ("a.txt", " \n")] {
        let (error, said) = error_of(name, content, &tokenizer);
        assert!(matches!(error, Error::Empty { .. }), "{error}");
        assert_eq!(said, format!("no record in {name}"));
    }
    assert!(matches!(load(&[], &tokenizer, &options).unwrap_err(), Error::Empty { .. }));
    for (name, found, hint) in
        [("a.gz", "gz", "data.jsonl.gz"), ("a.csv.gz", "csv.gz", "JSON"), ("a.jsonl.zst", "zst", "unpack")]
    {
        let (error, said) = error_of(name, "x", &tokenizer);
        let expected = "is not one of .jsonl, .json, .txt (or these with .gz)";
        assert_eq!(said, format!("{name}: the extension {found:?} {expected}"));
        assert!(error.hint().unwrap().contains(hint), "{:?}", error.hint());
    }
    let (_, said) = error_of("a.csv", "x", &tokenizer);
    assert!(said.contains("\"csv\""));
    let (error, said) = error_of("a.txt", b"one\ntwo \xff", &tokenizer);
    assert_eq!(said, "a.txt:2: expected UTF-8 text, found the byte 0xff");
    assert!(error.hint().unwrap().contains("iconv"));
}

#[test]
fn a_chat_needs_a_template_and_an_answer_an_end() {
    let chat = "{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}, {\"role\": \"assistant\", \"content\": \"y\"}]}";
    let files = Files::new();
    files.write("tokenizer.json", TOKENIZER);
    files.write("tokenizer_config.json", CONFIG);
    let mut tokenizer = Tokenizer::from_dir(files.path()).unwrap();
    let (error, said) = error_of("a.jsonl", chat, &tokenizer);
    assert!(
        said.starts_with("a.jsonl:1: the record is a chat, but the tokenizer has no chat template"),
        "{said}"
    );
    assert!(said.contains("{chat_template.jinja, chat_template.json, tokenizer_config.json}"), "{said}");
    assert!(error.hint().unwrap().contains("--chat-template"));

    tokenizer.load_chat_template(&files.write("t.jinja", include_str!("fixtures/brackets.jinja"))).unwrap();
    let two_users = "{\"messages\": [{\"role\": \"system\", \"content\": \"x\"}]}";
    let (error, said) = error_of("a.jsonl", two_users, &tokenizer);
    assert!(
        said.starts_with("a.jsonl:1: the chat template refuses the chat: user and assistant take turns"),
        "{said}"
    );
    assert!(error.hint().is_some());
    let error = tokenizer.load_chat_template(&files.write("t.jinja", "{% if %}")).unwrap_err();
    assert!(error.to_string().contains("t.jinja: syntax error"), "{error}");
    assert!(matches!(tokenizer.load_chat_template("no/such".as_ref()), Err(Error::Read { .. })));

    let endless = Tokenizer::from_bytes(TOKENIZER, None).unwrap();
    let (error, said) = error_of("a.jsonl", "{\"prompt\": \"x\", \"completion\": \"y\"}", &endless);
    assert!(said.starts_with("a.jsonl:1: the answer needs an end-of-sequence token"), "{said}");
    assert!(error.hint().unwrap().contains("eos_token"));
}

#[test]
fn tokenizers_that_cannot_be_loaded() {
    let files = Files::new();
    let error = Tokenizer::from_dir(files.path()).unwrap_err();
    assert!(error.to_string().contains("tokenizer.json: cannot be read"), "{error}");
    assert!(error.hint().unwrap().contains("Hugging Face model"));
    files.write("tokenizer.model", "x");
    assert!(Tokenizer::from_dir(files.path()).unwrap_err().hint().unwrap().contains("save_pretrained"));
    files.write("tokenizer.json", "{}");
    let error = Tokenizer::from_dir(files.path()).unwrap_err();
    assert!(error.to_string().contains("expected a Hugging Face tokenizer.json"), "{error}");
    files.write("tokenizer.json", TOKENIZER);
    files.write("tokenizer_config.json", "{");
    let error = Tokenizer::from_dir(files.path()).unwrap_err();
    assert!(error.to_string().contains("tokenizer_config.json: broken JSON"), "{error}");
    files.write("tokenizer_config.json", "{\"eos_token\": \"</s>\"}");
    let error = Tokenizer::from_dir(files.path()).unwrap_err();
    assert!(error.to_string().contains("expected the eos_token \"</s>\" in the vocabulary"), "{error}");
}

#[test]
fn special_tokens_and_templates_come_from_the_files_of_a_model() {
    let files = Files::new();
    files.write("tokenizer.json", TOKENIZER);
    let tokenizer = Tokenizer::from_dir(files.path()).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.vocab_size()), (None, None, 420));
    assert!(tokenizer.chat_template().is_none());

    files.write("config.json", "{\"eos_token_id\": 0}");
    assert_eq!(Tokenizer::from_dir(files.path()).unwrap().eos(), Some(0));
    files.write("generation_config.json", "{\"eos_token_id\": [3, 2, 99999]}");
    let tokenizer = Tokenizer::from_dir(files.path()).unwrap();
    assert_eq!((tokenizer.eos(), tokenizer.stop_tokens()), (Some(3), &[3, 2][..]));
    files.write("special_tokens_map.json", "{\"bos_token\": \"<|begin|>\", \"eos_token\": \"<|turn|>\"}");
    files.write("tokenizer_config.json", "{\"eos_token\": {\"content\": \"<|end|>\"}, \"chat_template\": [{\"name\": \"tools\", \"template\": \"T\"}, {\"name\": \"default\", \"template\": \"D\"}]}");
    let tokenizer = Tokenizer::from_dir(files.path()).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.stop_tokens()), (Some(1), Some(2), &[2, 3][..]));
    assert_eq!(tokenizer.id_of("<|turn|>"), Some(3));
    assert_eq!(tokenizer.chat_template().unwrap().source(), "D");
    files.write("chat_template.json", "{\"chat_template\": \"J\"}");
    assert_eq!(Tokenizer::from_dir(files.path()).unwrap().chat_template().unwrap().source(), "J");
    files.write("chat_template.jinja", "{{ bos_token }}F{{ eos_token }}");
    let tokenizer = Tokenizer::from_dir(files.path()).unwrap();
    assert_eq!(tokenizer.chat_template().unwrap().render(&[], None, false).unwrap(), "<|begin|>F<|end|>");
}
