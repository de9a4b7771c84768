//! Backward: tiles of keys against blocks of queries (arXiv 2205.14135, algorithm 4), on transposed scores: a row is
//! a key and a column a query, so the tiles of probabilities and of their gradients are left operands as they lie.
//!
//! An element of dk or dv is summed over blocks of queries in ascending order, one head of the group after another
//! inside the tile of keys; an element of dq over tiles of keys in ascending order. Tasks of either kind below keep
//! to these orders and use the same products, so they give the same bits.

use std::ops::Range;

use super::operands::{Heads, Space, Target};
use super::tile::{LANES, Lines, PANEL, Place, ROWS, Slopes, Start, Tiles};
use crate::buffer::Floats;

/// Keys of a tile; tiles start at multiples of it in their segment.
pub(super) const KEYS: usize = 128;
/// Queries of a block; blocks start at multiples of it in their segment.
pub(super) const QUERIES: usize = 64;

/// One backward pass.
pub(super) struct Backward<'a> {
    pub(super) heads: Heads<'a>,
    pub(super) tiles: Tiles,
    /// q and do `[T, H*E]`, k and v `[S, G*E]`.
    pub(super) q: Floats<'a>,
    pub(super) k: Floats<'a>,
    pub(super) v: Floats<'a>,
    pub(super) d_o: Floats<'a>,
    /// `[T, H]` each: the log-sum-exp, and delta = do . o.
    pub(super) lse: &'a [f32],
    pub(super) delta: &'a [f32],
    pub(super) dq: Target<'a>,
    pub(super) dk: Target<'a>,
    pub(super) dv: Target<'a>,
}

/// One segment and one key/value head.
#[derive(Clone)]
pub(super) struct Part {
    pub(super) queries: Range<usize>,
    pub(super) keys: Range<usize>,
    pub(super) kv_head: usize,
}

/// What a task computes.
pub(super) enum Work {
    /// dq, dk and dv of the whole part, each tile of probabilities once.
    Whole,
    /// dk and dv of the tile of keys that starts here, counted inside the segment.
    Keys(usize),
    /// dq of the block of queries that starts here, counted inside the segment.
    Queries(usize),
}

/// A task's working space.
struct Tile<'s> {
    /// Rows of an operand as they lie, `[max(KEYS, QUERIES), width]`.
    rows: &'s mut [f32],
    /// k and v `[KEYS, width]`.
    k: &'s mut [f32],
    v: &'s mut [f32],
    /// k, steps over the keys.
    k_columns: &'s mut [f32],
    /// q and do, steps over a head's elements.
    q: &'s mut [f32],
    d_o: &'s mut [f32],
    /// q and do, steps over the queries.
    q_columns: &'s mut [f32],
    d_o_columns: &'s mut [f32],
    /// `[QUERIES]`.
    lse: &'s mut [f32],
    delta: &'s mut [f32],
    /// `[ROWS, QUERIES]`.
    scores: &'s mut [f32],
    products: &'s mut [f32],
    /// `[ROWS, QUERIES / pair]`.
    p: &'s mut [f32],
    /// `[KEYS, QUERIES / pair]`.
    ds: &'s mut [f32],
    /// `[KEYS / 2, QUERIES]` where words are pairs.
    ds_pairs: &'s mut [f32],
    /// `[KEYS, e]`, e in whole registers.
    dk: &'s mut [f32],
    dv: &'s mut [f32],
}

