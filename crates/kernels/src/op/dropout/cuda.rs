//! Dropout on a GPU.

use super::{Dropout, DropoutMask, check};
use crate::{Accum, Cuda, Result, Tensor};

impl Dropout for Cuda {
    fn dropout(&self, rate: f32, seed: u64, x: &Tensor, accum: Accum, y: &mut Tensor) -> Result<()> {
        let op = "dropout";
        let DropoutMask { key, threshold, scale } = check(rate, seed, x, y)?;
        let (count, x, y) = (x.len(), self.floats(op, "x", x)?, self.floats_mut(op, "y", y)?);
        let add = u32::from(accum == Accum::Add);
        let mask = [key.into(), threshold.into(), scale.into()];
        let operands = [x.into(), add.into(), y.into(), (count as u64).into()];
        self.apply(op, "dropout", count, &[&mask[..], &operands].concat())
    }
}
