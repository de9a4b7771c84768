//! Norms before each sub-layer, and around it in Gemma 2 and 3, whose second norm is `(norm)` here:
//!
//! ```text
//! x ──┬── norm ── attention ── (norm) ──(+)── mid ──┬── norm ── feed-forward ── (norm) ──(+)── y
//!     └──────────────────────────────────┘          └─────────────────────────────────────┘
//! ```

use lora_sb_kernels::{Accum, Tensor};

use crate::attention::{Attend, AttentionSaved};
use crate::config::NormPlacement;
use crate::mlp::FeedForwardSaved;
use crate::norm::NormSaved;
use crate::{Batch, Gradients, InputGradient, LinearHook, Model, Norm, Result};

#[derive(Debug)]
pub(super) struct BlockSaved {
    /// `[T, D]`.
    pub(super) x: Tensor,
    attention_norm: NormSaved,
    attention: AttentionSaved,
    attention_output: Option<OutputSaved>,
    /// The residual stream between attention and feed-forward, `[T, D]`.
    mid: Tensor,
    feed_forward_norm: NormSaved,
    feed_forward: FeedForwardSaved,
    feed_forward_output: Option<OutputSaved>,
}

/// What the norm behind a sub-layer keeps.
#[derive(Debug)]
struct OutputSaved {
    /// What the sub-layer made, `[T, D]`.
    f: Tensor,
    norm: NormSaved,
}

impl Model {
    pub(super) fn block_before(
        &self,
        layer: usize,
        x: Tensor,
        positions: &Tensor,
        attend: Attend<'_>,
        hook: &dyn LinearHook,
    ) -> Result<(Tensor, BlockSaved)> {
        let (n, attention_norm) = self.norm(Norm::Attention(layer), &x)?; // [T, D]
        let (f, attention) = self.attention(layer, n, positions, attend, hook)?; // [T, D]
        let (mut mid, attention_output) = self.output_norm(Norm::AttentionOutput(layer), f)?; // [T, D]
        self.kernels.add(1.0, &x, &mut mid)?;
        let (n, feed_forward_norm) = self.norm(Norm::FeedForward(layer), &mid)?; // [T, D]
        let (f, feed_forward) = self.feed_forward(layer, n, hook)?; // [T, D]
        let (mut y, feed_forward_output) = self.output_norm(Norm::FeedForwardOutput(layer), f)?; // [T, D]
        self.kernels.add(1.0, &mid, &mut y)?;
        let saved = BlockSaved {
            x,
            attention_norm,
            attention,
            attention_output,
            mid,
            feed_forward_norm,
            feed_forward,
            feed_forward_output,
        };
        Ok((y, saved))
    }

    pub(super) fn block_before_backward(
        &self,
        layer: usize,
        saved: BlockSaved,
        batch: &Batch,
        dy: Tensor,
        hook: &mut dyn LinearHook,
        gradients: &mut dyn Gradients,
        wanted: InputGradient,
    ) -> Result<Option<Tensor>> {
        let BlockSaved {
            x,
            attention_norm,
            attention,
            attention_output,
            mid,
            feed_forward_norm,
            feed_forward,
            feed_forward_output,
        } = saved;
        let norm = Norm::FeedForward(layer);
        let df =
            self.output_norm_backward(Norm::FeedForwardOutput(layer), feed_forward_output, &dy, gradients)?; // [T, D]
        let n = || self.norm(norm, &mid).map(|(n, _)| n);
        let df = df.as_ref().unwrap_or(&dy);
        let dn = self.feed_forward_backward(layer, feed_forward, n, df, hook, gradients)?; // [T, D]
        let mut dmid = dy; // y = mid + ...: the gradient passes unchanged, and the norm's is added
        self.norm_backward(norm, &mid, &feed_forward_norm, &dn, Accum::Add, &mut dmid, gradients)?;
        drop((dn, mid, feed_forward_norm));

        let norm = Norm::Attention(layer);
        let df =
            self.output_norm_backward(Norm::AttentionOutput(layer), attention_output, &dmid, gradients)?;
        let n = || self.norm(norm, &x).map(|(n, _)| n);
        let read = wanted == InputGradient::Wanted || self.norm_is_trained(norm, gradients);
        let places = (&batch.positions, &batch.segments);
        let dy = df.as_ref().unwrap_or(&dmid);
        let dn = self.attention_backward(layer, attention, n, places, dy, read, hook, gradients)?; // [T, D]
        let Some(dn) = dn else { return Ok(None) };
        drop(df);
        let mut dx = dmid; // mid = x + ...: as above
        self.norm_backward(norm, &x, &attention_norm, &dn, Accum::Add, &mut dx, gradients)?;
        Ok((wanted == InputGradient::Wanted).then_some(dx))
    }

    /// What a sub-layer made, f `[T, D]`, normed if the model does so, and as it is if not.
    fn output_norm(&self, norm: Norm, f: Tensor) -> Result<(Tensor, Option<OutputSaved>)> {
        if self.config.norm_placement != NormPlacement::Around {
            return Ok((f, None));
        }
        let (y, saved) = self.norm(norm, &f)?; // [T, D]
        Ok((y, Some(OutputSaved { f, norm: saved })))
    }

    /// df `[T, D]` from dy `[T, D]`; none where there is no norm and dy is df.
    fn output_norm_backward(
        &self,
        norm: Norm,
        saved: Option<OutputSaved>,
        dy: &Tensor,
        gradients: &mut dyn Gradients,
    ) -> Result<Option<Tensor>> {
        let Some(OutputSaved { f, norm: saved }) = saved else { return Ok(None) };
        let mut df = self.kernels.empty(f.shape())?; // [T, D]
        self.norm_backward(norm, &f, &saved, dy, Accum::Replace, &mut df, gradients)?;
        Ok(Some(df))
    }
}
