//! Measuring: what a training step and a generated token cost on this machine, beside what the machine can do.
//!
//! `subject` finds the model and its adapter, `batches` what it is trained on, `work` counts what a step has to compute,
//! `ceiling` measures what the machine computes and reads at best, `measure` takes the times, `outcome` holds them for
//! people, scripts and records, `planned` is the memory as a plan has it, `machine` says where and when.

mod batches;
mod ceiling;
mod machine;
mod measure;
mod outcome;
mod planned;
mod preset;
mod subject;
mod work;

pub(crate) use batches::{Batches, write_batches};
pub(crate) use ceiling::{memory_rate, product_rate};
pub(crate) use machine::{Machine, Processor, date};
pub(crate) use measure::{PROMPT, decode, steps};
pub(crate) use outcome::{Ceiling, Decoding, Memory, Outcome, Setting};
pub(crate) use planned::planned;
pub(crate) use subject::{Subject, adapted, adapter_config};
pub(crate) use work::necessary;
