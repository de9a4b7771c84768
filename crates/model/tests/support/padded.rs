//! A device on which rows may begin with padding, as transformers' eager attention computes such rows.
//!
//! This program packs sequences and has no padding. The fixtures of transformers have, and where a prediction is made
//! from a padding token, the comparison needs what transformers does there: nobody sees a padding token, and a padding
//! token of a decoder, which would see nobody, sees all tokens of its row alike.

use std::sync::Arc;

use lora_sb_kernels::*;

/// A device, except for attention and the rows of learned positions, which the host computes.
#[derive(Debug)]
pub(crate) struct Padded {
    device: Arc<dyn Kernels>,
    /// Length and padding of every row, for each batch with padding. Batches of the same lengths have the same.
    batches: Vec<Vec<(usize, usize)>>,
    /// The row of a position table that RoBERTa gives to padding, which is also the token's id, and the rows of that
    /// table.
    pad: Option<(u32, usize)>,
}

/// A query of one head, and a key that it sees.
struct Pair {
    /// First elements of the head in q, and in k and v.
    q: usize,
    k: usize,
    probability: f64,
    /// The derivative of the score by the scaled dot product.
    slope: f64,
}

impl Padded {
    pub(crate) fn new(
        device: Arc<dyn Kernels>,
        batches: Vec<Vec<(usize, usize)>>,
        pad: Option<(u32, usize)>,
    ) -> Self {
        Padded { device, batches, pad }
    }

    /// The rows of the batch with these lengths; without padding where none is known.
    fn rows(&self, segments: &Segments) -> Vec<(usize, usize)> {
        let lengths = || segments.iter().map(|(queries, _)| queries.len());
        let same = |rows: &&Vec<(usize, usize)>| rows.iter().map(|row| row.0).eq(lengths());
        match self.batches.iter().find(same) {
            Some(rows) => rows.clone(),
            None => lengths().map(|length| (length, 0)).collect(),
        }
    }

    /// Every query's pairs, with the logarithm of the sum of its exponentials.
    fn queries(
        &self,
        shape: &AttentionShape,
        segments: &Segments,
        (q, k): (&[f32], &[f32]),
    ) -> Vec<(Vec<Pair>, f64)> {
        let mut all = Vec::new();
        for ((queries, _), (length, pads)) in segments.iter().zip(self.rows(segments)) {
            for i in 0..length {
                let seen = shape.visible(i, length, length);
                let seen = seen.start.max(pads)..seen.end;
                for head in 0..shape.heads {
                    let q_at = ((queries.start + i) * shape.heads + head) * shape.head_size;
                    let k_at =
                        |j| ((queries.start + j) * shape.kv_heads + head / shape.group()) * shape.head_size;
                    let score = |j| {
                        let pairs = q[q_at..].iter().zip(&k[k_at(j)..]).take(shape.head_size);
                        let dot: f64 = pairs.map(|(&q, &k)| f64::from(q) * f64::from(k)).sum();
                        let score = dot * f64::from(shape.scale);
                        match shape.soft_cap.map(f64::from) {
                            Some(cap) => ((score / cap).tanh() * cap, 1.0 - (score / cap).tanh().powi(2)),
                            None => (score, 1.0),
                        }
                    };
                    // A mask of -3e38 swallows the scores where all are masked, but lets their gradient pass.
                    let keys = if seen.is_empty() { 0..length } else { seen.clone() };
                    let scores: Vec<_> = keys
                        .map(|j| (j, score(j)))
                        .map(|(j, (s, slope))| (j, if seen.is_empty() { 0.0 } else { s }, slope))
                        .collect();
                    let sum: f64 = scores.iter().map(|(_, s, _)| s.exp()).sum();
                    let pair = |&(j, s, slope): &(usize, f64, f64)| Pair {
                        q: q_at,
                        k: k_at(j),
                        probability: s.exp() / sum,
                        slope,
                    };
                    all.push((scores.iter().map(pair).collect(), sum.ln()));
                }
            }
        }
        all
    }

