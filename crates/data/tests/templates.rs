//! Published chat templates, where the environment variable `LORA_SB_TEMPLATES` names a folder of `.jinja` files.

mod common;

use common::*;
use lora_sb_data::{Color, LoadOptions, Tokenizer, load, preview};
use serde_json::{Value, json};

const WORDS: [&str; 2] = ["Beneath the old pear tree.", "It ripens in autumn."];

/// The fixture with the tokens that the template writes in `<|...|>` and the like.
fn tokenizer_for(template: &str) -> Tokenizer {
    let mut file: Value = serde_json::from_slice(TOKENIZER).unwrap();
    let mut tokens: Vec<String> =
        ["<end_of_turn>", "<start_of_turn>", "[INST]", "[/INST]"].map(String::from).into();
    let mut rest = template;
    while let Some(open) = rest.find("<|") {
        rest = &rest[open..];
        if let Some(close) = rest.find("|>").filter(|&close| !rest[..close].contains(['\n', '{', ' '])) {
            tokens.push(rest[..close + 2].to_owned());
        }
        rest = &rest[2..];
    }
    let added = file["added_tokens"].as_array_mut().unwrap();
    for token in tokens {
        if !added.iter().any(|known| known["content"] == token) {
            let id = 416 + added.len();
            added.push(json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}));
        }
    }
    Tokenizer::from_bytes(file.to_string().as_bytes(), Some(CONFIG)).unwrap()
}

#[test]
fn published_templates_train_the_assistants_words() {
    let Some(folder) = std::env::var_os("LORA_SB_TEMPLATES") else {
        eprintln!("skipped: LORA_SB_TEMPLATES is not set to a folder of .jinja files");
        return;
    };
    let system = json!({"role": "system", "content": "Answer shortly."});
    let turns = [
        json!({"role": "user", "content": "Where do we meet?"}),
        json!({"role": "assistant", "content": WORDS[0]}),
        json!({"role": "user", "content": "And the fruit?"}),
        json!({"role": "assistant", "content": WORDS[1]}),
    ];
    let with_system = json!({"messages": [system, turns[0], turns[1]]});
    let without = json!({"messages": turns});
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "jinja"));
    files.sort();
    assert!(!files.is_empty(), "the folder holds no .jinja file");
    let mut failed = Vec::new();
    for file in files {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let source = std::fs::read_to_string(&file).unwrap();
        let mut tokenizer = tokenizer_for(&source);
        if let Err(error) = tokenizer.load_chat_template(&file) {
            failed.push(format!("{name}: {error}"));
            continue;
        }
        for (chat, record, words) in [("system", &with_system, &WORDS[..1]), ("turns", &without, &WORDS[..])]
        {
            let folder = Files::new();
            let path = folder.write("chat.jsonl", jsonl(std::slice::from_ref(record)));
            let dataset = match load(&[path], &tokenizer, &LoadOptions::new(1 << 20)) {
                Ok(dataset) => dataset,
                Err(error) => {
                    eprintln!("{name}, {chat}: {error}");
                    // Some templates have no system role; every one takes turns.
                    if chat == "turns" {
                        failed.push(format!("{name}, {chat}: {error}"));
                    }
                    continue;
                }
            };
            let example = &dataset.examples[0];
            eprintln!("{name}, {chat}: {:?}", preview(&tokenizer, example, Color::Never).unwrap());
            let runs = trained(&tokenizer, example);
            let right = runs.len() == words.len()
                && runs.iter().zip(words).all(|(run, words)| {
                    let after = run.find(words).map(|at| &run[at + words.len()..]);
                    after.is_some_and(|after| after.trim().chars().count() < 24)
                });
            let ends = runs.last().is_some_and(|run| !run.ends_with(words[words.len() - 1]));
            if !right || !ends {
                failed.push(format!("{name}, {chat}: {runs:?}"));
            }
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}
