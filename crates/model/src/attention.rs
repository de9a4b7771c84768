//! Self-attention: projections, norms of heads, rotation, attention over packed sequences, output projection.

use std::borrow::Borrow;

use lora_sb_kernels::{Accum, Segments, Tensor};

use crate::norm::NormSaved;
use crate::{Gradients, LinearHook, Model, Norm, Projection, Result, SiteSaved};

/// The layers that read the sub-layer's input.
const PARTS: [Projection; 3] = [Projection::Query, Projection::Key, Projection::Value];

/// What the queries of some tokens see: from q `[T, H*E]`, k and v `[T, G*E]` of a layer to o `[T, H*E]` and
/// lse `[T, H]`. The tokens' own sequences when training, those and what is cached when generating.
pub(crate) type Attend<'a> = &'a mut dyn FnMut(&Tensor, &Tensor, &Tensor) -> Result<(Tensor, Tensor)>;

/// What the attention keeps for its backward.
#[derive(Debug)]
pub(crate) struct AttentionSaved {
    q: Heads,
    k: Heads,
    /// `[T, G*E]`.
    v: Tensor,
    /// `[T, H*E]`.
    o: Tensor,
    /// `[T, H]`.
    lse: Tensor,
    /// Of query, key and value, or of the one layer that makes all three.
    projections: Vec<SiteSaved>,
    output: SiteSaved,
}

/// Queries or keys that are kept.
#[derive(Debug)]
enum Heads {
    /// As the attention reads them, `[T, H*E]`.
    Ready(Tensor),
    /// Before their norm: they are normed and rotated once more for the backward.
    Raw(RawHeads),
}

impl Heads {
    fn keep(ready: Tensor, raw: Option<RawHeads>) -> Self {
        match raw {
            Some(raw) => Heads::Raw(raw),
            None => Heads::Ready(ready),
        }
    }
}

/// Projected queries or keys, and what their norm saved.
#[derive(Debug)]
struct RawHeads {
    /// `[T*H, E]`.
    x: Tensor,
    norm: NormSaved,
}

impl Model {
    /// What the attention adds to the residual stream, `[T, D]`; n `[T, D]` is its input, positions `[T]`.
    pub(crate) fn attention(
        &self,
        layer: usize,
        n: impl Borrow<Tensor>,
        positions: &Tensor,
        attend: Attend<'_>,
        hook: &dyn LinearHook,
    ) -> Result<(Tensor, AttentionSaved)> {
        let ([q, k, v], projections) = self.linear_parts(layer, PARTS, n.borrow(), hook)?;
        drop(n);
        let (q, raw_q) = self.heads(Norm::Query(layer), layer, q, positions)?; // [T, H*E]
        let (k, raw_k) = self.heads(Norm::Key(layer), layer, k, positions)?; // [T, G*E]
        let (o, lse) = attend(&q, &k, &v)?; // [T, H*E], [T, H]
        let (q, k) = (Heads::keep(q, raw_q), Heads::keep(k, raw_k));
        let (y, output) = self.linear(Projection::Output.of(layer), &o, hook)?; // [T, D]
        Ok((y, AttentionSaved { q, k, v, o, lse, projections, output }))
    }

