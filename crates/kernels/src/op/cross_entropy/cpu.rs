//! The loss on the CPU: the vocabulary a block at a time, as attention goes over its keys.
//!
//! With the weight's rows as keys and as values, `softmax(x W^T) W` is an attention of every token over the vocabulary:
//! the largest logit m and `sum exp(z - m)` are kept as they stand after each block, and what has been summed so far is
//! scaled when m grows (Milakov & Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135). Then
//! `dx = weight (softmax(z) W - W[label])`. One pass over the weight gives both products, its rows are still in a cache
//! for the second, and no row of logits is ever whole. The weight's own gradient reads `softmax(z)`, which needs the
//! whole sum: where it is wanted, the logits are computed a second time.

use std::ops::Range;

use half::bf16;

use super::{CrossEntropy, LossGradients, classes, dims};
use crate::buffer::{Floats, FloatsMut, allocated_bytes};
use crate::cpu::blocks::rows_per_block;
use crate::cpu::gemm::bf16::{PackedRows, pack_rows, packed_bytes};
use crate::cpu::gemm::{View, product_scratch_bytes_of};
use crate::cpu::vector::{self, LANES, lanes, vectorised};
use crate::op::elementwise::check_cap;
use crate::op::linear::cpu::Products;
use crate::{Accum, Cpu, DType, Result, Tensor};

/// Columns of logits that exist at a time: so many that adding to the sums `[N, D]` is little beside the product of that
/// depth, and so few that logits and rows of the weight are in a cache when they are used again.
const VOCABULARY_BLOCK: usize = 2048;

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
        let chunk_rows = chunk_rows.clamp(1, labels.len().max(1));
        let mut logits = self.recycler.take(chunk_rows * v.min(VOCABULARY_BLOCK));
        let mut loss = 0.0;
        for start in (0..labels.len()).step_by(chunk_rows) {
            let rows = start..(start + chunk_rows).min(labels.len());
            let x = View::rows(x, rows.start * d, rows.len(), d, d);
            let chunk = Chunk {
                cpu: self,
                products,
                x,
                packed: (products == Products::Bf16).then(|| pack_rows(&self.team, &self.recycler, x)),
                w,
                v,
                labels: &labels[rows.clone()],
                weights: &weights[rows.clone()],
                soft_cap,
            };
            let dx = match dx.as_deref_mut() {
                Some(dx) => Some(dx.floats_mut(op, "dx")?.slice(rows.start * d..rows.end * d)),
                None => None,
            };
            let ends = chunk.sums(logits.as_mut_slice(), dx);
            loss += ends.iter().zip(chunk.weights).map(|(end, &weight)| end.loss(weight)).sum::<f64>();
            if let Some(dw) = dw.as_deref_mut() {
                chunk.weight_gradient(logits.as_mut_slice(), &ends, dw.f32_mut(op, "dw")?);
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
        let rows = logits.chunks_mut(c).zip(labels).zip(weights);
        Ok(rows.map(|((z, &label), &weight)| row_loss(z, label as usize, weight)).sum())
    }
}

/// Bytes that the loss of one row takes while its chunk is computed, without the products' own.
pub(crate) fn cross_entropy_row_bytes(v: usize, d: usize) -> usize {
    (v.min(VOCABULARY_BLOCK) + d) * size_of::<f32>()
}

/// Bytes that the loss takes beside its operands: x `[N, D]`, w `[V, D]`, `chunk_rows` rows at a time.
pub(crate) fn cross_entropy_scratch_bytes(
    dtype: DType,
    (n, v, d): (usize, usize, usize),
    chunk_rows: usize,
    gradients: LossGradients,
) -> usize {
    let (rows, block) = (chunk_rows.min(n), v.min(VOCABULARY_BLOCK));
    let product = |m, n, k| product_scratch_bytes_of(dtype, m, n, k);
    let mut products = product(rows, block, d);
    let mut sums = 0;
    if gradients != LossGradients::None {
        products = products.max(product(rows, d, block));
        sums = if dtype == DType::Bf16 { allocated_bytes(rows * d) } else { 0 };
    }
    if gradients == LossGradients::InputAndWeight {
        products = products.max(product(block, d, rows));
    }
    let packed = if dtype == DType::Bf16 { packed_bytes(rows, d) } else { 0 };
    allocated_bytes(rows * block) + sums + packed + products
}