impl Backward<'_> {
    fn parts(tiles: &Tiles, e: usize) -> [usize; 17] {
        let (width, e_out) = (tiles.width(e), e.next_multiple_of(LANES));
        let (transposed, columns) = (tiles.transposed_length(QUERIES, e), tiles.columns_length(QUERIES, e));
        [
            KEYS.max(QUERIES) * width,
            KEYS * width,
            KEYS * width,
            tiles.columns_length(KEYS, e),
            transposed,
            transposed,
            columns,
            columns,
            QUERIES,
            QUERIES,
            ROWS * QUERIES,
            ROWS * QUERIES,
            ROWS * QUERIES / tiles.pair,
            KEYS * QUERIES / tiles.pair,
            if tiles.pair == 2 { KEYS / 2 * QUERIES } else { 0 },
            KEYS * e_out,
            KEYS * e_out,
        ]
    }

    /// Words of the working space that [`Backward::run`] takes; `queries` is the longest part that is done whole.
    pub(super) fn words(tiles: &Tiles, group: usize, e: usize, queries: usize) -> usize {
        let e_out = e.next_multiple_of(LANES);
        let dq = group * queries.next_multiple_of(QUERIES).max(QUERIES) * e_out;
        Space::words(&Self::parts(tiles, e)) + Space::words(&[dq])
    }

    /// `dv = P^T do`, `dS = P (do V^T - delta)`, `dq = scale dS K`, `dk = scale dS^T Q`.
    pub(super) fn run(&self, part: &Part, work: &Work, space: &mut [f32]) {
        let mut space = Space::new(space);
        let [
            rows,
            k,
            v,
            k_columns,
            q,
            d_o,
            q_columns,
            d_o_columns,
            lse,
            delta,
            scores,
            products,
            p,
            ds,
            ds_pairs,
            dk,
            dv,
        ] = Self::parts(&self.tiles, self.heads.geometry.head_size).map(|words| space.take(words));
        let mut tile = Tile {
            rows,
            k,
            v,
            k_columns,
            q,
            d_o,
            q_columns,
            d_o_columns,
            lse,
            delta,
            scores,
            products,
            p,
            ds,
            ds_pairs,
            dk,
            dv,
        };
        match *work {
            Work::Whole => self.whole(part, &mut tile, &mut space),
            Work::Keys(start) => self.keys(part, start, &mut tile, &mut []),
            Work::Queries(start) => self.queries(part, start, &mut tile, &mut space),
        }
    }

    fn whole(&self, part: &Part, tile: &mut Tile<'_>, space: &mut Space<'_>) {
        let e_out = self.heads.geometry.head_size.next_multiple_of(LANES);
        let (group, queries) = (self.heads.geometry.group(), part.queries.len());
        // [group, queries, e_out]
        let dq = space.take(group * queries * e_out);
        dq.fill(0.0);
        for start in (0..part.keys.len()).step_by(KEYS) {
            self.keys(part, start, tile, dq);
        }
        for (head, dq) in dq.chunks_exact(queries * e_out).enumerate() {
            self.write_dq(part, 0..queries, part.kv_head * group + head, dq);
        }
    }

    /// dk and dv of a tile of keys; adds to dq `[group, queries, e_out]` unless it is empty.
    fn keys(&self, part: &Part, start: usize, tile: &mut Tile<'_>, dq: &mut [f32]) {
        let (geometry, group) = (self.heads.geometry, self.heads.geometry.group());
        let (queries, e_out) = (part.queries.len(), geometry.head_size.next_multiple_of(LANES));
        let keys = start..(start + KEYS).min(part.keys.len());
        self.load_keys(part, &keys, !dq.is_empty(), tile);
        tile.dk[..keys.len() * e_out].fill(0.0);
        tile.dv[..keys.len() * e_out].fill(0.0);
        let seen = |key| geometry.seen_by(key, queries, part.keys.len());
        let (first, end) = (seen(keys.start).start, seen(keys.end - 1).end);
        for head in 0..group {
            for start in (first / QUERIES * QUERIES..end).step_by(QUERIES) {
                let block = start..(start + QUERIES).min(queries);
                self.load_queries(part, &block, part.kv_head * group + head, true, tile);
                self.scores(part, &keys, &block, true, tile);
                if !dq.is_empty() {
                    let dq = &mut dq[(head * queries + start) * e_out..];
                    self.add_dq(part, &keys, &block, tile, dq);
                }
            }
        }
        self.write_keys(part, &keys, tile);
    }

    /// dq of a block of queries.
    fn queries(&self, part: &Part, start: usize, tile: &mut Tile<'_>, space: &mut Space<'_>) {
        let (geometry, group) = (self.heads.geometry, self.heads.geometry.group());
        let (queries, e_out) = (part.queries.len(), geometry.head_size.next_multiple_of(LANES));
        let block = start..(start + QUERIES).min(queries);
        let dq = space.take(block.len() * e_out);
        let seen = |query| geometry.visible(query, queries, part.keys.len());
        let (first, end) = (seen(block.start).start, seen(block.end - 1).end);
        for head in part.kv_head * group..(part.kv_head + 1) * group {
            dq.fill(0.0);
            self.load_queries(part, &block, head, false, tile);
            for start in (first / KEYS * KEYS..end).step_by(KEYS) {
                let keys = start..(start + KEYS).min(part.keys.len());
                self.load_keys(part, &keys, true, tile);
                self.scores(part, &keys, &block, false, tile);
                self.add_dq(part, &keys, &block, tile, dq);
            }
            self.write_dq(part, block.clone(), head, dq);
        }
    }

    fn load_keys(&self, part: &Part, keys: &Range<usize>, columns: bool, tile: &mut Tile<'_>) {
        let (tiles, e) = (&self.tiles, self.heads.geometry.head_size);
        let rows = part.keys.start + keys.start..part.keys.start + keys.end;
        let place = self.heads.keys(&rows, part.kv_head);
        tiles.rows(self.k, place, e, tile.k);
        tiles.rows(self.v, place, e, tile.v);
        if columns {
            tiles.columns(tile.k, keys.len(), e, KEYS, tile.k_columns);
        }
    }

    fn load_queries(
        &self,
        part: &Part,
        block: &Range<usize>,
        head: usize,
        columns: bool,
        tile: &mut Tile<'_>,
    ) {
        let rows = part.queries.start + block.start..part.queries.start + block.end;
        let place = self.heads.queries(&rows, head);
        self.load_operand(self.q, place, columns, tile.rows, (tile.q, tile.q_columns));
        self.load_operand(self.d_o, place, columns, tile.rows, (tile.d_o, tile.d_o_columns));
        let heads = self.heads.geometry.heads;
        for (i, row) in rows.clone().enumerate() {
            // Powers of 2 stand for those of e.
            tile.lse[i] = self.lse[row * heads + head] * std::f32::consts::LOG2_E;
            tile.delta[i] = self.delta[row * heads + head];
        }
        tile.lse[rows.len()..].fill(0.0);
        tile.delta[rows.len()..].fill(0.0);
    }

    fn load_operand(
        &self,
        x: Floats<'_>,
        place: Place,
        columns: bool,
        rows: &mut [f32],
        out: (&mut [f32], &mut [f32]),
    ) {
        let (tiles, e) = (&self.tiles, self.heads.geometry.head_size);
        tiles.rows(x, place, e, rows);
        tiles.transposed(rows, place.rows, e, out.0);
        if columns {
            tiles.columns(rows, place.rows, e, QUERIES, out.1);
        }
    }

    /// The gradients of the scores of a tile and a block, and with `sum` what they add to dk and dv.
    fn scores(&self, part: &Part, keys: &Range<usize>, block: &Range<usize>, sum: bool, tile: &mut Tile<'_>) {
        let geometry = self.heads.geometry;
        let stride = QUERIES / self.tiles.pair;
        for first in (0..keys.len()).step_by(ROWS) {
            let count = ROWS.min(keys.len() - first);
            let mut visible: [Range<usize>; ROWS] = [const { 0..0 }; ROWS];
            for (i, visible) in visible[..count].iter_mut().enumerate() {
                let key = keys.start + first + i;
                let seen = geometry.seen_by(key, part.queries.len(), part.keys.len());
                let within = |query: usize| query.clamp(block.start, block.end) - block.start;
                *visible = within(seen.start)..within(seen.end);
            }
            let seen = visible[0].start..visible[count - 1].end;
            if seen.is_empty() {
                tile.ds[first * stride..(first + count) * stride].fill(0.0);
                continue;
            }
            let columns = seen.start / LANES * LANES..seen.end.next_multiple_of(LANES);
            self.rows(tile, (first, count), &visible[..count], &columns);
            if sum {
                self.add_dk_dv(tile, (first, count), &columns);
            }
        }
        if self.tiles.pair == 2 {
            for pair in 0..keys.len() / 2 {
                let (low, high) = tile.ds[2 * pair * stride..][..2 * stride].split_at(stride);
                self.tiles.zip_rows(low, high, &mut tile.ds_pairs[pair * QUERIES..][..QUERIES]);
            }
            if keys.len() % 2 == 1 {
                let low = &tile.ds[(keys.len() - 1) * stride..][..stride];
                let out = &mut tile.ds_pairs[keys.len() / 2 * QUERIES..][..QUERIES];
                self.tiles.zip_rows(low, &[0.0; QUERIES / 2], out);
            }
        }
    }

    /// `s = scale K Q^T`, `p = exp(s - lse)`, `ds = p (V do^T - delta)` for a few keys.
    fn rows(
        &self,
        tile: &mut Tile<'_>,
        (first, count): (usize, usize),
        visible: &[Range<usize>],
        columns: &Range<usize>,
    ) {
        let (geometry, tiles) = (self.heads.geometry, &self.tiles);
        let (e, width) = (geometry.head_size, tiles.width(geometry.head_size));
        let (steps, panel, stride) = (tiles.steps(e), PANEL * width, QUERIES / tiles.pair);
        let alpha = match geometry.soft_cap {
            None => geometry.scale * std::f32::consts::LOG2_E,
            Some(_) => geometry.scale,
        };
        let line = |words| Lines { words, row_stride: width, step_stride: 1 };
        let k = line(&tile.k[first * width..]);
        let out = (&mut *tile.scores, QUERIES);
        tiles.product((k, count, steps), (tile.q, panel), columns.clone(), out, Start::Replace(alpha));
        let v = line(&tile.v[first * width..]);
        let out = (&mut *tile.products, QUERIES);
        tiles.product((v, count, steps), (tile.d_o, panel), columns.clone(), out, Start::Replace(1.0));
        tiles.slopes(Slopes {
            scores: tile.scores,
            products: tile.products,
            width: QUERIES,
            columns: columns.clone(),
            visible,
            soft_cap: geometry.soft_cap,
            lse: tile.lse,
            delta: tile.delta,
            p: tile.p,
            ds: &mut tile.ds[first * stride..],
            stride,
        });
    }

    /// `dv += P^T do`, `dk += dS^T Q` for a few keys.
    fn add_dk_dv(&self, tile: &mut Tile<'_>, (first, count): (usize, usize), columns: &Range<usize>) {
        let tiles = &self.tiles;
        let e_out = self.heads.geometry.head_size.next_multiple_of(LANES);
        let (stride, length) = (QUERIES / tiles.pair, tiles.panel_length(QUERIES));
        let (start, steps) = (columns.start / tiles.pair, columns.len() / tiles.pair);
        let line = |words| Lines { words, row_stride: stride, step_stride: 1 };
        let (p, ds) = (line(&tile.p[start..]), line(&tile.ds[first * stride + start..]));
        let (d_o, q) = (&tile.d_o_columns[start * PANEL..], &tile.q_columns[start * PANEL..]);
        let dv = (&mut tile.dv[first * e_out..], e_out);
        tiles.product((p, count, steps), (d_o, length), 0..e_out, dv, Start::Add);
        let dk = (&mut tile.dk[first * e_out..], e_out);
        tiles.product((ds, count, steps), (q, length), 0..e_out, dk, Start::Add);
    }

    /// `dq += dS K` for a block of queries; `dq [queries, e_out]`.
    fn add_dq(
        &self,
        part: &Part,
        keys: &Range<usize>,
        block: &Range<usize>,
        tile: &Tile<'_>,
        dq: &mut [f32],
    ) {
        let (geometry, tiles) = (self.heads.geometry, &self.tiles);
        let e_out = geometry.head_size.next_multiple_of(LANES);
        let ds: &[f32] = if tiles.pair == 2 { tile.ds_pairs } else { tile.ds };
        let seen = |query| geometry.visible(query, part.queries.len(), part.keys.len());
        for first in (0..block.len()).step_by(ROWS) {
            let count = ROWS.min(block.len() - first);
            let within = |key: usize| key.clamp(keys.start, keys.end) - keys.start;
            let start = within(seen(block.start + first).start) / tiles.pair;
            let end = within(seen(block.start + first + count - 1).end).div_ceil(tiles.pair);
            if start >= end {
                continue;
            }
            let ds = Lines { words: &ds[start * QUERIES + first..], row_stride: 1, step_stride: QUERIES };
            let k = (&tile.k_columns[start * PANEL..], tiles.panel_length(KEYS));
            let out = (&mut dq[first * e_out..], e_out);
            tiles.product((ds, count, end - start), k, 0..e_out, out, Start::Add);
        }
    }

    #[expect(unsafe_code, reason = "writes its own rows and heads of gradients shared between tasks")]
    fn write_dq(&self, part: &Part, block: Range<usize>, head: usize, dq: &[f32]) {
        let queries = part.queries.start + block.start..part.queries.start + block.end;
        let rows = self.heads.head_rows(self.heads.queries(&queries, head));
        // SAFETY: no other task has these queries and this head.
        unsafe { self.dq.write(rows, dq, &[self.heads.geometry.scale]) };
    }

    #[expect(unsafe_code, reason = "writes its own rows and heads of gradients shared between tasks")]
    fn write_keys(&self, part: &Part, keys: &Range<usize>, tile: &Tile<'_>) {
        let keys = part.keys.start + keys.start..part.keys.start + keys.end;
        let rows = self.heads.head_rows(self.heads.keys(&keys, part.kv_head));
        // SAFETY: no other task has these keys and this key/value head.
        unsafe {
            self.dk.write(rows, tile.dk, &[self.heads.geometry.scale]);
            self.dv.write(rows, tile.dv, &[1.0]);
        }
    }
}
