//! What tensors and operations take of a GPU's memory, for plans.

use super::memory::granules;
use crate::DType;

/// Bytes of the driver's context: code of kernels, stacks and queues of every multiprocessor. A constant that covers what
/// the vendor's tools show for a process without tensors on GPUs of compute capability 8.0 to 9.0, some 300 to 500 MiB; a
/// limit that comes from what the driver reports as free does not depend on it.
const CONTEXT_BYTES: usize = 500 << 20;

/// Bytes of cuBLASLt's workspace.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;

/// What a process takes before its first tensor.
pub(crate) const OVERHEAD_BYTES: usize = CONTEXT_BYTES + WORKSPACE_BYTES;

/// The part of the memory in use, one in so many, that a plan leaves to the gaps in the driver's pool: an estimate.
const FRAGMENTATION: usize = 32;

pub(crate) fn fragmentation_bytes(peak: usize) -> usize {
    peak / FRAGMENTATION
}

pub(crate) fn tensor_bytes(bytes: usize) -> usize {
    granules(bytes)
}

/// The most parts that a product's depth is cut into.
const PARTS: usize = 64;

/// The most bytes that the parts' results take together: products are cut into no more blocks than four for each
/// multiprocessor, of at most 160, and a block's tile has up to 128 x 256 sums.
const PARTS_BYTES: usize = 4 * 160 * 128 * 256 * size_of::<f32>();

/// A weight that is rounded, and the results of the parts that a product's depth is cut into.
pub(crate) fn product_scratch_bytes((x, w): (DType, DType), m: usize, n: usize, k: usize) -> usize {
    let rounded = if x == DType::Bf16 && w != x { granules(n * k * x.size()) } else { 0 };
    rounded + granules((PARTS * m * n * size_of::<f32>()).min(PARTS_BYTES))
}