/// Some rows of tokens, N of them, and the whole vocabulary.
struct Chunk<'a> {
    cpu: &'a Cpu,
    products: Products,
    /// `[N, D]`.
    x: View<'a>,
    /// The same in panels, read again for each block of the vocabulary.
    packed: Option<PackedRows>,
    /// `[V, D]`.
    w: Floats<'a>,
    v: usize,
    /// `[N]`, as the weights.
    labels: &'a [u32],
    weights: &'a [f32],
    soft_cap: Option<f32>,
}

/// What is known of a row's logits after some blocks of them.
#[derive(Clone, Copy)]
struct Seen {
    max: f32,
    /// The sum of `exp(z - max)`.
    total: f32,
    /// The logit of the label.
    labelled: f32,
    /// What sums under the last maximum are multiplied by.
    rescale: f32,
}

impl Seen {
    const NOTHING: Seen = Seen { max: f32::NEG_INFINITY, total: 0.0, labelled: 0.0, rescale: 0.0 };

    /// The row's loss times its weight.
    fn loss(&self, weight: f32) -> f64 {
        f64::from(weight) * (f64::from(self.max) + f64::from(self.total).ln() - f64::from(self.labelled))
    }

    /// `z`, a block of logits, becomes `exp(z - max)`, times the cap's derivative where there is a cap; `label` is the
    /// label's place in the block.
    fn add(&mut self, z: &mut [f32], label: Option<usize>, soft_cap: Option<f32>) {
        if let Some(cap) = soft_cap {
            vector::soft_cap(z, cap);
        }
        if let Some(label) = label {
            self.labelled = z[label];
        }
        let largest = vector::max(z);
        // A NaN becomes the maximum and stays it.
        let max = if largest > self.max || largest.is_nan() { largest } else { self.max };
        self.rescale = (self.max - max).exp();
        self.max = max;
        let sum = match soft_cap {
            None => vector::exp_in_place_minus(z, max),
            Some(cap) => {
                let sum = sum_of_exp_minus(z, max);
                capped_gradient(z, max, 1.0, cap);
                sum
            }
        };
        self.total = self.total * self.rescale + sum;
    }
}

