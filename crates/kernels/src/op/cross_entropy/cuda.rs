//! The loss on a GPU: as on the CPU, the vocabulary a block at a time, with blocks that are worth a launch.

use std::ops::Range;

use super::{CrossEntropy, LossGradients, classes, dims};
use crate::cuda::blas::Matrix;
use crate::cuda::launch::{Argument, DeviceFloats};
use crate::cuda::memory::{Storage, granules};
use crate::cuda::row::{SLAB, teams};
use crate::cuda::sizes::product_scratch_bytes;
use crate::op::elementwise::check_cap;
use crate::op::linear::cuda::product::{Sum, Typed};
use crate::{Cuda, DType, Result, Tensor};

/// Columns of logits that exist at a time: as many as a team of threads holds, so that a row of them is read once.
const VOCABULARY_BLOCK: usize = SLAB;

/// Rows of logits begin at multiples of so many elements: 32 bytes, or 16 of the `bf16` that take their place.
const ALIGNED: usize = 8;

/// The `f32` numbers that are known of a row: its largest logit, the sum of `exp(z - max)`, the label's logit, the weight.
const SEEN: usize = 4;

impl CrossEntropy for Cuda {
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
        let op = "cross_entropy";
        let (d, v) = dims(x, w, labels, weights, dx.as_deref(), dw.as_deref())?;
        if let Some(cap) = soft_cap {
            check_cap(op, cap)?;
        }
        let n = x.shape()[0];
        let (x, w) = (self.floats(op, "x", x)?, self.floats(op, "w", w)?);
        let (labels, weights) = (self.indices(op, "labels", labels)?, self.f32(op, "weights", weights)?);
        let dx = dx.map(|dx| self.floats_mut(op, "dx", dx)).transpose()?;
        let dw = dw.map(|dw| self.f32_mut(op, "dw", dw)).transpose()?;
        if n == 0 {
            return Ok(0.0);
        }
        let chunk_rows = chunk_rows.clamp(1, n);
        let logits = self.scratch(op, chunk_rows * row_stride(v) * size_of::<f32>())?; // [chunk_rows, block]
        let seen = self.scratch(op, n * SEEN * size_of::<f32>())?; // [N, 4]
        let sums = match dx {
            Some(DeviceFloats { dtype: DType::Bf16, .. }) => chunk_rows * d * size_of::<f32>(),
            _ => 0,
        };
        let sums = self.scratch(op, sums)?; // [chunk_rows, D] where dx cannot hold them
        for start in (0..n).step_by(chunk_rows) {
            let chunk = Chunk {
                cuda: self,
                x: behind(x, start * d),
                w,
                n: chunk_rows.min(n - start),
                d,
                v,
                labels: labels + (start * size_of::<u32>()) as u64,
                weights: weights + (start * size_of::<f32>()) as u64,
                cap: soft_cap.unwrap_or(0.0),
                logits: logits.address(),
                seen: seen.address() + (start * SEEN * size_of::<f32>()) as u64,
            };
            chunk.sums(dx.map(|dx| behind(dx, start * d)), &sums)?;
            if let Some(dw) = dw {
                chunk.weight_gradient(dw)?;
            }
        }
        self.loss(op, &seen, n)
    }

    fn cross_entropy_of_logits(&self, logits: &mut Tensor, labels: &Tensor, weights: &Tensor) -> Result<f64> {
        let op = "cross_entropy_of_logits";
        let c = classes(logits, labels, weights)?;
        let n = logits.shape()[0];
        let (labels, weights) = (self.indices(op, "labels", labels)?, self.f32(op, "weights", weights)?);
        let logits = self.f32_mut(op, "logits", logits)?;
        let seen = self.scratch(op, n * SEEN * size_of::<f32>())?; // [N, 4]
        let (launch, team) = teams(n, c);
        self.launch(
            op,
            "loss_of_logits",
            launch,
            &[
                logits.into(),
                labels.into(),
                weights.into(),
                seen.address().into(),
                (n as u64).into(),
                (c as u32).into(),
                team.into(),
            ],
        )?;
        self.loss(op, &seen, n)
    }
}

/// Elements from one row of a block's logits to the next.
fn row_stride(v: usize) -> usize {
    v.min(VOCABULARY_BLOCK).next_multiple_of(ALIGNED)
}

/// Bytes that the loss of one row takes while its chunk is computed.
pub(crate) fn row_bytes(v: usize, d: usize) -> usize {
    (row_stride(v) + d + SEEN) * size_of::<f32>()
}

