//! Which block works on which part of which segment: tables that are the same for all layers of a batch.
//!
//! The cut of a segment does not depend on its neighbours, so neither do its sums; on the GPU it depends by the size of tiles
//! that shared memory has room for. Blocks with the most to do come first, so that the last to end are short.

use std::sync::{Arc, Mutex};

use crate::cuda::memory::{Storage, granules};
use crate::op::attention::{AttentionShape, Mask, Segments};
use crate::{Cuda, Error, Result};

/// Words of an item: `Item` of `work.cuh`.
const ITEM: usize = 8;
/// Words of a join: `Join` of `forward.cu`.
const JOIN: usize = 5;
/// Words of a sum: `KeySum` of `backward_keys.cu`.
const SUM: usize = 4;
/// The slot of a result that is no part of one.
const WHOLE: u32 = u32::MAX;

/// A segment of at most so many rows is cut into tiles of one warp: generated tokens, and the shortest sequences.
const FEW_ROWS: usize = 64;
/// Keys that such a tile goes over; more are split. A multiple of every kernel's keys of a tile.
const KEYS_OF_FEW: usize = 256;
/// The fewest rows that are worth a block of its own for the gradients of a tile of keys.
const ROWS_OF_PART: usize = 2048;
/// Blocks that a long segment is cut into for them, about: a few for every multiprocessor.
const BLOCKS: usize = 512;

/// How rows or keys are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cut {
    /// Rows: segments of many into tiles of so many, segments of few into smaller tiles, whose keys are split.
    Forward { tile: usize, few: usize },
    /// Rows into tiles of so many.
    Rows { tile: usize },
    /// Keys into tiles of so many, whose rows are split.
    Keys { tile: usize },
    /// The same without a split.
    WholeKeys { tile: usize },
}

/// Where a table's items are on the device, and how many.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Part {
    pub(super) address: u64,
    pub(super) count: usize,
}

/// A table on the device.
#[derive(Debug)]
pub(super) struct Table {
    /// Blocks of as many warps as they have.
    pub(super) items: Part,
    /// Blocks of one warp.
    pub(super) few: Part,
    /// Tiles whose results are added up from parts.
    pub(super) joins: Part,
    /// Such parts.
    pub(super) slots: usize,
    _storage: Storage,
}

/// What a table depends on.
#[derive(Debug, PartialEq)]
struct Key {
    segments: Segments,
    cut: Cut,
    mask: Mask,
    group: usize,
}

/// The tables of the last batches, which the layers of a model share.
#[derive(Debug, Default)]
pub(crate) struct Tables(Mutex<Vec<(Key, Arc<Table>)>>);

/// Tables that are kept: forward and backward of a batch with two masks, and of the batch before.
pub(super) const KEPT: usize = 12;

impl Tables {
    /// The table of a cut, from the last batches or made and copied to the device.
    pub(super) fn table(
        &self,
        op: &'static str,
        device: &Cuda,
        geometry: &AttentionShape,
        segments: &Segments,
        cut: Cut,
    ) -> Result<Arc<Table>> {
        let mut kept = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let (mask, group) = (geometry.mask, geometry.group());
        let same =
            |key: &Key| (key.cut, key.mask, key.group) == (cut, mask, group) && key.segments == *segments;
        if let Some(at) = kept.iter().position(|(key, _)| same(key)) {
            let found = kept.remove(at);
            let table = Arc::clone(&found.1);
            kept.push(found);
            return Ok(table);
        }
        let table = Arc::new(Work::new(op, geometry, segments, cut)?.upload(op, device)?);
        if kept.len() == KEPT {
            kept.remove(0);
        }
        kept.push((Key { segments: segments.clone(), cut, mask, group }, Arc::clone(&table)));
        Ok(table)
    }
}

/// Bytes that tables take at most for so many tokens of any segments that attend to themselves.
pub(super) fn table_bytes(geometry: &AttentionShape, tokens: usize) -> usize {
    // Every token may be a segment of its own. A tile has at least 16 rows; a part of keys as many as ROWS_OF_PART.
    let items = tokens + (tokens * geometry.group()).div_ceil(16);
    KEPT * granules(size_of::<u32>() * items * (ITEM + SUM))
}

/// The most parts of gradients of keys in tiles of so many, for so many tokens of any segments that attend to themselves.
pub(super) fn most_parts(
    op: &'static str,
    geometry: &AttentionShape,
    tokens: usize,
    tile: usize,
) -> Result<usize> {
    // Shorter segments are not split for want of rows, longer ones because they have tiles enough.
    let (shortest, tiles) = (ROWS_OF_PART / geometry.group() + 1, BLOCKS.div_ceil(geometry.kv_heads));
    let mut most = 0;
    for count in 1..=tiles.min(tokens.div_ceil(tile)) {
        let (low, high) = (shortest.max((count - 1) * tile + 1), tokens.min(count * tile));
        if low <= high {
            let slots = Work::new(op, geometry, &Segments::packed([high]), Cut::Keys { tile })?.slots;
            most = most.max(slots * (tokens / low));
        }
    }
    Ok(most)
}

/// A table in words.
#[derive(Debug, Default)]
struct Work {
    items: Vec<[u32; ITEM]>,
    few: Vec<[u32; ITEM]>,
    joins: Vec<u32>,
    join_words: usize,
    slots: usize,
}

