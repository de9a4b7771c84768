//! Which of the crate's own kernels makes a product, and in how many parts of its depth.

use crate::cuda::driver::Gpu;

use super::product::{Sum, depth};

/// A kernel and the size of its tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// `f32` on the ordinary cores, 128 x 128.
    F32Large,
    /// The same, 64 x 64.
    F32Small,
}

impl Kernel {
    pub(super) fn name(self, _sum: &Sum) -> &'static str {
        match self {
            Kernel::F32Large => "gemm_f32_128",
            Kernel::F32Small => "gemm_f32_64",
        }
    }

    /// Rows and columns of a tile.
    pub(super) fn tile(self) -> [usize; 2] {
        match self {
            Kernel::F32Large => [128, 128],
            Kernel::F32Small => [64, 64],
        }
    }

    /// Products along the depth that one step adds.
    fn step(self) -> usize {
        match self {
            Kernel::F32Large => 8,
            Kernel::F32Small => 16,
        }
    }

    pub(super) fn threads(self) -> u32 {
        256
    }

    pub(super) fn shared_bytes(self) -> usize {
        0
    }

    /// Elements that one load brings.
    pub(super) fn vector(self) -> usize {
        4
    }
}

/// How a product is made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub(super) kernel: Kernel,
    /// Blocks that share a tile, each with a part of the depth.
    pub(super) parts: usize,
    pub(super) steps_of_a_part: usize,
}

impl Plan {
    pub(super) fn of(sum: &Sum, gpu: &Gpu) -> Self {
        let kernel = Kernel::F32Small;
        let steps = depth(&sum.first).div_ceil(kernel.step())
            + sum.second.as_ref().map_or(0, |second| depth(second).div_ceil(kernel.step()));
        let _ = gpu;
        Plan { kernel, parts: 1, steps_of_a_part: steps }
    }

    /// Bytes of the parts' own results.
    pub(super) fn scratch_bytes(self, m: usize, n: usize) -> usize {
        if self.parts > 1 { self.parts * m * n * size_of::<f32>() } else { 0 }
    }
}
