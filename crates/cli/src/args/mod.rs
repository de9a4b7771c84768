//! The command line, as it is typed.
//!
//! Every setting of a run is an `Option` here: what was not typed is decided in [`resolve`](crate::resolve).
//! Names are those of PEFT, TRL and Axolotl; a recipe file has the same names with underscores.

mod bench;
mod choice;
mod settings;

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand};
use lora_sb_model::SaveType;
use lora_sb_tune::config::Precision;
use lora_sb_tune::eval::Metric;

use crate::device::DeviceChoice;

pub(crate) use bench::{BenchArgs, RECORDS};
pub(crate) use choice::{
    BestMetric, EXCESS_LENGTH, InitConvention, InitEta, MethodChoice, PROBLEM_TYPES, ProblemType, Ranks,
    TRAIN_ON, name_of,
};
pub(crate) use settings::SettingsArgs;

/// Flags of other programs, and the one of this program that does the same.
pub(crate) const ELSEWHERE: [(&str, &str); 10] = [
    ("--use-rslora", "--method rslora"),
    ("--use-dora", "--method dora"),
    ("--init-lora-weights", "--method"),
    ("--adapter-type", "--method"),
    ("--lora-rank", "--rank"),
    ("--max-seq-length", "--max-length"),
    ("--sequence-len", "--max-length"),
    ("--micro-batch-size", "--per-device-train-batch-size"),
    ("--num-epochs", "--num-train-epochs"),
    ("--model-name-or-path", "--model"),
];

/// Fine-tune language models on a fraction of the usual trainable parameters.
#[derive(Debug, Parser)]
#[command(
    name = "lora-sb",
    version,
    arg_required_else_help = true,
    subcommand_required = true,
    max_term_width = 110,
    args_override_self = true,
    after_help = "Examples:
  lora-sb train                                   the built-in model and text: a first look
  lora-sb train --model DIR --data chats.jsonl    your model, your data
  lora-sb plan --model DIR --data chats.jsonl     what that would do, and its memory
  lora-sb generate --adapter lora-sb-run --prompt \"Once\""
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Fine-tune a model and write a run directory
    #[command(after_help = "Examples:
  lora-sb train
  lora-sb train --model DIR --data chats.jsonl --rank 64 --output-dir run
  lora-sb train --config recipe.toml --learning-rate 1e-3
  lora-sb train --resume latest --output-dir run

Without --model and --data the model and the text that are built in are used. Ctrl-C finishes \
the step, saves and exits; --resume goes on from there. A recipe file holds the same names with \
underscores, as `rank = 64`. Exit codes: 0 done, 1 failed, 2 wrong arguments, 130 interrupted.")]
    Train(Box<SettingsArgs>),
    /// Show what `train` would do with the same arguments: parameters, memory, tokens, every value and its source
    #[command(after_help = "Examples:
  lora-sb plan
  lora-sb plan --model DIR --data chats.jsonl --per-device-train-batch-size 8
  lora-sb plan --model config.json --method all --rank 32,64,96")]
    ///
    /// Without --data, or with several methods or ranks, a table of the trained, stored and total parameters, for
    /// which a config.json is enough.
    Plan(Box<PlanArgs>),
    /// Write text with a model, with or without an adapter
    #[command(after_help = "Examples:
  lora-sb generate --prompt \"Once upon a time\"
  lora-sb generate --adapter lora-sb-run --prompt \"ROMEO:\" --temperature 0.8 --seed 7
  lora-sb generate --model DIR --adapter run --prompts prompts.txt
  lora-sb generate --model DIR --adapter run --prompt \"Q: 2 + 2\" --stop \"Q:\" --temperature 0")]
    Generate(GenerateArgs),
    /// Say the class or value of texts with an encoder, as JSON lines
    #[command(after_help = "Examples:
  lora-sb predict --adapter run --text \"A fine film.\"
  lora-sb predict --adapter run --text \"He sleeps.\" --text-pair \"Someone is awake.\"
  lora-sb predict --model DIR --adapter run --data test.jsonl")]
    Predict(PredictArgs),
    /// Add an adapter to its model's weights and write a plain Hugging Face model directory
    #[command(after_help = "Examples:
  lora-sb merge --model DIR --adapter run --out merged
  lora-sb merge --model DIR --adapter run --out merged --dtype f32")]
    Merge(MergeArgs),
    /// Write an adapter for other tools
    #[command(after_help = "Examples:
  lora-sb export --adapter run --format peft --out peft-adapter")]
    Export(ExportArgs),
    /// Compare what an export or a merged model computes with the native adapter
    #[command(after_help = "Examples:
  lora-sb verify --model DIR --adapter run --exported peft-adapter
  lora-sb verify --model DIR --adapter run --exported merged")]
    Verify(VerifyArgs),
    /// Average adapters that share A and B into one, exactly
    #[command(after_help = "Examples:
  lora-sb average --adapter run-1 --adapter run-2 --out average
  lora-sb average --adapter run-1 --adapter run-2 --weight 3 --weight 1 --out average")]
    Average(AverageArgs),
    /// Show what is in a model, adapter, checkpoint or run directory, and whether it is whole
    #[command(after_help = "Examples:
  lora-sb inspect lora-sb-run
  lora-sb inspect lora-sb-run --json")]
    Inspect(InspectArgs),
    /// Show what this machine has to compute with, which device is taken, and whether it computes right
    #[command(after_help = "Examples:
  lora-sb doctor
  lora-sb doctor --json

