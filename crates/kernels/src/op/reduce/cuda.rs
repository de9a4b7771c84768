//! The reductions on a GPU.

use super::Reduce;
use crate::cuda::launch::{Launch, THREADS, code};
use crate::{Cuda, Result, Tensor};

/// Elements that one block reads at once: eight a thread.
const BLOCK: usize = 8 * THREADS as usize;

/// The most blocks of one tensor: as many as the largest GPUs run at once, and few enough to add up on the host.
const MOST_BLOCKS: usize = 1024;

impl Reduce for Cuda {
    fn sum_of_squares(&self, x: &Tensor) -> Result<f64> {
        Ok(self.sums_of_squares(&[x])?[0])
    }

    /// One launch and one wait for all tensors. Which elements a block adds up depends on their number alone.
    fn sums_of_squares(&self, xs: &[&Tensor]) -> Result<Vec<f64>> {
        let op = "sum_of_squares";
        let blocks: Vec<usize> = xs.iter().map(|x| x.len().div_ceil(BLOCK).min(MOST_BLOCKS)).collect();
        let total: usize = blocks.iter().sum();
        let (mut summands, mut first) = (Vec::with_capacity(xs.len()), 0);
        for (x, &blocks) in xs.iter().zip(&blocks) {
            let floats = self.floats(op, "x", x)?;
            if blocks > 0 {
                let (count, blocks) = (x.len() as u64, blocks as u64);
                summands.push([floats.address, code(floats.dtype), count, first, blocks]);
                first += blocks;
            }
        }
        let (table, sums) =
            (self.scratch(op, size_of_val(&summands[..]))?, self.scratch(op, total * size_of::<f64>())?);
        self.upload(op, &table, &summands)?;
        let arguments = [table.address().into(), (summands.len() as u32).into(), sums.address().into()];
        self.launch(op, "sums_of_squares", Launch::blocks(total, THREADS), &arguments)?;
        let sums: Vec<f64> = self.download(op, &sums, total)?;
        let mut sums = sums.into_iter();
        Ok(blocks.iter().map(|&blocks| sums.by_ref().take(blocks).sum()).collect())
    }
}