    /// The rows of RoBERTa's positions, where `rows` are those of a batch that counts its padding too.
    fn positions(&self, rows: &[u32]) -> Option<Vec<u32>> {
        let (pad, _) = self.pad?;
        let of_padding = |pads| std::iter::repeat_n(pad, pads);
        let counted = |batch: &&Vec<(usize, usize)>| {
            let counted = batch.iter().flat_map(|&(length, _)| (pad + 1..).take(length));
            rows.iter().copied().eq(counted)
        };
        let batch = self.batches.iter().find(counted)?.iter();
        let row = |&(length, pads): &(usize, usize)| of_padding(pads).chain((pad + 1..).take(length - pads));
        Some(batch.flat_map(row).collect())
    }
}

impl Attention for Padded {
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
        let (q, k, v) = (self.to_f32(q)?, self.to_f32(k)?, self.to_f32(v)?);
        let (mut out, mut logs) = (vec![0.0; q.len()], Vec::new());
        for (pairs, log) in self.queries(geometry, segments, (&q, &k)) {
            logs.push(log as f32);
            for e in 0..geometry.head_size {
                let sum: f64 = pairs.iter().map(|pair| pair.probability * f64::from(v[pair.k + e])).sum();
                out[pairs[0].q + e] = sum as f32;
            }
        }
        self.write_f32(o, &out)?;
        self.write_f32(lse, &logs)
    }

    fn attention_backward(
        &self,
        geometry: &AttentionShape,
        segments: &Segments,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        _: &Tensor,
        _: &Tensor,
        d_o: &Tensor,
        (dq, dk, dv): (&mut Tensor, &mut Tensor, &mut Tensor),
    ) -> Result<()> {
        let (q, k, v, d_o) = (self.to_f32(q)?, self.to_f32(k)?, self.to_f32(v)?, self.to_f32(d_o)?);
        let (mut of_q, mut of_k, mut of_v) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
        let (e, scale) = (geometry.head_size, f64::from(geometry.scale));
        for (pairs, _) in self.queries(geometry, segments, (&q, &k)) {
            let dp = |pair: &Pair| -> f64 {
                (0..e).map(|e| f64::from(d_o[pair.q + e]) * f64::from(v[pair.k + e])).sum()
            };
            let delta: f64 = pairs.iter().map(|pair| pair.probability * dp(pair)).sum();
            for pair in &pairs {
                let ds = pair.probability * (dp(pair) - delta) * pair.slope * scale;
                for e in 0..e {
                    of_q[pair.q + e] += ds * f64::from(k[pair.k + e]);
                    of_k[pair.k + e] += ds * f64::from(q[pair.q + e]);
                    of_v[pair.k + e] += pair.probability * f64::from(d_o[pair.q + e]);
                }
            }
        }
        for (out, values) in [(dq, of_q), (dk, of_k), (dv, of_v)] {
            self.write_f32(out, &values.into_iter().map(|value| value as f32).collect::<Vec<_>>())?;
        }
        Ok(())
    }
}

impl Embedding for Padded {
    fn embedding(&self, ids: &Tensor, table: &Tensor, x: &mut Tensor) -> Result<()> {
        self.device.embedding(ids, table, x)
    }

    /// transformers gives the position of padding no gradient, as it does the token.
    fn embedding_gradient(&self, ids: &Tensor, dx: &Tensor, dtable: &mut Tensor) -> Result<()> {
        let before = self.to_f32(dtable)?;
        self.device.embedding_gradient(ids, dx, dtable)?;
        match self.pad {
            Some((pad, rows)) if dtable.shape()[0] == rows => {
                let width = dtable.shape()[1];
                let row = pad as usize * width..(pad as usize + 1) * width;
                let mut after = self.to_f32(dtable)?;
                after[row.clone()].copy_from_slice(&before[row]);
                self.write_f32(dtable, &after)
            }
            _ => Ok(()),
        }
    }
}

impl Memory for Padded {
    fn from_u32(&self, values: &[u32], shape: &[usize]) -> Result<Tensor> {
        match self.positions(values) {
            Some(rows) => self.device.from_u32(&rows, shape),
            None => self.device.from_u32(values, shape),
        }
    }

