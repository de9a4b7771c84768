//! One configurable transformer with an explicit backward, and Hugging Face directories.
//!
//! A [`Model`] is read from a directory ([`Model::load`]), from bytes in memory ([`Model::from_files`]) or
//! drawn at random ([`Model::random`]). It computes losses, gradients and logits of packed batches on any
//! [`Kernels`](lora_sb_kernels::Kernels). A method of fine-tuning is a [`LinearHook`]; the model never learns
//! its name. There is no autograd: each part returns what its backward needs, and its backward consumes it.
//!
//! Shapes are named by the legend of [`lora_sb_kernels`]; N is also the number of labelled tokens.
//!
//! # Example
//!
//! ```
//! use std::collections::BTreeMap;
//! use std::sync::Arc;
//!
//! use lora_sb_kernels::{Cpu, Kernels};
//! use lora_sb_model::{Batch, Config, Frozen, Model, Recompute, Sequence, Storage};
//!
//! let config = Config::from_json(
//!     br#"{
//!         "model_type": "llama", "vocab_size": 13, "hidden_size": 8, "intermediate_size": 12,
//!         "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32
//!     }"#,
//! )?;
//! let kernels: Arc<dyn Kernels> = Arc::new(Cpu::new(1)?);
//! let model = Model::random(config, Arc::clone(&kernels), 7, Storage::Trainable)?;
//!
//! let sequence = Sequence::text(&[1, 5, 3, 12], &[false, true, true, true], 1.0 / 3.0);
//! let batch = Batch::pack(&*kernels, &[sequence])?;
//!
//! let mut gradients = BTreeMap::new();
//! for parameter in model.parameters() {
//!     gradients.insert(parameter, kernels.zeros(&model.config().parameter_shape(parameter))?);
//! }
//! let loss = model.loss_and_gradients(&batch, &mut Frozen, &mut gradients, Recompute::None)?;
//! assert!((loss - 13f64.ln()).abs() < 0.1); // random weights: nearly every token is equally likely
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod attention;
mod batch;
mod block;
mod classifier;
mod config;
pub mod decode;
mod embed;
mod error;
mod family;
mod fingerprint;
mod head;
pub mod hook;
mod linear;
mod load;
pub mod memory;
mod mlp;
mod model;
mod norm;
mod save;
mod site;
mod task;
mod weight_file;
mod weights;

pub use batch::{Batch, Sequence, Target};
pub use block::BlockSaved;
pub use config::{BlockKind, Config, FeedForward, NormKind, NormPlacement, Positions, Rotation, Task};
pub use decode::{Decoder, Generation, Next, Sampling, generate};
pub use error::{Error, Result};
pub use family::Family;
pub use hook::{Frozen, Gradients, InputGradient, Layer, LinearHook, NoGradients, Recompute, SiteSaved};
pub use load::{LoadOptions, Mismatched};
pub use model::Model;
pub use save::{SHARD_BYTES, SaveType, save_model, save_model_in_shards};
pub use site::{Norm, Parameter, Projection, Site};
pub use weight_file::{WeightFile, WeightFileWriter, WeightView};
pub use weights::Storage;
