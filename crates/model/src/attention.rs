//! Self-attention: projections, norms of heads, rotation, attention over packed sequences, output projection.
//!
//! Behind the attention of the last block only some rows are read, R of T (see [`block`](crate::block)): the output
//! projection computes no others, forward or backward.

use lora_sb_kernels::{Accum, Segments, Tensor};

use crate::linear::Operand;
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
    /// Queries, keys and values of the input n `[T, D]`, and what the queries see; positions `[T]`.
    pub(crate) fn attention(
        &self,
        layer: usize,
        n: Operand<'_>,
        positions: &Tensor,
        attend: Attend<'_>,
        hook: &dyn LinearHook,
    ) -> Result<AttentionSaved> {
        let ([q, k, v], projections) = self.linear_parts(layer, PARTS, &n, hook)?;
        drop(n);
        let (q, raw_q) = self.heads(Norm::Query(layer), layer, q, positions)?; // [T, H*E]
        let (k, raw_k) = self.heads(Norm::Key(layer), layer, k, positions)?; // [T, G*E]
        let (o, lse) = attend(&q, &k, &v)?; // [T, H*E], [T, H]
        let (q, k) = (Heads::keep(q, raw_q), Heads::keep(k, raw_k));
        Ok(AttentionSaved { q, k, v, o, lse, projections, output: SiteSaved::default() })
    }

    /// What the attention adds to the residual stream, f `[R, D]`, replaced, in the rows that are read.
    pub(crate) fn attention_output(
        &self,
        layer: usize,
        saved: &mut AttentionSaved,
        rows: Option<&Tensor>,
        f: &mut Tensor,
        hook: &dyn LinearHook,
    ) -> Result<()> {
        let o = self.read_rows(rows, &saved.o)?; // [R, H*E]
        saved.output = self.linear(Projection::Output.of(layer), &o, Accum::Replace, f, hook)?;
        Ok(())
    }

    /// The gradient dn `[T, D]` of the input, where it is wanted, from df `[R, D]`, a product's operand.
    ///
    /// `n` gives the input again; it is called only if a trained part reads it.
    pub(crate) fn attention_backward<'x>(
        &self,
        layer: usize,
        saved: AttentionSaved,
        n: impl FnOnce() -> Result<Operand<'x>>,
        (positions, segments): (&Tensor, &Segments),
        rows: Option<&Tensor>,
        df: Operand<'_>,
        wanted: bool,
        hook: &mut dyn LinearHook,
        gradients: &mut dyn Gradients,
    ) -> Result<Option<Tensor>> {
        let AttentionSaved { q, k, v, o, lse, projections, output } = saved;
        let d_o = self.output_backward(layer, output, rows, &o, df, hook, gradients)?; // [T, H*E]

        let (q, raw_q) = self.heads_again(Norm::Query(layer), layer, q, positions)?; // [T, H*E]
        let (k, raw_k) = self.heads_again(Norm::Key(layer), layer, k, positions)?; // [T, G*E]
        let (mut dq, mut dk) = (self.operand(q.shape())?, self.operand(k.shape())?);
        let mut dv = self.operand(v.shape())?; // [T, G*E], as dk; dq [T, H*E]
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

    /// The gradient `[T, H*E]` of what the attention made, o `[T, H*E]`, from df `[R, D]`.
    fn output_backward(
        &self,
        layer: usize,
        saved: SiteSaved,
        rows: Option<&Tensor>,
        o: &Tensor,
        df: Operand<'_>,
        hook: &mut dyn LinearHook,
        gradients: &mut dyn Gradients,
    ) -> Result<Tensor> {
        let site = Projection::Output.of(layer);
        let input = match self.linear_needs_input(site, hook, gradients) {
            true => Some(self.read_rows(rows, o)?), // [R, H*E]
            false => None,
        };
        let mut d_few = self.operand(&[df.shape()[0], o.shape()[1]])?; // [R, H*E]
        let out = Some((&mut d_few, Accum::Replace));
        self.linear_backward(site, saved, input.as_deref(), &df, out, hook, gradients)?;
        drop((input, df));
        self.spread_rows(rows, d_few, o.shape()[0])
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
        let mut o = self.operand(q.shape())?; // [T, H*E]
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
            let (normed, norm) = self.norm(norm, &x, self.dtype)?; // [T*H, E]
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
        let mut dx = self.operand(x.shape())?; // [T*H, E]
        self.norm_backward(norm, &x, &saved, &dy, Accum::Replace, &mut dx, gradients)?;
        Ok(dx.reshape(&shape)?)
    }
}
