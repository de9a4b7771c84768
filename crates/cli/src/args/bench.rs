//! What `bench` takes.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use lora_sb_tune::config::{GradientCheckpointing, Precision};

use super::choice::{self, MethodChoice};
use crate::device::DeviceChoice;

/// Where `--record` writes when no file is given: a file of the day in this folder.
pub(crate) const RECORDS: &str = "records";

/// What `bench` takes.
#[derive(Debug, Args)]
#[command(allow_negative_numbers = true)]
pub(crate) struct BenchArgs {
    /// Directory of a Hugging Face model, a config.json, or a preset: llama-60m, llama-160m, llama-3.2-1b, llama-3.2-3b,
    /// mistral-7b, gemma-2-9b, roberta-large, minilm-l6. Presets, and a config.json without weights beside it, get random
    /// weights, frozen ones in bf16
    #[arg(long, value_name = "MODEL", help_heading = "Model and batches")]
    pub(crate) model: PathBuf,
    /// Examples of a step, which is one micro-batch [default: 4, for encoders 32]
    #[arg(long, value_name = "N", help_heading = "Model and batches")]
    pub(crate) per_device_train_batch_size: Option<usize>,
    /// Tokens of each example; with --data of the longest, longer ones are cut [default: 512, for encoders 128]
    #[arg(long, value_name = "TOKENS", help_heading = "Model and batches")]
    pub(crate) max_length: Option<usize>,
    /// Train on these files, as `train` reads them, instead of on synthetic tokens of one length
    #[arg(long, value_name = "FILE", num_args = 1.., help_heading = "Model and batches")]
    pub(crate) data: Option<Vec<PathBuf>>,
    /// Directory of the tokenizer for --data [default: that of the model]
    #[arg(long, value_name = "DIR", requires = "data", help_heading = "Model and batches")]
    pub(crate) tokenizer: Option<PathBuf>,
    /// Write the examples of every step as JSON lines, so that another program can train on the same
    #[arg(long, value_name = "FILE", help_heading = "Model and batches")]
    pub(crate) write_batches: Option<PathBuf>,

    /// What is trained. Adapters begin at random bases: a step takes as long from there as from any other start
    #[arg(
        long,
        value_name = "METHOD",
        value_parser = choice::method(),
        default_value = "lora-sb",
        help_heading = "Method"
    )]
    pub(crate) method: MethodChoice,
    /// Rank r of the adapter
    #[arg(
        long,
        short = 'r',
        alias = "lora-r",
        value_name = "R",
        default_value_t = 64,
        help_heading = "Method"
    )]
    pub(crate) rank: usize,
    /// What activations are held and multiplied in, as in `train` [default: f32, on a GPU bf16]
    #[arg(long, value_name = "TYPE", value_parser = choice::precision(), help_heading = "Method")]
    pub(crate) dtype: Option<Precision>,
    /// Compute blocks again in the backward pass: true for all blocks, or a number
    #[arg(
        long,
        value_name = "BLOCKS",
        num_args = 0..=1,
        default_value = "false",
        default_missing_value = "true",
        value_parser = choice::gradient_checkpointing,
        help_heading = "Method"
    )]
    pub(crate) gradient_checkpointing: GradientCheckpointing,
    /// Seed of the random weights, the adapter and the order of --data
    #[arg(long, value_name = "N", default_value_t = 42, help_heading = "Method")]
    pub(crate) seed: u64,

    /// Steps that are measured
    #[arg(long, value_name = "N", default_value_t = 8, help_heading = "Measuring")]
    pub(crate) steps: usize,
    /// Steps before them
    #[arg(long, value_name = "N", default_value_t = 2, help_heading = "Measuring")]
    pub(crate) warmup: usize,
    /// Also write so many tokens greedily, behind a prompt of 16, and measure that
    #[arg(long, value_name = "TOKENS", help_heading = "Measuring")]
    pub(crate) decode: Option<usize>,
    /// Time of the products that the steps are held against, before them and after them
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, help_heading = "Measuring")]
    pub(crate) product_seconds: f64,
    /// What computes: cpu, cuda:N for the GPU of that number, or auto for the first GPU that can be used and where there is
    /// none the processor [default: auto]
    #[arg(long, value_name = "DEVICE", value_parser = DeviceChoice::from_str, help_heading = "Measuring")]
    pub(crate) device: Option<DeviceChoice>,
    /// Threads of the processor [default: all cores]
    #[arg(long, value_name = "N", help_heading = "Measuring")]
    pub(crate) threads: Option<usize>,

    /// Append the result to a file in Markdown [default: records/DATE-bench.md]
    #[arg(long, value_name = "FILE", num_args = 0..=1, help_heading = "Output")]
    pub(crate) record: Option<Option<PathBuf>>,
    /// Print one JSON object
    #[arg(long, help_heading = "Output")]
    pub(crate) json: bool,
}
