//! The gated activation on the CPU.

use super::{GatedActivation, check};
use crate::buffer::{Floats, FloatsMut};
use crate::cpu::blocks::{BLOCK, Room, TILE};
use crate::cpu::vector::lanes::Element;
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
        let (gate, up, h) = (gate.floats(op, "gate")?, up.floats(op, "up")?, h.floats_mut(op, "h")?);
        let blocks = gate.chunks(BLOCK).zip(up.chunks(BLOCK)).zip(h.chunks(BLOCK));
        self.each(gate.len(), blocks, |((gate, up), h)| match (gate, up, h) {
            (Floats::Bf16(gate), Floats::Bf16(up), FloatsMut::Bf16(h)) => forward(activation, gate, up, h),
            (gate, up, h) => {
                let [mut gate_room, mut up_room, mut h_room] = <[Room; 3]>::default();
                for ((gate, up), h) in gate.chunks(TILE).zip(up.chunks(TILE)).zip(h.chunks(TILE)) {
                    let (gate, up) = (gate_room.read(gate), up_room.read(up));
                    h_room.replace(h, |h| forward(activation, gate, up, h));
                }
            }
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
        let (gate, up) = (gate.floats_mut(op, "gate")?, up.floats_mut(op, "up")?);
        let dh = dh.floats(op, "dh")?;
        let blocks = gate.chunks(BLOCK).zip(up.chunks(BLOCK)).zip(dh.chunks(BLOCK));
        self.each(dh.len(), blocks, |((gate, up), dh)| match (gate, up, dh) {
            (FloatsMut::Bf16(gate), FloatsMut::Bf16(up), Floats::Bf16(dh)) => {
                backward(activation, gate, up, dh);
            }
            (gate, up, dh) => {
                let [mut gate_room, mut up_room, mut dh_room] = <[Room; 3]>::default();
                for ((gate, up), dh) in gate.chunks(TILE).zip(up.chunks(TILE)).zip(dh.chunks(TILE)) {
                    let dh = dh_room.read(dh);
                    let gradients = |gate: &mut [f32], up: &mut [f32]| backward(activation, gate, up, dh);
                    gate_room.update(gate, |gate| up_room.update(up, |up| gradients(gate, up)));
                }
            }
        });
        Ok(())
    }
}

vectorised! {
    /// `h = act(gate) up`.
    fn forward<L, E: Element>(activation: Activation, gate: &[E], up: &[E], h: &mut [E]) {
        match activation {
            Activation::Silu => products::<L, Silu, E>(gate, up, h),
            Activation::Gelu => products::<L, Gelu, E>(gate, up, h),
            Activation::GeluTanh => products::<L, GeluTanh, E>(gate, up, h),
            Activation::Tanh => products::<L, Tanh, E>(gate, up, h),
        }
    }
}

vectorised! {
    /// `dgate = dh up act'(gate)` over `gate`, `dup = dh act(gate)` over `up`.
    fn backward<L, E: Element>(activation: Activation, gate: &mut [E], up: &mut [E], dh: &[E]) {
        match activation {
            Activation::Silu => gradients::<L, Silu, E>(gate, up, dh),
            Activation::Gelu => gradients::<L, Gelu, E>(gate, up, dh),
            Activation::GeluTanh => gradients::<L, GeluTanh, E>(gate, up, dh),
            Activation::Tanh => gradients::<L, Tanh, E>(gate, up, dh),
        }
    }
}

#[inline(always)]
fn products<L: Level, C: Curve, E: Element>(gate: &[E], up: &[E], h: &mut [E]) {
    for ((h, &gate), &up) in h.iter_mut().zip(gate).zip(up) {
        *h = E::round(C::value_and_slope::<L>(gate.wide()).0 * up.wide());
    }
}

#[inline(always)]
fn gradients<L: Level, C: Curve, E: Element>(gate: &mut [E], up: &mut [E], dh: &[E]) {
    for ((gate, up), &dh) in gate.iter_mut().zip(up).zip(dh) {
        let (value, slope) = C::value_and_slope::<L>(gate.wide());
        let dh = dh.wide();
        (*gate, *up) = (E::round(dh * up.wide() * slope), E::round(dh * value));
    }
}
