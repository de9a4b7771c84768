//! Norms behind each residual sum, as in BERT (arXiv 1706.03762, section 3.1):
//!
//! ```text
//! x ──┬── attention ──(+)── a ── norm ── mid ──┬── feed-forward ──(+)── b ── norm ── y
//!     └────────────────┘                       └───────────────────┘
//! ```

use lora_sb_kernels::{Accum, DType, Tensor};

use crate::attention::{Attend, AttentionSaved};
use crate::linear::Operand;
use crate::mlp::FeedForwardSaved;
use crate::norm::NormSaved;
use crate::{Batch, Error, Gradients, InputGradient, LinearHook, Model, Norm, Result};

#[derive(Debug)]
pub(super) struct BlockSaved {
    /// `[T, D]`; none where nothing reads it again.
    pub(super) x: Option<Tensor>,
    attention: AttentionSaved,
    /// The first sum, `[R, D]`; mid is its norm.
    a: Tensor,
    attention_norm: NormSaved,
    feed_forward: FeedForwardSaved,
    /// The second sum, `[R, D]`.
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
        rows: Option<&Tensor>,
        hook: &dyn LinearHook,
    ) -> Result<(Tensor, BlockSaved)> {
        let mut attention = self.attention(layer, self.as_operand(&x)?, positions, attend, hook)?;
        let read = self.read_rows(rows, &x)?; // [R, D]
        let mut a = self.kernels.empty(read.shape())?; // [R, D]
        self.attention_output(layer, &mut attention, rows, &mut a, hook)?;
        let norm = Norm::Attention(layer);
        let (mid, attention_norm) = self.add_norm(norm, &read, &mut a, DType::F32)?; // a += x; [R, D]
        drop(read);
        let b = || Ok(self.kernels.empty(mid.shape())?);
        let n = self.as_operand(&mid)?;
        let (mut b, feed_forward) = self.feed_forward(layer, n, (b, Accum::Replace), hook)?; // [R, D]
        let norm = Norm::FeedForward(layer);
        let (y, feed_forward_norm) = self.add_norm(norm, &mid, &mut b, DType::F32)?; // b += mid; [R, D]
        let x = Some(x);
        Ok((y, BlockSaved { x, attention, a, attention_norm, feed_forward, b, feed_forward_norm }))
    }

    pub(super) fn block_behind_backward(
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
        let BlockSaved { x, attention, a, attention_norm, feed_forward, b, feed_forward_norm } = saved;
        let wanted = wanted == InputGradient::Wanted;
        let mut db = self.kernels.empty(b.shape())?; // [R, D]
        let norm = Norm::FeedForward(layer);
        self.norm_backward(norm, &b, &feed_forward_norm, &dy, Accum::Replace, &mut db, gradients)?;
        drop((b, dy, feed_forward_norm));
        let norm = Norm::Attention(layer);
        let mid = || self.norm(norm, &a, self.dtype).map(|(mid, _)| Operand::Own(mid));
        let df = self.as_operand(&db)?;
        let dn = self.feed_forward_backward(layer, feed_forward, mid, df, hook, gradients)?; // [R, D]
        let mut dmid = db; // b = mid + ...: the gradient passes unchanged
        self.kernels.add(1.0, &dn, &mut dmid)?;
        drop(dn);

        let mut da = self.kernels.empty(a.shape())?; // [R, D]
        self.norm_backward(norm, &a, &attention_norm, &dmid, Accum::Replace, &mut da, gradients)?;
        drop((a, dmid, attention_norm));
        let places = (&batch.positions, &batch.segments);
        let again = || match &x {
            Some(x) => self.as_operand(x),
            None => Err(Error::Dropped { layer }),
        };
        let df = self.as_operand(&da)?;
        let dn =
            self.attention_backward(layer, attention, again, places, rows, df, wanted, hook, gradients)?;
        let Some(dn) = dn else { return Ok(None) };
        let mut dx = self.spread_rows(rows, da, batch.tokens())?; // a = x + ...: as above
        self.kernels.add(1.0, &dn, &mut dx)?;
        Ok(Some(dx))
    }
}
