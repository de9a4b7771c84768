//! Norms before each sub-layer, and around it in Gemma 2 and 3, whose second norm is `(norm)` here:
//!
//! ```text
//! x ──┬── norm ── attention ── (norm) ──(+)── mid ──┬── norm ── feed-forward ── (norm) ──(+)── y
//!     └──────────────────────────────────┘          └─────────────────────────────────────┘
//! ```

use lora_sb_kernels::{Accum, DType, Tensor};

use crate::attention::{Attend, AttentionSaved};
use crate::config::NormPlacement;
use crate::linear::Operand;
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
    /// The residual stream between attention and feed-forward, `[R, D]`.
    mid: Tensor,
    feed_forward_norm: NormSaved,
    feed_forward: FeedForwardSaved,
    feed_forward_output: Option<OutputSaved>,
}

/// What the norm behind a sub-layer keeps.
#[derive(Debug)]
struct OutputSaved {
    /// What the sub-layer made, `[R, D]`.
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
        rows: Option<&Tensor>,
        hook: &dyn LinearHook,
    ) -> Result<(Tensor, BlockSaved)> {
        let (n, attention_norm) = self.norm(Norm::Attention(layer), &x, self.dtype)?; // [T, D]
        let mut attention = self.attention(layer, Operand::Own(n), positions, attend, hook)?;
        let read = self.read_rows(rows, &x)?; // [R, D]
        let mut f = self.added(read.shape())?; // [R, D]
        self.attention_output(layer, &mut attention, rows, &mut f, hook)?;
        let (mut mid, attention_output) = self.output_norm(Norm::AttentionOutput(layer), f)?; // [R, D]
        let norm = Norm::FeedForward(layer);
        let (n, feed_forward_norm) = self.add_norm(norm, &read, &mut mid, self.dtype)?; // mid += x; [R, D]
        drop(read);
        let (f, accum) = self.feed_forward_result(&mid);
        let (f, feed_forward) = self.feed_forward(layer, Operand::Own(n), (f, accum), hook)?; // [R, D]
        let (mut y, feed_forward_output) = self.output_norm(Norm::FeedForwardOutput(layer), f)?; // [R, D]
        if accum == Accum::Replace {
            self.kernels.add(1.0, &mid, &mut y)?;
        }
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
        rows: Option<&Tensor>,
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
            self.output_norm_backward(Norm::FeedForwardOutput(layer), feed_forward_output, &dy, gradients)?; // [R, D]
        let n = || self.norm(norm, &mid, self.dtype).map(|(n, _)| Operand::Own(n));
        let dn = self.feed_forward_backward(layer, feed_forward, n, df, hook, gradients)?; // [R, D]
        let mut dmid = dy; // y = mid + ...: the gradient passes unchanged, and the norm's is added
        self.norm_backward(norm, &mid, &feed_forward_norm, &dn, Accum::Add, &mut dmid, gradients)?;
        drop((dn, mid, feed_forward_norm));

        let norm = Norm::Attention(layer);
        let df =
            self.output_norm_backward(Norm::AttentionOutput(layer), attention_output, &dmid, gradients)?; // [R, D]
        let n = || self.norm(norm, &x, self.dtype).map(|(n, _)| Operand::Own(n));
        let read = wanted == InputGradient::Wanted || self.norm_is_trained(norm, gradients);
        let places = (&batch.positions, &batch.segments);
        let dn = self.attention_backward(layer, attention, n, places, rows, df, read, hook, gradients)?; // [T, D]
        let Some(dn) = dn else { return Ok(None) };
        let mut dx = self.spread_rows(rows, dmid, x.shape()[0])?; // mid = x + ...: as above
        self.norm_backward(norm, &x, &attention_norm, &dn, Accum::Add, &mut dx, gradients)?;
        Ok((wanted == InputGradient::Wanted).then_some(dx))
    }

    /// For what a sub-layer makes `[R, D]`: the residual stream itself, or what a norm reads before it is added.
    fn added(&self, shape: &[usize]) -> Result<Tensor> {
        match self.config.norm_placement {
            NormPlacement::Around => self.operand(shape),
            _ => Ok(self.kernels.empty(shape)?),
        }
    }

    /// Where the feed-forward layer's product `[R, D]` goes: into a copy of mid that it is added to, so that the sum
    /// takes no pass of its own, or to a norm.
    fn feed_forward_result(&self, mid: &Tensor) -> (impl FnOnce() -> Result<Tensor>, Accum) {
        let around = self.config.norm_placement == NormPlacement::Around;
        let f = move || if around { self.operand(mid.shape()) } else { self.copied(mid) };
        (f, if around { Accum::Replace } else { Accum::Add })
    }

    /// What a sub-layer made, f `[R, D]`, normed if the model does so, and as it is if not.
    fn output_norm(&self, norm: Norm, f: Tensor) -> Result<(Tensor, Option<OutputSaved>)> {
        if self.config.norm_placement != NormPlacement::Around {
            return Ok((f, None));
        }
        let (y, saved) = self.norm(norm, &f, DType::F32)?; // [R, D]
        Ok((y, Some(OutputSaved { f, norm: saved })))
    }

    /// df `[R, D]`, as products read it, from dy `[R, D]`.
    fn output_norm_backward<'y>(
        &self,
        norm: Norm,
        saved: Option<OutputSaved>,
        dy: &'y Tensor,
        gradients: &mut dyn Gradients,
    ) -> Result<Operand<'y>> {
        let Some(OutputSaved { f, norm: saved }) = saved else { return self.as_operand(dy) };
        let mut df = self.operand(f.shape())?; // [R, D]
        self.norm_backward(norm, &f, &saved, dy, Accum::Replace, &mut df, gradients)?;
        Ok(Operand::Own(df))
    }
}
