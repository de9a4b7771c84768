//! One block of the residual stream.
//!
//! ```text
//! x ──┬── norm ── attention ──(+)── mid ──┬── norm ── feed-forward ──(+)── y
//!     └───────────────────────┘           └──────────────────────────┘
//! ```

use lora_sb_kernels::{Accum, Tensor};

use crate::attention::AttentionSaved;
use crate::mlp::FeedForwardSaved;
use crate::{Batch, Gradients, InputGradient, LinearHook, Model, Parameter, Result};

/// What a block keeps for its backward. Normed inputs and the gated product are not among it: they are
/// cheap to compute again, and mostly nobody asks for them.
#[derive(Debug)]
pub struct BlockSaved {
    /// `[T, D]`.
    x: Tensor,
    /// `[T]`.
    attention_rstd: Tensor,
    attention: AttentionSaved,
    /// The residual stream between attention and feed-forward, `[T, D]`.
    mid: Tensor,
    /// `[T]`.
    feed_forward_rstd: Tensor,
    feed_forward: FeedForwardSaved,
}

impl BlockSaved {
    /// The block's input `[T, D]`; the rest is dropped.
    pub fn into_input(self) -> Tensor {
        self.x
    }
}

impl Model {
    /// The block's output `[T, D]` from its input x `[T, D]`, which is kept in what is saved.
    ///
    /// # Errors
    /// Where there is no such layer or the device is out of memory.
    pub fn block_forward(
        &self,
        layer: usize,
        x: Tensor,
        batch: &Batch,
        hook: &dyn LinearHook,
    ) -> Result<(Tensor, BlockSaved)> {
        let (n, attention_rstd) = self.norm(Parameter::AttentionNorm(layer), &x)?; // [T, D], [T]
        let (mut mid, attention) = self.attention(layer, n, batch, hook)?; // [T, D]
        self.kernels.add(1.0, &x, &mut mid)?;
        let (n, feed_forward_rstd) = self.norm(Parameter::FeedForwardNorm(layer), &mid)?; // [T, D], [T]
        let (mut y, feed_forward) = self.feed_forward(layer, n, hook)?; // [T, D]
        self.kernels.add(1.0, &mid, &mut y)?;
        Ok((y, BlockSaved { x, attention_rstd, attention, mid, feed_forward_rstd, feed_forward }))
    }

    /// The gradient `[T, D]` of the block's input, where it is wanted, from that of its output, dy `[T, D]`.
    ///
    /// The gradients of the block's own parameters and of the hook's are added where they belong.
    ///
    /// # Errors
    /// Where there is no such layer or the device is out of memory.
    pub fn block_backward(
        &self,
        layer: usize,
        saved: BlockSaved,
        batch: &Batch,
        dy: Tensor,
        hook: &mut dyn LinearHook,
        gradients: &mut dyn Gradients,
        wanted: InputGradient,
    ) -> Result<Option<Tensor>> {
        let BlockSaved { x, attention_rstd, attention, mid, feed_forward_rstd, feed_forward } = saved;
        let gain = Parameter::FeedForwardNorm(layer);
        let n = || self.norm(gain, &mid).map(|(n, _)| n);
        let dn = self.feed_forward_backward(layer, feed_forward, &n, &dy, hook, gradients)?; // [T, D]
        let mut dmid = dy; // y = mid + ...: the gradient passes unchanged, and the norm's is added
        self.norm_backward(gain, &mid, &feed_forward_rstd, &dn, Accum::Add, &mut dmid, gradients)?;
        drop((dn, mid, feed_forward_rstd));

        let gain = Parameter::AttentionNorm(layer);
        let n = || self.norm(gain, &x).map(|(n, _)| n);
        let read = wanted == InputGradient::Wanted || gradients.of(gain).is_some();
        let dn = self.attention_backward(layer, attention, &n, batch, &dmid, read, hook, gradients)?; // [T, D]
        let Some(dn) = dn else { return Ok(None) };
        let mut dx = dmid; // mid = x + ...: as above
        self.norm_backward(gain, &x, &attention_rstd, &dn, Accum::Add, &mut dx, gradients)?;
        Ok((wanted == InputGradient::Wanted).then_some(dx))
    }
}
