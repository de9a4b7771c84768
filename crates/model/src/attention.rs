//! Self-attention: projections, rotation, attention over packed sequences, output projection.

use lora_sb_kernels::{Accum, Segments, Tensor};

use crate::{Batch, Gradients, LinearHook, Model, Projection, Result, SiteSaved};

/// Queries, keys and values of some tokens, rotated.
#[derive(Debug)]
pub(crate) struct Projected {
    /// `[T, H*E]`.
    pub(crate) q: Tensor,
    /// `[T, G*E]`.
    pub(crate) k: Tensor,
    /// `[T, G*E]`.
    pub(crate) v: Tensor,
    /// Of query, key and value.
    sites: [SiteSaved; 3],
}

/// What the attention keeps for its backward.
#[derive(Debug)]
pub(crate) struct AttentionSaved {
    projected: Projected,
    /// `[T, H*E]`.
    o: Tensor,
    /// `[T, H]`.
    lse: Tensor,
    output: SiteSaved,
}

impl Model {
    /// q, k and v of the normed input n `[T, D]`; positions `[T]`.
    pub(crate) fn attention_project(
        &self,
        layer: usize,
        n: &Tensor,
        positions: &Tensor,
        hook: &dyn LinearHook,
    ) -> Result<Projected> {
        let (mut q, query) = self.linear(Projection::Query.of(layer), n, hook)?; // [T, H*E]
        let (mut k, key) = self.linear(Projection::Key.of(layer), n, hook)?; // [T, G*E]
        let (v, value) = self.linear(Projection::Value.of(layer), n, hook)?; // [T, G*E]
        self.kernels.rope(&self.rope, positions, &mut q)?;
        self.kernels.rope(&self.rope, positions, &mut k)?;
        Ok(Projected { q, k, v, sites: [query, key, value] })
    }

    /// o `[T, H*E]` and lse `[T, H]` of queries `[T, H*E]` over keys and values `[S, G*E]`.
    pub(crate) fn attend(
        &self,
        segments: &Segments,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let geometry = self.config.attention_shape();
        let mut o = self.kernels.empty(q.shape())?; // [T, H*E]
        let mut lse = self.kernels.empty(&[q.shape()[0], geometry.heads])?; // [T, H]
        self.kernels.attention(&geometry, segments, q, k, v, &mut o, &mut lse)?;
        Ok((o, lse))
    }

    /// What the attention adds to the residual stream, `[T, D]`; n `[T, D]` is the normed input.
    pub(crate) fn attention(
        &self,
        layer: usize,
        n: Tensor,
        batch: &Batch,
        hook: &dyn LinearHook,
    ) -> Result<(Tensor, AttentionSaved)> {
        let projected = self.attention_project(layer, &n, &batch.positions, hook)?;
        drop(n);
        let (o, lse) = self.attend(&batch.segments, &projected.q, &projected.k, &projected.v)?;
        let (y, output) = self.linear(Projection::Output.of(layer), &o, hook)?; // [T, D]
        Ok((y, AttentionSaved { projected, o, lse, output }))
    }

    /// The gradient dn `[T, D]` of the normed input, where it is wanted, from dy `[T, D]`.
    ///
    /// `n` computes the normed input again; it is called only if a trained part reads it.
    pub(crate) fn attention_backward(
        &self,
        layer: usize,
        saved: AttentionSaved,
        n: &dyn Fn() -> Result<Tensor>,
        batch: &Batch,
        dy: &Tensor,
        wanted: bool,
        hook: &mut dyn LinearHook,
        gradients: &mut dyn Gradients,
    ) -> Result<Option<Tensor>> {
        let AttentionSaved { projected: Projected { q, k, v, sites }, o, lse, output } = saved;
        let mut d_o = self.kernels.empty(o.shape())?; // [T, H*E]
        let d_o_out = Some((&mut d_o, Accum::Replace));
        self.linear_backward(Projection::Output.of(layer), output, Some(&o), dy, d_o_out, hook, gradients)?;

        let (mut dq, mut dk) = (self.kernels.empty(q.shape())?, self.kernels.empty(k.shape())?);
        let mut dv = self.kernels.empty(v.shape())?; // [T, G*E], as dk; dq [T, H*E]
        self.kernels.attention_backward(
            &self.config.attention_shape(),
            &batch.segments,
            (&q, &k, &v),
            &o,
            &lse,
            &d_o,
            (&mut dq, &mut dk, &mut dv),
        )?;
        drop((q, k, v, o, lse, d_o));
        self.kernels.rope_backward(&self.rope, &batch.positions, &mut dq)?;
        self.kernels.rope_backward(&self.rope, &batch.positions, &mut dk)?;

        let projections = [Projection::Query, Projection::Key, Projection::Value].map(|p| p.of(layer));
        let n = match projections.iter().any(|&site| self.linear_needs_input(site, hook, gradients)) {
            true => Some(n()?), // [T, D]
            false => None,
        };
        let mut dn = if wanted { Some(self.kernels.empty(dy.shape())?) } else { None }; // [T, D]
        let mut accum = Accum::Replace;
        for ((site, saved), d) in projections.into_iter().zip(sites).zip([dq, dk, dv]) {
            let dx = dn.as_mut().map(|dn| (dn, accum));
            self.linear_backward(site, saved, n.as_ref(), &d, dx, hook, gradients)?;
            accum = Accum::Add;
        }
        Ok(dn)
    }
}
