//! The parameter table of `plan`, out of published configurations.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::common::{Run, Workshop, json};

fn config(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/configs").join(name)
}

fn plan(shop: &Workshop, config: &Path, arguments: &str) -> Run {
    let mut command = shop.command(&["plan", "--model"]);
    Run::of(command.arg(config).args(arguments.split_whitespace()).output().unwrap())
}

fn trained(table: &Value, method: &str, rank: impl Into<Value>) -> u64 {
    let rank = rank.into();
    let row =
        table["rows"].as_array().unwrap().iter().find(|row| row["method"] == method && row["rank"] == rank);
    row.unwrap_or_else(|| panic!("{method} {rank} is not in {table}"))["trained"].as_u64().unwrap()
}

/// arXiv 2411.19557, tables 1 to 3, of four architectures.
#[test]
fn the_figures_of_the_paper_come_out_of_config_json() {
    let shop = Workshop::new();
    let cases = [
        ("mistral-7b-v0.1.json", 83_886_080, 85_262_336, [229_376, 917_504, 2_064_384], 7_241_732_096_u64),
        ("gemma-2-9b.json", 108_036_096, 109_885_440, [301_056, 1_204_224, 2_709_504], 9_241_705_984),
        ("llama-3.2-3b.json", 48_627_712, 49_401_856, [200_704, 802_816, 1_806_336], 3_212_749_824),
    ];
    for (name, lora, dora, latent, full) in cases {
        let table = json(&plan(&shop, &config(name), "--method all --rank 32,64,96 --json").ok().out);
        assert_eq!(trained(&table, "lora", 32), lora, "{name}");
        assert_eq!(trained(&table, "dora", 32), dora, "{name}");
        assert_eq!(trained(&table, "full", Value::Null), full, "{name}");
        for (rank, expected) in [32, 64, 96].into_iter().zip(latent) {
            assert_eq!(trained(&table, "lora-sb", rank), expected, "{name}");
            assert_eq!(trained(&table, "lora-xs", rank), expected, "{name}");
        }
        assert_eq!(table["rows"].as_array().unwrap().len(), 8 * 3 + 1);
    }
    let roberta = config("roberta-large.json");
    let table = json(&plan(&shop, &roberta, "--method all --rank 8,16,24 --json").ok().out);
    let figures =
        [("lora", 8, 2_162_688), ("dora", 8, 2_260_992), ("lora-sb", 16, 24_576), ("lora-sb", 24, 55_296)];
    for (method, rank, expected) in figures {
        assert_eq!(trained(&table, method, rank), expected, "{method}");
    }
    assert_eq!(trained(&table, "full", Value::Null), 355_359_744);
}

#[test]
fn the_table_needs_no_weights_and_no_tokenizer() {
    let shop = Workshop::new();
    for file in ["model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::remove_file(shop.path("model").join(file)).unwrap();
    }
    let table = shop.run("plan --model model --method lora-sb --rank 3,5").ok().out;
    // 14 modules x r x r
    for expected in ["14 linear layers (all-linear)", "method", "of full", "126", "350"] {
        assert!(table.contains(expected), "{expected:?} is not in {table}");
    }
    let lines = table.lines().filter(|line| line.trim_start().starts_with("lora-sb")).count();
    assert_eq!(lines, 2, "{table}");
    let few = shop.run("plan --model model --method lora --rank 3 --target-modules q_proj").ok().out;
    // 2 layers x 3 x (16 + 16)
    assert!(few.contains("192") && few.contains("q_proj"), "{few}");
    assert!(shop.run("plan --method all --rank 8").ok().out.contains("lora-ga"), "the built-in model");
    shop.run("plan --model model --method all --rank 9").failed(1, &["rank 9", "k_proj"]);
    shop.run("plan --model model --method all --rank 0,4").failed(1, &["rank"]);
    shop.run("plan --model model --target-modules q_prj").failed(1, &["q_prj", "q_proj"]);
    shop.run("plan --model model --method all --data data.jsonl").failed(2, &["--method all"]);
    shop.run("plan --model model --rank 3,5 --data data.jsonl").failed(2, &["--rank 3,5"]);
    shop.write("broken.json", "{\"model_type\": \"llama\"}");
    shop.run("plan --model broken.json --method all").failed(1, &["broken.json", "hidden_size"]);
    shop.run("plan --model none.json --method all").failed(1, &["none.json"]);
}
