//! Tiny models, data and the command, for the tests of this crate.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use lora_sb_kernels::{Cpu, Kernels};
use lora_sb_model::{Config, Model, SaveType, save_model};

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
        let kernels: Arc<dyn Kernels> = Arc::new(Cpu::new(1).unwrap());
        let model =
            Model::random(Config::from_json(config(vocabulary).as_bytes()).unwrap(), kernels, 3).unwrap();
        save_model(&self.path(name), &model, SaveType::F32, &mut |_, values| Ok(values)).unwrap();
        let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/tests/fixtures/tokenizer.json");
        std::fs::copy(tokenizer, self.path(name).join("tokenizer.json")).unwrap();
        self.write(Path::new(name).join("tokenizer_config.json"), r#"{"eos_token": "<|end|>"}"#);
    }

    /// The command, in this directory.
    pub(crate) fn command(&self, arguments: &[impl AsRef<OsStr>]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lora-sb"));
        command
            .current_dir(self.dir.path())
            .args(arguments)
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
