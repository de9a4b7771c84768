//! Which kernels there are for heads of which size, and how they cut the work: what the `.cu` files instantiate.

use crate::DType;

/// One kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pass {
    pub(super) kernel: &'static str,
    /// Rows (or keys, for their gradients) that a warp holds.
    pub(super) band: usize,
    /// Keys (or rows) of the tiles that a block goes over.
    pub(super) across: usize,
    /// The most warps of a block.
    pub(super) warps: usize,
}

/// The kernels for one type and for heads of up to `width` elements, which they take as so many.
#[derive(Debug)]
pub(super) struct Tiling {
    dtype: DType,
    pub(super) width: usize,
    pub(super) forward: Pass,
    pub(super) queries: Pass,
    pub(super) keys: Pass,
    /// Blocks that share the gradients of a tile of keys: one for both, or one each.
    pub(super) key_blocks: usize,
}

/// A block of one of the kernels on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) warps: usize,
    /// Tiles across that are in shared memory at a time.
    pub(super) stages: usize,
    pub(super) shared_bytes: usize,
}

macro_rules! pass {
    ($kernel:expr, $bands:literal, $across:literal, $warps:literal) => {
        Pass { kernel: $kernel, band: 16 * $bands, across: $across, warps: $warps }
    };
}

macro_rules! tilings {
    ($($dtype:ident $name:literal $width:literal: $forward:tt $queries:tt $keys:tt $blocks:literal;)*) => {
        const TILINGS: &[Tiling] = &[$(Tiling {
            dtype: DType::$dtype,
            width: $width,
            forward: tilings!(concat!("attention_forward_", $name), $forward),
            queries: tilings!(concat!("attention_queries_", $name), $queries),
            keys: tilings!(concat!("attention_keys_", $name), $keys),
            key_blocks: $blocks,
        },)*];
    };
    ($kernel:expr, ($bands:literal, $across:literal, $warps:literal)) => {
        pass!($kernel, $bands, $across, $warps)
    };
}

// (tiles of 16 rows a warp, length of the tiles across, warps) of forward, queries, keys.
tilings! {
    Bf16 "bf16_32" 32: (2, 64, 4) (2, 32, 4) (2, 32, 4) 1;
    Bf16 "bf16_64" 64: (2, 64, 4) (2, 32, 4) (2, 32, 4) 1;
    Bf16 "bf16_96" 96: (2, 64, 4) (2, 32, 4) (1, 64, 4) 1;
    Bf16 "bf16_128" 128: (2, 64, 4) (2, 32, 4) (1, 64, 4) 1;
    Bf16 "bf16_256" 256: (1, 64, 4) (1, 32, 4) (1, 32, 4) 2;
    F32 "f32_64" 64: (1, 32, 4) (1, 32, 4) (1, 32, 4) 1;
    F32 "f32_128" 128: (1, 32, 4) (1, 32, 4) (1, 32, 4) 1;
    F32 "f32_256" 256: (1, 16, 4) (1, 16, 4) (1, 16, 4) 2;
}

impl Tiling {
    /// The kernels for heads of `e` elements of a type; `None` where heads are too large for tiles.
    pub(super) fn of(dtype: DType, e: usize) -> Option<&'static Tiling> {
        TILINGS.iter().find(|tiling| tiling.dtype == dtype && tiling.width >= e)
    }

    /// Bytes of a row of a tile in shared memory.
    fn row_bytes(&self) -> usize {
        self.width * self.dtype.size() + 16
    }

    /// The forward's block with at most so many warps, where shared memory has so many bytes.
    pub(super) fn forward_block(&self, warps: usize, limit: usize) -> Block {
        let Pass { band, across, .. } = self.forward;
        let bytes = |warps, _| (warps * band + 2 * across) * self.row_bytes();
        largest(warps.min(self.forward.warps), &[1], limit, bytes)
    }

    /// The block for the gradients of queries.
    pub(super) fn queries_block(&self, limit: usize) -> Block {
        let Pass { band, across, .. } = self.queries;
        let bytes = |warps, stages| (2 * warps * band + 2 * stages * across) * self.row_bytes();
        largest(self.queries.warps, &[2, 1], limit, bytes)
    }

    /// The block for the gradients of keys and values.
    pub(super) fn keys_block(&self, limit: usize) -> Block {
        let Pass { band, across, .. } = self.keys;
        let statistics = 2 * size_of::<f32>();
        let bytes = |warps, stages| {
            2 * warps * band * self.row_bytes() + stages * across * (2 * self.row_bytes() + statistics)
        };
        largest(self.keys.warps, &[2, 1], limit, bytes)
    }
}

/// The block with the most warps, and then stages, that shared memory has room for; the smallest where it has for none.
fn largest(warps: usize, stages: &[usize], limit: usize, bytes: impl Fn(usize, usize) -> usize) -> Block {
    let halves = std::iter::successors(Some(warps), |&warps| (warps > 1).then_some(warps / 2));
    let mut blocks = halves.flat_map(|warps| stages.iter().map(move |&stages| (warps, stages)));
    let (warps, stages) = blocks
        .find(|&(warps, stages)| bytes(warps, stages) <= limit)
        .unwrap_or((1, stages[stages.len() - 1]));
    Block { warps, stages, shared_bytes: bytes(warps, stages) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shared memory of a block on compute capability 8.6 and 8.9, the smallest.
    const SMALLEST: usize = 99 << 10;

    #[test]
    fn every_kernel_fits_the_smallest_shared_memory() {
        for tiling in TILINGS {
            let name = tiling.forward.kernel;
            let blocks = [
                tiling.forward_block(4, SMALLEST),
                tiling.queries_block(SMALLEST),
                tiling.keys_block(SMALLEST),
            ];
            assert!(blocks.iter().all(|block| block.shared_bytes <= SMALLEST), "{name}: {blocks:?}");
        }
    }

    #[test]
    fn heads_go_to_the_narrowest_kernel() {
        let width = |dtype, e| Tiling::of(dtype, e).map(|tiling| tiling.width);
        assert_eq!(width(DType::Bf16, 80), Some(96));
        assert_eq!(width(DType::F32, 1), Some(64));
        assert_eq!(width(DType::F32, 256), Some(256));
        assert_eq!(width(DType::Bf16, 257), None);
    }
}
