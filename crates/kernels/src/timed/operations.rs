//! Every operation, handed on.

use super::Timed;
use super::cost::{Cost, Direction, axis};
use crate::{
    Accum, Activate, Activation, AdamW, AdamWStep, Attention, AttentionShape, Bias, Channel, Columns,
    CrossEntropy, Dropout, Elementwise, Embedding, Extra, GatedActivation, GroupLayer, LatentBackward,
    LayerNorm, Linear, LinearGroup, Reduce, Result, RmsGain, RmsNorm, Rope, RopeTable, Rows, Segments,
    SquaredError, Tensor,
};

impl Linear for Timed {
    fn linear(&self, x: &Tensor, w: &Tensor, alpha: f32, accum: Accum, y: &mut Tensor) -> Result<()> {
        let cost = Cost::product(axis(x, 0), w, &[x, y]);
        self.timed("linear", cost, || self.inner.linear(x, w, alpha, accum, y))
    }

    fn linear_fused(
        &self,
        x: &Tensor,
        w: &Tensor,
        extra: Extra<'_>,
        accum: Accum,
        y: &mut Tensor,
    ) -> Result<()> {
        let cost = Cost::product(axis(x, 0), w, &[x, y]).and_term(extra.term);
        self.timed("linear_fused", cost, || self.inner.linear_fused(x, w, extra, accum, y))
    }

    fn linear_input_gradient(
        &self,
        dy: &Tensor,
        w: &Tensor,
        alpha: f32,
        accum: Accum,
        dx: &mut Tensor,
    ) -> Result<()> {
        let cost = Cost::product(axis(dy, 0), w, &[dy, dx]);
        self.timed("linear_input_gradient", cost, || {
            self.inner.linear_input_gradient(dy, w, alpha, accum, dx)
        })
    }

    fn linear_input_gradient_fused(
        &self,
        dy: &Tensor,
        w: &Tensor,
        term: Option<(&Tensor, &Tensor)>,
        accum: Accum,
        dx: &mut Tensor,
    ) -> Result<()> {
        let cost = Cost::product(axis(dy, 0), w, &[dy, dx]).and_term(term);
        self.timed("linear_input_gradient_fused", cost, || {
            self.inner.linear_input_gradient_fused(dy, w, term, accum, dx)
        })
    }

    fn linear_weight_gradient(
        &self,
        dy: &Tensor,
        x: &Tensor,
        alpha: f32,
        accum: Accum,
        dw: &mut Tensor,
    ) -> Result<()> {
        let cost = Cost::product(axis(dy, 0), dw, &[dy, x]);
        self.timed("linear_weight_gradient", cost, || {
            self.inner.linear_weight_gradient(dy, x, alpha, accum, dw)
        })
    }
}

