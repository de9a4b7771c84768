//! The law: the supervised tokens are exactly the answer and its end token.

mod common;

use common::*;
use lora_sb_data::{
    Color, Format, LoadOptions, SkipSpecial, Tokenizer, TrainOn, alpaca_prompt, load, preview,
};
use serde_json::{Value, json};

const ANSWERS: &[&str] =
    &["the pear tree", " a river", "42", "naïve 🌳 ∑", "one\n\ntwo\n", "", "\n\nlate", "x "];

/// The trained text of one record with one answer.
fn answer_of(record: Value, tokenizer: &Tokenizer) -> (String, String) {
    let dataset = load_records(&[record], tokenizer);
    let runs = trained(tokenizer, &dataset.examples[0]);
    assert_eq!(runs.len(), 1, "{runs:?}");
    (text(tokenizer, &dataset.examples[0]), runs.concat())
}

#[test]
fn alpaca_trains_the_output_and_the_end() {
    let tokenizer = tokenizer();
    for answer in ANSWERS {
        // "\n" of the prompt and "\n\n" of the answer are "\n\n" and "\n" to the vocabulary: the first is context.
        let expected = answer.strip_prefix('\n').unwrap_or(answer);
        for input in ["", "three apples"] {
            let record = json!({"instruction": "What is it?", "input": input, "output": answer});
            let (whole, words) = answer_of(record, &tokenizer);
            assert_eq!(whole, format!("{}{answer}<|end|>", alpaca_prompt("What is it?", input)));
            assert!(
                words == format!("{answer}<|end|>") || words == format!("{expected}<|end|>"),
                "{words:?}"
            );
            assert_eq!(whole.contains("### Input:\nthree apples\n"), !input.is_empty());
        }
    }
}

#[test]
fn aliases_are_read_and_said() {
    let tokenizer = tokenizer();
    let cases = [
        (json!({"id": 7, "question": "Who?", "answer": "me"}), "alpaca from question, answer; not read: id"),
        (json!({"query": "Who?", "response": "me"}), "alpaca from query, response"),
        (json!({"instruction": "Who?", "response": "me"}), "alpaca from instruction, response"),
        (
            json!({"instruction": "Who?", "context": "", "response": "me", "category": "qa"}),
            "alpaca from instruction, context, response; not read: category",
        ),
    ];
    for (record, said) in cases {
        let dataset = load_records(&[record], &tokenizer);
        assert!(dataset.report.to_string().contains(said), "{}", dataset.report);
        let example = &dataset.examples[0];
        assert_eq!(text(&tokenizer, example), format!("{}me<|end|>", alpaca_prompt("Who?", "")));
        assert_eq!(trained(&tokenizer, example), ["me<|end|>"]);
    }
    let dolly = json!({"instruction": "Who?", "context": "A tree.", "response": "me"});
    assert_eq!(answer_of(dolly, &tokenizer).0, format!("{}me<|end|>", alpaca_prompt("Who?", "A tree.")));
    let null_input = json!({"instruction": "Who?", "input": null, "output": "me"});
    assert_eq!(answer_of(null_input, &tokenizer).0, format!("{}me<|end|>", alpaca_prompt("Who?", "")));
}

#[test]
fn prompts_are_joined_as_they_are_and_a_straddling_token_goes_to_its_words() {
    let tokenizer = tokenizer();
    for answer in ANSWERS {
        let (whole, words) = answer_of(json!({"prompt": "Q: who?\nA:", "completion": answer}), &tokenizer);
        assert_eq!(whole, format!("Q: who?\nA:{answer}<|end|>"));
        assert_eq!(words, format!("{answer}<|end|>"));
    }
    // " the" is one token, of which the prompt has only the space.
    let record = json!({"prompt": "A: ", "completion": "the tree"});
    assert_eq!(answer_of(record, &tokenizer).1, " the tree<|end|>");
    // " tree" holds letters of the prompt, and "\n\n" nothing but blanks.
    assert!(tokenizer.id_of("Ġtree").is_some() && tokenizer.id_of("ĊĊ").is_some());
    let record = json!({"prompt": "a tr", "completion": "ee of the sea"});
    assert_eq!(answer_of(record, &tokenizer).1, " of the sea<|end|>");
    let record = json!({"prompt": "A:\n", "completion": "\n the"});
    assert_eq!(answer_of(record, &tokenizer).1, " the<|end|>");
    // Question and answer under a given format are joined as well.
    let options = LoadOptions { format: Some(Format::PromptCompletion), ..LoadOptions::new(64) };
    let record = jsonl(&[json!({"question": "who?", "answer": " me"})]);
    let dataset = load_text("a.jsonl", record, &tokenizer, &options).unwrap();
    assert_eq!(text(&tokenizer, &dataset.examples[0]), "who? me<|end|>");
}

