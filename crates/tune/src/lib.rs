//! LoRA-SB and its neighbours: adapters, initialisation, training, export.
//!
//! LoRA-SB (arXiv 2411.19557) trains `W = W0 + s B R A` where only the r x r matrix `R` moves. `B` and `A` are
//! orthonormal and frozen; they come from the truncated SVD of the first update that full fine-tuning would
//! make. This crate holds that method and those it is compared with (LoRA-XS, LoRA, full fine-tuning) behind
//! one type, [`Tuned`]: a model together with what is trained on it.
//!
//! | module | holds |
//! |---|---|
//! | [`adapter`] | one file a method: its update, its gradients, its parameter count |
//! | [`init`] | where an adapter starts: the streamed gradient, and the starting values of each method |
//! | [`export`] | the native adapter directory, PEFT directories, merged models |
//! | [`config`], [`optim`], [`train`], [`eval`], [`plan`], [`run`] | a training run |

pub mod adapter;
pub mod config;
mod error;
pub mod eval;
pub mod export;
pub mod init;
mod method;
pub mod optim;
pub mod plan;
pub mod run;
mod target;
pub mod train;
mod tuned;

pub use config::TrainConfig;
pub use error::{Error, PlanChange, Result};
pub use method::{AdapterConfig, Convention, InitConfig, Method};
pub use target::Targets;
pub use tuned::{TensorVisitor, Tuned};
