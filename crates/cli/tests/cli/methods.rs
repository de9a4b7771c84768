//! Every method from training to other programs' files, and what is made of several adapters.

use lora_sb_tune::Method;

use crate::common::{Run, SMALL, Workshop, json};

#[test]
fn every_method_trains_and_its_result_is_used() {
    let shop = Workshop::new();
    for method in Method::ALL.map(Method::name) {
        shop.train(method, &format!("--method {method} --max-steps 2")).ok();
        let greedy = |source: &str| {
            let arguments = "--prompt sea --max-new-tokens 5 --temperature 0";
            shop.run(&format!("generate {source} {arguments}")).ok().out
        };
        let generated = greedy(&format!("--adapter {method}"));
        assert!(generated.starts_with("sea"), "{generated}");
        shop.run(&format!("merge --adapter {method} --out merged-{method}")).ok();
        assert_eq!(greedy(&format!("--model merged-{method}")), generated, "{method}");
        assert!(shop.run(&format!("inspect {method}")).ok().out.contains(method));
        if method == "full" {
            continue;
        }
        shop.run(&format!("export --adapter {method} --out peft-{method}")).ok();
        assert_eq!(greedy(&format!("--model model --adapter peft-{method}")), generated, "{method}");
        for exported in ["peft", "merged"] {
            let verified =
                format!("verify --model model --adapter {method} --exported {exported}-{method} --json");
            let found = json(&shop.run(&verified).ok().out);
            assert_eq!(found["equal"], true, "{method}: {found}");
        }
        let inspected = json(&shop.run(&format!("inspect {method}/adapter --json")).ok().out);
        assert_eq!(inspected["method"], method);
    }
    shop.run("export --adapter full --out none").failed(1, &["full fine-tuning has no adapter"]);
    shop.run("verify --adapter full --exported peft-lora").failed(1, &["full fine-tuning has no adapter"]);
    // Another adapter's export is another adapter's.
    shop.run("verify --adapter lora-sb --exported peft-lora-xs").failed(1, &["peft-lora-xs"]);
    shop.run("verify --adapter lora-sb --exported merged-full").failed(1, &["merged-full"]);
    shop.run("verify --adapter lora-sb --exported lora").failed(1, &["lora", "PEFT directory or a model"]);
}

#[test]
fn settings_of_methods_are_used_or_refused() {
    let shop = Workshop::new();
    let plan = |arguments: &str| {
        let run = shop.run(&format!("plan {SMALL} --json {arguments}")).ok();
        json(&run.out)["plan"].take()
    };
    let value = |arguments: &str, name: &str| plan(arguments)[name]["value"].clone();
    assert_eq!(value("--method RS_LoRA", "method"), "rslora");
    assert_eq!(value("--method lora_pro", "method"), "lora-pro");
    assert_eq!(value("", "init"), "sb");
    assert_eq!(value("--method lora-xs", "init"), "xs");
    assert_eq!(value("--method lora-xs --init sb_zero", "init"), "sb-zero");
    assert_eq!(value("--lora-dropout 0.1", "lora_dropout"), 0.1);
    assert_eq!(value("--method lora --loraplus-lr-ratio 16", "loraplus_lr_ratio"), 16.0);
    assert!(plan("--method lora").get("init").is_none());
    assert!(plan("--init xs").get("init_eta").is_none(), "no gradient is estimated for it");

    let train = |arguments: &str| shop.train("run", arguments);
    train("--method pissa --init sb").failed(2, &["--init sb", "pissa", "lora-sb and lora-xs"]);
    train("--loraplus-lr-ratio 16").failed(1, &["loraplus_lr_ratio", "lora-sb", "dora"]);
    train("--method lora --loraplus-lr-ratio 0").failed(1, &["loraplus_lr_ratio"]);
    train("--lora-dropout 1").failed(1, &["lora_dropout", "below 1"]);
    train("--method all").failed(2, &["--method all", "plan"]);
    train("--rank 3,5").failed(2, &["--rank 3,5", "plan"]);
    for (flag, own) in [("--use-rslora", "--method rslora"), ("--use-dora", "--method dora")] {
        let typed = train(flag);
        assert_eq!(typed.code, Some(2));
        assert!(typed.err.contains(own), "{}", typed.err);
    }
    let typed = train("--init svd");
    assert!(typed.code == Some(2) && typed.err.contains("w0-orthonormal"), "{}", typed.err);
    assert!(!shop.path("run").exists());
    // Dropout, LoRA+ and a start of one's own, to the end, and the same again after a resumption.
    train("--method lora --lora-dropout 0.2 --loraplus-lr-ratio 4").ok();
    let whole = shop.read("run/adapter/adapter.safetensors");
    for made in ["run/adapter", "run/checkpoints/step-6", "run/checkpoints/step-8"] {
        std::fs::remove_dir_all(shop.path(made)).unwrap();
    }
    shop.run("train --resume run").ok();
    assert!(shop.read("run/adapter/adapter.safetensors") == whole);
    shop.train("random", "--init random-orthonormal --max-steps 1").ok();
    assert!(shop.run("inspect random/adapter").ok().out.contains("random-orthonormal"));
}

