//! The group as operations of one layer after another: what it means, and how devices without a faster way do it.

use super::{GroupLayer, LatentBackward, LatentPart};
use crate::{Accum, Extra, Linear, Memory, Result, Tensor};

pub(super) fn forward<D: Linear + Memory + ?Sized>(
    device: &D,
    x: &Tensor,
    layers: &[GroupLayer<'_>],
    accum: Accum,
    ys: &mut [&mut Tensor],
) -> Result<Vec<Option<Tensor>>> {
    let mut us = Vec::with_capacity(layers.len());
    for (layer, y) in layers.iter().zip(ys) {
        let &GroupLayer { weight, bias, latent } = layer;
        let Some(LatentPart { a, r, b, scale }) = latent else {
            device.linear_fused(x, weight, Extra { bias, term: None }, accum, y)?;
            us.push(None);
            continue;
        };
        let shape = [x.shape()[0], r.shape()[0]]; // [T, r]
        let (mut u, mut h) = (device.empty(&shape)?, device.empty_of(x.dtype(), &shape)?);
        device.linear(x, a, 1.0, Accum::Replace, &mut u)?; // u = x A^T
        device.linear(&u, r, scale, Accum::Replace, &mut h)?; // h = s u R^T
        device.linear_fused(x, weight, Extra { bias, term: Some((&h, b)) }, accum, y)?; // y = x W^T + h B^T + b
        us.push(Some(u));
    }
    Ok(us)
}

pub(super) fn backward<D: Linear + Memory + ?Sized>(
    device: &D,
    dys: &[&Tensor],
    layers: &[GroupLayer<'_>],
    latents: &mut [Option<LatentBackward<'_>>],
    mut dx: Option<(&mut Tensor, Accum)>,
) -> Result<()> {
    for ((dy, layer), latent) in dys.iter().zip(layers).zip(latents) {
        let mut term = None;
        if let (Some(part), Some(LatentBackward { u, gradient })) = (layer.latent, latent) {
            let mut v = device.empty(u.shape())?; // [T, r]
            device.linear_input_gradient(dy, part.b, 1.0, Accum::Replace, &mut v)?; // v = dy B
            device.linear_weight_gradient(&v, u, part.scale, Accum::Add, gradient)?; // dR += s v^T u
            if dx.is_some() {
                let mut w = device.empty_of(dy.dtype(), u.shape())?; // [T, r]
                device.linear_input_gradient(&v, part.r, part.scale, Accum::Replace, &mut w)?; // w = s v R
                term = Some((w, part.a));
            }
        }
        if let Some((dx, accum)) = &mut dx {
            let term = term.as_ref().map(|(w, a)| (w, *a));
            device.linear_input_gradient_fused(dy, layer.weight, term, *accum, dx)?; // dx = dy W + w A
            *accum = Accum::Add;
        }
    }
    Ok(())
}
