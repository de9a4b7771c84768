//! The feed-forward layer: gate and up, gated activation, down.

use lora_sb_kernels::{Accum, Tensor};

use crate::{Gradients, LinearHook, Model, Projection, Result, SiteSaved};

/// What the feed-forward layer keeps for its backward.
#[derive(Debug)]
pub(crate) struct FeedForwardSaved {
    /// `[T, F]`.
    gate: Tensor,
    /// `[T, F]`.
    up: Tensor,
    /// Of gate, up and down.
    sites: [SiteSaved; 3],
}

impl Model {
    /// What the feed-forward layer adds to the residual stream, `[T, D]`; n `[T, D]` is the normed input.
    pub(crate) fn feed_forward(
        &self,
        layer: usize,
        n: Tensor,
        hook: &dyn LinearHook,
    ) -> Result<(Tensor, FeedForwardSaved)> {
        let (gate, gate_saved) = self.linear(Projection::Gate.of(layer), &n, hook)?; // [T, F]
        let (up, up_saved) = self.linear(Projection::Up.of(layer), &n, hook)?; // [T, F]
        drop(n);
        let h = self.gated(&gate, &up)?; // [T, F]
        let (y, down_saved) = self.linear(Projection::Down.of(layer), &h, hook)?; // [T, D]
        Ok((y, FeedForwardSaved { gate, up, sites: [gate_saved, up_saved, down_saved] }))
    }

    /// `h = act(gate) * up`; all `[T, F]`.
    fn gated(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        let mut h = self.kernels.empty(gate.shape())?; // [T, F]
        self.kernels.gated_activation(self.config.activation, gate, up, &mut h)?;
        Ok(h)
    }

    /// The gradient dn `[T, D]` of the normed input from dy `[T, D]`.
    ///
    /// `n` computes the normed input again; it is called only if a trained part reads it.
    pub(crate) fn feed_forward_backward(
        &self,
        layer: usize,
        saved: FeedForwardSaved,
        n: &dyn Fn() -> Result<Tensor>,
        dy: &Tensor,
        hook: &mut dyn LinearHook,
        gradients: &mut dyn Gradients,
    ) -> Result<Tensor> {
        let FeedForwardSaved { mut gate, mut up, sites: [gate_saved, up_saved, down_saved] } = saved;
        let [gate_site, up_site, down_site] =
            [Projection::Gate, Projection::Up, Projection::Down].map(|projection| projection.of(layer));

        let h = match self.linear_needs_input(down_site, hook, gradients) {
            true => Some(self.gated(&gate, &up)?), // [T, F]
            false => None,
        };
        let mut dh = self.kernels.empty(gate.shape())?; // [T, F]
        let dh_out = Some((&mut dh, Accum::Replace));
        self.linear_backward(down_site, down_saved, h.as_ref(), dy, dh_out, hook, gradients)?;
        drop(h);
        self.kernels.gated_activation_backward(self.config.activation, &mut gate, &mut up, &dh)?;
        drop(dh);
        let (dgate, dup) = (gate, up); // [T, F], overwritten by their gradients

        let read = [gate_site, up_site].iter().any(|&site| self.linear_needs_input(site, hook, gradients));
        let n = if read { Some(n()?) } else { None }; // [T, D]
        let mut dn = self.kernels.empty(dy.shape())?; // [T, D]
        let dn_out = Some((&mut dn, Accum::Replace));
        self.linear_backward(gate_site, gate_saved, n.as_ref(), &dgate, dn_out, hook, gradients)?;
        drop(dgate);
        let dn_out = Some((&mut dn, Accum::Add));
        self.linear_backward(up_site, up_saved, n.as_ref(), &dup, dn_out, hook, gradients)?;
        Ok(dn)
    }
}
