//! The command line, as it is typed.
//!
//! Every setting of a run is an `Option` here: what was not typed is decided in [`resolve`](crate::resolve).
//! Names are those of PEFT, TRL and Axolotl; a recipe file has the same names with underscores.

use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};
use lora_sb_data::{ExcessLength, Format, TrainOn};
use lora_sb_model::SaveType;
use lora_sb_tune::Method;
use lora_sb_tune::optim::Scheduler;

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
  lora-sb plan --model DIR --data chats.jsonl --per-device-train-batch-size 8")]
    Plan(Box<SettingsArgs>),
    /// Write text with a model, with or without an adapter
    #[command(after_help = "Examples:
  lora-sb generate --prompt \"Once upon a time\"
  lora-sb generate --adapter lora-sb-run --prompt \"ROMEO:\" --temperature 0.8 --seed 7
  lora-sb generate --model DIR --adapter run --prompts prompts.txt")]
    Generate(GenerateArgs),
    /// Add an adapter to its model's weights and write a plain Hugging Face model directory
    #[command(after_help = "Examples:
  lora-sb merge --model DIR --adapter run --out merged
  lora-sb merge --model DIR --adapter run --out merged --dtype f32")]
    Merge(MergeArgs),
    /// Write an adapter for other tools
    #[command(after_help = "Examples:
  lora-sb export --adapter run --format peft --out peft-adapter")]
    Export(ExportArgs),
    /// Show what is in a model, adapter, checkpoint or run directory, and whether it is whole
    #[command(after_help = "Examples:
  lora-sb inspect lora-sb-run
  lora-sb inspect lora-sb-run --json")]
    Inspect(InspectArgs),
}

/// The settings of a run. All have defaults, which `plan` shows with the values of a given run.
#[derive(Debug, Default, Args)]
#[command(allow_negative_numbers = true)]
pub(crate) struct SettingsArgs {
    /// Recipe of settings, TOML; what is typed here goes before it. Paths in it are relative to the working
    /// directory, as here
    #[arg(long, value_name = "FILE", help_heading = "Run")]
    pub(crate) config: Option<PathBuf>,
    /// Where the run is written; must not exist yet [default: lora-sb-run]
    #[arg(long, value_name = "DIR", help_heading = "Run")]
    pub(crate) output_dir: Option<PathBuf>,
    /// Go on from a checkpoint: its directory, or `latest` for the newest of --output-dir. Settings that are not
    /// given are those of the run
    #[arg(long, value_name = "CHECKPOINT", help_heading = "Run")]
    pub(crate) resume: Option<PathBuf>,
    /// Seed of every random draw [default: 42]
    #[arg(long, value_name = "N", help_heading = "Run")]
    pub(crate) seed: Option<u64>,
    /// Threads; the results do not depend on it [default: all cores]
    #[arg(long, value_name = "N", help_heading = "Run")]
    pub(crate) threads: Option<usize>,
    /// Print only the result and errors
    #[arg(long, short, help_heading = "Run")]
    pub(crate) quiet: bool,