    /// The gradient dn `[T, D]` of the input, where it is wanted, from dy `[T, D]`.
    ///
    /// `n` gives the input again; it is called only if a trained part reads it.
    pub(crate) fn attention_backward(
        &self,
        layer: usize,
        saved: AttentionSaved,
        n: impl FnOnce() -> Result<Tensor>,
        (positions, segments): (&Tensor, &Segments),
        dy: &Tensor,
        wanted: bool,
        hook: &mut dyn LinearHook,
        gradients: &mut dyn Gradients,
    ) -> Result<Option<Tensor>> {
        let AttentionSaved { q, k, v, o, lse, projections, output } = saved;
        let mut d_o = self.kernels.empty(o.shape())?; // [T, H*E]
        let d_o_out = Some((&mut d_o, Accum::Replace));
        self.linear_backward(Projection::Output.of(layer), output, Some(&o), dy, d_o_out, hook, gradients)?;

        let (q, raw_q) = self.heads_again(Norm::Query(layer), layer, q, positions)?; // [T, H*E]
        let (k, raw_k) = self.heads_again(Norm::Key(layer), layer, k, positions)?; // [T, G*E]
        let (mut dq, mut dk) = (self.kernels.empty(q.shape())?, self.kernels.empty(k.shape())?);
        let mut dv = self.kernels.empty(v.shape())?; // [T, G*E], as dk; dq [T, H*E]
        self.kernels.attention_backward(
            &self.config.attention_shape(layer),
            segments,
            (&q, &k, &v),
            &o,
            &lse,
            &d_o,
            (&mut dq, &mut dk, &mut dv),
        )?;
        drop((q, k, v, o, lse, d_o));
        let dq = self.heads_backward(Norm::Query(layer), layer, raw_q, positions, dq, gradients)?;
        let dk = self.heads_backward(Norm::Key(layer), layer, raw_k, positions, dk, gradients)?;
        self.linear_parts_backward(layer, PARTS, projections, n, [dq, dk, dv], wanted, hook, gradients)
    }

    /// o `[T, H*E]` and lse `[T, H]` of queries `[T, H*E]` over keys and values `[S, G*E]`.
    pub(crate) fn attend(
        &self,
        layer: usize,
        segments: &Segments,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let geometry = self.config.attention_shape(layer);
        let mut o = self.kernels.empty(q.shape())?; // [T, H*E]
        let mut lse = self.kernels.empty(&[q.shape()[0], geometry.heads])?; // [T, H]
        self.kernels.attention(&geometry, segments, q, k, v, &mut o, &mut lse)?;
        Ok((o, lse))
    }

    /// Projected queries or keys x `[T, H*E]` as the attention reads them: each head normed where the model has
    /// such norms, then turned by its token's position. Where it is normed, x comes back as well.
    fn heads(
        &self,
        norm: Norm,
        layer: usize,
        x: Tensor,
        positions: &Tensor,
    ) -> Result<(Tensor, Option<RawHeads>)> {
        let (mut y, mut raw) = (x, None);
        if self.config.query_key_norm {
            let shape = y.shape().to_vec();
            let e = self.config.head_dim;
            let x = y.reshape(&[shape[0] * shape[1] / e, e])?; // [T*H, E]
            let (normed, norm) = self.norm(norm, &x)?; // [T*H, E]
            y = normed.reshape(&shape)?;
            raw = Some(RawHeads { x, norm });
        }
        if let Some(rope) = self.ropes.get(self.config.blocks[layer].rotation) {
            self.kernels.rope(rope, positions, &mut y)?;
        }
        Ok((y, raw))
    }

    /// What was kept, as [`Model::heads`] gave it.
    fn heads_again(
        &self,
        norm: Norm,
        layer: usize,
        kept: Heads,
        positions: &Tensor,
    ) -> Result<(Tensor, Option<RawHeads>)> {
        match kept {
            Heads::Ready(y) => Ok((y, None)),
            Heads::Raw(RawHeads { x, .. }) => {
                let (tokens, elements) = (positions.len(), x.len());
                self.heads(norm, layer, x.reshape(&[tokens, elements / tokens])?, positions)
            }
        }
    }

    /// The gradient `[T, H*E]` of the projected queries or keys from that of what the attention read: turned back,
    /// and through the norm.
    fn heads_backward(
        &self,
        norm: Norm,
        layer: usize,
        raw: Option<RawHeads>,
        positions: &Tensor,
        mut dy: Tensor,
        gradients: &mut dyn Gradients,
    ) -> Result<Tensor> {
        if let Some(rope) = self.ropes.get(self.config.blocks[layer].rotation) {
            self.kernels.rope_backward(rope, positions, &mut dy)?;
        }
        let Some(RawHeads { x, norm: saved }) = raw else { return Ok(dy) };
        let shape = dy.shape().to_vec();
        let dy = dy.reshape(x.shape())?; // [T*H, E]
        let mut dx = self.kernels.empty(x.shape())?; // [T*H, E]
        self.norm_backward(norm, &x, &saved, &dy, Accum::Replace, &mut dx, gradients)?;
        Ok(dx.reshape(&shape)?)
    }
}
