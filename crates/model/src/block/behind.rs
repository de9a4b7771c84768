//! Norms behind each residual sum, as in BERT (arXiv 1706.03762, section 3.1):
//!
//! ```text
//! x ──┬── attention ──(+)── a ── norm ── mid ──┬── feed-forward ──(+)── b ── norm ── y
//!     └────────────────┘                       └───────────────────┘
//! ```

use lora_sb_kernels::{Accum, Tensor};

use crate::attention::{Attend, AttentionSaved};
use crate::mlp::FeedForwardSaved;
use crate::norm::NormSaved;
use crate::{Batch, Gradients, InputGradient, LinearHook, Model, Norm, Result};

#[derive(Debug)]
pub(super) struct BlockSaved {
    /// `[T, D]`.
    pub(super) x: Tensor,
    attention: AttentionSaved,
    /// The first sum, `[T, D]`; mid is its norm.
    a: Tensor,
    attention_norm: NormSaved,
    feed_forward: FeedForwardSaved,
    /// The second sum, `[T, D]`.
    b: Tensor,
    feed_forward_norm: NormSaved,
}

impl Model {
    pub(super) fn block_behind(
        &self,
        layer: usize,
        x: Tensor,
        positions: &Tensor,
        attend: Attend<'_>,
        hook: &dyn LinearHook,
    ) -> Result<(Tensor, BlockSaved)> {
        let (mut a, attention) = self.attention(layer, &x, positions, attend, hook)?; // [T, D]
        self.kernels.add(1.0, &x, &mut a)?;
        let (mid, attention_norm) = self.norm(Norm::Attention(layer), &a)?; // [T, D]
        let (mut b, feed_forward) = self.feed_forward(layer, &mid, hook)?; // [T, D]
        self.kernels.add(1.0, &mid, &mut b)?;
        drop(mid);
        let (y, feed_forward_norm) = self.norm(Norm::FeedForward(layer), &b)?; // [T, D]
        Ok((y, BlockSaved { x, attention, a, attention_norm, feed_forward, b, feed_forward_norm }))
    }

    pub(super) fn block_behind_backward(
        &self,
        layer: usize,
        saved: BlockSaved,
        batch: &Batch,
        dy: Tensor,
        hook: &mut dyn LinearHook,
        gradients: &mut dyn Gradients,
        wanted: InputGradient,
    ) -> Result<Option<Tensor>> {
        let BlockSaved { x, attention, a, attention_norm, feed_forward, b, feed_forward_norm } = saved;
        let wanted = wanted == InputGradient::Wanted;
        let mut db = self.kernels.empty(b.shape())?; // [T, D]
        let norm = Norm::FeedForward(layer);
        self.norm_backward(norm, &b, &feed_forward_norm, &dy, Accum::Replace, &mut db, gradients)?;
        drop((b, dy));
        let norm = Norm::Attention(layer);
        let mid = || self.norm(norm, &a).map(|(mid, _)| mid);
        let dn = self.feed_forward_backward(layer, feed_forward, mid, &db, hook, gradients)?; // [T, D]
        let mut dmid = db; // b = mid + ...: the gradient passes unchanged
        self.kernels.add(1.0, &dn, &mut dmid)?;

        let mut da = dn; // [T, D], overwritten
        self.norm_backward(norm, &a, &attention_norm, &dmid, Accum::Replace, &mut da, gradients)?;
        drop((a, dmid));
        let places = (&batch.positions, &batch.segments);
        let again = || Ok(x);
        let dn = self.attention_backward(layer, attention, again, places, &da, wanted, hook, gradients)?;
        let Some(dn) = dn else { return Ok(None) };
        let mut dx = da; // a = x + ...: as above
        self.kernels.add(1.0, &dn, &mut dx)?;
        Ok(Some(dx))
    }
}
