//! Attention on the CPU: for one segment and key/value head at a time, blocks of queries against all the keys
//! they see, as matrix products. A block's probabilities are the only scores that exist.

use rayon::prelude::*;
use std::ops::Range;

use super::{Attention, AttentionShape, Segments, check};
use crate::buffer::Floats;
use crate::cpu::gemm::{Output, Scratch, SharedRows, View, gemm_serial};
use crate::cpu::vector::{self, lanes, vectorised};
use crate::{Accum, Cpu, Result, Tensor};

/// Queries of a block: enough to pay for packing the keys, few enough that the diagonal wastes little.
const QUERIES: usize = 64;

impl Attention for Cpu {
    fn attention(
        &self,
        geometry: &AttentionShape,
        segments: &Segments,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        o: &mut Tensor,
        lse: &mut Tensor,
    ) -> Result<()> {
        let op = "attention";
        check(op, geometry, segments, (q, k, v), o, lse)?;
        let heads = Heads::new(geometry);
        let inputs = Inputs { q: q.f32(op, "q")?, k: k.f32(op, "k")?, v: v.f32(op, "v")? };
        let o = Output::rows(o.f32_mut(op, "o")?, heads.query_width()).share();
        let lse = Output::rows(lse.f32_mut(op, "lse")?, geometry.heads).share();
        self.each_head(geometry, segments, |task| task.forward(&heads, &inputs, &o, &lse));
        Ok(())
    }

    fn attention_backward(
        &self,
        geometry: &AttentionShape,
        segments: &Segments,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        o: &Tensor,
        lse: &Tensor,
        d_o: &Tensor,
        (dq, dk, dv): (&mut Tensor, &mut Tensor, &mut Tensor),
    ) -> Result<()> {
        let op = "attention_backward";
        check(op, geometry, segments, (q, k, v), o, lse)?;
        check(op, geometry, segments, (dq, dk, dv), d_o, lse)?;
        let heads = Heads::new(geometry);
        let inputs = Inputs { q: q.f32(op, "q")?, k: k.f32(op, "k")?, v: v.f32(op, "v")? };
        let outputs = Outputs { o: o.f32(op, "o")?, lse: lse.f32(op, "lse")?, d_o: d_o.f32(op, "d_o")? };
        let gradients = Gradients {
            dq: Output::rows(dq.f32_mut(op, "dq")?, heads.query_width()).share(),
            dk: Output::rows(dk.f32_mut(op, "dk")?, heads.key_width()).share(),
            dv: Output::rows(dv.f32_mut(op, "dv")?, heads.key_width()).share(),
        };
        self.each_head(geometry, segments, |task| task.backward(&heads, &inputs, &outputs, &gradients));
        Ok(())
    }
}

impl Cpu {
    /// Does `work` for every segment and key/value head; a task's outputs are its own.
    fn each_head(&self, geometry: &AttentionShape, segments: &Segments, work: impl Fn(Task) + Send + Sync) {
        let tasks: Vec<Task> = segments
            .iter()
            .filter(|(queries, _)| !queries.is_empty())
            .flat_map(|(queries, keys)| {
                (0..geometry.kv_heads).map(move |kv_head| Task {
                    queries: queries.clone(),
                    keys: keys.clone(),
                    kv_head,
                })
            })
            .collect();
        match tasks.len() {
            1 => tasks.into_iter().for_each(work),
            _ => self.pool.install(|| tasks.into_par_iter().with_max_len(1).for_each(work)),
        }
    }
}

/// Where heads lie in the rows of the operands.
struct Heads<'a> {
    geometry: &'a AttentionShape,
}

impl<'a> Heads<'a> {
    fn new(geometry: &'a AttentionShape) -> Self {
        Heads { geometry }
    }

    /// H*E.
    fn query_width(&self) -> usize {
        self.geometry.heads * self.geometry.head_size
    }

    /// G*E.
    fn key_width(&self) -> usize {
        self.geometry.kv_heads * self.geometry.head_size
    }

    /// The first element of query head `head` in row `row`.
    fn query_offset(&self, row: usize, head: usize) -> usize {
        row * self.query_width() + head * self.geometry.head_size
    }

    /// The first element of key/value head `head` in row `row`.
    fn key_offset(&self, row: usize, head: usize) -> usize {
        row * self.key_width() + head * self.geometry.head_size
    }

    /// One query head of `rows`: `[rows, E]`.
    fn query_view<'x>(&self, x: &'x [f32], rows: &Range<usize>, head: usize) -> View<'x> {
        let offset = self.query_offset(rows.start, head);
        View::rows(Floats::F32(x), offset, rows.len(), self.geometry.head_size, self.query_width())
    }

    /// One key/value head of `rows`: `[rows, E]`.
    fn key_view<'x>(&self, x: &'x [f32], rows: &Range<usize>, head: usize) -> View<'x> {
        let offset = self.key_offset(rows.start, head);
        View::rows(Floats::F32(x), offset, rows.len(), self.geometry.head_size, self.key_width())
    }
}

