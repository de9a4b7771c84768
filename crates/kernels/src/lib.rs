//! Numbers on devices: every operation of a transformer, forward and backward.
//!
//! This crate knows tensors and operations and nothing of models, adapters or text. An operation is one
//! folder of [`op`]: `mod.rs` states the trait, its formula and its source and checks the shapes; `naive.rs`
//! is the specification, generic over `f32` and `f64`; `cpu.rs` is the fast version for processors.
//! A device is a value that implements every operation, [`Kernels`]; callers hold it as `dyn Kernels`.
//!
//! # Legend
//!
//! | symbol | meaning |
//! |---|---|
//! | `T` | tokens of a packed batch |
//! | `D` | width of the residual stream |
//! | `H`, `G` | query heads, key/value heads |
//! | `E` | size of one head |
//! | `F` | width of the feed-forward layer |
//! | `V` | vocabulary |
//! | `r` | rank |
//! | `U` | elements of a head that a rotation turns |
//! | `N`, `K` | rows and columns of a linear layer's weight, `[out, in]` |
//!
//! All tensors are contiguous and row-major. What is trained, its gradients and statistics are `f32`; weights
//! keep the type of their file (`f32`, `bf16`, `f16`). Activations are `f32` or `bf16`, each tensor on its own:
//! an operation computes in `f32` whatever it reads and rounds what it writes, to nearest with ties to even.
//! Only products differ: where every operand that is no weight is `bf16`, the weight is rounded to `bf16` as
//! well and the products are summed in `f32` ([`Linear`]).
//!
//! # Example
//!
//! ```
//! use lora_sb_kernels::{Accum, Cpu, Linear, Memory};
//!
//! let cpu = Cpu::new(2)?;
//! let x = cpu.from_f32(&[1.0, 2.0], &[1, 2])?; // [T, K]
//! let w = cpu.from_f32(&[3.0, 4.0, 5.0, 6.0, 7.0, 8.0], &[3, 2])?; // [N, K]
//! let mut y = cpu.zeros(&[1, 3])?; // [T, N]
//! cpu.linear(&x, &w, 1.0, Accum::Replace, &mut y)?;
//! assert_eq!(cpu.to_f32(&y)?, [11.0, 17.0, 23.0]);
//! # Ok::<(), lora_sb_kernels::Error>(())
//! ```

mod accum;
mod buffer;
mod cpu;
pub mod cuda;
mod device;
mod dtype;
mod error;
pub mod heap;
pub mod linalg;
mod number;
pub mod op;
mod place;
mod random;
mod shape;
mod tensor;
mod timed;

pub use accum::Accum;
pub use buffer::SharedBytes;
pub use cpu::Cpu;
pub use cuda::Cuda;
pub use device::{Kernels, Memory, Usage};
pub use dtype::DType;
pub use error::{Error, Result};
pub use number::Number;
pub use op::activation::{Activate, Activation};
pub use op::adamw::{AdamW, AdamWStep};
pub use op::attention::{Attention, AttentionShape, Mask, Segments};
pub use op::bias::Bias;
pub use op::channel::Channel;
pub use op::columns::Columns;
pub use op::cross_entropy::{CrossEntropy, LossGradients};
pub use op::dropout::{Dropout, DropoutMask};
pub use op::elementwise::Elementwise;
pub use op::embedding::Embedding;
pub use op::gated_activation::GatedActivation;
pub use op::layer_norm::LayerNorm;
pub use op::linear::{Extra, Linear};
pub use op::linear_group::{GroupLayer, LatentBackward, LatentPart, LinearGroup};
pub use op::reduce::Reduce;
pub use op::rms_norm::{RmsGain, RmsNorm};
pub use op::rope::{Rope, RopeScaling, RopeTable};
pub use op::rows::Rows;
pub use op::squared_error::SquaredError;
pub use place::Place;
pub use random::{Generator, Stream};
pub use tensor::Tensor;
pub use timed::{OpTime, Stopwatch, Timed};
