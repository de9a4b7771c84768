//! The gated activation on the CPU.

use super::{Activation, GatedActivation, check};
use crate::cpu::blocks::BLOCK;
use crate::cpu::vector::{lanes, vectorised};
use crate::{Cpu, Result, Tensor};

impl GatedActivation for Cpu {
    fn gated_activation(
        &self,
        activation: Activation,
        gate: &Tensor,
        up: &Tensor,
        h: &mut Tensor,
    ) -> Result<()> {
        let op = "gated_activation";
        check(op, gate, up, h)?;
        let (gate, up, h) = (gate.f32(op, "gate")?, up.f32(op, "up")?, h.f32_mut(op, "h")?);
        let blocks = gate.chunks(BLOCK).zip(up.chunks(BLOCK)).zip(h.chunks_mut(BLOCK));
        self.each(gate.len(), blocks, |((gate, up), h)| match activation {
            Activation::Silu => silu(gate, up, h),
        });
        Ok(())
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
        let (gate, up, dh) = (gate.f32_mut(op, "gate")?, up.f32_mut(op, "up")?, dh.f32(op, "dh")?);
        let blocks = gate.chunks_mut(BLOCK).zip(up.chunks_mut(BLOCK)).zip(dh.chunks(BLOCK));
        self.each(dh.len(), blocks, |((gate, up), dh)| match activation {
            Activation::Silu => silu_backward(gate, up, dh),
        });
        Ok(())
    }
}

vectorised! {
    /// `h = z sigmoid(z) up` with `z = gate`.
    fn silu<L>(gate: &[f32], up: &[f32], h: &mut [f32]) {
        for ((h, &z), &up) in h.iter_mut().zip(gate).zip(up) {
            let s = 1.0 / (1.0 + lanes::exp::<L>(-z));
            *h = z * s * up;
        }
    }
}

vectorised! {
    /// `dgate = dh up s (1 + z (1 - s))` over `gate`, `dup = dh z s` over `up`, with `s = sigmoid(z)`.
    fn silu_backward<L>(gate: &mut [f32], up: &mut [f32], dh: &[f32]) {
        for ((gate, up), &dh) in gate.iter_mut().zip(up).zip(dh) {
            let z = *gate;
            let s = 1.0 / (1.0 + lanes::exp::<L>(-z));
            let slope = s * (1.0 + z * (1.0 - s));
            (*gate, *up) = (dh * *up * slope, dh * (z * s));
        }
    }
}
