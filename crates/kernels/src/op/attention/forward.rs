//! Forward: a block of queries against one tile of keys after another, with a softmax that goes along
//! (arXiv 2205.14135, algorithm 1).

use std::ops::Range;

use super::operands::{Heads, Space, Target};
use super::tile::{LANES, Lines, PANEL, ROWS, Softmax, Start, Tiles};
use crate::buffer::Floats;
use crate::cpu::gemm::SharedRows;
use crate::cpu::vector::{lanes, vectorised};

/// Keys of a tile; tiles start at multiples of it in their segment.
const KEYS: usize = 128;
/// Rows of a task, a row being a query and one of the heads that share keys.
const TASK_ROWS: usize = 256;
/// Fewest queries of a task.
const TASK_QUERIES: usize = 4;

/// One forward pass.
pub(super) struct Forward<'a> {
    pub(super) heads: Heads<'a>,
    pub(super) tiles: Tiles,
    /// q `[T, H*E]`, k and v `[S, G*E]`.
    pub(super) q: Floats<'a>,
    pub(super) k: Floats<'a>,
    pub(super) v: Floats<'a>,
    /// o `[T, H*E]`, lse `[T, H]`.
    pub(super) o: Target<'a>,
    pub(super) lse: SharedRows<'a>,
}

/// A block of one segment's queries, and the query heads of one key/value head.
pub(super) struct Task {
    pub(super) queries: Range<usize>,
    pub(super) keys: Range<usize>,
    pub(super) kv_head: usize,
    /// Queries, counted inside the segment.
    pub(super) block: Range<usize>,
}

/// A task's working space. Row `i * group + h` is query i of the block and head h of the group.
struct Tile<'s> {
    /// `[rows, width]`.
    q: &'s mut [f32],
    /// Rows of k or v as they lie, `[KEYS, width]`.
    rows: &'s mut [f32],
    /// k, steps over a head's elements.
    k: &'s mut [f32],
    /// v, steps over the keys.
    v: &'s mut [f32],
    /// `[ROWS, KEYS]`.
    scores: &'s mut [f32],
    /// `[ROWS, KEYS / pair]`.
    p: &'s mut [f32],
    /// `[rows, e]`, e in whole registers.
    o: &'s mut [f32],
    /// `[rows]`.
    largest: &'s mut [f32],
    /// `[rows, LANES]`.
    total: &'s mut [f32],
    /// `[rows]`.
    factors: &'s mut [f32],
}