    fn empty_of(&self, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        self.device.empty_of(dtype, shape)
    }

    fn zeros(&self, shape: &[usize]) -> Result<Tensor> {
        self.device.zeros(shape)
    }

    fn from_f32(&self, values: &[f32], shape: &[usize]) -> Result<Tensor> {
        self.device.from_f32(values, shape)
    }

    fn from_bytes(&self, bytes: SharedBytes, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        self.device.from_bytes(bytes, dtype, shape)
    }

    fn to_f32(&self, tensor: &Tensor) -> Result<Vec<f32>> {
        self.device.to_f32(tensor)
    }

    fn write_f32(&self, tensor: &mut Tensor, values: &[f32]) -> Result<()> {
        self.device.write_f32(tensor, values)
    }

    fn place(&self) -> Place {
        self.device.place()
    }

    fn usage(&self) -> Usage {
        self.device.usage()
    }

    fn reset_peak(&self) {
        self.device.reset_peak();
    }
}

impl Kernels for Padded {
    fn name(&self) -> String {
        format!("{} with padding", self.device.name())
    }

    fn prefers(&self) -> DType {
        self.device.prefers()
    }

    fn synchronize(&self) -> Result<()> {
        self.device.synchronize()
    }
}

/// Everything else is the device's.
macro_rules! delegate {
    ($($operation:ident { $(fn $name:ident($($operand:ident: $kind:ty),*) -> $result:ty;)* })*) => {
        $(impl $operation for Padded {
            $(fn $name(&self, $($operand: $kind),*) -> $result {
                self.device.$name($($operand),*)
            })*
        })*
    };
}

