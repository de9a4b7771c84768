//! PEFT directories: what PEFT, vLLM, llama.cpp's converter and their kin load as LoRA.
//!
//! | file | holds |
//! |---|---|
//! | `adapter_model.safetensors` | `base_model.model.<module>.lora_A.weight [r, in]`, `.lora_B.weight [out, r]`; of a DoRA `.lora_magnitude_vector [out]`; of a classifier `base_model.model.<its head's parameter>` |
//! | `adapter_config.json` | rank, scale, targets and features |
//!
//! [`export`] writes every method as LoRA or DoRA. [`import`] reads those back, what PEFT saved of the methods that
//! are known here, and the layout of LoRA-SB's authors.

mod export;
mod features;
mod import;

use super::files::Names;

pub use export::{Options, VLLM_RANKS, export};
pub use import::{Imported, import};

/// The configuration's name in a directory; transformers takes a directory that holds it for an adapter's.
pub(super) const MANIFEST: &str = "adapter_config.json";

pub(super) const NAMES: Names = Names { tensors: "adapter_model.safetensors", manifest: MANIFEST };

/// Stands before the module's path in every name of the file.
const PREFIX: &str = "base_model.model.";

/// In our files' metadata: [`Model::fingerprint`](lora_sb_model::Model::fingerprint) of the base.
const FINGERPRINT: &str = "lora_sb.base_fingerprint";

/// What PEFT trains in full and saves where `task_type` is SEQ_CLS, whatever else is said.
const HEAD_MODULES: [&str; 2] = ["classifier", "score"];