#[test]
fn the_tokens_are_those_of_the_whole_text() {
    let tokenizer = tokenizer();
    let dataset = load_records(&[json!({"prompt": "the te", "completion": "acher of the tree"})], &tokenizer);
    let mut whole = tokenizer.encode("the teacher of the tree", lora_sb_data::AddSpecial::Yes).unwrap();
    whole.push(tokenizer.eos().unwrap());
    assert_eq!(dataset.examples[0].ids, whole);
}

#[test]
fn bos_and_eos_are_the_post_processors_and_never_doubled() {
    let (bos, eos) = (Some(&1), Some(&2));
    for post_processor_writes_eos in [false, true] {
        let tokenizer = tokenizer_with_bos(post_processor_writes_eos);
        let records = [
            json!({"prompt": "Who?", "completion": " me"}),
            json!({"prompt": "<|begin|>Who?", "completion": " me"}),
            json!({"prompt": "Who?", "completion": " me<|end|>"}),
        ];
        let dataset = load_records(&records, &tokenizer);
        assert_eq!(dataset.report.bos_doubled, 1);
        assert!(dataset.report.to_string().contains("1 text began with the tokenizer's own BOS"));
        for example in &dataset.examples {
            assert_eq!((example.ids.first(), example.ids.last()), (bos, eos));
            assert_eq!(example.ids.iter().filter(|&&id| id == 1).count(), 1);
            assert_eq!(example.ids.iter().filter(|&&id| id == 2).count(), 1);
            assert_eq!(trained(&tokenizer, example), [" me<|end|>"]);
        }
    }
}

#[test]
fn plain_text_is_trained_whole() {
    for tokenizer in [tokenizer(), tokenizer_with_bos(false), tokenizer_with_bos(true)] {
        let rows = load_records(&[json!({"text": "the sea and the wind"})], &tokenizer);
        let options = LoadOptions::new(4096);
        let file = load_text("sea.txt", "the sea and the wind", &tokenizer, &options).unwrap();
        assert_eq!(rows.examples[0].ids, file.examples[0].ids);
        let example = &file.examples[0];
        assert_eq!(example.ids.last(), Some(&2));
        assert_eq!(example.trained_tokens(), example.ids.len() - 1);
    }
}

fn chat() -> Value {
    json!({"messages": [
        {"role": "user", "content": "What is the name of the tree?"},
        {"role": "assistant", "content": "It is the old pear tree."},
        {"role": "user", "content": "thank you"},
        {"role": "assistant", "content": "end"},
    ]})
}

#[test]
fn a_chat_trains_the_assistants_words_and_end_of_turn() {
    let cases = [
        (include_str!("fixtures/turns.jinja"), ["It is the old pear tree.<|end|>", "end<|end|>"]),
        (include_str!("fixtures/brackets.jinja"), [" It is the old pear tree. <|end|>", " end <|end|>"]),
        (include_str!("fixtures/thinking.jinja"), [" It is the old pear tree.<|turn|>", " end<|end|>"]),
        (include_str!("fixtures/plain.jinja"), [" It is the old pear tree.", " end<|end|>"]),
    ];
    for (template, expected) in cases {
        let tokenizer = with_template(template);
        let dataset = load_records(&[chat()], &tokenizer);
        let runs = trained(&tokenizer, &dataset.examples[0]);
        if template.contains("thinking block") {
            // What the template writes between its generation prompt and the words is the model's to write.
            assert_eq!(runs, [expected[0], "<think></think> end<|end|>"]);
        } else {
            assert_eq!(runs, expected, "{}", text(&tokenizer, &dataset.examples[0]));
        }
    }
}

#[test]
fn content_may_be_a_list_and_roles_may_be_sharegpts() {
    let tokenizer = with_template(include_str!("fixtures/turns.jinja"));
    let list = json!({"messages": [
        {"role": "user", "content": [{"type": "text", "text": "What is the name"}, {"type": "text", "value": " of the tree?"}]},
        {"role": "assistant", "content": [{"type": "text", "value": "It is the old pear tree."}]},
        {"role": "user", "content": "thank you"},
        {"role": "assistant", "content": "end"},
    ]});
    let sharegpt = json!({"conversations": [
        {"from": "human", "value": "What is the name of the tree?"},
        {"from": "gpt", "value": "It is the old pear tree."},
        {"from": "human", "value": "thank you"},
        {"from": "gpt", "value": "end"},
    ]});
    let expected = &load_records(&[chat()], &tokenizer).examples[0];
    for record in [list, sharegpt] {
        let example = &load_records(&[record], &tokenizer).examples[0];
        assert_eq!((&example.ids, &example.trained), (&expected.ids, &expected.trained));
    }
}

