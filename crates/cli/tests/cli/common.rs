//! Tiny models, data and the command, for the tests of this crate.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use lora_sb_kernels::{Cpu, Kernels};
use lora_sb_model::{Config, Model, SaveType, Storage, save_model};

/// A temporary directory with a model `model`, data `data.jsonl` and what the commands write.
pub(crate) struct Workshop {
    dir: tempfile::TempDir,
}

/// `data.jsonl`: prompts and completions of unequal lengths.
pub(crate) fn records(count: usize) -> String {
    (0..count)
        .map(|index| {
            let (a, b) = (index % 7, index / 7);
            let completion = " the river ".repeat(1 + index % 3);
            format!("{{\"prompt\": \"{a} and {b} is\", \"completion\": \"{completion}{}\"}}\n", a + b)
        })
        .collect()
}

/// `config.json` of the tiny model.
pub(crate) fn config(vocabulary: usize) -> String {
    format!(
        r#"{{"model_type": "llama", "vocab_size": {vocabulary}, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
            "max_position_embeddings": 96, "initializer_range": 0.2, "made_by": "a test"}}"#
    )
}

/// `config.json` of a tiny BERT; its vocabulary is larger than the tokenizer's, as published ones are.
pub(crate) const ENCODER_CONFIG: &str = r#"{"model_type": "bert", "vocab_size": 170, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 40,
    "initializer_range": 0.2, "made_by": "a test"}"#;

/// Texts whose class follows from a word.
pub(crate) fn labelled_records(count: usize) -> String {
    let record = |index: usize| {
        let (class, place) = [("harbour", "the sea"), ("valley", "a river")][index * 7 / 3 % 2];
        let text = format!("{} {place} {}", index % 5, "and it ".repeat(index % 4));
        format!("{{\"sentence\": \"{text}\", \"label\": \"{class}\"}}\n")
    };
    (0..count).map(record).collect()
}

impl Workshop {
    pub(crate) fn new() -> Self {
        let workshop = Workshop { dir: tempfile::tempdir().unwrap() };
        workshop.write_model("model", 420);
        std::fs::write(workshop.path("data.jsonl"), records(29)).unwrap();
        workshop
    }

    pub(crate) fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn read(&self, name: impl AsRef<Path>) -> Vec<u8> {
        let path = self.path(name);
        std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    pub(crate) fn write(&self, name: impl AsRef<Path>, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    /// A random model with the tokenizer of the data crate's tests.
    pub(crate) fn write_model(&self, name: &str, vocabulary: usize) {
        self.write_decoder(name, &config(vocabulary));
    }

    /// The same of any `config.json`.
    pub(crate) fn write_decoder(&self, name: &str, config: &str) {
        self.write_random(name, config, "tokenizer.json");
        self.write(Path::new(name).join("tokenizer_config.json"), r#"{"eos_token": "<|end|>"}"#);
    }

    /// A workshop with a random BERT as `model`, without a classifier as after its pre-training, and labelled texts
    /// as `data.jsonl`.
    pub(crate) fn encoder() -> Self {
        let workshop = Workshop { dir: tempfile::tempdir().unwrap() };
        workshop.write_random("model", ENCODER_CONFIG, "wordpiece.json");
        let mut weights = workshop.read("model/model.safetensors");
        // What begins with `cls.` is the head of the pre-training, which nobody reads.
        replace(&mut weights, "\"classifier.weight", "\"cls.sifier.weight");
        replace(&mut weights, "\"classifier.bias", "\"cls.sifier.bias");
        workshop.write("model/model.safetensors", weights);
        workshop.write("data.jsonl", labelled_records(41));
        workshop
    }

    /// A random model of a `config.json` with one of the data crate's tokenizers.
    pub(crate) fn write_random(&self, name: &str, config: &str, tokenizer: &str) {
        let kernels: Arc<dyn Kernels> = Arc::new(Cpu::new(1).unwrap());
        let config = Config::from_json(config.as_bytes()).unwrap();
        let model = Model::random(config, kernels, 3, Storage::Trainable).unwrap();
        save_model(&self.path(name), &model, SaveType::F32, &mut |_, values| Ok(values)).unwrap();
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/tests/fixtures");
        std::fs::copy(fixtures.join(tokenizer), self.path(name).join("tokenizer.json")).unwrap();
    }

    /// The command, in this directory.
    pub(crate) fn command(&self, arguments: &[impl AsRef<OsStr>]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lora-sb"));
        command
            .current_dir(self.dir.path())
            .args(arguments)
            // What is expected is what the processor does, on machines with a GPU, too.
            .env("CUDA_VISIBLE_DEVICES", "")
            .env_remove("NO_COLOR")
            .env_remove("CLICOLOR_FORCE");
        command
    }

    /// Runs the command to its end.
    pub(crate) fn run(&self, arguments: &str) -> Run {
        let words: Vec<&str> = arguments.split_whitespace().collect();
        Run::of(self.command(&words).output().unwrap())
    }

    /// A small training run into `out`, with further arguments.
    pub(crate) fn train(&self, out: &str, arguments: &str) -> Run {
        self.run(&format!("train {SMALL} --output-dir {out} {arguments}"))
    }
}

/// The arguments of a run of 8 steps that takes a moment.
pub(crate) const SMALL: &str = "--model model --data data.jsonl --rank 3 --max-length 40 --threads 1 --val-set-size 5 \
     --per-device-train-batch-size 2 --gradient-accumulation-steps 2 --max-steps 8 --eval-steps 3 --save-steps 2 \
     --save-total-limit 8 --logging-steps 2 --init-samples 7";

/// The same for the encoder's workshop.
pub(crate) const SMALL_ENCODER: &str = "--model model --data data.jsonl --rank 3 --max-length 12 --threads 1 \
     --val-set-size 9 --per-device-train-batch-size 4 --max-steps 8 --eval-steps 4 --save-steps 2 \
     --save-total-limit 8 --logging-steps 2 --init-samples 7 --learning-rate 2e-2";

/// Replaces text in the header of a safetensors file by text of the same length.
pub(crate) fn replace(bytes: &mut [u8], from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
}

/// Reads a text that a command wrote for machines.
#[track_caller]
pub(crate) fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// The same of one object a line.
#[track_caller]
pub(crate) fn json_lines(text: &str) -> Vec<serde_json::Value> {
    text.lines().map(json).collect()
}

/// What a command came to.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Run {
    pub(crate) fn of(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).expect("output is UTF-8");
        Run { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }

    /// It must have gone well.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{}\n{}", self.out, self.err);
        self
    }

    /// It must have failed with a code, an error that names all of `names`, and a hint.
    #[track_caller]
    pub(crate) fn failed(self, code: i32, names: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "{}\n{}", self.out, self.err);
        let error = self.err.lines().position(|line| line.starts_with("error: "));
        let hint = self.err.lines().position(|line| line.starts_with("hint: "));
        assert!(matches!((error, hint), (Some(error), Some(hint)) if error < hint), "{}", self.err);
        for name in names {
            assert!(self.err.contains(name), "{name:?} is not in {}", self.err);
        }
        assert!(!self.err.contains("panicked") && !self.err.contains("RUST_BACKTRACE"), "{}", self.err);
        self
    }
}
