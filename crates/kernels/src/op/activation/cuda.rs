//! The activations on a GPU.

use super::{Activate, Activation, check};
use crate::{Cuda, Result, Tensor};

impl Activation {
    /// Its number in `activation.cuh`.
    pub(crate) fn code(self) -> u32 {
        match self {
            Activation::Silu => 0,
            Activation::Gelu => 1,
            Activation::GeluTanh => 2,
            Activation::Tanh => 3,
        }
    }
}

impl Activate for Cuda {
    fn activation(&self, activation: Activation, x: &Tensor, y: &mut Tensor) -> Result<()> {
        let op = "activation";
        check(op, x, "y", y)?;
        let (count, x, y) = (x.len(), self.floats(op, "x", x)?, self.floats_mut(op, "y", y)?);
        let arguments = [activation.code().into(), x.into(), y.into(), (count as u64).into()];
        self.apply(op, "activation", count, &arguments)
    }

    fn activation_backward(&self, activation: Activation, x: &mut Tensor, dy: &Tensor) -> Result<()> {
        let op = "activation_backward";
        check(op, x, "dy", dy)?;
        let (count, x, dy) = (dy.len(), self.floats_mut(op, "x", x)?, self.floats(op, "dy", dy)?);
        let arguments = [activation.code().into(), x.into(), dy.into(), (count as u64).into()];
        self.apply(op, "activation_backward", count, &arguments)
    }
}
