//! The widest moments of one block, forward and backward.
//!
//! Each function adds up the tensors that are live at one moment, in the order of `block/before.rs`, `block/behind.rs`,
//! `attention.rs` and `mlp.rs`.

use lora_sb_kernels::DType;

use super::{Footprint, Trained};
use crate::Projection;
use crate::config::{FeedForward, NormKind, NormPlacement};

/// The tensors of one block, in bytes.
pub(super) struct Moments<'a> {
    footprint: &'a Footprint<'a>,
    /// T.
    tokens: usize,
    /// R: the rows that are read behind the attention, where they are not all.
    read: Option<usize>,
}

impl<'a> Moments<'a> {
    pub(super) fn of(footprint: &'a Footprint<'a>, tokens: usize, read: Option<usize>) -> Self {
        Moments { footprint, tokens, read }
    }

    fn placement(&self) -> NormPlacement {
        self.footprint.config.norm_placement
    }

    fn rounds(&self) -> bool {
        self.footprint.dtype != DType::F32
    }

    /// R.
    fn rows(&self) -> usize {
        self.read.unwrap_or(self.tokens)
    }

    fn d(&self) -> usize {
        self.footprint.config.hidden_size
    }

    fn f(&self) -> usize {
        self.footprint.config.intermediate_size
    }

    /// H*E.
    fn queries(&self) -> usize {
        self.footprint.config.num_attention_heads * self.footprint.config.head_dim
    }

    /// G*E.
    fn keys(&self) -> usize {
        self.footprint.config.num_key_value_heads * self.footprint.config.head_dim
    }

    /// A tensor that products read or make, `[rows, width]`.
    fn operand(&self, rows: usize, width: usize) -> usize {
        self.footprint.place.bytes_of(self.footprint.dtype, rows * width)
    }

    /// An `f32` tensor.
    fn exact(&self, elements: usize) -> usize {
        self.footprint.place.bytes(elements)
    }

    /// The residual stream or its gradient `[rows, D]`.
    fn stream(&self, rows: usize) -> usize {
        self.exact(rows * self.d())
    }

    /// The gradient of the block's output, `[R, D]`.
    pub(super) fn stream_gradient(&self) -> usize {
        self.stream(self.rows())
    }

    /// The stream as a product reads it, where that is another tensor: `[rows, D]`.
    fn rounded_stream(&self, rows: usize) -> usize {
        if self.rounds() { self.operand(rows, self.d()) } else { 0 }
    }

    /// The statistics of one norm of the residual stream.
    fn norm(&self, rows: usize) -> usize {
        match self.footprint.config.norm {
            NormKind::Rms(_) => self.exact(rows),
            NormKind::Layer => 2 * self.exact(rows),
        }
    }

    /// What a product `[m, k] [k, n]` computes in, as its packed blocks.
    fn product(&self, m: usize, n: usize, k: usize) -> usize {
        self.footprint.place.product_scratch_bytes(self.footprint.types(), m, n, k)
    }

    /// The largest packed blocks of the products that give a layer's gradients; the layer `[n, k]`.
    fn gradients(&self, rows: usize, n: usize, k: usize, trained: Trained) -> usize {
        let weight = if trained.reads_inputs() { self.product(n, k, rows) } else { 0 };
        self.product(rows, k, n).max(weight)
    }

    /// Columns of the gradients that are packed together where layers of one input, `all` columns in all and `widest` at
    /// most, go backward: all of them in `bf16`, one layer's in `f32`.
    fn together(&self, all: usize, widest: usize) -> usize {
        if self.rounds() { all } else { widest }
    }

    /// What the attention computes in, as if all tokens were one sequence.
    fn scores(&self) -> usize {
        let footprint = self.footprint;
        let shape = footprint.config.attention_shape(0);
        footprint.place.attention_scratch_bytes(footprint.dtype, &shape, self.tokens)
    }