A GPU needs NVIDIA's driver and nothing else. Its matrix products are those of cuBLASLt where that is found: in the \
system's library path, a CUDA toolkit, a Python environment with PyTorch, or where the variable LORA_SB_CUBLASLT \
says. Exit code 1: the device that would be taken does not work.")]
    Doctor(DoctorArgs),
    /// Measure training steps of a model or a preset: speed beside the device's own, memory, time by operation
    #[command(after_help = "Examples:
  lora-sb bench --model llama-160m --max-length 256 --dtype bf16
  lora-sb bench --model roberta-large --rank 24 --method lora
  lora-sb bench --model DIR --data chats.jsonl --record
  lora-sb bench --model llama-3.2-1b --steps 0 --decode 64

Nothing is kept of the training. The rate of matrix products is measured before and after the steps, on the model's own \
layers and in the same type; the share is of the better one.")]
    Bench(BenchArgs),
}

/// What `plan` takes.
#[derive(Debug, Default, Args)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) settings: SettingsArgs,
    /// Print one JSON object
    #[arg(long, help_heading = "Run")]
    pub(crate) json: bool,
}

/// What `generate` takes.
#[derive(Debug, Args)]
#[command(allow_negative_numbers = true)]
#[command(group = clap::ArgGroup::new("what").required(true))]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) source: ModelArgs,
    /// Adapter directory, PEFT directory, or run directory
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    pub(crate) adapter: Option<PathBuf>,
    /// What activations are held and multiplied in. bf16: what linear layers and attention read and write is bf16,
    /// summed in f32; weights of another type are rounded to bf16 once [default: f32, on a GPU bf16]
    #[arg(long, value_name = "TYPE", value_parser = choice::precision(), help_heading = "Model")]
    pub(crate) dtype: Option<Precision>,
    /// Text to continue
    #[arg(long, value_name = "TEXT", group = "what", help_heading = "Text")]
    pub(crate) prompt: Option<String>,
    /// File with one prompt a line; the continuations are printed as JSON lines
    #[arg(long, value_name = "FILE", group = "what", help_heading = "Text")]
    pub(crate) prompts: Option<PathBuf>,
    /// Prompts of the file that are continued together
    #[arg(long, value_name = "N", default_value_t = 16, help_heading = "Text")]
    pub(crate) batch_size: usize,
    /// Texts that end the continuation, which is printed up to the first of them
    #[arg(long, value_name = "TEXT", num_args = 1.., help_heading = "Text")]
    pub(crate) stop: Vec<String>,
    /// Most tokens to write; an end-of-sequence token ends sooner
    #[arg(long, value_name = "TOKENS", default_value_t = 200, help_heading = "Text")]
    pub(crate) max_new_tokens: usize,
    /// Randomness: 0 always takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.8, help_heading = "Sampling")]
    pub(crate) temperature: f64,
    /// Draw from the K likeliest tokens alone; 0 draws from all
    #[arg(long, value_name = "K", default_value_t = 0, help_heading = "Sampling")]
    pub(crate) top_k: usize,
    /// Draw from the fewest likeliest tokens that hold this share of the probability
    #[arg(long, value_name = "SHARE", default_value_t = 1.0, help_heading = "Sampling")]
    pub(crate) top_p: f64,
    /// Seed of the draws
    #[arg(long, value_name = "N", default_value_t = 42, help_heading = "Sampling")]
    pub(crate) seed: u64,
}

/// Which model, and what computes it.
#[derive(Debug, Args)]
pub(crate) struct ModelArgs {
    /// Directory of a Hugging Face model [default: the model of the adapter's run, or the built-in one]
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    pub(crate) model: Option<PathBuf>,
    /// What computes: cpu, cuda:N for the GPU of that number, or auto for the first GPU that can be used and where there is
    /// none the processor [default: auto; of merge and export, which compute little, cpu]
    #[arg(long, value_name = "DEVICE", value_parser = DeviceChoice::from_str, help_heading = "Model")]
    pub(crate) device: Option<DeviceChoice>,
    /// Threads of the processor [default: all cores]
    #[arg(long, value_name = "N", help_heading = "Model")]
    pub(crate) threads: Option<usize>,
}