impl Work {
    fn new(op: &'static str, geometry: &AttentionShape, segments: &Segments, cut: Cut) -> Result<Self> {
        let most = u32::MAX as usize / geometry.group();
        if segments.queries() >= most || segments.keys() >= most {
            let message = format!("{} queries and {} keys at once", segments.queries(), segments.keys());
            return Err(Error::Value { op, message });
        }
        let mut work = Work { join_words: JOIN, ..Work::default() };
        for (queries, keys) in segments.iter() {
            let rows = queries.len() * geometry.group();
            let places = [queries.start, queries.len(), keys.start, keys.len()].map(|place| place as u32);
            match cut {
                Cut::Forward { few, .. } if rows <= FEW_ROWS => work.add_few(geometry, places, few),
                Cut::Forward { tile, .. } | Cut::Rows { tile } => work.add_rows(geometry, places, tile),
                Cut::Keys { tile } => {
                    work.add_keys(geometry, places, tile, part_rows(geometry, &places, tile))
                }
                Cut::WholeKeys { tile } => work.add_keys(geometry, places, tile, usize::MAX),
            }
        }
        // The sort is stable: equal ones stay in the order of the batch.
        let longest_first = |item: &[u32; ITEM]| std::cmp::Reverse(item[6] - item[5]);
        work.items.sort_by_key(longest_first);
        work.few.sort_by_key(longest_first);
        Ok(work)
    }

    fn add_rows(&mut self, geometry: &AttentionShape, places: [u32; 4], tile: usize) {
        for (start, keys) in row_tiles(geometry, places, tile) {
            self.items.push(item(places, start, keys, WHOLE));
        }
    }

    fn add_few(&mut self, geometry: &AttentionShape, places: [u32; 4], tile: usize) {
        let rows = places[1] as usize * geometry.group();
        for (start, keys) in row_tiles(geometry, places, tile) {
            let parts = keys.len().div_ceil(KEYS_OF_FEW);
            if parts < 2 {
                self.few.push(item(places, start, keys, WHOLE));
                continue;
            }
            let join = [places[0] as usize, start, tile.min(rows - start), self.slots, parts];
            self.joins.extend(join.map(|word| word as u32));
            for begin in keys.clone().step_by(KEYS_OF_FEW) {
                let end = (begin + KEYS_OF_FEW).min(keys.end);
                self.few.push(item(places, start, begin..end, self.slots as u32));
                self.slots += 1;
            }
        }
    }

    fn add_keys(&mut self, geometry: &AttentionShape, places: [u32; 4], tile: usize, part: usize) {
        self.join_words = SUM;
        let (queries, keys, group) = (places[1] as usize, places[3] as usize, geometry.group());
        for start in (0..keys).step_by(tile) {
            let count = tile.min(keys - start);
            let seen = |key| geometry.seen_by(key, queries, keys);
            let rows = seen(start).start * group..seen(start + count - 1).end * group;
            let parts = rows.len().div_ceil(part);
            if parts < 2 {
                self.items.push(item(places, start, rows, WHOLE));
                continue;
            }
            let sum = [places[2] as usize + start, count, self.slots, parts];
            self.joins.extend(sum.map(|word| word as u32));
            // Parts of about one length, in whole tiles.
            let length = rows.len().div_ceil(parts).next_multiple_of(64);
            for begin in (0..parts).map(|index| (rows.start + index * length).min(rows.end)) {
                let end = (begin + length).min(rows.end);
                self.items.push(item(places, start, begin..end, self.slots as u32));
                self.slots += 1;
            }
        }
    }

    fn upload(self, op: &'static str, device: &Cuda) -> Result<Table> {
        let words = [self.items.as_flattened(), self.few.as_flattened(), &self.joins].concat();
        let storage = device.scratch(op, size_of::<u32>() * words.len())?;
        device.upload(op, &storage, &words)?;
        let part = |first: usize, count| Part {
            address: storage.address() + (size_of::<u32>() * first) as u64,
            count,
        };
        let (items, few) = (self.items.len(), self.few.len());
        Ok(Table {
            items: part(0, items),
            few: part(ITEM * items, few),
            joins: part(ITEM * (items + few), self.joins.len() / self.join_words),
            slots: self.slots,
            _storage: storage,
        })
    }
}

/// Rows of a part of a tile of keys in a segment: all, where the segment has tiles enough.
fn part_rows(geometry: &AttentionShape, places: &[u32; 4], tile: usize) -> usize {
    let (rows, keys) = (places[1] as usize * geometry.group(), places[3] as usize);
    ROWS_OF_PART.max(rows * (geometry.kv_heads * keys.div_ceil(tile)) / BLOCKS)
}

fn item(places: [u32; 4], start: usize, over: std::ops::Range<usize>, slot: u32) -> [u32; ITEM] {
    let [first_query, queries, first_key, keys] = places;
    [first_query, queries, first_key, keys, start as u32, over.start as u32, over.end as u32, slot]
}

/// The first row of every tile of a segment, and the keys that its rows see.
fn row_tiles(
    geometry: &AttentionShape,
    places: [u32; 4],
    tile: usize,
) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> {
    let (queries, keys, group) = (places[1] as usize, places[3] as usize, geometry.group());
    let seen = move |row: usize| geometry.visible(row / group, queries, keys);
    let rows = queries * group;
    (0..rows)
        .step_by(tile)
        .map(move |start| (start, seen(start).start..seen((start + tile).min(rows) - 1).end))
}