    fn holds(&self, projection: Projection) -> bool {
        self.footprint.config.projections.contains(&projection)
    }

    /// q, k, v `[T, *]`; their gradients take the same.
    fn heads(&self) -> usize {
        self.operand(self.tokens, self.queries()) + 2 * self.operand(self.tokens, self.keys())
    }

    /// q and k once more where their heads are normed.
    fn normed_heads(&self) -> usize {
        match self.footprint.config.query_key_norm {
            true => self.operand(self.tokens, self.queries()) + self.operand(self.tokens, self.keys()),
            false => 0,
        }
    }

    /// What the attention keeps: q, k, v, o, lse, and the statistics of heads' norms.
    fn attention(&self) -> usize {
        let config = self.footprint.config;
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let bytes = |width| self.exact(self.tokens * width);
        let norms = if config.query_key_norm { bytes(heads) + bytes(kv_heads) } else { 0 };
        self.heads() + self.operand(self.tokens, self.queries()) + bytes(heads) + norms
    }

    /// What the feed-forward layer keeps: what its activation reads.
    fn feed_forward(&self) -> usize {
        let parts = match self.footprint.config.feed_forward {
            FeedForward::Gated(_) => 2,
            FeedForward::Plain(_) => 1,
        };
        parts * self.operand(self.rows(), self.f())
    }

    /// A residual sum that a norm reads, and the norm's statistics; `[R, D]`.
    fn sum(&self) -> usize {
        self.stream(self.rows()) + self.norm(self.rows())
    }

    /// What a norm behind a sub-layer reads, and its statistics; `[R, D]`.
    fn output(&self) -> usize {
        match self.placement() {
            NormPlacement::Around => self.operand(self.rows(), self.d()) + self.norm(self.rows()),
            _ => 0,
        }
    }

    /// The block's input `[T, D]`, with the statistics of its norm where one stands before.
    fn input(&self, kept: bool) -> usize {
        match self.placement() {
            NormPlacement::Behind if !kept => 0,
            NormPlacement::Behind => self.stream(self.tokens),
            _ => self.stream(self.tokens) + self.norm(self.tokens),
        }
    }

    /// Sums that are kept.
    fn sums(&self) -> usize {
        if self.placement() == NormPlacement::Behind { 2 } else { 1 }
    }

    /// All that is kept; `input` says whether the block's input is, where only layers read it.
    pub(super) fn saved(&self, input: bool) -> usize {
        let sums = self.sums() * self.sum() + 2 * self.output();
        self.input(input) + sums + self.attention() + self.feed_forward()
    }

    /// The widest moment of the forward, the block's input and what it will have kept included.
    pub(super) fn forward(&self) -> usize {
        let (t, r, d, f) = (self.tokens, self.rows(), self.d(), self.f());
        let behind = self.placement() == NormPlacement::Behind;
        // The sub-layer's input as products read it, until the last of them has.
        let normed = |rows| if behind { self.rounded_stream(rows) } else { self.operand(rows, d) };
        let input = self.input(true);
        let widest = self.queries().max(self.keys());
        let mut projections = self.heads() + self.product(t, widest, d);
        if self.holds(Projection::QueryKeyValue) {
            let whole = self.queries() + 2 * self.keys();
            projections = self.operand(t, whole) + self.heads().max(self.product(t, whole, d));
        }
        let projected = input + normed(t) + projections;
        let attended = input + self.attention() + self.normed_heads() + self.scores();
        let few = match self.read {
            Some(r) => self.operand(r, self.queries()),
            None => 0,
        };
        let read = if self.read.is_some() { self.stream(r) } else { 0 };
        let made = if self.placement() == NormPlacement::Around { self.output() } else { self.sum() };
        let output = input + self.attention() + few + read + made + self.product(r, d, self.queries());

        // What is there through the feed-forward layer, its own tensors aside.
        let between = input + self.attention() + self.output() + self.sum();
        let mid = if behind { self.stream(r) } else { 0 };
        let summed = between + read + mid + normed(r);
        let (mut up, hidden) = (self.product(r, f, d), self.feed_forward());
        if self.holds(Projection::GateUp) {
            up = self.operand(r, 2 * f).max(self.product(r, 2 * f, d).saturating_sub(hidden));
        }
        let up = between + mid + normed(r) + hidden + up;
        let h = self.operand(r, f);
        let made = if self.output() > 0 { self.operand(r, d) } else { self.stream(r) };
        let down = between + mid + hidden + h + made + self.product(r, d, f);
        let last = self.saved(true) + mid + self.stream(r); // behind, y and its norm's sum
        projected.max(attended).max(output).max(summed).max(up).max(down).max(last)
    }

