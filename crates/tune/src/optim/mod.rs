//! The optimizer: a learning rate for each step, clipping, and AdamW's moments.

mod adamw;
mod clip;
mod schedule;

pub use adamw::AdamW;
pub use clip::{clip_factor, global_norm};
pub use schedule::{Schedule, Scheduler};