impl LinearGroup for Timed {
    fn linear_group(
        &self,
        x: &Tensor,
        layers: &[GroupLayer<'_>],
        accum: Accum,
        ys: &mut [&mut Tensor],
    ) -> Result<Vec<Option<Tensor>>> {
        let moved: Vec<&Tensor> = ys.iter().map(|y| &**y).chain([x]).collect();
        let cost = Cost::group(axis(x, 0), layers, Direction::Forward, &moved);
        self.timed("linear_group", cost, || self.inner.linear_group(x, layers, accum, ys))
    }

    fn linear_group_backward(
        &self,
        dys: &[&Tensor],
        layers: &[GroupLayer<'_>],
        latents: &mut [Option<LatentBackward<'_>>],
        dx: Option<(&mut Tensor, Accum)>,
    ) -> Result<()> {
        let moved: Vec<&Tensor> = dys.iter().copied().chain(dx.as_ref().map(|(dx, _)| &**dx)).collect();
        let rows = dys.first().map_or(0, |dy| axis(dy, 0));
        let direction = if dx.is_some() { Direction::Backward } else { Direction::GradientAlone };
        let cost = Cost::group(rows, layers, direction, &moved);
        self.timed("linear_group_backward", cost, || {
            self.inner.linear_group_backward(dys, layers, latents, dx)
        })
    }
}

impl Attention for Timed {
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
        let cost = Cost::attention(2, geometry, segments, &[q, k, v, o, lse]);
        self.timed("attention", cost, || self.inner.attention(geometry, segments, q, k, v, o, lse))
    }

    fn attention_backward(
        &self,
        geometry: &AttentionShape,
        segments: &Segments,
        inputs: (&Tensor, &Tensor, &Tensor),
        o: &Tensor,
        lse: &Tensor,
        d_o: &Tensor,
        gradients: (&mut Tensor, &mut Tensor, &mut Tensor),
    ) -> Result<()> {
        let (q, k, v) = inputs;
        // dq, dk and dv have the sizes of q, k and v.
        let cost = Cost::attention(5, geometry, segments, &[q, k, v, q, k, v, o, lse, d_o]);
        self.timed("attention_backward", cost, || {
            self.inner.attention_backward(geometry, segments, inputs, o, lse, d_o, gradients)
        })
    }
}

impl CrossEntropy for Timed {
    fn cross_entropy(
        &self,
        x: &Tensor,
        w: &Tensor,
        labels: &Tensor,
        weights: &Tensor,
        soft_cap: Option<f32>,
        chunk_rows: usize,
        dx: Option<&mut Tensor>,
        dw: Option<&mut Tensor>,
    ) -> Result<f64> {
        let gradients: Vec<&Tensor> = [dx.as_deref(), dw.as_deref()].into_iter().flatten().collect();
        let cost = Cost::vocabulary(1 + gradients.len(), x, w, &gradients);
        self.timed("cross_entropy", cost, || {
            self.inner.cross_entropy(x, w, labels, weights, soft_cap, chunk_rows, dx, dw)
        })
    }

    fn cross_entropy_of_logits(&self, logits: &mut Tensor, labels: &Tensor, weights: &Tensor) -> Result<f64> {
        let cost = Cost::moved(&[logits]);
        self.timed("cross_entropy_of_logits", cost, || {
            self.inner.cross_entropy_of_logits(logits, labels, weights)
        })
    }
}

impl SquaredError for Timed {
    fn squared_error(&self, z: &mut Tensor, targets: &Tensor, weights: &Tensor) -> Result<f64> {
        let cost = Cost::moved(&[z, targets, weights]);
        self.timed("squared_error", cost, || self.inner.squared_error(z, targets, weights))
    }
}

impl RmsNorm for Timed {
    fn rms_norm(
        &self,
        x: &Tensor,
        gain: &Tensor,
        kind: RmsGain,
        eps: f32,
        y: &mut Tensor,
        rstd: &mut Tensor,
    ) -> Result<()> {
        let cost = Cost::moved(&[x, y]);
        self.timed("rms_norm", cost, || self.inner.rms_norm(x, gain, kind, eps, y, rstd))
    }

    fn add_rms_norm(
        &self,
        f: &Tensor,
        x: &mut Tensor,
        gain: &Tensor,
        kind: RmsGain,
        eps: f32,
        y: &mut Tensor,
        rstd: &mut Tensor,
    ) -> Result<()> {
        let cost = Cost::moved(&[f, x, x, y]);
        self.timed("add_rms_norm", cost, || self.inner.add_rms_norm(f, x, gain, kind, eps, y, rstd))
    }

    fn rms_norm_backward(
        &self,
        x: &Tensor,
        gain: &Tensor,
        kind: RmsGain,
        rstd: &Tensor,
        dy: &Tensor,
        accum: Accum,
        dx: &mut Tensor,
        dgain: Option<&mut Tensor>,
    ) -> Result<()> {
        let cost = Cost::moved(&[x, dy, dx]);
        self.timed("rms_norm_backward", cost, || {
            self.inner.rms_norm_backward(x, gain, kind, rstd, dy, accum, dx, dgain)
        })
    }
}

impl LayerNorm for Timed {
    fn layer_norm(
        &self,
        x: &Tensor,
        gain: &Tensor,
        shift: &Tensor,
        eps: f32,
        y: &mut Tensor,
        mean: &mut Tensor,
        rstd: &mut Tensor,
    ) -> Result<()> {
        let cost = Cost::moved(&[x, y]);
        self.timed("layer_norm", cost, || self.inner.layer_norm(x, gain, shift, eps, y, mean, rstd))
    }

    fn add_layer_norm(
        &self,
        f: &Tensor,
        x: &mut Tensor,
        gain: &Tensor,
        shift: &Tensor,
        eps: f32,
        y: &mut Tensor,
        mean: &mut Tensor,
        rstd: &mut Tensor,
    ) -> Result<()> {
        let cost = Cost::moved(&[f, x, x, y]);
        self.timed("add_layer_norm", cost, || {
            self.inner.add_layer_norm(f, x, gain, shift, eps, y, mean, rstd)
        })
    }

    fn layer_norm_backward(
        &self,
        x: &Tensor,
        gain: &Tensor,
        statistics: (&Tensor, &Tensor),
        dy: &Tensor,
        accum: Accum,
        dx: &mut Tensor,
        dgain: Option<&mut Tensor>,
        dshift: Option<&mut Tensor>,
    ) -> Result<()> {
        let cost = Cost::moved(&[x, dy, dx]);
        self.timed("layer_norm_backward", cost, || {
            self.inner.layer_norm_backward(x, gain, statistics, dy, accum, dx, dgain, dshift)
        })
    }
}

impl Rope for Timed {
    fn rope(&self, table: &RopeTable, positions: &Tensor, x: &mut Tensor) -> Result<()> {
        self.timed("rope", Cost::moved(&[x]), || self.inner.rope(table, positions, x))
    }

    fn rope_backward(&self, table: &RopeTable, positions: &Tensor, dx: &mut Tensor) -> Result<()> {
        self.timed("rope_backward", Cost::moved(&[dx]), || self.inner.rope_backward(table, positions, dx))
    }
}

impl GatedActivation for Timed {
    fn gated_activation(
        &self,
        activation: Activation,
        gate: &Tensor,
        up: &Tensor,
        h: &mut Tensor,
    ) -> Result<()> {
        let cost = Cost::moved(&[gate, up, h]);
        self.timed("gated_activation", cost, || self.inner.gated_activation(activation, gate, up, h))
    }

    fn gated_activation_backward(
        &self,
        activation: Activation,
        gate: &mut Tensor,
        up: &mut Tensor,
        dh: &Tensor,
    ) -> Result<()> {
        let cost = Cost::moved(&[gate, up, dh]);
        self.timed("gated_activation_backward", cost, || {
            self.inner.gated_activation_backward(activation, gate, up, dh)
        })
    }
}

impl Activate for Timed {
    fn activation(&self, activation: Activation, x: &Tensor, y: &mut Tensor) -> Result<()> {
        self.timed("activation", Cost::moved(&[x, y]), || self.inner.activation(activation, x, y))
    }

    fn activation_backward(&self, activation: Activation, x: &mut Tensor, dy: &Tensor) -> Result<()> {
        let cost = Cost::moved(&[x, dy]);
        self.timed("activation_backward", cost, || self.inner.activation_backward(activation, x, dy))
    }
}

impl Elementwise for Timed {
    fn cast(&self, x: &Tensor, y: &mut Tensor) -> Result<()> {
        self.timed("cast", Cost::moved(&[x, y]), || self.inner.cast(x, y))
    }

    fn add(&self, alpha: f32, x: &Tensor, y: &mut Tensor) -> Result<()> {
        self.timed("add", Cost::moved(&[x, y]), || self.inner.add(alpha, x, y))
    }

    fn fill(&self, value: f32, x: &mut Tensor) -> Result<()> {
        self.timed("fill", Cost::moved(&[x]), || self.inner.fill(value, x))
    }

    fn scaled_sign(&self, alpha: f32, x: &mut Tensor) -> Result<()> {
        self.timed("scaled_sign", Cost::moved(&[x]), || self.inner.scaled_sign(alpha, x))
    }

    fn scale(&self, alpha: f32, x: &mut Tensor) -> Result<()> {
        self.timed("scale", Cost::moved(&[x]), || self.inner.scale(alpha, x))
    }

    fn soft_cap(&self, cap: f32, x: &mut Tensor) -> Result<()> {
        self.timed("soft_cap", Cost::moved(&[x]), || self.inner.soft_cap(cap, x))
    }
}

impl Bias for Timed {
    fn bias(&self, b: &Tensor, y: &mut Tensor) -> Result<()> {
        self.timed("bias", Cost::moved(&[b, y]), || self.inner.bias(b, y))
    }

    fn bias_gradient(&self, dy: &Tensor, db: &mut Tensor) -> Result<()> {
        self.timed("bias_gradient", Cost::moved(&[dy, db]), || self.inner.bias_gradient(dy, db))
    }
}

impl Channel for Timed {
    fn scale_channels(&self, c: &Tensor, y: &mut Tensor) -> Result<()> {
        self.timed("scale_channels", Cost::moved(&[c, y]), || self.inner.scale_channels(c, y))
    }

    fn channel_products(&self, a: &Tensor, b: &Tensor, accum: Accum, out: &mut Tensor) -> Result<()> {
        let cost = Cost::moved(&[a, b, out]);
        self.timed("channel_products", cost, || self.inner.channel_products(a, b, accum, out))
    }

    fn row_products(&self, a: &Tensor, b: &Tensor, alpha: f32, accum: Accum, out: &mut Tensor) -> Result<()> {
        let cost = Cost::moved(&[a, b, out]);
        self.timed("row_products", cost, || self.inner.row_products(a, b, alpha, accum, out))
    }
}

impl Columns for Timed {
    fn take_columns(&self, x: &Tensor, from: usize, y: &mut Tensor) -> Result<()> {
        // As much is read of the whole as the part holds.
        self.timed("take_columns", Cost::moved(&[y, y]), || self.inner.take_columns(x, from, y))
    }

    fn put_columns(&self, y: &Tensor, from: usize, x: &mut Tensor) -> Result<()> {
        self.timed("put_columns", Cost::moved(&[y, y]), || self.inner.put_columns(y, from, x))
    }
}

impl Rows for Timed {
    fn gather_rows(&self, rows: &Tensor, x: &Tensor, y: &mut Tensor) -> Result<()> {
        self.timed("gather_rows", Cost::moved(&[y, y]), || self.inner.gather_rows(rows, x, y))
    }

    fn scatter_rows(&self, rows: &Tensor, dy: &Tensor, dx: &mut Tensor) -> Result<()> {
        self.timed("scatter_rows", Cost::moved(&[dy, dx]), || self.inner.scatter_rows(rows, dy, dx))
    }

    fn copy_rows(&self, from: &Tensor, x: &Tensor, to: &Tensor, y: &mut Tensor) -> Result<()> {
        let row = |tensor: &Tensor| tensor.bytes() / axis(tensor, 0).max(1);
        let cost = Cost::of_bytes(from.len() * (row(x) + row(y)));
        self.timed("copy_rows", cost, || self.inner.copy_rows(from, x, to, y))
    }
}

impl Embedding for Timed {
    fn embedding(&self, ids: &Tensor, table: &Tensor, x: &mut Tensor) -> Result<()> {
        self.timed("embedding", Cost::moved(&[x, x]), || self.inner.embedding(ids, table, x))
    }

    fn embedding_gradient(&self, ids: &Tensor, dx: &Tensor, dtable: &mut Tensor) -> Result<()> {
        let cost = Cost::moved(&[dx, dx]);
        self.timed("embedding_gradient", cost, || self.inner.embedding_gradient(ids, dx, dtable))
    }
}

impl Dropout for Timed {
    fn dropout(&self, rate: f32, seed: u64, x: &Tensor, accum: Accum, y: &mut Tensor) -> Result<()> {
        self.timed("dropout", Cost::moved(&[x, y]), || self.inner.dropout(rate, seed, x, accum, y))
    }
}

impl Reduce for Timed {
    fn sum_of_squares(&self, x: &Tensor) -> Result<f64> {
        self.timed("sum_of_squares", Cost::moved(&[x]), || self.inner.sum_of_squares(x))
    }

    fn sums_of_squares(&self, xs: &[&Tensor]) -> Result<Vec<f64>> {
        self.timed("sums_of_squares", Cost::moved(xs), || self.inner.sums_of_squares(xs))
    }
}

impl AdamW for Timed {
    fn adamw(
        &self,
        step: &AdamWStep,
        g: &Tensor,
        p: &mut Tensor,
        m: &mut Tensor,
        v: &mut Tensor,
    ) -> Result<()> {
        let cost = Cost::moved(&[g, p, m, v]);
        self.timed("adamw", cost, || self.inner.adamw(step, g, p, m, v))
    }
}
