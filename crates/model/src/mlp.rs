//! The feed-forward layer: gate and up, or up alone, activation, down.

use lora_sb_kernels::{Accum, Activation, Tensor};

use crate::config::FeedForward;
use crate::linear::Operand;
use crate::{Gradients, LinearHook, Model, Projection, Result, SiteSaved};

/// The layers that read the sub-layer's input, where a gate is among them and where not.
const GATED: [Projection; 2] = [Projection::Gate, Projection::Up];
const PLAIN: [Projection; 1] = [Projection::Up];

/// What the feed-forward layer keeps for its backward.
#[derive(Debug)]
pub(crate) struct FeedForwardSaved {
    hidden: Hidden,
    /// Of the layers that made it: gate and up, the one that makes both, or up alone.
    projections: Vec<SiteSaved>,
    down: SiteSaved,
}

/// What the activation reads, and its gradient after the backward; each `[T, F]`.
#[derive(Debug)]
enum Hidden {
    Gated(Activation, [Tensor; 2]),
    Plain(Activation, [Tensor; 1]),
}

impl Model {
    /// What the feed-forward layer adds to the residual stream, f `[T, D]`: replaced, or added to; n `[T, D]` is its
    /// input. `f` is called when the layer's own largest tensors are there.
    pub(crate) fn feed_forward(
        &self,
        layer: usize,
        n: Operand<'_>,
        (f, accum): (impl FnOnce() -> Result<Tensor>, Accum),
        hook: &dyn LinearHook,
    ) -> Result<(Tensor, FeedForwardSaved)> {
        let (hidden, projections) = match self.config.feed_forward {
            FeedForward::Gated(activation) => {
                let (parts, saved) = self.linear_parts(layer, GATED, &n, hook)?;
                (Hidden::Gated(activation, parts), saved)
            }
            FeedForward::Plain(activation) => {
                let (parts, saved) = self.linear_parts(layer, PLAIN, &n, hook)?;
                (Hidden::Plain(activation, parts), saved)
            }
        };
        drop(n);
        let h = self.activated(&hidden)?; // [T, F]
        let mut f = f()?; // [T, D]
        let down = self.linear(Projection::Down.of(layer), &h, accum, &mut f, hook)?;
        Ok((f, FeedForwardSaved { hidden, projections, down }))
    }

    /// `h = act(gate) * up`, or `h = act(up)`; all `[T, F]`.
    fn activated(&self, hidden: &Hidden) -> Result<Tensor> {
        let (Hidden::Gated(_, [x, ..]) | Hidden::Plain(_, [x])) = hidden;
        let mut h = self.operand(x.shape())?; // [T, F]
        match hidden {
            Hidden::Gated(activation, [gate, up]) => {
                self.kernels.gated_activation(*activation, gate, up, &mut h)?;
            }
            Hidden::Plain(activation, [up]) => self.kernels.activation(*activation, up, &mut h)?,
        }
        Ok(h)
    }

    /// The gradient dn `[T, D]` of the input from df `[T, D]`, a product's operand.
    ///
    /// `n` gives the input again; it is called only if a trained part reads it.
    pub(crate) fn feed_forward_backward<'x>(
        &self,
        layer: usize,
        saved: FeedForwardSaved,
        n: impl FnOnce() -> Result<Operand<'x>>,
        df: Operand<'_>,
        hook: &mut dyn LinearHook,
        gradients: &mut dyn Gradients,
    ) -> Result<Tensor> {
        let FeedForwardSaved { hidden, projections, down } = saved;
        let site = Projection::Down.of(layer);
        let h = match self.linear_needs_input(site, hook, gradients) {
            true => Some(self.activated(&hidden)?), // [T, F]
            false => None,
        };
        let mut dh = self.operand(&[df.shape()[0], self.config.intermediate_size])?; // [T, F]
        let dh_out = Some((&mut dh, Accum::Replace));
        self.linear_backward(site, down, h.as_ref(), &df, dh_out, hook, gradients)?;
        drop((h, df));
        // The tensors of `hidden` are overwritten by their gradients.
        let dn = match hidden {
            Hidden::Gated(activation, [mut gate, mut up]) => {
                self.kernels.gated_activation_backward(activation, &mut gate, &mut up, &dh)?;
                drop(dh);
                self.linear_parts_backward(layer, GATED, projections, n, [gate, up], true, hook, gradients)?
            }
            Hidden::Plain(activation, [mut up]) => {
                self.kernels.activation_backward(activation, &mut up, &dh)?;
                drop(dh);
                self.linear_parts_backward(layer, PLAIN, projections, n, [up], true, hook, gradients)?
            }
        };
        Ok(dn.expect("it was wanted"))
    }
}
