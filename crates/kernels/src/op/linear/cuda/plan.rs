//! Which of the crate's own kernels makes a product, and in how many parts of its depth.

use crate::DType;
use crate::cuda::driver::Gpu;

use super::product::{Sum, aligned, depth};

/// A kernel, by its arithmetic and the size of its tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kernel {
    /// `bf16` on the tensor cores, 128 x 256.
    Bf16Large,
    /// The same, 128 x 128.
    Bf16Medium,
    /// The same, 64 x 64.
    Bf16Small,
    /// `f32` on the ordinary cores, 128 x 128; operands of any type.
    F32Large,
    /// The same, 64 x 64.
    F32Small,
    /// At most so many rows with a weight, 1, 4 or 8; a weight beside `bf16` is rounded in passing.
    Few(usize),
}

use Kernel::{Bf16Large, Bf16Medium, Bf16Small, F32Large, F32Small, Few};

/// Up to this many rows a weight is read once, in place and as it is stored.
pub(crate) const FEW_ROWS: usize = 8;

impl Kernel {
    /// Those that can make a sum; the tensor cores' take operands of `bf16` that lie in one of three ways, and the larger ones
    /// only such that lie at whole vectors.
    fn of(sum: &Sum) -> &'static [Kernel] {
        let mut operands = sum.operands();
        let transposed = (sum.first.0.transposed, sum.first.1.transposed);
        match sum.c.rows {
            1 if transposed == (false, true) => &[Few(1)],
            2..=4 if transposed == (false, true) => &[Few(4)],
            5..=FEW_ROWS if transposed == (false, true) => &[Few(8)],
            _ if transposed == (true, true) || operands.any(|x| x.dtype != DType::Bf16) => {
                &[F32Large, F32Small]
            }
            _ if sum.operands().all(|x| aligned(&x, Bf16Large.vector())) => {
                &[Bf16Large, Bf16Medium, Bf16Small]
            }
            _ => &[Bf16Small],
        }
    }

    pub(super) fn name(self, sum: &Sum) -> &'static str {
        let names = match self {
            Bf16Large => ["gemm_bf16_256_nn", "gemm_bf16_256_nt", "gemm_bf16_256_tn"],
            Bf16Medium => ["gemm_bf16_128_nn", "gemm_bf16_128_nt", "gemm_bf16_128_tn"],
            Bf16Small => ["gemm_bf16_64_nn", "gemm_bf16_64_nt", "gemm_bf16_64_tn"],
            F32Large => ["gemm_f32_128"; 3],
            F32Small => ["gemm_f32_64"; 3],
            Few(1) => ["few_1"; 3],
            Few(2..=4) => ["few_4"; 3],
            Few(_) => ["few_8"; 3],
        };
        match (sum.first.0.transposed, sum.first.1.transposed) {
            (false, false) => names[0],
            (false, true) => names[1],
            (true, _) => names[2],
        }
    }

    /// Rows and columns of a tile.
    pub(super) fn tile(self) -> [usize; 2] {
        match self {
            Bf16Large => [128, 256],
            Bf16Medium | F32Large => [128, 128],
            Bf16Small | F32Small => [64, 64],
            Few(rows) => [rows, 4],
        }
    }

    /// Products along the depth that one step adds.
    pub(super) fn step(self) -> usize {
        match self {
            Bf16Large | Bf16Medium | Bf16Small => 32,
            F32Large | Few(_) => 8,
            F32Small => 16,
        }
    }

    pub(super) fn threads(self) -> u32 {
        match self {
            Bf16Medium | Bf16Small | Few(_) => 128,
            Bf16Large | F32Large | F32Small => 256,
        }
    }

    /// Bytes of dynamic shared memory: four stages of a step of both operands.
    pub(super) fn shared_bytes(self) -> usize {
        let [rows, columns] = self.tile();
        match self {
            Bf16Large | Bf16Medium | Bf16Small => 4 * self.step() * (rows + columns) * DType::Bf16.size(),
            F32Large | F32Small | Few(_) => 0,
        }
    }

    /// Elements that one load brings.
    pub(super) fn vector(self) -> usize {
        match self {
            F32Large | F32Small => 4,
            Bf16Large | Bf16Medium | Bf16Small | Few(_) => 8,
        }
    }

    /// Products that a multiprocessor adds in a clock where it is busy with tiles of this size: what the units can do (of an
    /// A100 in `bf16`, of an H100 in `f32`), less what a smaller tile waits for memory.
    fn rate(self) -> f64 {
        match self {
            Bf16Large => 1024.0,
            Bf16Medium => 900.0,
            Bf16Small => 500.0,
            F32Large => 100.0,
            F32Small | Few(_) => 70.0,
        }
    }
}