impl Forward<'_> {
    /// Queries of a task.
    pub(super) fn block(group: usize) -> usize {
        (TASK_ROWS / group).max(TASK_QUERIES)
    }

    fn parts(tiles: &Tiles, group: usize, e: usize) -> [usize; 10] {
        let (rows, width) = (Self::block(group) * group, tiles.width(e));
        [
            rows * width,
            KEYS * width,
            tiles.transposed_length(KEYS, e),
            tiles.columns_length(KEYS, e),
            ROWS * KEYS,
            ROWS * KEYS / tiles.pair,
            rows * e.next_multiple_of(LANES),
            rows,
            rows * LANES,
            rows,
        ]
    }

    /// Words of the working space that [`Forward::run`] takes.
    pub(super) fn words(tiles: &Tiles, group: usize, e: usize) -> usize {
        Space::words(&Self::parts(tiles, group, e))
    }

    /// `s = scale Q K^T`, `o = softmax(s) V`.
    pub(super) fn run(&self, task: &Task, space: &mut [f32]) {
        let (geometry, e) = (self.heads.geometry, self.heads.geometry.head_size);
        let (group, width) = (geometry.group(), self.tiles.width(e));
        let mut space = Space::new(space);
        let [q, rows, k, v, scores, p, o, largest, total, factors] =
            Self::parts(&self.tiles, group, e).map(|words| space.take(words));
        let mut tile = Tile { q, rows, k, v, scores, p, o, largest, total, factors };
        for (i, query) in task.block.clone().enumerate() {
            let place = self.heads.group(task.queries.start + query, task.kv_head);
            self.tiles.rows(self.q, place, e, &mut tile.q[i * group * width..]);
        }
        let rows = task.block.len() * group;
        tile.o[..rows * e.next_multiple_of(LANES)].fill(0.0);
        tile.largest[..rows].fill(f32::NEG_INFINITY);
        tile.total[..rows * LANES].fill(0.0);

        let seen = |query| geometry.visible(query, task.queries.len(), task.keys.len());
        let (first, end) = (seen(task.block.start).start, seen(task.block.end - 1).end);
        for start in (first / KEYS * KEYS..end).step_by(KEYS) {
            let keys = start..(start + KEYS).min(end);
            // The queries that hide the fewest keys of the tile see all of it where the outermost do.
            let hidden = seen(task.block.start).end < keys.end || seen(task.block.end - 1).start > keys.start;
            self.tile(task, &keys, hidden, &mut tile);
        }
        self.write(task, &mut tile);
    }

    /// Adds what a tile of keys gives; `hidden` where some query of the block does not see some of them.
    fn tile(&self, task: &Task, keys: &Range<usize>, hidden: bool, tile: &mut Tile<'_>) {
        let (geometry, e) = (self.heads.geometry, self.heads.geometry.head_size);
        let (tiles, group, width) = (&self.tiles, geometry.group(), self.tiles.width(e));
        let rows = task.keys.start + keys.start..task.keys.start + keys.end;
        let place = self.heads.keys(&rows, task.kv_head);
        tiles.rows(self.k, place, e, tile.rows);
        tiles.transposed(tile.rows, keys.len(), e, tile.k);
        tiles.rows(self.v, place, e, tile.rows);
        tiles.columns(tile.rows, keys.len(), e, KEYS, tile.v);
        let finite = !hidden || tiles.all_finite(&tile.rows[..keys.len() * width]);

        let all = task.block.len() * group;
        for first in (0..all).step_by(ROWS) {
            let count = ROWS.min(all - first);
            let mut visible: [Range<usize>; ROWS] = [const { 0..0 }; ROWS];
            let (mut query, mut head) = (task.block.start + first / group, first % group);
            for visible in &mut visible[..count] {
                let seen = geometry.visible(query, task.queries.len(), task.keys.len());
                let within = |key: usize| key.clamp(keys.start, keys.end) - keys.start;
                *visible = within(seen.start)..within(seen.end);
                head += 1;
                if head == group {
                    (query, head) = (query + 1, 0);
                }
            }
            // Both ends move on from query to query; of a window that has not begun or is over, nothing is seen.
            let seen = visible[0].start..visible[count - 1].end;
            if !seen.is_empty() {
                self.rows(tile, (first, count), &visible[..count], seen, finite);
            }
        }
    }

    /// The same for a few rows: their scores, their probabilities, and what these add to the outputs.
    fn rows(
        &self,
        tile: &mut Tile<'_>,
        (first, count): (usize, usize),
        visible: &[Range<usize>],
        seen: Range<usize>,
        finite: bool,
    ) {
        let (geometry, tiles) = (self.heads.geometry, &self.tiles);
        let (e, width) = (geometry.head_size, tiles.width(geometry.head_size));
        let (e_out, stride) = (e.next_multiple_of(LANES), KEYS / tiles.pair);
        let columns = seen.start / LANES * LANES..seen.end.next_multiple_of(LANES);
        let q = Lines { words: &tile.q[first * width..], row_stride: width, step_stride: 1 };
        // Powers of 2 stand for those of e; a soft cap bends the scores before.
        let alpha = match geometry.soft_cap {
            None => geometry.scale * std::f32::consts::LOG2_E,
            Some(_) => geometry.scale,
        };
        tiles.product(
            (q, count, tiles.steps(e)),
            (tile.k, PANEL * width),
            columns.clone(),
            (tile.scores, KEYS),
            Start::Replace(alpha),
        );
        let mut factors = [1.0; ROWS];
        tiles.softmax(Softmax {
            scores: tile.scores,
            width: KEYS,
            columns,
            visible,
            soft_cap: geometry.soft_cap,
            largest: &mut tile.largest[first..first + count],
            total: &mut tile.total[first * LANES..(first + count) * LANES],
            factors: &mut factors,
            words: tile.p,
            stride,
        });
        let o = &mut tile.o[first * e_out..];
        if !finite {
            return visible_sums(
                tiles,
                (tile.p, stride),
                (tile.rows, width),
                visible,
                &factors,
                (o, e, e_out),
            );
        }
        let steps = seen.start / tiles.pair..seen.end.div_ceil(tiles.pair);
        let p = Lines { words: &tile.p[steps.start..], row_stride: stride, step_stride: 1 };
        let v = (&tile.v[steps.start * PANEL..], tiles.panel_length(KEYS));
        tiles.product((p, count, steps.len()), v, 0..e_out, (o, e_out), Start::Rescale(&factors));
    }

    /// `o = sum / total`, `lse = ln total + largest`.
    #[expect(unsafe_code, reason = "writes its own rows and heads of outputs shared between tasks")]
    fn write(&self, task: &Task, tile: &mut Tile<'_>) {
        let (geometry, group) = (self.heads.geometry, self.heads.geometry.group());
        let count = task.block.len() * group;
        let (lse, factors) = (&mut tile.largest[..count], &mut tile.factors[..count]);
        add_lanes(tile.total[..count * LANES].as_chunks::<LANES>().0, factors);
        for (lse, total) in lse.iter_mut().zip(&mut *factors) {
            *lse = *lse * std::f32::consts::LN_2 + total.ln();
            *total = total.recip();
        }
        let query = task.queries.start + task.block.start;
        let rows = self.heads.group_rows(query, task.kv_head, count);
        // SAFETY: no other task has these queries and heads.
        unsafe { self.o.write(rows, tile.o, factors) };
        for (query, lse) in (query..).zip(lse.chunks_exact(group)) {
            let place = query * geometry.heads + task.kv_head * group;
            // SAFETY: as above.
            unsafe { self.lse.slice(place, group) }.copy_from_slice(lse);
        }
    }
}

vectorised! {
    /// The sum of each row's lanes.
    fn add_lanes<L>(rows: &[[f32; LANES]], sums: &mut [f32]) {
        for (row, sum) in rows.iter().zip(sums) {
            *sum = lanes::combine(*row, |a, b| a + b);
        }
    }
}

/// `o = factor o + sum p_j v_j` over the seen keys alone: in a product an infinite or NaN value of a key that the
/// query must not see meets a probability of 0, which makes NaN. p `[rows, p_stride]`, v `[keys, width]`.
fn visible_sums(
    tiles: &Tiles,
    (p, p_stride): (&[f32], usize),
    (v, width): (&[f32], usize),
    visible: &[Range<usize>],
    factors: &[f32],
    (o, e, e_out): (&mut [f32], usize, usize),
) {
    for (row, seen) in visible.iter().enumerate() {
        let (p, o) = (&p[row * p_stride..][..p_stride], &mut o[row * e_out..][..e]);
        o.iter_mut().for_each(|o| *o *= factors[row]);
        for key in seen.clone() {
            let (p, v) = (tiles.element(p, key), &v[key * width..][..width]);
            o.iter_mut().enumerate().for_each(|(i, o)| *o += p * tiles.element(v, i));
        }
    }
}