impl Chunk<'_> {
    /// The blocks of the vocabulary.
    fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let v = self.v;
        (0..v).step_by(VOCABULARY_BLOCK).map(move |start| start..(start + VOCABULARY_BLOCK).min(v))
    }

    /// The weight's rows of a block, `[B, D]`.
    fn block_of_w(&self, block: &Range<usize>) -> View<'_> {
        let d = self.x.columns;
        View::rows(self.w, block.start * d, block.len(), d, d)
    }

    /// The logits `[N, B]` of a block.
    fn logits<'z>(&self, block: &Range<usize>, z: &'z mut [f32]) -> &'z mut [f32] {
        let z = &mut z[..self.labels.len() * block.len()];
        let w = self.block_of_w(block).transposed(); // [D, B]
        match &self.packed {
            Some(x) => x.times(&self.cpu.team, &self.cpu.recycler, w, Accum::Replace, FloatsMut::F32(z)),
            None => {
                let terms = [(self.x, w)];
                self.cpu.product(self.products, &terms, 1.0, None, Accum::Replace, FloatsMut::F32(z));
            }
        }
        z
    }

    /// Does `work` with each row `[B]` of a block's z and the label's place in it, and rounds what it leaves where the
    /// products do so: each row then lies at the beginning of its own place.
    fn each_row<T: Send>(
        &self,
        block: &Range<usize>,
        z: &mut [f32],
        others: impl Iterator<Item = T>,
        work: impl Fn(&mut [f32], Option<usize>, &mut T) + Send + Sync,
    ) {
        let elements = z.len();
        let mut rows: Vec<_> = z.chunks_mut(block.len()).zip(self.labels).zip(others).collect();
        self.cpu.each(elements, rows.chunks_mut(rows_per_block(block.len())), |rows| {
            for ((z, label), other) in rows {
                let label = (**label as usize).checked_sub(block.start).filter(|&label| label < z.len());
                work(z, label, other);
                if self.products == Products::Bf16 {
                    narrow_in_place(z);
                }
            }
        });
    }

    /// The rows `[N, B]` that [`Chunk::each_row`] left.
    fn operand<'z>(&self, block: &Range<usize>, z: &'z [f32]) -> View<'z> {
        let (n, b) = (self.labels.len(), block.len());
        match self.products {
            Products::F32 => View::rows(Floats::F32(z), 0, n, b, b),
            Products::Bf16 => View::rows(Floats::Bf16(bytemuck::cast_slice(z)), 0, n, b, 2 * b),
        }
    }

    /// What is known of each row after the whole vocabulary, and dx `[N, D]` where it is wanted.
    fn sums(&self, space: &mut [f32], dx: Option<FloatsMut<'_>>) -> Vec<Seen> {
        let (n, d) = (self.labels.len(), self.x.columns);
        let mut seen = vec![Seen::NOTHING; n];
        let Some(mut dx) = dx else {
            for block in self.blocks() {
                let z = self.logits(&block, space);
                self.each_row(&block, z, seen.iter_mut(), |z, label, seen| {
                    seen.add(z, label, self.soft_cap);
                });
            }
            return seen;
        };
        let mut own = self.cpu.recycler.take(if matches!(dx, FloatsMut::F32(_)) { 0 } else { n * d });
        let sums: &mut [f32] = match &mut dx {
            FloatsMut::F32(dx) => dx,
            FloatsMut::Bf16(_) => own.as_mut_slice(),
        };
        for block in self.blocks() {
            let z = self.logits(&block, space);
            let rows = seen.iter_mut().zip(sums.chunks_mut(d));
            self.each_row(&block, z, rows, |z, label, (seen, sums)| {
                seen.add(z, label, self.soft_cap);
                if block.start > 0 && seen.rescale != 1.0 {
                    vector::scale(sums, seen.rescale);
                }
            });
            let terms = [(self.operand(&block, z), self.block_of_w(&block))];
            let accum = if block.start == 0 { Accum::Replace } else { Accum::Add };
            self.cpu.product(self.products, &terms, 1.0, None, accum, FloatsMut::F32(sums));
        }
        self.input_gradient(&seen, sums);
        if let FloatsMut::Bf16(dx) = dx {
            vector::narrow(own.as_slice(), dx);
        }
        seen
    }

    /// `weight (sums / total - W[label])` from the sums `[N, D]` of `exp(z - max) W`; the second part times the cap's
    /// derivative.
    fn input_gradient(&self, seen: &[Seen], sums: &mut [f32]) {
        let d = self.x.columns;
        let elements = sums.len();
        let mut rows: Vec<_> = sums.chunks_mut(d).zip(seen).zip(self.labels).zip(self.weights).collect();
        self.cpu.each(elements, rows.chunks_mut(rows_per_block(d)), |rows| {
            let mut of_label = vec![0.0; d];
            for (((sums, seen), label), weight) in rows {
                self.w.widen(**label as usize * d, &mut of_label);
                if self.products == Products::Bf16 {
                    of_label.iter_mut().for_each(|w| *w = lanes::wide(lanes::round(*w)));
                }
                vector::scale(sums, **weight / seen.total);
                vector::axpy(-**weight * slope(seen.labelled, self.soft_cap), &of_label, sums);
            }
        });
    }

    /// `dW += dz^T x`, dw `[V, D]`, with `dz = weight (softmax(z) - [label])` from the logits once more.
    fn weight_gradient(&self, space: &mut [f32], seen: &[Seen], dw: &mut [f32]) {
        let d = self.x.columns;
        for block in self.blocks() {
            let z = self.logits(&block, space);
            let rows = seen.iter().zip(self.weights);
            self.each_row(&block, z, rows, |z, label, (seen, weight)| {
                let weight = **weight;
                let factor = weight / seen.total;
                match self.soft_cap {
                    None => {
                        vector::exp_in_place_minus(z, seen.max);
                        vector::scale(z, factor);
                    }
                    Some(cap) => {
                        vector::soft_cap(z, cap);
                        capped_gradient(z, seen.max, factor, cap);
                    }
                }
                if let Some(label) = label {
                    z[label] -= weight * slope(seen.labelled, self.soft_cap);
                }
            });
            let terms = [(self.operand(&block, z).transposed(), self.x)];
            let dw = FloatsMut::F32(&mut dw[block.start * d..block.end * d]);
            self.cpu.product(self.products, &terms, 1.0, None, Accum::Add, dw);
        }
    }
}

/// The derivative of the cap at a capped logit; 1 without one.
fn slope(z: f32, soft_cap: Option<f32>) -> f32 {
    soft_cap.map_or(1.0, |cap| {
        let t = z / cap;
        1.0 - t * t
    })
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
