//! The gated activation on a GPU.

use super::{GatedActivation, check};
use crate::{Activation, Cuda, Result, Tensor};

impl GatedActivation for Cuda {
    fn gated_activation(
        &self,
        activation: Activation,
        gate: &Tensor,
        up: &Tensor,
        h: &mut Tensor,
    ) -> Result<()> {
        let op = "gated_activation";
        check(op, gate, up, h)?;
        let count = gate.len();
        let (gate, up) = (self.floats(op, "gate", gate)?, self.floats(op, "up", up)?);
        let h = self.floats_mut(op, "h", h)?;
        let arguments = [activation.code().into(), gate.into(), up.into(), h.into(), (count as u64).into()];
        self.apply(op, "gated_activation", count, &arguments)
    }

    fn gated_activation_backward(
        &self,
        activation: Activation,
        gate: &mut Tensor,
        up: &mut Tensor,
        dh: &Tensor,
    ) -> Result<()> {
        let op = "gated_activation_backward";
        check(op, gate, up, dh)?;
        let count = dh.len();
        let (gate, up) = (self.floats_mut(op, "gate", gate)?, self.floats_mut(op, "up", up)?);
        let dh = self.floats(op, "dh", dh)?;
        let arguments = [activation.code().into(), gate.into(), up.into(), dh.into(), (count as u64).into()];
        self.apply(op, "gated_activation_backward", count, &arguments)
    }
}