#[test]
fn adapters_that_share_a_and_b_are_averaged() {
    let shop = Workshop::new();
    for (name, rate) in [("one", "1e-2"), ("two", "3e-2")] {
        shop.train(name, &format!("--init random-orthonormal --max-steps 3 --learning-rate {rate}")).ok();
    }
    let run =
        shop.run("average --adapter one --adapter two/adapter --weight 3 --weight 1 --out average").ok();
    assert!(run.out.contains("14 modules"), "{}", run.out);
    shop.run("generate --adapter average --prompt sea --max-new-tokens 3").ok();
    let r = |dir: &str| {
        let file = lora_sb_model::WeightFile::open(&shop.path(dir).join("adapter.safetensors")).unwrap();
        let view = file.get("model.layers.1.mlp.up_proj.lora_R").unwrap().unwrap();
        view.bytes
            .bytes()
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
            .collect::<Vec<_>>()
    };
    let (one, two, average) = (r("one/adapter"), r("two/adapter"), r("average"));
    assert_eq!(average.len(), 9);
    for ((one, two), average) in one.iter().zip(&two).zip(&average) {
        let expected = ((3.0 * f64::from(*one) + f64::from(*two)) / 4.0) as f32;
        assert_eq!(*average, expected);
    }
    shop.train("seed", "--init random-orthonormal --max-steps 1 --seed 7").ok();
    shop.train("lora", "--method lora --max-steps 1").ok();
    shop.run("average --adapter one --adapter seed --out none").failed(1, &["seed/adapter"]);
    shop.run("average --adapter lora --adapter lora --out none").failed(1, &["lora"]);
    shop.run("average --adapter one --out none").failed(2, &["--adapter", "two"]);
    shop.run("average --adapter one --adapter two --weight 1 --out none").failed(2, &["--weight", "1 for 2"]);
    shop.run("average --adapter one --adapter two --weight 1 --weight -1 --out none").failed(1, &["weight"]);
    shop.run("average --adapter one --adapter model --out none").failed(1, &["model", "native adapter"]);
    shop.run("average --adapter one --adapter two --out model").failed(1, &["model", "--out"]);
    assert!(!shop.path("none").exists());
}

#[test]
fn an_export_is_padded_to_a_rank_and_says_who_cannot_load_it() {
    let shop = Workshop::new();
    shop.train("run", "--max-steps 1").ok();
    shop.run("export --adapter run --out padded --pad-rank 8").ok();
    assert_eq!(json(&shop.run("inspect padded --json").ok().out)["rank"], 8);
    shop.run("verify --adapter run --exported padded").ok();
    shop.run("export --adapter run --out less --pad-rank 2").failed(1, &["pad_rank", "2"]);
    shop.train("dora", "--method dora --max-steps 1").ok();
    let exported = shop.run("export --adapter dora --out dora-peft").ok();
    assert!(exported.err.contains("warning:"), "{}", exported.err);
}