/// Bytes of a chunk with which products and launches are as fast as they get. A pass over the weight that few rows share is
/// bound by its reading; at this size it is some thousand rows, whose products take longer.
const CHUNK_BYTES: usize = 256 << 20;

/// The most rows that are worth computing together.
pub(crate) fn chunk_rows(v: usize, d: usize) -> usize {
    (CHUNK_BYTES / row_bytes(v, d)).max(1)
}

/// Bytes that the loss takes beside its operands: x `[N, D]` and w `[V, D]`, each of a type, `chunk_rows` rows at a time.
pub(crate) fn scratch_bytes(
    (x, w): (DType, DType),
    (n, v, d): (usize, usize, usize),
    chunk_rows: usize,
    gradients: LossGradients,
) -> usize {
    let (rows, block, bf16) = (chunk_rows.clamp(1, n.max(1)), v.min(VOCABULARY_BLOCK), x == DType::Bf16);
    let f32s = |count: usize| granules(count * size_of::<f32>());
    let product = |m, n, k| product_scratch_bytes((x, x), m, n, k);
    let (mut sums, mut products) = (0, product(rows, block, d));
    if gradients != LossGradients::None {
        products = products.max(product(rows, d, block));
        sums = if bf16 { f32s(rows * d) } else { 0 };
    }
    if gradients == LossGradients::InputAndWeight {
        products = products.max(product(block, d, rows));
    }
    let of_w = if bf16 && w != x { granules(block * d * x.size()) } else { 0 };
    f32s(rows * row_stride(v)) + f32s(n * SEEN) + sums + of_w + products
}

/// Some rows of tokens, n of them, and the whole vocabulary; what is not `Floats` is the address of `f32` or indices.
struct Chunk<'a> {
    cuda: &'a Cuda,
    /// `[n, D]`.
    x: DeviceFloats,
    /// `[V, D]`.
    w: DeviceFloats,
    n: usize,
    d: usize,
    v: usize,
    /// `[n]`, as the weights.
    labels: u64,
    weights: u64,
    /// 0 without one.
    cap: f32,
    /// `[n, row_stride]`.
    logits: u64,
    /// `[n, 4]`.
    seen: u64,
}

const OP: &str = "cross_entropy";

