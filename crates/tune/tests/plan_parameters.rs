//! Every parameter count of the literature that the program is held to, from `config.json` files alone.

mod common;

use common::device::root;
use lora_sb_model::Config;
use lora_sb_tune::plan::{ParameterReport, ParameterRow, ParameterTable};
use lora_sb_tune::{Error, Method, Targets};

/// The configuration of a published model, kept with the model's crate.
fn config(name: &str) -> Config {
    let path = root().join("crates/model/tests/configs").join(name);
    let json = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    Config::from_json(&json).unwrap()
}

fn table(config: &Config, targets: &Targets, ranks: &[usize]) -> ParameterTable {
    ParameterTable::new(config, targets, &[], &Method::ALL, ranks).unwrap()
}

fn row(table: &ParameterTable, method: Method, rank: usize) -> ParameterRow {
    let at = |row: &&ParameterRow| row.method == method && row.rank.is_none_or(|own| own == rank);
    *table.rows.iter().find(at).unwrap()
}

/// Tables 1 and 2 of arXiv 2411.19557, with DoRA's magnitudes.
#[test]
fn decoders() {
    let cases = [
        (
            "mistral-7b-v0.1.json",
            81_920 * 32,
            83_886_080,
            85_262_336,
            [229_376, 917_504, 2_064_384],
            7_241_732_096,
        ),
        (
            "gemma-2-9b.json",
            80_384 * 42,
            108_036_096,
            109_885_440,
            [301_056, 1_204_224, 2_709_504],
            9_241_705_984,
        ),
        (
            "llama-3.2-3b.json",
            54_272 * 28,
            48_627_712,
            49_401_856,
            [200_704, 802_816, 1_806_336],
            3_212_749_824,
        ),
    ];
    for (name, sides, lora, dora, latent, full) in cases {
        let config = config(name);
        let table = table(&config, &Targets::AllLinear, &[32, 64, 96]);
        assert_eq!((table.model, table.head), (full, 0), "{name}");
        for (index, rank) in [32, 64, 96].into_iter().enumerate() {
            for method in [Method::LoraSb, Method::LoraXs] {
                let found = row(&table, method, rank);
                assert_eq!(found.trained, latent[index], "{name} {method} {rank}");
                assert_eq!(found.stored, latent[index] + rank * sides);
                assert_eq!(found.total, full + found.stored);
            }
            for method in [Method::Lora, Method::RsLora, Method::LoraPro] {
                let found = row(&table, method, rank);
                assert_eq!(
                    (found.trained, found.stored),
                    (lora / 32 * rank, rank * sides),
                    "{name} {method}"
                );
            }
            for method in [Method::Pissa, Method::LoraGa] {
                let found = row(&table, method, rank);
                assert_eq!(
                    (found.trained, found.stored),
                    (rank * sides, 2 * rank * sides),
                    "{name} {method}"
                );
            }
            assert_eq!(row(&table, Method::Dora, rank).trained, dora + lora / 32 * (rank - 32), "{name}");
            let report = ParameterReport::new(&config, Method::LoraSb, rank, &config.sites());
            assert_eq!((report.trained, report.full, report.model), (latent[index], full, full));
        }
        let whole = row(&table, Method::Full, 32);
        assert_eq!((whole.rank, whole.trained, whole.head, whole.total), (None, full, 0, full), "{name}");
    }
}

/// RoBERTa-large with the four targets of the authors' code.
#[test]
fn encoder() {
    let config = config("roberta-large.json");
    let targets = Targets::parse("query,value,attention.output.dense,output.dense");
    let table =
        ParameterTable::new(&config, &targets, &["classifier".to_owned()], &Method::ALL, &[8, 16, 24])
            .unwrap();
    assert_eq!(table.sites, 24 * 4);
    // Without the layer that a task adds, and with it.
    let (body, last) = (355_359_744, 2 * 1024 + 2);
    assert_eq!((table.model, table.head), (body + last, last));
    for (rank, expected) in [(8, 6_144), (16, 24_576), (24, 55_296)] {
        let found = row(&table, Method::LoraSb, rank);
        assert_eq!((found.trained, found.head), (expected, 1024 * 1024 + 1024 + last));
    }
    assert_eq!(row(&table, Method::Lora, 8).trained, 2_162_688);
    assert_eq!(row(&table, Method::Dora, 8).trained, 2_260_992);
    let full = row(&table, Method::Full, 8);
    assert_eq!((full.trained, full.head, full.stored), (body, last, body + last));
}

#[test]
fn a_rank_or_a_name_that_does_not_fit_is_an_error() {
    let config = config("llama-3.2-3b.json");
    let at = |targets: &str, head: &[String], rank| {
        ParameterTable::new(&config, &Targets::parse(targets), head, &[Method::LoraSb], &[rank]).unwrap_err()
    };
    assert!(matches!(at("k_proj", &[], 1025), Error::RankTooLarge { rank: 1025, out: 1024, .. }));
    // Of all targets the one that allows least, so that its hint is right for all.
    assert!(matches!(at("q_proj,k_proj", &[], 4000), Error::RankTooLarge { out: 1024, .. }));
    assert!(matches!(at("query", &[], 8), Error::UnknownTarget { .. }));
    assert!(at("k_proj", &[], 0).to_string().starts_with("rank"));
    let message = at("k_proj", &["classifier".into()], 8).to_string();
    assert!(message.contains("no classification head"), "{message}");
}
