//! LoRA-SB and its neighbours: adapters, initialisation, training, export.
//!
//! LoRA-SB (arXiv 2411.19557) trains `W = W0 + s B R A` where only the r x r matrix `R` moves. `B` and `A` are
//! orthonormal and frozen; they come from the truncated SVD of the first update that full fine-tuning would
//! make. This crate holds that method and those it is compared with ([`Method`]) behind one type, [`Tuned`]: a
//! model together with what is trained on it.
//!
//! | module | holds |
//! |---|---|
//! | [`method`] | the methods, one file each: update, start, source, parameter count; their settings |
//! | [`adapter`] | what happens at a linear layer: the adapters' forward and gradients |
//! | [`init`] | the start of any method, and the streamed gradient that some take it from |
//! | [`head`] | classification heads that are trained beside an adapter |
//! | [`export`] | the native adapter directory, PEFT directories, merged models; their verification; averages |
//! | [`config`], [`optim`], [`train`], [`eval`], [`plan`], [`run`] | a training run |
//!
//! # Example
//!
//! One plain gradient step on the R of a tiny random model:
//!
//! ```
//! use std::sync::Arc;
//!
//! use lora_sb_data::{Example, Location};
//! use lora_sb_kernels::Cpu;
//! use lora_sb_model::{Batch, Config, Model, Recompute, Sequence, Storage};
//! use lora_sb_tune::{AdapterConfig, Bases, Convention, InitConfig, Method, Targets, Tuned};
//!
//! let config = Config::from_json(
//!     br#"{
//!         "model_type": "llama", "vocab_size": 13, "hidden_size": 8, "intermediate_size": 12,
//!         "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32
//!     }"#,
//! )?;
//! let model = Model::random(config, Arc::new(Cpu::new(1)?), 7, Storage::Trainable)?;
//!
//! let source = Location { file: std::path::Path::new("toy").into(), line: 1, element: None };
//! let example = Example::text(vec![1, 5, 3, 12], vec![false, true, true, true], source);
//!
//! let adapter = AdapterConfig {
//!     method: Method::LoraSb,
//!     rank: 4,
//!     lora_alpha: 4.0,
//!     lora_dropout: 0.0,
//!     target_modules: Targets::parse("q_proj,v_proj,down_proj"),
//!     init: InitConfig {
//!         bases: Bases::Sb,
//!         samples: 1,
//!         convention: Convention::PerSample,
//!         eta: 1e-3,
//!         max_tokens: 1024,
//!         blocks_at_once: None,
//!     },
//!     modules_to_save: Vec::new(),
//!     seed: 42,
//! };
//! let mut tuned = Tuned::adapt(model, &adapter, std::slice::from_ref(&example), &mut |_| ())?;
//! assert_eq!(tuned.trained_parameters(), 6 * 4 * 4); // r^2 for each of six matrices
//!
//! let kernels = tuned.model.kernels().clone();
//! let sequence = Sequence::text(&example.ids, &example.trained, 1.0 / 3.0);
//! let batch = Batch::pack(&*kernels, &[sequence])?;
//! let before = tuned.loss_and_gradients(&batch, Recompute::None)?;
//! tuned.visit(&mut |_name, value, gradient| Ok(kernels.add(-0.1, gradient, value)?))?;
//! assert!(tuned.loss(&batch)? < before);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod adapter;
pub mod config;
mod error;
pub mod eval;
pub mod export;
pub mod head;
pub mod init;
pub mod method;
pub mod optim;
pub mod plan;
pub mod run;
mod target;
pub mod train;
mod tuned;

pub use config::TrainConfig;
pub use error::{Error, PlanChange, Result};
pub use method::{AdapterConfig, Bases, Convention, InitConfig, Method};
pub use target::Targets;
pub use tuned::{Role, TensorVisitor, Tuned};
