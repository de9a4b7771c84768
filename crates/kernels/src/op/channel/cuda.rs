//! The operations on channels on a GPU.

use super::{Channel, pair, width};
use crate::cuda::launch::{Launch, THREADS};
use crate::{Accum, Cuda, Result, Tensor, shape};

/// Warps of a block: `WARPS` of `columns.cuh`.
const WARPS: usize = THREADS as usize / 32;

impl Channel for Cuda {
    fn scale_channels(&self, c: &Tensor, y: &mut Tensor) -> Result<()> {
        let op = "scale_channels";
        let n = width(op, c, y)?;
        let rows = y.shape()[0];
        let (c, y) = (self.floats(op, "c", c)?, self.floats_mut(op, "y", y)?);
        self.apply_columns(op, c, y, [rows, n])
    }

    fn channel_products(&self, a: &Tensor, b: &Tensor, accum: Accum, out: &mut Tensor) -> Result<()> {
        let op = "channel_products";
        let (rows, n) = pair(op, ["T", "N"], a, b)?;
        shape::expect(op, "out", out, &[("N", n)])?;
        let (a, b, out) = (self.floats(op, "a", a)?, self.floats(op, "b", b)?, self.f32_mut(op, "out", out)?);
        self.sum_rows(op, op, &[a, b], [rows, n], accum, out)
    }

    fn row_products(&self, a: &Tensor, b: &Tensor, alpha: f32, accum: Accum, out: &mut Tensor) -> Result<()> {
        let op = "row_products";
        let (n, k) = pair(op, ["N", "K"], a, b)?;
        shape::expect(op, "out", out, &[("N", n)])?;
        let (a, b, out) = (self.floats(op, "a", a)?, self.floats(op, "b", b)?, self.f32_mut(op, "out", out)?);
        let (sizes, add) = ([n, k].map(|size| (size as u64).into()), u32::from(accum == Accum::Add));
        let arguments = [a.into(), b.into(), alpha.into(), sizes[0], sizes[1], add.into(), out.into()];
        self.launch(op, op, Launch::blocks(n.div_ceil(WARPS), THREADS), &arguments)
    }
}
