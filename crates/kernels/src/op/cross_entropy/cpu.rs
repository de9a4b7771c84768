//! The loss on the CPU: a chunk of logits at a time, turned into its own gradient in place.

use half::bf16;
use rayon::prelude::*;

use super::{CrossEntropy, classes, dims};
use crate::buffer::{Floats, FloatsMut};
use crate::cpu::gemm::View;
use crate::cpu::vector::{self, LANES, lanes, vectorised};
use crate::op::elementwise::check_cap;
use crate::op::linear::cpu::Products;
use crate::{Accum, Cpu, Result, Tensor};

impl CrossEntropy for Cpu {
    fn cross_entropy(
        &self,
        x: &Tensor,
        w: &Tensor,
        labels: &Tensor,
        weights: &Tensor,
        soft_cap: Option<f32>,
        chunk_rows: usize,
        mut dx: Option<&mut Tensor>,
        mut dw: Option<&mut Tensor>,
    ) -> Result<f64> {
        let op = "cross_entropy";
        let (d, v) = dims(x, w, labels, weights, dx.as_deref(), dw.as_deref())?;
        if let Some(cap) = soft_cap {
            check_cap(op, cap)?;
        }
        let products = Products::of(&[x]);
        let (x, w) = (x.floats(op, "x")?, w.floats(op, "w")?);
        let (labels, weights) = (labels.u32(op, "labels")?, weights.f32(op, "weights")?);
        let vocabulary = View::rows(w, 0, v, d, d);
        let chunk_rows = chunk_rows.clamp(1, labels.len().max(1));
        let mut logits = self.recycler.take(chunk_rows * v);
        let mut loss = 0.0;
        for start in (0..labels.len()).step_by(chunk_rows) {
            let rows = start..(start + chunk_rows).min(labels.len());
            let hidden = View::rows(x, rows.start * d, rows.len(), d, d);
            let logits = &mut logits.as_mut_slice()[..rows.len() * v];
            let terms = [(hidden, vocabulary.transposed())];
            self.product(products, &terms, 1.0, None, Accum::Replace, FloatsMut::F32(logits));
            let (labels, weights) = (&labels[rows.clone()], &weights[rows.clone()]);
            loss += self.losses(logits, labels, weights, v, soft_cap, products);
            let slopes = match products {
                Products::F32 => View::rows(Floats::F32(logits), 0, rows.len(), v, v),
                Products::Bf16 => {
                    View::rows(Floats::Bf16(bytemuck::cast_slice(logits)), 0, rows.len(), v, 2 * v)
                }
            };
            if let Some(dx) = dx.as_deref_mut() {
                let dx = dx.floats_mut(op, "dx")?.slice(rows.start * d..rows.end * d);
                self.product(products, &[(slopes, vocabulary)], 1.0, None, Accum::Replace, dx);
            }
            if let Some(dw) = dw.as_deref_mut() {
                let dw = FloatsMut::F32(dw.f32_mut(op, "dw")?);
                self.product(products, &[(slopes.transposed(), hidden)], 1.0, None, Accum::Add, dw);
            }
        }
        Ok(loss)
    }

    fn cross_entropy_of_logits(&self, logits: &mut Tensor, labels: &Tensor, weights: &Tensor) -> Result<f64> {
        let op = "cross_entropy_of_logits";
        let c = classes(logits, labels, weights)?;
        let (labels, weights) = (labels.u32(op, "labels")?, weights.f32(op, "weights")?);
        let logits = logits.f32_mut(op, "logits")?;
        if labels.is_empty() {
            return Ok(0.0);
        }
        Ok(self.losses(logits, labels, weights, c, None, Products::F32))
    }
}

impl Cpu {
    /// The sum of the rows' weighted losses in their order; `z [rows, V]` becomes its gradient: where the products
    /// behind are of `bf16`, rounded to it, each row at the beginning of its own place.
    fn losses(
        &self,
        z: &mut [f32],
        labels: &[u32],
        weights: &[f32],
        v: usize,
        soft_cap: Option<f32>,
        products: Products,
    ) -> f64 {
        let losses: Vec<f64> = self.pool.install(|| {
            let rows = z.par_chunks_mut(v).zip(labels).zip(weights);
            rows.map(|((z, &label), &weight)| {
                let loss = match soft_cap {
                    None => row_loss(z, label as usize, weight),
                    Some(cap) => capped_row_loss(z, label as usize, weight, cap),
                };
                if products == Products::Bf16 {
                    narrow_in_place(z);
                }
                loss
            })
            .collect()
        });
        losses.iter().sum()
    }
}

/// The first half of z becomes all of it as `bf16`.
fn narrow_in_place(z: &mut [f32]) {
    const PIECE: usize = 1024;
    let mut piece = [bf16::ZERO; PIECE];
    for start in (0..z.len()).step_by(PIECE) {
        let length = PIECE.min(z.len() - start);
        vector::narrow(&z[start..start + length], &mut piece[..length]);
        // Behind what has been read: 2 (start + length) bytes are never more than 4 (start + length).
        bytemuck::cast_slice_mut::<f32, bf16>(z)[start..start + length].copy_from_slice(&piece[..length]);
    }
}

/// One row's weighted loss; `z [V]` becomes `weight (softmax(z) - onehot(label))`.
fn row_loss(z: &mut [f32], label: usize, weight: f32) -> f64 {
    let labelled = z[label];
    let max = vector::max(z);
    let total = vector::exp_in_place_minus(z, max);
    let loss = f64::from(max) + f64::from(total).ln() - f64::from(labelled);
    vector::scale(z, weight / total);
    z[label] -= weight;
    f64::from(weight) * loss
}

/// As [`row_loss`] with `c tanh(z / c)` in place of z; `z` becomes the gradient behind the cap's derivative.
fn capped_row_loss(z: &mut [f32], label: usize, weight: f32, cap: f32) -> f64 {
    vector::soft_cap(z, cap);
    let labelled = z[label];
    let max = vector::max(z);
    let total = sum_of_exp_minus(z, max);
    let loss = f64::from(max) + f64::from(total).ln() - f64::from(labelled);
    capped_gradient(z, max, weight / total, cap);
    let t = labelled / cap;
    z[label] -= weight * (1.0 - t * t);
    f64::from(weight) * loss
}

vectorised! {
    /// The sum of `exp(z - shift)`: the capped values are needed again, so they are not overwritten.
    fn sum_of_exp_minus<L>(z: &[f32], shift: f32) -> f32 {
        let mut parts = [0.0f32; LANES];
        let (chunks, rest) = z.as_chunks::<LANES>();
        for z in chunks {
            for (part, &z) in parts.iter_mut().zip(z) {
                *part += lanes::exp::<L>(z - shift);
            }
        }
        for (part, &z) in parts.iter_mut().zip(rest) {
            *part += lanes::exp::<L>(z - shift);
        }
        lanes::combine(parts, |a, b| a + b)
    }
}

vectorised! {
    /// `z = factor exp(z - shift) (1 - (z / cap)^2)`.
    fn capped_gradient<L>(z: &mut [f32], shift: f32, factor: f32, cap: f32) {
        let inverse = cap.recip();
        for z in z {
            let t = *z * inverse;
            *z = factor * lanes::exp::<L>(*z - shift) * (1.0 - t * t);
        }
    }
}