/// q `[T, H*E]`, k and v `[S, G*E]`.
struct Inputs<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
}

/// o and do `[T, H*E]`, lse `[T, H]`.
struct Outputs<'a> {
    o: &'a [f32],
    lse: &'a [f32],
    d_o: &'a [f32],
}

/// dq `[T, H*E]`, dk and dv `[S, G*E]`.
struct Gradients<'a> {
    dq: SharedRows<'a>,
    dk: SharedRows<'a>,
    dv: SharedRows<'a>,
}

/// One segment and one key/value head, with the query heads that read it.
struct Task {
    queries: Range<usize>,
    keys: Range<usize>,
    kv_head: usize,
}

/// A block of queries: its rows, the keys that any of them sees, and for each the seen part of those.
struct Block {
    rows: Range<usize>,
    keys: Range<usize>,
    visible: Vec<Range<usize>>,
}

impl Task {
    fn query_heads(&self, geometry: &AttentionShape) -> Range<usize> {
        self.kv_head * geometry.group()..(self.kv_head + 1) * geometry.group()
    }

    fn blocks<'a>(&'a self, geometry: &'a AttentionShape) -> impl Iterator<Item = Block> + 'a {
        let (queries, keys) = (self.queries.len(), self.keys.len());
        (0..queries).step_by(QUERIES).map(move |first| {
            let last = (first + QUERIES).min(queries) - 1;
            let seen = |i| geometry.visible(i, queries, keys);
            let (low, high) = (seen(first).start, seen(last).end);
            let visible = (first..=last).map(|i| seen(i).start - low..seen(i).end - low).collect();
            let rows = self.queries.start + first..self.queries.start + last + 1;
            Block { rows, keys: self.keys.start + low..self.keys.start + high, visible }
        })
    }

    /// `s = scale Q K^T`, `o = softmax(s) V`.
    #[expect(unsafe_code, reason = "writes its own head's columns of outputs shared between tasks")]
    fn forward(self, heads: &Heads<'_>, inputs: &Inputs<'_>, o: &SharedRows<'_>, lse: &SharedRows<'_>) {
        let geometry = heads.geometry;
        let (mut scratch, mut scores) = (Scratch::default(), Vec::new());
        for block in self.blocks(geometry) {
            let (rows, keys) = (block.rows.len(), block.keys.len());
            for head in self.query_heads(geometry) {
                self.scores(&mut scratch, heads, inputs, &block, head, &mut scores);
                let mut inverse_totals = [0.0; QUERIES];
                for (i, seen) in block.visible.iter().enumerate() {
                    let row = &mut scores[i * keys..][..keys];
                    if let Some(cap) = geometry.soft_cap {
                        vector::soft_cap(&mut row[seen.clone()], cap);
                    }
                    let max = vector::max(&row[seen.clone()]);
                    let total = vector::exp_in_place_minus(&mut row[seen.clone()], max);
                    row[..seen.start].fill(0.0);
                    row[seen.end..].fill(0.0);
                    inverse_totals[i] = total.recip();
                    let place = (block.rows.start + i) * geometry.heads + head;
                    // SAFETY: no other task has this row and head.
                    let lse = unsafe { lse.slice(place, 1) };
                    lse[0] = max + total.ln();
                }
                let p = View::rows(Floats::F32(&scores), 0, rows, keys, keys);
                let v = heads.key_view(inputs.v, &block.keys, self.kv_head);
                let e = geometry.head_size;
                // SAFETY: no other task has these rows and this head.
                let out = unsafe { o.rectangle(heads.query_offset(block.rows.start, head), rows, e) };
                gemm_serial(&mut scratch, p, v, 1.0, Accum::Replace, out);
                for (i, row) in block.rows.clone().enumerate() {
                    // SAFETY: as above.
                    let row = unsafe { o.slice(heads.query_offset(row, head), e) };
                    if !vector::all_finite(row) {
                        let p = &scores[i * keys..][..keys];
                        self.visible_sum(heads, inputs.v, &block, (p, &block.visible[i]), row);
                    }
                    vector::scale(row, inverse_totals[i]);
                }
            }
        }
    }

    /// `o = sum p_j v_j` over the seen keys alone: in the block's product an infinite or NaN value of a key that
    /// the query must not see meets a probability of 0, which makes NaN.
    fn visible_sum(
        &self,
        heads: &Heads<'_>,
        v: &[f32],
        block: &Block,
        (p, seen): (&[f32], &Range<usize>),
        o: &mut [f32],
    ) {
        o.fill(0.0);
        for j in seen.clone() {
            let at = heads.key_offset(block.keys.start + j, self.kv_head);
            vector::axpy(p[j], &v[at..at + o.len()], o);
        }
    }