/// What `predict` takes.
#[derive(Debug, Args)]
#[command(allow_negative_numbers = true)]
#[command(group = clap::ArgGroup::new("what").required(true))]
pub(crate) struct PredictArgs {
    #[command(flatten)]
    pub(crate) source: ModelArgs,
    /// Adapter directory, PEFT directory, or run directory
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    pub(crate) adapter: Option<PathBuf>,
    /// Names of the classes in the order of their numbers, parted by commas [default: those of the adapter or model]
    #[arg(long, value_name = "NAMES", num_args = 1.., value_delimiter = ',', help_heading = "Model")]
    pub(crate) label_names: Option<Vec<String>>,
    /// What activations are held and multiplied in. bf16: what linear layers and attention read and write is bf16,
    /// summed in f32; weights of another type are rounded to bf16 once [default: f32, on a GPU bf16]
    #[arg(long, value_name = "TYPE", value_parser = choice::precision(), help_heading = "Model")]
    pub(crate) dtype: Option<Precision>,
    /// Text to classify
    #[arg(long, value_name = "TEXT", group = "what", help_heading = "Text")]
    pub(crate) text: Option<String>,
    /// Second text of a pair
    #[arg(long, value_name = "TEXT", requires = "text", help_heading = "Text")]
    pub(crate) text_pair: Option<String>,
    /// Files of texts, with or without labels; with labels the scores are printed at the end
    #[arg(long, value_name = "FILE", num_args = 1.., group = "what", help_heading = "Text")]
    pub(crate) data: Option<Vec<PathBuf>>,
    /// Longest text in tokens, longer ones are cut [default: that of the run, or what the model allows]
    #[arg(long, value_name = "TOKENS", help_heading = "Text")]
    pub(crate) max_length: Option<usize>,
    /// Texts that are computed together
    #[arg(long, value_name = "N", default_value_t = 32, help_heading = "Text")]
    pub(crate) batch_size: usize,
    /// Scores to print [default: all of the task]
    #[arg(
        long,
        value_name = "NAMES",
        num_args = 1..,
        value_delimiter = ',',
        value_parser = choice::metric(),
        help_heading = "Text"
    )]
    pub(crate) metrics: Option<Vec<Metric>>,
}

/// What `merge` takes.
#[derive(Debug, Args)]
pub(crate) struct MergeArgs {
    #[command(flatten)]
    pub(crate) source: ModelArgs,
    /// Adapter directory, PEFT directory, or run directory
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    pub(crate) adapter: PathBuf,
    /// Directory to write; must not exist yet
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    pub(crate) out: PathBuf,
    /// Element type of the weights [default: that of the model]
    #[arg(long, value_name = "TYPE", value_parser = choice::dtype(), help_heading = "Output")]
    pub(crate) dtype: Option<SaveType>,
}

/// What `export` takes.
#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    #[command(flatten)]
    pub(crate) source: ModelArgs,
    /// Adapter directory or run directory
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    pub(crate) adapter: PathBuf,
    /// Whose format
    #[arg(long, value_name = "FORMAT", value_parser = ["peft"], default_value = "peft", help_heading = "Output")]
    pub(crate) format: String,
    /// Directory to write; must not exist yet
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    pub(crate) out: PathBuf,
    /// Element type of the adapter's tensors
    #[arg(long, value_name = "TYPE", value_parser = choice::dtype(), default_value = "f32", help_heading = "Output")]
    pub(crate) dtype: SaveType,
    /// Rank to fill the matrices up to with zeros, for tools that want one rank for all adapters
    #[arg(long, value_name = "R", help_heading = "Output")]
    pub(crate) pad_rank: Option<usize>,
}

/// What `verify` takes.
#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    #[command(flatten)]
    pub(crate) source: ModelArgs,
    /// Adapter directory or run directory
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    pub(crate) adapter: PathBuf,
    /// PEFT directory or merged model to compare with it
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    pub(crate) exported: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// What `average` takes.
#[derive(Debug, Args)]
#[command(allow_negative_numbers = true)]
pub(crate) struct AverageArgs {
    /// Adapter directory or run directory; at least two
    #[arg(long, value_name = "DIR", required = true)]
    pub(crate) adapter: Vec<PathBuf>,
    /// Weight of each adapter, in their order [default: all alike]
    #[arg(long, value_name = "WEIGHT")]
    pub(crate) weight: Vec<f64>,
    /// Directory to write; must not exist yet
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
}

/// What `inspect` takes.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Directory of a model, an adapter (native or PEFT), a checkpoint or a run
    pub(crate) dir: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// What `doctor` takes.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}
