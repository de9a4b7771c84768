//! Matrix factorisations.
//!
//! Every product with a large matrix is an operation of the device ([`Linear`](crate::Linear)); only matrices
//! of the block's size `k x k` come to the host, where they are factorised in `f64`.

mod dense;
mod operator;
mod orthonormal;
mod svd;

pub use orthonormal::random_orthonormal;
pub use svd::{SvdOptions, TruncatedSvd, truncated_svd, truncated_svd_bytes};