/// How a product is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) kernel: Kernel,
    /// Blocks that share a tile, each with a part of the depth.
    pub(super) parts: usize,
}

/// Parts that are considered.
const PARTS: [usize; 12] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64];

/// Clocks until a block's first products, and for its results.
const BLOCK_CLOCKS: f64 = 2500.0;
/// Clocks for the launch that adds up parts.
const LAUNCH_CLOCKS: f64 = 5000.0;
/// Bytes of the GPU's memory for each multiprocessor and clock.
const MEMORY_RATE: f64 = 12.0;

impl Plan {
    /// The one of the least estimated time; ties go to larger tiles and fewer parts.
    pub(super) fn of(sum: &Sum, gpu: &Gpu) -> Self {
        let kernels = Kernel::of(sum).iter().filter(|kernel| kernel.shared_bytes() <= gpu.shared_bytes);
        let plans = kernels.flat_map(|&kernel| PARTS.map(|parts| Plan { kernel, parts }));
        let best = plans
            .filter(|plan| plan.parts == 1 || plan.divides(sum, gpu.multiprocessors))
            .map(|plan| (plan.clocks(sum, gpu.multiprocessors), plan))
            .min_by(|x, y| x.0.total_cmp(&y.0));
        best.expect("the smallest tile fits every GPU").1
    }

    /// Whether its parts are worth it: of some depth, and no more than fill the GPU, which bounds their memory besides.
    fn divides(self, sum: &Sum, multiprocessors: u32) -> bool {
        let enough = self.steps_of_a_part(sum) >= 4 && self.blocks(sum) <= 4 * multiprocessors as usize;
        enough && !matches!(self.kernel, Few(_))
    }

    fn blocks(self, sum: &Sum) -> usize {
        let [rows, columns] = self.kernel.tile();
        sum.c.rows.div_ceil(rows) * sum.c.columns.div_ceil(columns) * self.parts
    }

    /// An estimate, to choose by.
    fn clocks(self, sum: &Sum, multiprocessors: u32) -> f64 {
        let ([rows, columns], (m, n)) = (self.kernel.tile(), (sum.c.rows, sum.c.columns));
        let products = (rows * columns * self.kernel.step() * self.steps_of_a_part(sum)) as f64;
        let waves = self.blocks(sum).div_ceil(multiprocessors as usize) as f64;
        let clocks = waves * (products / self.kernel.rate() + BLOCK_CLOCKS);
        let (bytes, rate) = (2 * self.scratch_bytes(m, n), MEMORY_RATE * f64::from(multiprocessors));
        let addition = if self.parts > 1 { LAUNCH_CLOCKS + bytes as f64 / rate } else { 0.0 };
        clocks + addition
    }

    /// Steps of both terms that each part takes.
    pub(super) fn steps_of_a_part(self, sum: &Sum) -> usize {
        let steps: usize = sum.terms().map(|term| depth(&term).div_ceil(self.kernel.step())).sum();
        steps.div_ceil(self.parts)
    }

    /// Bytes of the parts' own results.
    pub(super) fn scratch_bytes(self, m: usize, n: usize) -> usize {
        if self.parts > 1 { self.parts * m * n * size_of::<f32>() } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Place;
    use crate::cuda::launch::DeviceFloats;
    use crate::op::linear::cuda::of;

    /// What a plan of a run's memory counts for products bounds what they take on any GPU.
    #[test]
    fn parts_take_no_more_than_is_counted() {
        let sizes = [1, 9, 16, 64, 100, 192, 512, 1000, 2048, 8192, 32_768];
        for (multiprocessors, dtype) in
            [4, 108, 132, 160].into_iter().flat_map(|count| [(count, DType::F32), (count, DType::Bf16)])
        {
            let gpu = Gpu {
                ordinal: 0,
                name: String::new(),
                capability: (9, 0),
                memory_bytes: 1 << 36,
                multiprocessors,
                shared_bytes: 227 << 10,
            };
            let matrix = |rows, columns| of(DeviceFloats { address: 0, dtype }, rows, columns);
            for (m, n, k) in
                sizes.iter().flat_map(|&m| sizes.iter().flat_map(move |&n| sizes.map(|k| (m, n, k))))
            {
                let first = (matrix(m, k), matrix(k, n));
                let sum = Sum { first, second: None, c: matrix(m, n), alpha: 1.0, beta: 0.0, bias: None };
                let taken = Plan::of(&sum, &gpu).scratch_bytes(m, n);
                let counted = Place::Cuda.product_scratch_bytes((dtype, dtype), m, n, k);
                assert!(
                    taken <= counted,
                    "{m} x {n} x {k} in {dtype} on {multiprocessors}: {taken} of {counted}"
                );
            }
        }
    }
}