delegate! {
    Activate {
        fn activation(activation: Activation, x: &Tensor, y: &mut Tensor) -> Result<()>;
        fn activation_backward(activation: Activation, x: &mut Tensor, dy: &Tensor) -> Result<()>;
    }
    AdamW {
        fn adamw(step: &AdamWStep, g: &Tensor, p: &mut Tensor, m: &mut Tensor, v: &mut Tensor) -> Result<()>;
    }
    Bias {
        fn bias(b: &Tensor, y: &mut Tensor) -> Result<()>;
        fn bias_gradient(dy: &Tensor, db: &mut Tensor) -> Result<()>;
    }
    Channel {
        fn scale_channels(c: &Tensor, y: &mut Tensor) -> Result<()>;
        fn channel_products(a: &Tensor, b: &Tensor, accum: Accum, out: &mut Tensor) -> Result<()>;
        fn row_products(a: &Tensor, b: &Tensor, alpha: f32, accum: Accum, out: &mut Tensor) -> Result<()>;
    }
    Columns {
        fn take_columns(x: &Tensor, from: usize, y: &mut Tensor) -> Result<()>;
        fn put_columns(y: &Tensor, from: usize, x: &mut Tensor) -> Result<()>;
    }
    CrossEntropy {
        fn cross_entropy(x: &Tensor, w: &Tensor, labels: &Tensor, weights: &Tensor, soft_cap: Option<f32>,
            chunk_rows: usize, dx: Option<&mut Tensor>, dw: Option<&mut Tensor>) -> Result<f64>;
        fn cross_entropy_of_logits(logits: &mut Tensor, labels: &Tensor, weights: &Tensor) -> Result<f64>;
    }
    Dropout {
        fn dropout(rate: f32, seed: u64, x: &Tensor, accum: Accum, y: &mut Tensor) -> Result<()>;
    }
    Elementwise {
        fn cast(x: &Tensor, y: &mut Tensor) -> Result<()>;
        fn add(alpha: f32, x: &Tensor, y: &mut Tensor) -> Result<()>;
        fn fill(value: f32, x: &mut Tensor) -> Result<()>;
        fn scaled_sign(alpha: f32, x: &mut Tensor) -> Result<()>;
        fn scale(alpha: f32, x: &mut Tensor) -> Result<()>;
        fn soft_cap(cap: f32, x: &mut Tensor) -> Result<()>;
    }
    GatedActivation {
        fn gated_activation(activation: Activation, gate: &Tensor, up: &Tensor, h: &mut Tensor) -> Result<()>;
        fn gated_activation_backward(activation: Activation, gate: &mut Tensor, up: &mut Tensor,
            dh: &Tensor) -> Result<()>;
    }
    LayerNorm {
        fn layer_norm(x: &Tensor, gain: &Tensor, shift: &Tensor, eps: f32, y: &mut Tensor, mean: &mut Tensor,
            rstd: &mut Tensor) -> Result<()>;
        fn add_layer_norm(f: &Tensor, x: &mut Tensor, gain: &Tensor, shift: &Tensor, eps: f32, y: &mut Tensor,
            mean: &mut Tensor, rstd: &mut Tensor) -> Result<()>;
        fn layer_norm_backward(x: &Tensor, gain: &Tensor, statistics: (&Tensor, &Tensor), dy: &Tensor, accum: Accum,
            dx: &mut Tensor, dgain: Option<&mut Tensor>, dshift: Option<&mut Tensor>) -> Result<()>;
    }
    Linear {
        fn linear(x: &Tensor, w: &Tensor, alpha: f32, accum: Accum, y: &mut Tensor) -> Result<()>;
        fn linear_fused(x: &Tensor, w: &Tensor, extra: Extra<'_>, accum: Accum, y: &mut Tensor) -> Result<()>;
        fn linear_input_gradient_fused(dy: &Tensor, w: &Tensor, term: Option<(&Tensor, &Tensor)>, accum: Accum,
            dx: &mut Tensor) -> Result<()>;
        fn linear_input_gradient(dy: &Tensor, w: &Tensor, alpha: f32, accum: Accum,
            dx: &mut Tensor) -> Result<()>;
        fn linear_weight_gradient(dy: &Tensor, x: &Tensor, alpha: f32, accum: Accum,
            dw: &mut Tensor) -> Result<()>;
    }
    LinearGroup {
        fn linear_group(x: &Tensor, layers: &[GroupLayer<'_>], accum: Accum,
            ys: &mut [&mut Tensor]) -> Result<Vec<Option<Tensor>>>;
        fn linear_group_backward(dys: &[&Tensor], layers: &[GroupLayer<'_>],
            latents: &mut [Option<LatentBackward<'_>>], dx: Option<(&mut Tensor, Accum)>) -> Result<()>;
    }
    Reduce {
        fn sum_of_squares(x: &Tensor) -> Result<f64>;
        fn sums_of_squares(xs: &[&Tensor]) -> Result<Vec<f64>>;
    }
    RmsNorm {
        fn rms_norm(x: &Tensor, gain: &Tensor, kind: RmsGain, eps: f32, y: &mut Tensor,
            rstd: &mut Tensor) -> Result<()>;
        fn add_rms_norm(f: &Tensor, x: &mut Tensor, gain: &Tensor, kind: RmsGain, eps: f32, y: &mut Tensor,
            rstd: &mut Tensor) -> Result<()>;
        fn rms_norm_backward(x: &Tensor, gain: &Tensor, kind: RmsGain, rstd: &Tensor, dy: &Tensor, accum: Accum,
            dx: &mut Tensor, dgain: Option<&mut Tensor>) -> Result<()>;
    }
    Rope {
        fn rope(table: &RopeTable, positions: &Tensor, x: &mut Tensor) -> Result<()>;
        fn rope_backward(table: &RopeTable, positions: &Tensor, dx: &mut Tensor) -> Result<()>;
    }
    Rows {
        fn gather_rows(rows: &Tensor, x: &Tensor, y: &mut Tensor) -> Result<()>;
        fn scatter_rows(rows: &Tensor, dy: &Tensor, dx: &mut Tensor) -> Result<()>;
        fn copy_rows(from: &Tensor, x: &Tensor, to: &Tensor, y: &mut Tensor) -> Result<()>;
    }
    SquaredError {
        fn squared_error(z: &mut Tensor, targets: &Tensor, weights: &Tensor) -> Result<f64>;
    }
}
