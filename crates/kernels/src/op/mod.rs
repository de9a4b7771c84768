//! The operations, one folder each: the trait with its formula, the naive specification, the fast versions.

pub mod adamw;
pub mod attention;
pub mod bias;
pub mod cross_entropy;
pub mod elementwise;
pub mod embedding;
pub mod gated_activation;
pub mod linear;
pub mod reduce;
pub mod rms_norm;
pub mod rope;
pub mod rows;
