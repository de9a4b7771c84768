//! Cutting work into blocks for the threads of a [`Cpu`].
//!
//! Blocks depend on the problem's size alone and every output element belongs to one block, so a result does
//! not depend on the number of threads.

use rayon::iter::{IntoParallelIterator, ParallelIterator};

use crate::Cpu;

/// Elements of one block: 64 KiB of `f32`, which a core's second cache holds for several operands.
pub(crate) const BLOCK: usize = 1 << 14;

/// Columns of one block of a sum over rows: long enough for the memory's prefetcher, few enough that the
/// narrowest layers still have work for several threads.
pub(crate) const COLUMNS: usize = 256;

/// Rows of `width` elements in one block; at least 1.
pub(crate) fn rows_per_block(width: usize) -> usize {
    (BLOCK / width.max(1)).max(1)
}

impl Cpu {
    /// Does `work` on every block; on the calling thread where all `elements` together fit in one block,
    /// since waking another thread takes longer than touching them.
    pub(crate) fn each<T: Send>(
        &self,
        elements: usize,
        blocks: impl Iterator<Item = T>,
        work: impl Fn(T) + Send + Sync,
    ) {
        if elements < BLOCK || self.threads() == 1 {
            return blocks.for_each(work);
        }
        let blocks: Vec<T> = blocks.collect();
        self.pool.install(|| blocks.into_par_iter().for_each(work));
    }

    /// The results of `work` on every block, in the order of the blocks; threads as in [`Cpu::each`].
    pub(crate) fn map<T: Send, R: Send>(
        &self,
        elements: usize,
        blocks: impl Iterator<Item = T>,
        work: impl Fn(T) -> R + Send + Sync,
    ) -> Vec<R> {
        if elements < BLOCK || self.threads() == 1 {
            return blocks.map(work).collect();
        }
        let blocks: Vec<T> = blocks.collect();
        self.pool.install(|| blocks.into_par_iter().map(work).collect())
    }
}
