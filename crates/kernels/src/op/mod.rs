//! The operations, one folder each: the trait with its formula, the naive specification, the fast versions.

pub mod activation;
pub mod adamw;
pub mod attention;
pub mod bias;
pub mod channel;
pub mod columns;
pub mod cross_entropy;
pub mod dropout;
pub mod elementwise;
pub mod embedding;
pub mod gated_activation;
pub mod layer_norm;
pub mod linear;
pub mod linear_group;
pub mod reduce;
pub mod rms_norm;
pub mod rope;
pub mod rows;
pub mod squared_error;
