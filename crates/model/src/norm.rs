//! The norms before the attention, the feed-forward layer and the head.

use lora_sb_kernels::{Accum, Tensor};

use crate::{Gradients, Model, Parameter, Result};

impl Model {
    /// `y = gain * x * rstd`; x and y `[T, D]`, rstd `[T]`.
    pub(crate) fn norm(&self, gain: Parameter, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let mut y = self.kernels.empty(x.shape())?; // [T, D]
        let mut rstd = self.kernels.empty(&x.shape()[..1])?; // [T]
        let eps = self.config.rms_norm_eps as f32;
        self.kernels.rms_norm(x, self.weights.required(gain)?, eps, &mut y, &mut rstd)?;
        Ok((y, rstd))
    }

    /// `dx (+)= ...`, `dgain += ...`; x, dy and dx `[T, D]`, rstd `[T]`.
    pub(crate) fn norm_backward(
        &self,
        gain: Parameter,
        x: &Tensor,
        rstd: &Tensor,
        dy: &Tensor,
        accum: Accum,
        dx: &mut Tensor,
        gradients: &mut dyn Gradients,
    ) -> Result<()> {
        let weight = self.weights.required(gain)?; // [D]
        Ok(self.kernels.rms_norm_backward(x, weight, rstd, dy, accum, dx, gradients.of(gain))?)
    }
}