#[test]
fn the_answer_may_repeat_the_question_or_the_template() {
    for template in ["turns", "brackets", "plain"] {
        let tokenizer = with_template(&fixture(template));
        for word in ["assistant", "yes", "end", "user", "e", "turn", " ) ", "Assistant: Assistant:"] {
            let record = json!({"messages": [
                {"role": "user", "content": word},
                {"role": "assistant", "content": word},
                {"role": "user", "content": word},
                {"role": "assistant", "content": word},
            ]});
            let example = &load_records(&[record], &tokenizer).examples[0];
            let runs = trained(&tokenizer, example);
            assert_eq!(runs.len(), 2, "{template} {word}: {runs:?}");
            for run in runs {
                assert_eq!(run.replace("<|end|>", "").trim(), word.trim(), "{template}");
            }
        }
    }
}

fn fixture(template: &str) -> String {
    let path =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/{template}.jinja"));
    std::fs::read_to_string(path).unwrap()
}

#[test]
fn words_that_the_template_rewrites_are_an_error_that_names_the_record() {
    let shouting = "{% for m in messages %}{{ m.content | upper }}{% endfor %}";
    let (error, said) = error_of("chat.jsonl", jsonl(&[chat()]), &with_template(shouting));
    assert!(said.starts_with("chat.jsonl:1: messages[1]: the assistant's words cannot be found"), "{said}");
    assert!(error.hint().unwrap().contains("--chat-template"));
}

#[test]
fn tool_calls_are_trained_as_the_template_writes_them() {
    let template = "{% for m in messages %}<|turn|>{{ m.role }}: {% if m.tool_calls %}{{ m.tool_calls[0] | tojson }}\
                    {% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}\
                    {% if add_generation_prompt %}<|turn|>assistant: {% endif %}";
    let tokenizer = with_template(template);
    let record = json!({"tools": [], "messages": [
        {"role": "user", "content": "the wind?"},
        {"role": "assistant", "content": null, "tool_calls": [{"name": "wind"}]},
        {"role": "tool", "content": "north"},
        {"role": "assistant", "content": "north"},
    ]});
    let example = &load_records(&[record], &tokenizer).examples[0];
    assert_eq!(trained(&tokenizer, example), [r#"{"name": "wind"}<|end|>"#, " north<|end|>"]);
}

#[test]
fn everything_can_be_trained() {
    let tokenizer = with_template(include_str!("fixtures/turns.jinja"));
    let options = LoadOptions { train_on: TrainOn::Everything, ..LoadOptions::new(512) };
    for record in [chat(), json!({"prompt": "a", "completion": "b"})] {
        let dataset = load_text("a.jsonl", jsonl(&[record]), &tokenizer, &options).unwrap();
        assert_eq!(dataset.examples[0].trained_tokens(), dataset.examples[0].ids.len() - 1);
    }
}

#[test]
fn the_preview_shows_the_mask() {
    let tokenizer = tokenizer();
    let example = &load_records(&[json!({"prompt": "Who?", "completion": " me 🌳"})], &tokenizer).examples[0];
    assert_eq!(preview(&tokenizer, example, Color::Never).unwrap(), "Who?⟦ me 🌳<|end|>⟧");
    let colored = preview(&tokenizer, example, Color::Always).unwrap();
    assert_eq!(colored, "\x1b[2mWho?\x1b[0m\x1b[32m me 🌳<|end|>\x1b[0m");
}

#[test]
fn files_of_each_kind_give_the_same_examples_and_keep_their_lines() {
    let tokenizer = tokenizer();
    let files = Files::new();
    let records = [json!({"prompt": "a", "completion": "b"}), json!({"prompt": "c", "completion": "d\n"})];
    let pretty: Vec<_> = records.iter().map(|record| serde_json::to_string_pretty(record).unwrap()).collect();
    let paths = [
        files.write("a.jsonl", format!("\u{feff}\n{}\r\n\n{}", records[0], records[1])),
        files.write("b.json", format!("\n[\n{} ,\n\n {}]\n", pretty[0], pretty[1])),
        files.write("c.json", format!("{}\n{}", pretty[0], pretty[1])),
        files.write("d.jsonl", format!("[{},\n{}]", records[0], records[1])),
    ];
    let dataset = load(&paths, &tokenizer, &LoadOptions::new(64)).unwrap();
    let places: Vec<_> = dataset.examples.iter().map(|e| (e.source.line, e.source.element)).collect();
    let expected =
        [(2, None), (4, None), (3, Some(0)), (8, Some(1)), (1, None), (5, None), (1, Some(0)), (2, Some(1))];
    assert_eq!(places, expected);
    for pair in dataset.examples.chunks(2).skip(1) {
        assert_eq!((&pair[0].ids, &pair[1].ids), (&dataset.examples[0].ids, &dataset.examples[1].ids));
    }
    let first = &dataset.examples[0];
    assert_eq!(tokenizer.decode(&first.ids, SkipSpecial::Yes).unwrap(), "ab");
}
