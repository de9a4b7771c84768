//! Products of a few tokens, as a generated token needs them: bound by reading each weight once, from where it lies.
//!
//! A row of the weight is read to its end before the next one begins, and nothing is fetched ahead by hand: one stream
//! of whole lines a thread is what a processor's own prefetchers follow best. Several rows at a time, or software
//! prefetches, halve the rate.

use half::bf16;

use super::cpu::Products;
use super::dots;
use crate::buffer::{Floats, FloatsMut};
use crate::{Accum, Cpu};

/// Elements of the weights in one task: enough for the prefetchers to get going.
const TASK: usize = 1 << 16;
/// Elements of a weight that are converted at a time where products ask for another type; a core's first cache holds
/// both copies.
const CONVERTED: usize = 1 << 12;

/// One of the products that are added up: x `[T, K]`, w `[N, K]`.
#[derive(Clone, Copy)]
pub(super) struct Term<'a> {
    pub(super) x: Floats<'a>,
    pub(super) w: Floats<'a>,
    pub(super) k: usize,
}

impl Cpu {
    /// `y (+)= alpha sum of x W^T + bias` for T tokens, at least one; y `[T, N]`, bias `[N]`.
    pub(super) fn linear_few(
        &self,
        products: Products,
        (t, n): (usize, usize),
        terms: &[Term<'_>],
        alpha: f32,
        bias: Option<&[f32]>,
        accum: Accum,
        y: FloatsMut<'_>,
    ) {
        let mut spaces = vec![Vec::new(); terms.len()];
        let terms: Vec<Prepared<'_>> = terms
            .iter()
            .zip(&mut spaces)
            .map(|(term, space)| Prepared::new(*term, products, space))
            .collect();
        let depth: usize = terms.iter().map(|term| term.k).sum();
        let rows = (TASK / depth).max(1);
        let mut sums = self.recycler.take(n * t); // [N, T]
        let sums = sums.as_mut_slice();
        let task = |(task, sums): (usize, &mut [f32])| {
            sums.fill(0.0);
            terms.iter().for_each(|term| term.add(task * rows, t, sums));
            sums.iter_mut().for_each(|sum| *sum *= alpha);
            if let Some(bias) = bias {
                let bias = &bias[task * rows..];
                sums.chunks_exact_mut(t)
                    .zip(bias)
                    .for_each(|(sums, b)| sums.iter_mut().for_each(|s| *s += b));
            }
        };
        self.team.map(sums.chunks_mut(rows * t).enumerate().collect(), task);
        let write = |y: &mut [f32]| {
            for (token, y) in y.chunks_exact_mut(n).enumerate() {
                let sums = sums[token..].iter().step_by(t);
                match accum {
                    Accum::Replace => y.iter_mut().zip(sums).for_each(|(y, &sum)| *y = sum),
                    Accum::Add => y.iter_mut().zip(sums).for_each(|(y, &sum)| *y += sum),
                }
            }
        };
        match accum {
            Accum::Replace => y.replace(write),
            Accum::Add => y.update(write),
        }
    }
}

/// A term whose x is of the type that it is multiplied in.
struct Prepared<'a> {
    x: Operand<'a>,
    w: Floats<'a>,
    k: usize,
}

/// x, and with it the arithmetic: pairs of `bf16` summed in `f32`, or `f32` throughout.
#[derive(Clone, Copy)]
enum Operand<'a> {
    Bf16(&'a [bf16]),
    F32(&'a [f32]),
}

impl<'a> Prepared<'a> {
    fn new(Term { x, w, k }: Term<'a>, products: Products, space: &'a mut Vec<f32>) -> Self {
        let x = match (products, x) {
            (Products::Bf16, Floats::Bf16(x)) => Operand::Bf16(x),
            _ => Operand::F32(x.widened(space)),
        };
        Prepared { x, w, k }
    }

    /// `sums[n, t] += x[t] . w[first + n]` for the rows that sums has room for; `[rows, T]`.
    fn add(&self, first: usize, t: usize, sums: &mut [f32]) {
        if self.k == 0 {
            return;
        }
        let rows = sums.len() / t;
        let w = self.w.slice(first * self.k..(first + rows) * self.k);
        match (self.x, w) {
            (Operand::Bf16(x), Floats::Bf16(w)) => dots::add_bf16(w, x, self.k, sums),
            (Operand::F32(x), Floats::F32(w)) => dots::add(w, x, self.k, sums),
            (Operand::F32(x), Floats::Bf16(w)) => dots::add(w, x, self.k, sums),
            _ => self.add_converted(w, t, sums),
        }
    }

    /// The same for rows of a type that is not multiplied in, converted a few at a time.
    fn add_converted(&self, w: Floats<'_>, t: usize, sums: &mut [f32]) {
        let k = self.k;
        let rows = (CONVERTED / k).max(1);
        let blocks = w.chunks(rows * k).zip(sums.chunks_mut(rows * t));
        match self.x {
            Operand::Bf16(x) => {
                let mut space = vec![bf16::ZERO; rows * k];
                blocks.for_each(|(w, sums)| {
                    let space = &mut space[..w.len()];
                    FloatsMut::Bf16(&mut *space).copy(w);
                    dots::add_bf16(space, x, k, sums);
                });
            }
            Operand::F32(x) => {
                let mut space = vec![0.0f32; rows * k];
                blocks.for_each(|(w, sums)| {
                    let space = &mut space[..w.len()];
                    w.widen(0, space);
                    dots::add(space, x, k, sums);
                });
            }
        }
    }
}