    /// `dv += P^T do`, `dS = P (do V^T - delta) scale`, `dq = dS K`, `dk += dS^T Q`.
    #[expect(unsafe_code, reason = "writes its own head's columns of gradients shared between tasks")]
    fn backward(
        self,
        heads: &Heads<'_>,
        inputs: &Inputs<'_>,
        outputs: &Outputs<'_>,
        gradients: &Gradients<'_>,
    ) {
        let (geometry, e) = (heads.geometry, heads.geometry.head_size);
        let (mut scratch, mut p, mut ds) = (Scratch::default(), Vec::new(), Vec::new());
        for row in self.keys.clone() {
            let offset = heads.key_offset(row, self.kv_head);
            // SAFETY: no other task has this segment's keys and this key/value head.
            unsafe { (gradients.dk.slice(offset, e).fill(0.0), gradients.dv.slice(offset, e).fill(0.0)) };
        }
        for block in self.blocks(geometry) {
            let (rows, keys) = (block.rows.len(), block.keys.len());
            let key_offset = heads.key_offset(block.keys.start, self.kv_head);
            for head in self.query_heads(geometry) {
                self.scores(&mut scratch, heads, inputs, &block, head, &mut p);
                let d_o = heads.query_view(outputs.d_o, &block.rows, head);
                let v = heads.key_view(inputs.v, &block.keys, self.kv_head);
                ds.resize(rows * keys, 0.0);
                gemm_serial(
                    &mut scratch,
                    d_o,
                    v.transposed(),
                    1.0,
                    Accum::Replace,
                    Output::rows(&mut ds, keys),
                );
                for (i, seen) in block.visible.iter().enumerate() {
                    let row = block.rows.start + i;
                    let at = heads.query_offset(row, head);
                    let delta = vector::dot(&outputs.d_o[at..at + e], &outputs.o[at..at + e]);
                    let lse = outputs.lse[row * geometry.heads + head];
                    let (p, ds) = (&mut p[i * keys..][..keys], &mut ds[i * keys..][..keys]);
                    let (p_seen, ds_seen) = (&mut p[seen.clone()], &mut ds[seen.clone()]);
                    match geometry.soft_cap {
                        None => probabilities_and_slopes(p_seen, ds_seen, lse, delta, geometry.scale),
                        Some(cap) => capped_slopes(p_seen, ds_seen, lse, delta, geometry.scale, cap),
                    }
                    for outside in [0..seen.start, seen.end..keys] {
                        p[outside.clone()].fill(0.0);
                        ds[outside].fill(0.0);
                    }
                }
                let p = View::rows(Floats::F32(&p), 0, rows, keys, keys);
                let ds = View::rows(Floats::F32(&ds), 0, rows, keys, keys);
                let q = heads.query_view(inputs.q, &block.rows, head);
                let k = heads.key_view(inputs.k, &block.keys, self.kv_head);
                // SAFETY: no other task has these queries and this head, nor these keys and this key/value head.
                let (dq, dk, dv) = unsafe {
                    let dq = gradients.dq.rectangle(heads.query_offset(block.rows.start, head), rows, e);
                    let dk = gradients.dk.rectangle(key_offset, keys, e);
                    (dq, dk, gradients.dv.rectangle(key_offset, keys, e))
                };
                gemm_serial(&mut scratch, p.transposed(), d_o, 1.0, Accum::Add, dv);
                gemm_serial(&mut scratch, ds, k, 1.0, Accum::Replace, dq);
                gemm_serial(&mut scratch, ds.transposed(), q, 1.0, Accum::Add, dk);
            }
        }
    }

    /// `s = scale Q K^T` of a block: `[rows, keys]`, also where a query does not see the key.
    fn scores(
        &self,
        scratch: &mut Scratch,
        heads: &Heads<'_>,
        inputs: &Inputs<'_>,
        block: &Block,
        head: usize,
        scores: &mut Vec<f32>,
    ) {
        let (rows, keys) = (block.rows.len(), block.keys.len());
        scores.resize(rows * keys, 0.0);
        let q = heads.query_view(inputs.q, &block.rows, head);
        let k = heads.key_view(inputs.k, &block.keys, self.kv_head);
        let out = Output::rows(scores, keys);
        gemm_serial(scratch, q, k.transposed(), heads.geometry.scale, Accum::Replace, out);
    }
}

vectorised! {
    /// Over `s`: `p = exp(s - lse)`; over `dp`: `p (dp - delta) scale`.
    fn probabilities_and_slopes<L>(s: &mut [f32], dp: &mut [f32], lse: f32, delta: f32, scale: f32) {
        for (s, dp) in s.iter_mut().zip(dp) {
            *s = lanes::exp::<L>(*s - lse);
            *dp = *s * (*dp - delta) * scale;
        }
    }
}

vectorised! {
    /// Over `s`: `p = exp(cap t - lse)` with `t = tanh(s / cap)`; over `dp`: `p (dp - delta) (1 - t^2) scale`.
    fn capped_slopes<L>(s: &mut [f32], dp: &mut [f32], lse: f32, delta: f32, scale: f32, cap: f32) {
        let inverse = cap.recip();
        for (s, dp) in s.iter_mut().zip(dp) {
            let t = lanes::tanh::<L>(*s * inverse);
            *s = lanes::exp::<L>(cap * t - lse);
            *dp = *s * (*dp - delta) * ((1.0 - t * t) * scale);
        }
    }
}
