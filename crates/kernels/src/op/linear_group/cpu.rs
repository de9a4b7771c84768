//! The group on the CPU: in `bf16` one packing of each operand, the thin products on the same panels, and every result in
//! one pass; in `f32`, and for a few tokens, one layer after another.

use super::{GroupLayer, LatentBackward, LatentPart, LinearGroup, check, check_backward, composed};
use crate::buffer::Recycled;
use crate::cpu::gemm::View;
use crate::cpu::gemm::bf16::{Group, Latent, Source, Square, SquareGradient, Target};
use crate::op::linear::cpu::{FEW_TOKENS, Products};
use crate::{Accum, Cpu, Memory, Result, Tensor};

impl LinearGroup for Cpu {
    fn linear_group(
        &self,
        x: &Tensor,
        layers: &[GroupLayer<'_>],
        accum: Accum,
        ys: &mut [&mut Tensor],
    ) -> Result<Vec<Option<Tensor>>> {
        let op = "linear_group";
        check(x, layers, ys)?;
        if !together(&[x]) {
            return composed::forward(self, x, layers, accum, ys);
        }
        let (t, k) = (x.shape()[0], x.shape()[1]);
        let room = |layer: &GroupLayer<'_>| match layer.latent {
            Some(part) => self.empty(&[t, part.r.shape()[0]]).map(Some),
            None => Ok(None),
        };
        let mut us: Vec<Option<Tensor>> = layers.iter().map(room).collect::<Result<_>>()?; // [T, r]
        let mut latents = Vec::new();
        for (layer, u) in layers.iter().zip(&mut us) {
            let Some((LatentPart { a, r: square, scale, .. }, u)) = layer.latent.zip(u.as_mut()) else {
                continue;
            };
            let r = square.shape()[0];
            latents.push(Latent {
                operand: 0,
                factor: View::rows(a.floats(op, "a")?, 0, r, k, k).transposed(),
                square: Square::Transposed(square.f32(op, "r")?),
                scale,
                u: u.f32_mut(op, "u")?,
                gradient: None,
            });
        }
        let mut spaces = vec![Vec::new(); layers.len()];
        let (mut targets, mut thin) = (Vec::new(), 0..);
        for ((layer, y), space) in layers.iter().zip(ys).zip(&mut spaces) {
            let n = layer.weight.shape()[0];
            let weight = View::rows(layer.weight.floats(op, "w")?, 0, n, k, k).transposed();
            let mut terms = vec![(Source::Operand(0), weight)];
            if let Some(LatentPart { r, b, .. }) = layer.latent {
                let r = r.shape()[0];
                let b = View::rows(b.floats(op, "b")?, 0, n, r, r).transposed();
                terms.extend(thin.next().map(|index| (Source::Latent(index), b)));
            }
            let bias = match layer.bias {
                Some(bias) => Some(bias.floats(op, "bias")?.widened(space)),
                None => None,
            };
            targets.push(Target { terms, alpha: 1.0, bias, accum, c: y.floats_mut(op, "y")? });
        }
        let operands = vec![View::rows(x.floats(op, "x")?, 0, t, k, k)];
        Group { operands, latents, targets }.compute(&self.team, &self.recycler);
        Ok(us)
    }

    fn linear_group_backward(
        &self,
        dys: &[&Tensor],
        layers: &[GroupLayer<'_>],
        latents: &mut [Option<LatentBackward<'_>>],
        dx: Option<(&mut Tensor, Accum)>,
    ) -> Result<()> {
        let op = "linear_group_backward";
        check_backward(dys, layers, latents, dx.as_ref().map(|(dx, _)| &**dx))?;
        if !together(dys) {
            return composed::backward(self, dys, layers, latents, dx);
        }
        let t = dys[0].shape()[0];
        let rank = |layer: &GroupLayer<'_>| layer.latent.map_or(0, |part| part.r.shape()[0]);
        let mut vs: Vec<Recycled> = layers.iter().map(|layer| self.recycler.take(t * rank(layer))).collect();
        let (mut operands, mut parts, mut terms) = (Vec::new(), Vec::new(), Vec::new());
        for (index, (((dy, layer), latent), v)) in
            dys.iter().zip(layers).zip(latents).zip(&mut vs).enumerate()
        {
            let (n, k, r) = (layer.weight.shape()[0], layer.weight.shape()[1], rank(layer));
            operands.push(View::rows(dy.floats(op, "dy")?, 0, t, n, n));
            terms.push((Source::Operand(index), View::rows(layer.weight.floats(op, "w")?, 0, n, k, k)));
            let Some((part, LatentBackward { u, gradient })) = layer.latent.zip(latent.as_mut()) else {
                continue;
            };
            terms.push((Source::Latent(parts.len()), View::rows(part.a.floats(op, "a")?, 0, r, k, k)));
            parts.push(Latent {
                operand: index,
                factor: View::rows(part.b.floats(op, "b")?, 0, n, r, r),
                square: Square::AsIs(part.r.f32(op, "r")?),
                scale: part.scale,
                u: v.as_mut_slice(),
                gradient: Some(SquareGradient {
                    other: u.f32(op, "u")?,
                    scale: part.scale,
                    gradient: gradient.f32_mut(op, "gradient")?,
                }),
            });
        }
        let mut targets = Vec::new();
        if let Some((dx, accum)) = dx {
            targets.push(Target { terms, alpha: 1.0, bias: None, accum, c: dx.floats_mut(op, "dx")? });
        }
        Group { operands, latents: parts, targets }.compute(&self.team, &self.recycler);
        Ok(())
    }
}

/// Whether the operands are multiplied in `bf16`, and are not so few rows that weights are better read in place.
fn together(operands: &[&Tensor]) -> bool {
    operands.first().is_some_and(|first| first.shape()[0] > FEW_TOKENS)
        && Products::of(operands) == Products::Bf16
}
