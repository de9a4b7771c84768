//! AdamW on a GPU.

use super::{AdamW, AdamWStep, Factors, check};
use crate::{Cuda, Result, Tensor};

impl AdamW for Cuda {
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
        let count = g.len();
        let (g, p) = (self.f32(op, "g", g)?, self.f32_mut(op, "p", p)?);
        let (m, v) = (self.f32_mut(op, "m", m)?, self.f32_mut(op, "v", v)?);
        let f = Factors::new(step);
        let moments = [f.gradient, f.first.0, f.first.1, f.second.0, f.second.1];
        let factors = [&moments[..], &[f.decay, f.rate, f.correction2, f.epsilon]].concat();
        let words = [g, p, m, v, count as u64];
        let arguments: Vec<_> =
            factors.into_iter().map(From::from).chain(words.into_iter().map(From::from)).collect();
        self.apply(op, "adamw", count, &arguments)
    }
}
