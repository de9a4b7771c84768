//! Where tensors lie, and what they and the operations take there: what a plan of a run's memory asks of a device.
//!
//! Every number is what the device's own counter ([`Memory::usage`](crate::Memory::usage)) will show: tensors by
//! [`Place::bytes_of`], working space of the widest operations by the functions named after them.

use crate::buffer::{allocated_bytes_of, idle_bytes};
use crate::cpu::gemm::product_scratch_bytes_of;
use crate::cuda::sizes;
use crate::op::{attention, cross_entropy};
use crate::{AttentionShape, DType, LossGradients};

/// The memory that a device's tensors lie in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The process's own, as the CPU takes it.
    Cpu,
    /// An NVIDIA GPU's.
    Cuda,
}

/// Threads whose spaces are counted where the CPU computes attention: with heads of 64 elements each takes about half a
/// MiB, and where a sequence is long, its queries' gradients of one group of heads.
const COUNTED_THREADS: usize = 2;

/// Bytes that the loss takes on the CPU for the rows of one pass over the head's weights. Some hundred rows hide the
/// reading; with 2,048 wide rows this is 2,048 rows.
const CPU_LOSS_BYTES: usize = 32 << 20;

impl Place {
    /// Bytes of a tensor of `elements` `f32` values.
    pub fn bytes(self, elements: usize) -> usize {
        self.bytes_of(DType::F32, elements)
    }

    /// Bytes of a tensor of `elements` values of a type.
    pub fn bytes_of(self, dtype: DType, elements: usize) -> usize {
        match self {
            Place::Cpu => allocated_bytes_of(dtype, elements),
            Place::Cuda => sizes::tensor_bytes(elements * dtype.size()),
        }
    }

    /// Bytes of a tensor in the type of its file, where it has `bytes` bytes.
    pub fn file_bytes(self, bytes: usize) -> usize {
        match self {
            Place::Cpu => bytes,
            Place::Cuda => sizes::tensor_bytes(bytes),
        }
    }

    /// Whether it is the process's own memory: a mapped file's tensors are then read where they lie, as far as somebody
    /// reads them, and what the host copies counts as well.
    pub fn is_host(self) -> bool {
        self == Place::Cpu
    }

    /// Bytes that are taken before the first tensor, by the driver and the libraries; `None` of the process's own memory,
    /// of which the system tells.
    pub fn overhead_bytes(self) -> Option<usize> {
        match self {
            Place::Cpu => None,
            Place::Cuda => Some(sizes::OVERHEAD_BYTES),
        }
    }

    /// Bytes that may be kept between tensors, where at most `peak` are in use.
    pub fn idle_bytes(self, peak: usize) -> usize {
        match self {
            Place::Cpu => idle_bytes(peak),
            Place::Cuda => sizes::fragmentation_bytes(peak),
        }
    }

    /// Bytes that the product of activations `[M, K]` and a weight `[K, N]` takes beside its operands and its result, each
    /// of a type.
    pub fn product_scratch_bytes(self, types: (DType, DType), m: usize, n: usize, k: usize) -> usize {
        match self {
            Place::Cpu => product_scratch_bytes_of(types.0, m, n, k),
            Place::Cuda => sizes::product_scratch_bytes(types, m, n, k),
        }
    }

    /// Bytes that attention over `tokens` tokens takes beside its operands, forward or backward, as if they were one
    /// sequence.
    pub fn attention_scratch_bytes(self, dtype: DType, shape: &AttentionShape, tokens: usize) -> usize {
        match self {
            Place::Cpu => attention::attention_scratch_bytes(dtype, shape, tokens, COUNTED_THREADS),
            // More tokens than a GPU counts are refused by the operation, whatever memory there is.
            Place::Cuda => attention::attention_gpu_scratch_bytes(dtype, shape, tokens).unwrap_or(0),
        }
    }

    /// Bytes that the loss takes beside its operands: x `[N, D]` and w `[V, D]`, each of a type, `chunk_rows` rows at a time.
    pub fn loss_scratch_bytes(
        self,
        types: (DType, DType),
        (n, v, d): (usize, usize, usize),
        chunk_rows: usize,
        gradients: LossGradients,
    ) -> usize {
        match self {
            Place::Cpu => {
                cross_entropy::cpu::cross_entropy_scratch_bytes(types.0, (n, v, d), chunk_rows, gradients)
            }
            Place::Cuda => cross_entropy::cuda::scratch_bytes(types, (n, v, d), chunk_rows, gradients),
        }
    }

    /// Rows whose loss is best computed together. The more rows share a pass over the head's weights, the less its reading
    /// costs; and a GPU wants more of them at a time to be busy.
    pub fn loss_rows(self, v: usize, d: usize) -> usize {
        match self {
            Place::Cpu => (CPU_LOSS_BYTES / cross_entropy::cpu::cross_entropy_row_bytes(v, d)).max(1),
            Place::Cuda => cross_entropy::cuda::chunk_rows(v, d),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpus_tensors_are_whole_granules_and_nothing_is_nothing() {
        let sizes = [0, 1, 128, 129].map(|elements| Place::Cuda.bytes(elements));
        assert_eq!(sizes, [0, 512, 512, 1024]);
        assert_eq!(Place::Cuda.bytes_of(DType::Bf16, 257), 1024);
        assert_eq!((Place::Cuda.file_bytes(513), Place::Cpu.file_bytes(513)), (1024, 513));
    }

    #[test]
    fn a_gpu_takes_more_rows_of_the_loss_at_a_time() {
        for (v, d) in [(4096, 256), (128_256, 2048), (256_000, 3584)] {
            assert!(Place::Cuda.loss_rows(v, d) > Place::Cpu.loss_rows(v, d), "V={v} D={d}");
        }
        assert_eq!(Place::Cpu.loss_rows(1 << 20, 1 << 30), 1);
    }
}
