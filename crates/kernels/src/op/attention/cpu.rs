//! Attention on the CPU: cuts the work into tasks of one segment and one key/value head. A tile's probabilities are
//! the only scores that exist.

use std::ops::Range;

use super::backward::{self, Backward, Part, Work};
use super::forward::{self, Forward};
use super::operands::{Heads, Target};
use super::tile::Tiles;
use super::{Attention, AttentionShape, Segments, check, one_type};
use crate::buffer::{Floats, allocated_bytes};
use crate::cpu::blocks::rows_per_block;
use crate::cpu::gemm::Output;
use crate::cpu::vector::{LANES, lanes, vectorised};
use crate::{Cpu, DType, Result, Tensor};

/// Multiplications that are not worth waking other threads for.
const SERIAL_BELOW: usize = 1 << 20;
/// Multiplications of a piece of work that a thread takes at a time, where tasks are smaller.
const PIECE: usize = 1 << 21;
/// Such pieces where there are many tasks: enough for threads of unequal speed to end together.
const PIECES_PER_THREAD: usize = 16;

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
        one_type(op, q, &[("k", k), ("v", v), ("o", o)])?;
        let (group, e) = (geometry.group(), geometry.head_size);
        let tiles = Tiles::of(q.dtype());
        let pass = Forward {
            heads: Heads { geometry },
            tiles,
            q: q.floats(op, "q")?,
            k: k.floats(op, "k")?,
            v: v.floats(op, "v")?,
            o: Target::new(o.floats_mut(op, "o")?),
            lse: Output::rows(lse.f32_mut(op, "lse")?, 1).share(),
        };
        let mut tasks = Vec::new();
        for part in parts(geometry, segments) {
            let queries = part.queries.len();
            tasks.extend((0..queries).step_by(Forward::block(group)).map(|start| forward::Task {
                queries: part.queries.clone(),
                keys: part.keys.clone(),
                kv_head: part.kv_head,
                block: start..(start + Forward::block(group)).min(queries),
            }));
        }
        let work = 2 * multiplications(geometry, segments);
        self.each_task(&tasks, work, Forward::words(&tiles, group, e), |task, space| pass.run(task, space));
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
        one_type(op, q, &[("k", k), ("v", v), ("o", o), ("do", d_o), ("dq", dq), ("dk", dk), ("dv", dv)])?;
        let tiles = Tiles::of(q.dtype());
        let (o, d_o) = (o.floats(op, "o")?, d_o.floats(op, "do")?);
        let mut delta = self.recycler.take(lse.len());
        self.deltas(geometry.head_size, o, d_o, delta.as_mut_slice());
        let pass = Backward {
            heads: Heads { geometry },
            tiles,
            q: q.floats(op, "q")?,
            k: k.floats(op, "k")?,
            v: v.floats(op, "v")?,
            d_o,
            lse: lse.f32(op, "lse")?,
            delta: delta.as_slice(),
            dq: Target::new(dq.floats_mut(op, "dq")?),
            dk: Target::new(dk.floats_mut(op, "dk")?),
            dv: Target::new(dv.floats_mut(op, "dv")?),
        };
        let work = 5 * multiplications(geometry, segments);
        let (tasks, longest) = self.backward_tasks(geometry, segments);
        let words = Backward::words(&tiles, geometry.group(), geometry.head_size, longest);
        self.each_task(&tasks, work, words, |(part, work), space| pass.run(part, work, space));
        Ok(())
    }
}

/// Bytes that attention takes beside its operands on so many threads, forward or backward, for sequences of up to
/// `longest` tokens, which are all.
pub(crate) fn attention_scratch_bytes(
    dtype: DType,
    geometry: &AttentionShape,
    longest: usize,
    threads: usize,
) -> usize {
    let (tiles, group, e) = (Tiles::of(dtype), geometry.group(), geometry.head_size);
    let forward = Forward::words(&tiles, group, e);
    let backward = Backward::words(&tiles, group, e, longest);
    let delta = allocated_bytes(longest * geometry.heads);
    (threads * allocated_bytes(forward)).max(threads * allocated_bytes(backward) + delta)
}

impl Cpu {
    /// Does `run` for every task, with working space of so many words; `work` counts all tasks' multiplications.
    fn each_task<T: Sync>(
        &self,
        tasks: &[T],
        work: usize,
        words: usize,
        run: impl Fn(&T, &mut [f32]) + Send + Sync,
    ) {
        let piece = |tasks: &[T]| {
            let mut space = self.recycler.take(words);
            tasks.iter().for_each(|task| run(task, space.as_mut_slice()));
        };
        if tasks.len() < 2 || work < SERIAL_BELOW || self.threads() == 1 {
            return piece(tasks);
        }
        let small = PIECE * tasks.len() / work;
        let length = (tasks.len() / (self.threads() * PIECES_PER_THREAD)).max(small).max(1);
        self.team.each(tasks.len().div_ceil(length), |at| {
            piece(&tasks[at * length..tasks.len().min((at + 1) * length)]);
        });
    }

