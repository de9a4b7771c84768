//! Every operation of every device against its specification.
//!
//! The truth is the specification run in `f64` on the same `f32` operands (weights after rounding to their
//! file's type). The tolerance of an element is a relative error that follows from the length of its sum,
//! times the sum of the magnitudes of what is added up in it.

#[path = "../common/mod.rs"]
mod common;

mod activations;
mod attention;
mod attention_cuda;
mod channels;
mod dropout;
mod elements;
mod linear_group;
mod losses;
mod normalisation;
mod products;
mod products_bf16;
mod rows;