    /// Directory of a Hugging Face model (config.json, safetensors, tokenizer.json) [default: the built-in one]
    #[arg(long, value_name = "DIR", help_heading = "Model and data")]
    pub(crate) model: Option<PathBuf>,
    /// Start from random weights; of the model only config.json and the tokenizer are read (with --method full)
    #[arg(
        long,
        value_name = "BOOL",
        num_args = 0..=1,
        default_missing_value = "true",
        help_heading = "Model and data"
    )]
    pub(crate) random_weights: Option<bool>,
    /// Training data: .jsonl, .json or .txt [default: with the built-in model, the plays of Shakespeare]
    #[arg(long, value_name = "FILE", num_args = 1.., help_heading = "Model and data")]
    pub(crate) data: Option<Vec<PathBuf>>,
    /// Held-out data for the evaluation
    #[arg(long, value_name = "FILE", num_args = 1.., help_heading = "Model and data")]
    pub(crate) validation_data: Option<Vec<PathBuf>>,
    /// Examples held out of --data where no --validation-data is given: a share below 1 or a number
    /// [default: 0]
    #[arg(long, value_name = "N", help_heading = "Model and data")]
    pub(crate) val_set_size: Option<f64>,
    /// Shape of the records [default: detected in each file]
    #[arg(long, value_name = "SHAPE", value_parser = format(), help_heading = "Model and data")]
    pub(crate) format: Option<Format>,
    /// Jinja chat template to use instead of the tokenizer's
    #[arg(long, value_name = "FILE", help_heading = "Model and data")]
    pub(crate) chat_template: Option<PathBuf>,
    /// Which tokens the loss is taken over; plain text is trained whole [default: completion]
    #[arg(long, value_name = "PART", value_parser = train_on(), help_heading = "Model and data")]
    pub(crate) train_on: Option<TrainOn>,
    /// Longest example in tokens [default: 512, or what the model allows if that is less]
    #[arg(long, value_name = "TOKENS", help_heading = "Model and data")]
    pub(crate) max_length: Option<usize>,
    /// What becomes of longer examples [default: split for text, truncate for the others]
    #[arg(long, value_name = "HOW", value_parser = excess_length(), help_heading = "Model and data")]
    pub(crate) excess_length_strategy: Option<ExcessLength>,

    /// What is trained [default: lora-sb]
    #[arg(long, value_name = "METHOD", value_parser = method(), help_heading = "Adapter")]
    pub(crate) method: Option<Method>,
    /// Rank r of the adapter: LoRA-SB trains r x r values a module [default: 64]
    #[arg(long, short = 'r', alias = "lora-r", value_name = "R", help_heading = "Adapter")]
    pub(crate) rank: Option<usize>,
    /// The update is scaled by lora-alpha / rank [default: the rank, which makes the scale 1]
    #[arg(long, value_name = "ALPHA", help_heading = "Adapter")]
    pub(crate) lora_alpha: Option<f64>,
    /// Modules that get an adapter: all-linear, or names parted by commas, as q_proj,v_proj
    /// [default: all-linear]
    #[arg(long, alias = "lora-target-modules", value_name = "NAMES", help_heading = "Adapter")]
    pub(crate) target_modules: Option<String>,
    /// Training examples that LoRA-SB estimates the first update on [default: 0.1 % of the data, at least 32]
    #[arg(long, value_name = "N", help_heading = "Adapter")]
    pub(crate) init_samples: Option<usize>,
    /// Size of the simulated first step: a number, or `reference` for the authors' lr / (warmup_ratio x steps)
    /// [default: the learning rate of the first step]
    #[arg(long, value_name = "ETA", value_parser = InitEta::from_str, help_heading = "Adapter")]
    pub(crate) init_eta: Option<InitEta>,
    /// How the samples' gradients are summed: each sample alike, or as the authors' code does
    /// [default: per-sample]
    #[arg(long, value_name = "HOW", value_parser = init_convention(), help_heading = "Adapter")]
    pub(crate) init_convention: Option<InitConvention>,

    /// Peak learning rate [default: 2e-3 for lora-sb, 4e-3 for lora-xs, 2e-4 for lora, 2e-5 for full]
    #[arg(long, visible_alias = "lr", value_name = "LR", help_heading = "Optimizer")]
    pub(crate) learning_rate: Option<f64>,
    /// Course of the learning rate after the warm-up [default: linear]
    #[arg(long, value_name = "COURSE", value_parser = scheduler(), help_heading = "Optimizer")]
    pub(crate) lr_scheduler_type: Option<Scheduler>,
    /// Warm-up as a share of all optimizer steps [default: 0.02]
    #[arg(long, value_name = "SHARE", help_heading = "Optimizer")]
    pub(crate) warmup_ratio: Option<f64>,
    /// Warm-up in optimizer steps; goes before --warmup-ratio where it is not 0 [default: 0]
    #[arg(long, value_name = "STEPS", help_heading = "Optimizer")]
    pub(crate) warmup_steps: Option<usize>,
    /// Decoupled weight decay of matrices [default: 0]
    #[arg(long, value_name = "DECAY", help_heading = "Optimizer")]
    pub(crate) weight_decay: Option<f64>,
    /// Decay of AdamW's first moment [default: 0.9]
    #[arg(long, value_name = "BETA", help_heading = "Optimizer")]
    pub(crate) adam_beta1: Option<f64>,
    /// Decay of AdamW's second moment [default: 0.999]
    #[arg(long, value_name = "BETA", help_heading = "Optimizer")]
    pub(crate) adam_beta2: Option<f64>,
    /// Added to the root of AdamW's second moment [default: 1e-8]
    #[arg(long, value_name = "EPSILON", help_heading = "Optimizer")]
    pub(crate) adam_epsilon: Option<f64>,
    /// Gradients are scaled down to this global norm; 0 leaves them [default: 1]
    #[arg(long, value_name = "NORM", help_heading = "Optimizer")]
    pub(crate) max_grad_norm: Option<f64>,

    /// Examples of one micro-batch [default: 4]
    #[arg(long, value_name = "N", help_heading = "Batches and length of the run")]
    pub(crate) per_device_train_batch_size: Option<usize>,
    /// Examples of one batch of the evaluation [default: 4]
    #[arg(long, value_name = "N", help_heading = "Batches and length of the run")]
    pub(crate) per_device_eval_batch_size: Option<usize>,
    /// Micro-batches of one optimizer step [default: 8]
    #[arg(long, value_name = "N", help_heading = "Batches and length of the run")]
    pub(crate) gradient_accumulation_steps: Option<usize>,
    /// Passes over the training data [default: 1]
    #[arg(long, value_name = "EPOCHS", help_heading = "Batches and length of the run")]
    pub(crate) num_train_epochs: Option<f64>,
    /// Optimizer steps; goes before --num-train-epochs [default: not set]
    #[arg(long, value_name = "STEPS", help_heading = "Batches and length of the run")]
    pub(crate) max_steps: Option<usize>,
    /// Compute blocks again in the backward pass: less memory, a third more work, the same bits [default: false]
    #[arg(
        long,
        value_name = "BOOL",
        num_args = 0..=1,
        default_missing_value = "true",
        help_heading = "Batches and length of the run"
    )]
    pub(crate) gradient_checkpointing: Option<bool>,

    /// Steps between two evaluations; 0 evaluates at the start and the end alone [default: 100]
    #[arg(long, value_name = "STEPS", help_heading = "Evaluating, saving, showing")]
    pub(crate) eval_steps: Option<usize>,
    /// Steps between two checkpoints; 0 saves at the end alone [default: 100]
    #[arg(long, value_name = "STEPS", help_heading = "Evaluating, saving, showing")]
    pub(crate) save_steps: Option<usize>,
    /// Checkpoints that are kept, the newest and the best [default: 2]
    #[arg(long, value_name = "N", help_heading = "Evaluating, saving, showing")]
    pub(crate) save_total_limit: Option<usize>,
    /// Steps between two lines of progress where the output is no terminal [default: 10]
    #[arg(long, value_name = "STEPS", help_heading = "Evaluating, saving, showing")]
    pub(crate) logging_steps: Option<usize>,
    /// Show how this text is continued before and after the training [default: none]
    #[arg(long, value_name = "TEXT", help_heading = "Evaluating, saving, showing")]
    pub(crate) sample_prompt: Option<String>,
}