    /// The widest moment of the backward, what was kept and the gradient of the block's output included.
    pub(super) fn backward(&self, trained: Trained, input: bool) -> usize {
        let (t, r, d, f) = (self.tokens, self.rows(), self.d(), self.f());
        let behind = self.placement() == NormPlacement::Behind;
        let reads = usize::from(trained.reads_inputs());
        let around = self.output() > 0;
        let dy = self.stream(r);
        // The gradient as products read it.
        let df = if around { self.operand(r, d) } else { self.rounded_stream(r) };
        let saved = self.saved(input);

        // The last norm: dy and, where it is another tensor, the gradient that passes it.
        let norm = saved + dy + if behind { dy } else { df };
        // What is there through the feed-forward layer: the last norm's own tensors are gone.
        let between = saved + dy - if behind { self.sum() } else { self.output() };
        let activated = (1 + reads) * self.operand(r, f); // dh, and h again
        let down = between + df + activated + self.gradients(r, d, f, trained);
        let again =
            if behind && !self.rounds() { reads * self.stream(r) } else { reads * self.operand(r, d) };
        let dn = self.operand(r, d);
        let fused = self.holds(Projection::GateUp);
        let all = if matches!(self.footprint.config.feed_forward, FeedForward::Gated(_)) { 2 * f } else { f };
        let packed = if fused { all } else { self.together(all, f) };
        let mut up = between + dn + again + self.gradients(r, packed, d, trained);
        if fused {
            up = up.max(between + self.operand(r, all));
        }

        // What is there through the attention: input, q, k, v, o, lse and the gradient of the sum.
        let attention = self.input(input) + self.attention() + dy;
        let summed = attention + self.sum() + self.output() + if behind { 2 * dy } else { dn };
        let few = if self.read.is_some() { self.operand(r, self.queries()) } else { 0 };
        let d_few = self.operand(r, self.queries());
        let output_norm = attention + self.output() + df;
        let output = attention + df + d_few + reads * few + self.gradients(r, d, self.queries(), trained);
        let d_o = self.operand(t, self.queries());
        let spread = attention + few + d_o;
        let delta = self.exact(t * self.footprint.config.num_attention_heads);
        let attended = attention + d_o + self.heads() + self.normed_heads() + delta + self.scores();
        let whole = self.holds(Projection::QueryKeyValue);
        let all = self.queries() + 2 * self.keys();
        let packed = if whole { all } else { self.together(all, self.queries().max(self.keys())) };
        let again = if behind { self.rounded_stream(t) } else { self.operand(t, d) };
        let gradients = self.input(input) + dy + self.heads();
        let dn = self.operand(t, d);
        let parts = gradients + dn + reads * again + self.gradients(t, packed, d, trained);
        let joined = gradients + if whole { self.heads() } else { 0 };
        let dx = if self.read.is_some() { self.stream(t) } else { 0 };
        let stream = self.input(input) + dy + dn + dx;
        let moments = [norm, down, up, summed, output_norm, output, spread, attended, parts, joined, stream];
        moments.into_iter().max().unwrap_or(0)
    }
}
