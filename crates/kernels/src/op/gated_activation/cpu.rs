//! The gated activation on the CPU.

use super::{GatedActivation, check};
use crate::cpu::blocks::BLOCK;
use crate::cpu::vector::{Level, vectorised};
use crate::op::activation::cpu::{Curve, Gelu, GeluTanh, Silu, Tanh};
use crate::{Activation, Cpu, Result, Tensor};

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
        self.each(gate.len(), blocks, |((gate, up), h)| forward(activation, gate, up, h));
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
        self.each(dh.len(), blocks, |((gate, up), dh)| backward(activation, gate, up, dh));
        Ok(())
    }
}

vectorised! {
    /// `h = act(gate) up`.
    fn forward<L>(activation: Activation, gate: &[f32], up: &[f32], h: &mut [f32]) {
        match activation {
            Activation::Silu => products::<L, Silu>(gate, up, h),
            Activation::Gelu => products::<L, Gelu>(gate, up, h),
            Activation::GeluTanh => products::<L, GeluTanh>(gate, up, h),
            Activation::Tanh => products::<L, Tanh>(gate, up, h),
        }
    }
}

vectorised! {
    /// `dgate = dh up act'(gate)` over `gate`, `dup = dh act(gate)` over `up`.
    fn backward<L>(activation: Activation, gate: &mut [f32], up: &mut [f32], dh: &[f32]) {
        match activation {
            Activation::Silu => gradients::<L, Silu>(gate, up, dh),
            Activation::Gelu => gradients::<L, Gelu>(gate, up, dh),
            Activation::GeluTanh => gradients::<L, GeluTanh>(gate, up, dh),
            Activation::Tanh => gradients::<L, Tanh>(gate, up, dh),
        }
    }
}

#[inline(always)]
fn products<L: Level, C: Curve>(gate: &[f32], up: &[f32], h: &mut [f32]) {
    for ((h, &gate), &up) in h.iter_mut().zip(gate).zip(up) {
        *h = C::value_and_slope::<L>(gate).0 * up;
    }
}

#[inline(always)]
fn gradients<L: Level, C: Curve>(gate: &mut [f32], up: &mut [f32], dh: &[f32]) {
    for ((gate, up), &dh) in gate.iter_mut().zip(up).zip(dh) {
        let (value, slope) = C::value_and_slope::<L>(*gate);
        (*gate, *up) = (dh * *up * slope, dh * value);
    }
}
