//! The settings of a run, as they are typed or stand in a recipe.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use lora_sb_data::{ExcessLength, Format, TrainOn};
use lora_sb_tune::Bases;
use lora_sb_tune::config::{ByteSize, GradientCheckpointing, Precision};
use lora_sb_tune::eval::Metric;
use lora_sb_tune::optim::Scheduler;

use super::choice::{self, BestMetric, InitConvention, InitEta, MethodChoice, ProblemType, Ranks};
use crate::device::DeviceChoice;

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
    /// What computes: cpu, cuda:N for the GPU of that number, or auto for the first GPU that can be used and where there is
    /// none the processor [default: auto]
    #[arg(long, value_name = "DEVICE", value_parser = DeviceChoice::from_str, help_heading = "Run")]
    pub(crate) device: Option<DeviceChoice>,
    /// Threads of the processor; the results do not depend on it [default: all cores]
    #[arg(long, value_name = "N", help_heading = "Run")]
    pub(crate) threads: Option<usize>,
    /// Print only the result and errors
    #[arg(long, short, help_heading = "Run")]
    pub(crate) quiet: bool,

    /// Directory of a Hugging Face model (config.json, safetensors, tokenizer.json); for the parameter table of
    /// `plan` a config.json is enough [default: the built-in one]
    #[arg(long, value_name = "DIR", help_heading = "Model and data")]
    pub(crate) model: Option<PathBuf>,
    /// Start from random weights; of the model only config.json and the tokenizer are read. With --method full
    /// that is training from scratch; an adapter on random weights learns nothing and is for planning and
    /// measuring
    #[arg(
        long,
        value_name = "BOOL",
        num_args = 0..=1,
        default_missing_value = "true",
        help_heading = "Model and data"
    )]
    pub(crate) random_weights: Option<bool>,
    /// Training data: .jsonl, .json or .txt, also with .gz [default: with the built-in model, the plays of Shakespeare]
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
    #[arg(long, value_name = "SHAPE", value_parser = choice::format(), help_heading = "Model and data")]
    pub(crate) format: Option<Format>,
    /// Jinja chat template to use instead of the tokenizer's
    #[arg(long, value_name = "FILE", help_heading = "Model and data")]
    pub(crate) chat_template: Option<PathBuf>,
    /// Which tokens the loss is taken over; plain text is trained whole [default: completion]
    #[arg(long, value_name = "PART", value_parser = choice::train_on(), help_heading = "Model and data")]
    pub(crate) train_on: Option<TrainOn>,
    /// Longest example in tokens [default: 512, for encoders 128, or what the model allows if that is less]
    #[arg(long, value_name = "TOKENS", help_heading = "Model and data")]
    pub(crate) max_length: Option<usize>,
    /// What becomes of longer examples [default: split for text, truncate for the others]
    #[arg(long, value_name = "HOW", value_parser = choice::excess_length(), help_heading = "Model and data")]
    pub(crate) excess_length_strategy: Option<ExcessLength>,

    /// What is trained; `plan` takes `all` for its table [default: lora-sb]
    #[arg(
        long,
        value_name = "METHOD",
        value_parser = choice::method(),
        help_heading = "Adapter"
    )]
    pub(crate) method: Option<MethodChoice>,
    /// Rank r of the adapter: LoRA-SB trains r x r values a module; `plan` takes several for its table, as
    /// 32,64,96 [default: 64]
    #[arg(long, short = 'r', alias = "lora-r", value_name = "R", value_parser = Ranks::from_str, help_heading = "Adapter")]
    pub(crate) rank: Option<Ranks>,
    /// The update is scaled by lora-alpha / rank, with rslora by lora-alpha / sqrt(rank) [default: the rank, a scale
    /// of 1, or of sqrt(rank)]
    #[arg(long, value_name = "ALPHA", help_heading = "Adapter")]
    pub(crate) lora_alpha: Option<f64>,
    /// Share of the adapter's inputs that is left out in training, another at each step [default: 0]
    #[arg(long, value_name = "SHARE", help_heading = "Adapter")]
    pub(crate) lora_dropout: Option<f64>,
    /// Modules that get an adapter: all-linear, or names parted by commas, as q_proj,v_proj
    /// [default: all-linear; for encoders query,value,attention.output.dense,output.dense]
    #[arg(long, alias = "lora-target-modules", value_name = "NAMES", help_heading = "Adapter")]
    pub(crate) target_modules: Option<String>,
    /// Where lora-sb and lora-xs start: sb from the first update, sb-gradient from the first gradient without its
    /// sign, sb-zero from the bases of sb with R = 0, xs from the weights, w0-orthonormal from their singular
    /// vectors with R = 0, random-orthonormal from random ones [default: the method's own]
    #[arg(long, value_name = "START", value_parser = choice::init(), help_heading = "Adapter")]
    pub(crate) init: Option<Bases>,
    /// Training examples that lora-sb and lora-ga estimate the first gradient on [default: 0.1 % of the data, at least 32]
    #[arg(long, value_name = "N", help_heading = "Adapter")]
    pub(crate) init_samples: Option<usize>,
    /// Size of the simulated first step: a number, or `reference` for the authors' lr / (warmup_ratio x steps)
    /// [default: the learning rate of the first step]
    #[arg(long, value_name = "ETA", value_parser = InitEta::from_str, help_heading = "Adapter")]
    pub(crate) init_eta: Option<InitEta>,
    /// How the samples' gradients are summed: each sample alike, or as the authors' code does
    /// [default: per-sample]
    #[arg(long, value_name = "HOW", value_parser = choice::init_convention(), help_heading = "Adapter")]
    pub(crate) init_convention: Option<InitConvention>,

    /// Number of classes [default: that of the data]
    #[arg(long, value_name = "N", help_heading = "Classification (BERT, RoBERTa)")]
    pub(crate) num_labels: Option<usize>,
    /// Names of the classes in the order of their numbers, parted by commas [default: the model's where the data
    /// uses them, else the data's]
    #[arg(
        long,
        value_name = "NAMES",
        num_args = 1..,
        value_delimiter = ',',
        help_heading = "Classification (BERT, RoBERTa)"
    )]
    pub(crate) label_names: Option<Vec<String>>,
    /// Whether labels are classes or numbers to be predicted [default: numbers where one has a fraction, as 3.8]
    #[arg(
        long,
        value_name = "TYPE",
        value_parser = choice::problem_type(),
        help_heading = "Classification (BERT, RoBERTa)"
    )]
    pub(crate) problem_type: Option<ProblemType>,
    /// Where the model's head has another number of labels, draw a new one instead of ending with an error; whatever
    /// fits is kept [default: false]
    #[arg(
        long,
        value_name = "BOOL",
        num_args = 0..=1,
        default_missing_value = "true",
        help_heading = "Classification (BERT, RoBERTa)"
    )]
    pub(crate) ignore_mismatched_sizes: Option<bool>,
    /// Modules of the classification head that are trained in full beside the adapter, parted by commas
    /// [default: classifier]
    #[arg(long, value_name = "NAMES", help_heading = "Classification (BERT, RoBERTa)")]
    pub(crate) modules_to_save: Option<String>,
    /// Steps that train these modules alone, at the peak learning rate, before the adapter is made: the first gradient
    /// of lora-sb and lora-ga comes through the head, which may be new and random [default: 0, as in the paper]
    #[arg(long, value_name = "STEPS", help_heading = "Classification (BERT, RoBERTa)")]
    pub(crate) head_warmup_steps: Option<usize>,
    /// Scores that are shown [default: accuracy for classes, pearson for numbers]
    #[arg(
        long,
        value_name = "NAMES",
        num_args = 1..,
        value_delimiter = ',',
        value_parser = choice::metric(),
        help_heading = "Classification (BERT, RoBERTa)"
    )]
    pub(crate) metrics: Option<Vec<Metric>>,
    /// What chooses the best checkpoint: the held-out loss or a score [default: loss]
    #[arg(
        long,
        value_name = "NAME",
        value_parser = choice::best_metric(),
        help_heading = "Classification (BERT, RoBERTa)"
    )]
    pub(crate) metric_for_best_model: Option<BestMetric>,

    /// Peak learning rate [default: 2e-3 for lora-sb, 4e-3 for lora-xs, 2e-5 for full, 2e-4 for the others; for
    /// encoders 1e-3, 1e-3, 2e-5, 4e-4]
    #[arg(long, visible_alias = "lr", value_name = "LR", help_heading = "Optimizer")]
    pub(crate) learning_rate: Option<f64>,
    /// LoRA+: the learning rate of B is that of A times this; for methods that train both [default: 1]
    #[arg(long, value_name = "RATIO", help_heading = "Optimizer")]
    pub(crate) loraplus_lr_ratio: Option<f64>,
    /// Course of the learning rate after the warm-up [default: linear]
    #[arg(long, value_name = "COURSE", value_parser = choice::scheduler(), help_heading = "Optimizer")]
    pub(crate) lr_scheduler_type: Option<Scheduler>,
    /// Warm-up as a share of all optimizer steps [default: 0.02, for encoders 0.06]
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

    /// Examples of one micro-batch [default: 4, for encoders 32]
    #[arg(long, value_name = "N", help_heading = "Batches and length of the run")]
    pub(crate) per_device_train_batch_size: Option<usize>,
    /// Examples of one batch of the evaluation [default: 4, for encoders 32]
    #[arg(long, value_name = "N", help_heading = "Batches and length of the run")]
    pub(crate) per_device_eval_batch_size: Option<usize>,
    /// Micro-batches of one optimizer step [default: 8, for encoders 1]
    #[arg(long, value_name = "N", help_heading = "Batches and length of the run")]
    pub(crate) gradient_accumulation_steps: Option<usize>,
    /// Passes over the training data [default: 1, for encoders 3]
    #[arg(long, value_name = "EPOCHS", help_heading = "Batches and length of the run")]
    pub(crate) num_train_epochs: Option<f64>,
    /// Optimizer steps; goes before --num-train-epochs [default: not set]
    #[arg(long, value_name = "STEPS", help_heading = "Batches and length of the run")]
    pub(crate) max_steps: Option<usize>,

    /// What activations are held and multiplied in. bf16: what linear layers and attention read and write is bf16,
    /// summed in f32; the residual stream, the loss, what is trained, its gradients and the optimizer's moments stay
    /// f32; frozen weights are rounded to bf16 once, at load [default: f32, on a GPU bf16]
    #[arg(long, value_name = "TYPE", value_parser = choice::precision(), help_heading = "Speed and memory")]
    pub(crate) dtype: Option<Precision>,
    /// The most memory that the process may take, or of a GPU's, as 4GiB or 800MiB: the run is laid out to fit, and not
    /// begun if it cannot [default: what the system or the GPU has free]
    #[arg(long, value_name = "SIZE", value_parser = choice::memory_limit, help_heading = "Speed and memory")]
    pub(crate) memory_limit: Option<ByteSize>,
    /// Compute blocks again in the backward pass: less memory, up to a third more work, the same bits. true: all
    /// blocks, a number: so many, auto: as few as fit [default: auto]
    #[arg(
        long,
        value_name = "BLOCKS",
        num_args = 0..=1,
        default_missing_value = "true",
        value_parser = choice::gradient_checkpointing,
        help_heading = "Speed and memory"
    )]
    pub(crate) gradient_checkpointing: Option<GradientCheckpointing>,
    /// Tokens whose loss is computed together [default: as many as take 32 MiB, on a GPU 256 MiB, fewer where nothing else
    /// makes the run fit]
    #[arg(long, value_name = "ROWS", help_heading = "Speed and memory")]
    pub(crate) loss_chunk: Option<usize>,

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