    /// `delta = do . o` of every query and head: o and do `[T, H*E]`, delta `[T, H]`.
    fn deltas(&self, e: usize, o: Floats<'_>, d_o: Floats<'_>, delta: &mut [f32]) {
        let rows = rows_per_block(e);
        let blocks = o.chunks(rows * e).zip(d_o.chunks(rows * e)).zip(delta.chunks_mut(rows));
        self.each(o.len(), blocks, |((o, d_o), delta)| match (o, d_o) {
            (Floats::F32(o), Floats::F32(d_o)) => row_products(o, d_o, e, delta),
            (Floats::Bf16(o), Floats::Bf16(d_o)) => row_products_bf16(o, d_o, e, delta),
            _ => unreachable!("the operands are of one type"),
        });
    }

    /// The tasks of the backward pass, and the queries of the longest part that is one task.
    ///
    /// A part that would keep one thread busy while the others have nothing left to do is cut into tiles of keys for
    /// dk and dv and blocks of queries for dq, which costs 7 products instead of 5 and gives the same bits.
    fn backward_tasks(&self, geometry: &AttentionShape, segments: &Segments) -> (Vec<(Part, Work)>, usize) {
        let total =
            geometry.kv_heads * segments.iter().map(|segment| pairs(geometry, &segment)).sum::<usize>();
        let (mut tasks, mut longest) = (Vec::new(), 0);
        for part in parts(geometry, segments) {
            let own = pairs(geometry, &(part.queries.clone(), part.keys.clone()));
            if own * self.threads() * 5 <= total * 7 {
                longest = longest.max(part.queries.len());
                tasks.push((part, Work::Whole));
                continue;
            }
            let keys = (0..part.keys.len()).step_by(backward::KEYS).map(Work::Keys);
            let queries = (0..part.queries.len()).step_by(backward::QUERIES).map(Work::Queries);
            tasks.extend(keys.chain(queries).map(|work| (part.clone(), work)));
        }
        (tasks, longest)
    }
}

/// Every segment that has queries, with each of the key/value heads.
fn parts<'a>(geometry: &AttentionShape, segments: &'a Segments) -> impl Iterator<Item = Part> + 'a {
    let kv_heads = geometry.kv_heads;
    segments.iter().filter(|(queries, _)| !queries.is_empty()).flat_map(move |(queries, keys)| {
        (0..kv_heads).map(move |kv_head| Part { queries: queries.clone(), keys: keys.clone(), kv_head })
    })
}

/// Pairs of a query and a key that it sees.
fn pairs(geometry: &AttentionShape, (queries, keys): &(Range<usize>, Range<usize>)) -> usize {
    (0..queries.len()).map(|query| geometry.visible(query, queries.len(), keys.len()).len()).sum()
}

/// Multiplications of one product over all heads.
fn multiplications(geometry: &AttentionShape, segments: &Segments) -> usize {
    let pairs = segments.iter().map(|segment| pairs(geometry, &segment)).sum::<usize>();
    pairs * geometry.heads * geometry.head_size
}

vectorised! {
    /// `out[row] = x[row] . y[row]`, rows of `e` elements.
    fn row_products<L>(x: &[f32], y: &[f32], e: usize, out: &mut [f32]) {
        for ((x, y), out) in x.chunks_exact(e).zip(y.chunks_exact(e)).zip(out) {
            *out = lanes::dot::<L>(x, y);
        }
    }
}

vectorised! {
    /// The same of `bf16`, in `f32`.
    fn row_products_bf16<L>(x: &[half::bf16], y: &[half::bf16], e: usize, out: &mut [f32]) {
        for ((x, y), out) in x.chunks_exact(e).zip(y.chunks_exact(e)).zip(out) {
            let mut sums = [0.0f32; LANES];
            for (x, y) in x.chunks(LANES).zip(y.chunks(LANES)) {
                for ((sum, &x), &y) in sums.iter_mut().zip(x).zip(y) {
                    *sum = lanes::fma::<L>(lanes::wide(x), lanes::wide(y), *sum);
                }
            }
            *out = lanes::combine(sums, |a, b| a + b);
        }
    }
}
