//! The squared error on a GPU.

use super::{SquaredError, check};
use crate::cuda::launch::{Launch, THREADS};
use crate::{Cuda, Result, Tensor};

impl SquaredError for Cuda {
    fn squared_error(&self, z: &mut Tensor, targets: &Tensor, weights: &Tensor) -> Result<f64> {
        let op = "squared_error";
        check(op, z, targets, weights)?;
        let count = z.len() as u64;
        let (targets, weights) = (self.f32(op, "targets", targets)?, self.f32(op, "weights", weights)?);
        let (z, loss) = (self.f32_mut(op, "z", z)?, self.scratch(op, size_of::<f64>())?);
        let arguments = [z, targets, weights, count, loss.address()].map(From::from);
        self.launch(op, "squared_error", Launch::blocks(1, THREADS), &arguments)?;
        Ok(self.download(op, &loss, 1)?[0])
    }
}
