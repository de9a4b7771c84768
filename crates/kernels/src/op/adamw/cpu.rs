//! AdamW on the CPU.

use super::{AdamW, AdamWStep, Factors, check};
use crate::cpu::blocks::BLOCK;
use crate::cpu::vector::vectorised;
use crate::{Cpu, Result, Tensor};

impl AdamW for Cpu {
    fn adamw(
        &self,
        step: &AdamWStep,
        g: &Tensor,
        p: &mut Tensor,
        m: &mut Tensor,
        v: &mut Tensor,
    ) -> Result<()> {
        let op = "adamw";
        check(g, p, m, v)?;
        let factors = Factors::new(step);
        let (g, p) = (g.f32(op, "g")?, p.f32_mut(op, "p")?);
        let (m, v) = (m.f32_mut(op, "m")?, v.f32_mut(op, "v")?);
        let blocks =
            g.chunks(BLOCK).zip(p.chunks_mut(BLOCK)).zip(m.chunks_mut(BLOCK)).zip(v.chunks_mut(BLOCK));
        self.each(g.len(), blocks, |(((g, p), m), v)| update(factors, g, p, m, v));
        Ok(())
    }
}

vectorised! {
    /// The update of one block, in the specification's order of operations: the same bits.
    fn update<L>(f: Factors, g: &[f32], p: &mut [f32], m: &mut [f32], v: &mut [f32]) {
        for (((&g, p), m), v) in g.iter().zip(p).zip(m).zip(v) {
            let g = g * f.gradient;
            *m = *m * f.first.0 + g * f.first.1;
            *v = *v * f.second.0 + g * g * f.second.1;
            *p = *p * f.decay - f.rate * *m / (v.sqrt() / f.correction2 + f.epsilon);
        }
    }
}