impl Chunk<'_> {
    /// The blocks of the vocabulary.
    fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let v = self.v;
        (0..v).step_by(VOCABULARY_BLOCK).map(move |start| start..(start + VOCABULARY_BLOCK).min(v))
    }

    /// The type of the products' operands.
    fn arithmetic(&self) -> DType {
        if self.x.dtype == DType::Bf16 { DType::Bf16 } else { DType::F32 }
    }

    /// The weight's rows of a block, rounded beside `bf16`; products in `f32` widen what they read.
    fn block_of_w(&self, block: &Range<usize>) -> Result<Typed> {
        let rows = behind(self.w, block.start * self.d);
        let dtype = if self.arithmetic() == DType::Bf16 { DType::Bf16 } else { rows.dtype };
        self.cuda.as_type(OP, rows, block.len() * self.d, dtype)
    }

    /// A block's logits `[n, B]`, `f32`, and what takes their place as the products' operand.
    fn place(&self, block: &Range<usize>) -> (Matrix, Matrix) {
        let (address, rows, columns, stride) = (self.logits, self.n, block.len(), row_stride(self.v));
        let logits = Matrix { address, dtype: DType::F32, rows, columns, stride, transposed: false };
        let dtype = self.arithmetic();
        (logits, Matrix { dtype, stride: stride * size_of::<f32>() / dtype.size(), ..logits })
    }

    /// Computes the logits of a block.
    fn project(&self, block: &Range<usize>, w: &Typed) -> Result<()> {
        let x = matrix(self.x, self.n, self.d);
        let w = Matrix { transposed: true, ..matrix(w.floats, block.len(), self.d) };
        self.multiply((x, w), self.place(block).0, 0.0)
    }

    fn multiply(&self, first: (Matrix, Matrix), c: Matrix, beta: f32) -> Result<()> {
        self.cuda.sum(OP, &Sum { first, second: None, c, alpha: 1.0, beta, bias: None })
    }

    /// Launches a kernel over the rows of a block's logits; `own` are its arguments between the labels and the rows.
    fn each_row(&self, kernel: &'static str, block: &Range<usize>, own: &[Argument]) -> Result<()> {
        let (launch, team) = teams(self.n, block.len());
        let logits = [
            self.logits.into(),
            (row_stride(self.v) as u32).into(),
            (block.len() as u32).into(),
            (block.start as u32).into(),
            self.labels.into(),
        ];
        let rows = [Argument::from(self.n as u64), team.into()];
        self.cuda.launch(OP, kernel, launch, &[&logits, own, &rows].concat())
    }

    /// What is known of each row after the whole vocabulary, and dx `[n, D]` where it is wanted; `space` holds the sums
    /// `[n, D]` of a dx that cannot.
    fn sums(&self, dx: Option<DeviceFloats>, space: &Storage) -> Result<()> {
        let sums = match dx {
            None => DeviceFloats { address: 0, dtype: DType::F32 },
            Some(dx) if dx.dtype == DType::F32 => dx,
            Some(_) => DeviceFloats { address: space.address(), dtype: DType::F32 },
        };
        for block in self.blocks() {
            let w = self.block_of_w(&block)?;
            self.project(&block, &w)?;
            let (_, p) = self.place(&block);
            let address = if dx.is_some() { p.address } else { 0 };
            let written = DeviceFloats { address, dtype: p.dtype };
            let softmax = [self.weights.into(), self.cap.into(), self.seen.into(), written.into()];
            let scaled = [sums.address.into(), (self.d as u32).into()];
            self.each_row("loss_block", &block, &[&softmax[..], &scaled].concat())?;
            if dx.is_some() {
                let beta = if block.start == 0 { 0.0 } else { 1.0 };
                let w = matrix(w.floats, block.len(), self.d);
                self.multiply((p, w), matrix(sums, self.n, self.d), beta)?;
            }
        }
        dx.map_or(Ok(()), |dx| self.input_gradient(sums.address, dx))
    }

    /// `weight (sums / total - W[label])` from the sums `[n, D]` of `exp(z - max) W`; the second part times the cap's
    /// derivative.
    fn input_gradient(&self, sums: u64, dx: DeviceFloats) -> Result<()> {
        let (launch, team) = teams(self.n, self.d);
        self.cuda.launch(
            OP,
            "loss_input_gradient",
            launch,
            &[
                sums.into(),
                self.w.into(),
                self.labels.into(),
                self.seen.into(),
                self.cap.into(),
                u32::from(self.arithmetic() == DType::Bf16).into(),
                dx.into(),
                (self.n as u64).into(),
                (self.d as u32).into(),
                team.into(),
            ],
        )
    }

    /// `dW += dz^T x`, dw `[V, D]`, with `dz = weight (softmax(z) - [label])` from the logits once more.
    fn weight_gradient(&self, dw: u64) -> Result<()> {
        for block in self.blocks() {
            self.project(&block, &self.block_of_w(&block)?)?;
            let (_, dz) = self.place(&block);
            let written = DeviceFloats { address: dz.address, dtype: dz.dtype };
            let own = [self.cap.into(), self.seen.into(), written.into()];
            self.each_row("loss_gradient_block", &block, &own)?;
            let rows = behind(DeviceFloats { address: dw, dtype: DType::F32 }, block.start * self.d);
            let terms = (Matrix { transposed: true, ..dz }, matrix(self.x, self.n, self.d));
            self.multiply(terms, matrix(rows, block.len(), self.d), 1.0)?;
        }
        Ok(())
    }
}

/// The elements from so many on.
fn behind(floats: DeviceFloats, elements: usize) -> DeviceFloats {
    DeviceFloats { address: floats.address + (elements * floats.dtype.size()) as u64, ..floats }
}

/// Rows one after another.
fn matrix(floats: DeviceFloats, rows: usize, columns: usize) -> Matrix {
    let DeviceFloats { address, dtype } = floats;
    Matrix { address, dtype, rows, columns, stride: columns, transposed: false }
}

impl Cuda {
    /// The weighted sum of the rows' losses from what is known of them, `[N, 4]`; waits for it.
    fn loss(&self, op: &'static str, seen: &Storage, n: usize) -> Result<f64> {
        let seen: Vec<f32> = self.download(op, seen, n * SEEN)?;
        let rows = seen.as_chunks::<SEEN>().0.iter().map(|row| row.map(f64::from));
        Ok(rows.map(|[max, total, labelled, weight]| weight * (max + total.ln() - labelled)).sum())
    }
}