/// What `generate` takes.
#[derive(Debug, Args)]
#[command(allow_negative_numbers = true)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) source: ModelArgs,
    /// Adapter directory, PEFT directory, or run directory
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    pub(crate) adapter: Option<PathBuf>,
    /// Text to continue
    #[arg(long, value_name = "TEXT", required_unless_present = "prompts", help_heading = "Text")]
    pub(crate) prompt: Option<String>,
    /// File with one prompt a line; the continuations are printed as JSON lines
    #[arg(long, value_name = "FILE", conflicts_with = "prompt", help_heading = "Text")]
    pub(crate) prompts: Option<PathBuf>,
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

/// Which model, on how many threads.
#[derive(Debug, Args)]
pub(crate) struct ModelArgs {
    /// Directory of a Hugging Face model [default: the model of the adapter's run, or the built-in one]
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    pub(crate) model: Option<PathBuf>,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N", help_heading = "Model")]
    pub(crate) threads: Option<usize>,
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
    #[arg(long, value_name = "TYPE", value_parser = dtype(), help_heading = "Output")]
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
    #[arg(long, value_name = "TYPE", value_parser = dtype(), default_value = "f32", help_heading = "Output")]
    pub(crate) dtype: SaveType,
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

/// `--init-eta` as it is typed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum InitEta {
    /// A number.
    Number(f64),
    /// The authors' formula.
    Reference,
}