#[test]
fn random_weights_are_for_measuring_and_say_so() {
    let shop = Workshop::new();
    std::fs::remove_file(shop.path("model/model.safetensors")).unwrap();
    let run = shop.train("run", "--random-weights --max-steps 2").ok();
    assert!(run.err.contains("warning: lora-sb on random weights"), "{}", run.err);
    assert!(run.out.contains("from random weights"), "{}", run.out);
    let generate = "--prompt sea --max-new-tokens 3 --temperature 0";
    let from_run = shop.run(&format!("generate --adapter run {generate}")).ok().out;
    std::fs::remove_dir_all(shop.path("run/adapter")).unwrap();
    assert_eq!(
        shop.run(&format!("generate --adapter run {generate}")).ok().out,
        from_run,
        "from its checkpoint"
    );
    assert!(shop.run(&format!("plan {SMALL} --random-weights")).ok().out.contains("random"));
    // Without the flag there are no weights.
    shop.train("other", "").failed(1, &["model.safetensors"]);
    let scratch: Run = shop.train("scratch", "--random-weights --method full --max-steps 1").ok();
    assert!(scratch.err.is_empty(), "training from scratch is nothing to warn of: {}", scratch.err);
}

/// Keys that a family's `config.json` has beside those that all have.
const FAMILIES: [(&str, &str); 6] = [
    ("mistral", r#""sliding_window": 7"#),
    ("qwen2", r#""use_sliding_window": false"#),
    ("qwen3", r#""tie_word_embeddings": true"#),
    ("gemma2", r#""sliding_window": 7, "query_pre_attn_scalar": 8, "final_logit_softcapping": 30.0"#),
    ("gemma3_text", r#""sliding_window": 7, "query_pre_attn_scalar": 8"#),
    ("phi3", r#""pad_token_id": 0"#),
];

#[test]
fn every_family_trains_and_its_adapter_goes_out_and_in() {
    let shop = Workshop::new();
    for (family, keys) in FAMILIES {
        let config = crate::common::config(420).replace("\"llama\"", &format!("\"{family}\", {keys}"));
        shop.write_decoder("model", &config);
        shop.train(family, "--max-steps 2").ok();
        let greedy = |source: &str| {
            let arguments = "--prompt sea --max-new-tokens 12 --temperature 0";
            shop.run(&format!("generate {source} {arguments}")).ok().out
        };
        let generated = greedy(&format!("--adapter {family}"));
        for (command, exported) in [("export", "peft"), ("merge", "merged")] {
            shop.run(&format!("{command} --adapter {family} --out {exported}-{family}")).ok();
            shop.run(&format!("verify --adapter {family} --exported {exported}-{family}")).ok();
        }
        assert_eq!(greedy(&format!("--model merged-{family}")), generated, "{family}");
        assert_eq!(json(&shop.run(&format!("inspect merged-{family} --json")).ok().out)["family"], family);
        std::fs::remove_dir_all(shop.path("model")).unwrap();
    }
    let encoder = Workshop::encoder();
    let config = crate::common::ENCODER_CONFIG
        .replace("\"bert\"", "\"roberta\", \"pad_token_id\": 0, \"type_vocab_size\": 1");
    encoder.write_random("model", &config, "wordpiece.json");
    encoder.run(&format!("train {} --output-dir run", crate::common::SMALL_ENCODER)).ok();
    encoder.run("export --adapter run --out peft").ok();
    encoder.run("verify --adapter run --exported peft").ok();
    encoder.run("predict --adapter run --data data.jsonl").ok();
}