impl FromStr for InitEta {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "reference" => Ok(InitEta::Reference),
            _ => text.parse().map(InitEta::Number).map_err(|_| "expected a number or `reference`".into()),
        }
    }
}

/// `--init-convention` as it is typed; the batch size of `reference` is that of the training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InitConvention {
    /// Every sample weighs the same.
    PerSample,
    /// The authors' code.
    Reference,
}

/// A parser of a fixed list of names; those with an underscore are understood and not shown.
fn choice<T: Copy + Send + Sync + 'static>(
    list: &'static [(&'static str, T)],
) -> impl TypedValueParser<Value = T> {
    let names = list.iter().map(|(name, _)| PossibleValue::new(*name).hide(name.contains('_')));
    PossibleValuesParser::new(names).try_map(move |text: String| {
        let found = list.iter().find(|(name, _)| *name == text);
        found.map(|(_, value)| *value).ok_or_else(|| format!("{text:?} is not in the list"))
    })
}

const FORMATS: [(&str, Format); 4] = [
    ("alpaca", Format::Alpaca),
    ("prompt-completion", Format::PromptCompletion),
    ("messages", Format::Messages),
    ("text", Format::Text),
];

pub(crate) const TRAIN_ON: [(&str, TrainOn); 2] =
    [("completion", TrainOn::Completion), ("everything", TrainOn::Everything)];

pub(crate) const EXCESS_LENGTH: [(&str, ExcessLength); 4] = [
    ("truncate", ExcessLength::Truncate),
    ("split", ExcessLength::Split),
    ("drop", ExcessLength::Drop),
    ("raise", ExcessLength::Raise),
];

const METHODS: [(&str, Method); 6] = [
    ("lora-sb", Method::LoraSb),
    ("lora-xs", Method::LoraXs),
    ("lora", Method::Lora),
    ("full", Method::Full),
    ("lora_sb", Method::LoraSb),
    ("lora_xs", Method::LoraXs),
];

const SCHEDULERS: [(&str, Scheduler); 3] =
    [("constant", Scheduler::Constant), ("linear", Scheduler::Linear), ("cosine", Scheduler::Cosine)];

const CONVENTIONS: [(&str, InitConvention); 2] =
    [("per-sample", InitConvention::PerSample), ("reference", InitConvention::Reference)];

const DTYPES: [(&str, SaveType); 3] =
    [("f32", SaveType::F32), ("bf16", SaveType::Bf16), ("f16", SaveType::F16)];

fn format() -> impl TypedValueParser<Value = Format> {
    choice(&FORMATS)
}

fn train_on() -> impl TypedValueParser<Value = TrainOn> {
    choice(&TRAIN_ON)
}

fn excess_length() -> impl TypedValueParser<Value = ExcessLength> {
    choice(&EXCESS_LENGTH)
}

fn method() -> impl TypedValueParser<Value = Method> {
    choice(&METHODS)
}

fn scheduler() -> impl TypedValueParser<Value = Scheduler> {
    choice(&SCHEDULERS)
}

fn init_convention() -> impl TypedValueParser<Value = InitConvention> {
    choice(&CONVENTIONS)
}

fn dtype() -> impl TypedValueParser<Value = SaveType> {
    choice(&DTYPES)
}
