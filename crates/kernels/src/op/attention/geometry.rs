//! Who sees whom: heads, masks and the boundaries of packed sequences.

use std::ops::Range;

use crate::op::elementwise::check_cap;
use crate::{Error, Result};

/// Which keys of its own segment a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// All: encoders.
    Full,
    /// Those at its own position and before: decoders.
    Causal,
    /// The last `window` of those, itself included.
    Sliding {
        /// Number of keys, at least 1.
        window: usize,
    },
}

/// Heads and their size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// H, query heads.
    pub heads: usize,
    /// G, key/value heads; H is a multiple of G and query head h reads key/value head h / (H/G).
    pub kv_heads: usize,
    /// E, elements of a head.
    pub head_size: usize,
    /// Factor of the dot products, usually 1/sqrt(E).
    pub scale: f32,
    /// Which keys a query sees.
    pub mask: Mask,
    /// Bounds the scores before the softmax, `s = cap tanh(s / cap)`; a positive number.
    pub soft_cap: Option<f32>,
}

impl AttentionShape {
    /// Query heads per key/value head, H/G.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
        if let Some(cap) = self.soft_cap {
            check_cap(op, cap)?;
        }
        let (h, g) = (self.heads, self.kv_heads);
        if h > 0 && g > 0 && h.is_multiple_of(g) && self.head_size > 0 {
            return Ok(());
        }
        let message = format!("H={h} query heads are not a positive multiple of G={g} key/value heads");
        Err(Error::Value { op, message })
    }

    /// The keys, counted inside the segment, that query `i` of `queries` sees among `keys`.
    ///
    /// The last query stands at the last key, so that a query generated against a cache of earlier keys
    /// has the position that it would have in the whole sequence.
    pub fn visible(&self, i: usize, queries: usize, keys: usize) -> Range<usize> {
        let end = i + keys - queries + 1;
        match self.mask {
            Mask::Full => 0..keys,
            Mask::Causal => 0..end,
            Mask::Sliding { window } => end.saturating_sub(window)..end,
        }
    }

    /// The queries, counted inside the segment, that see key `j`: the inverse of [`AttentionShape::visible`].
    pub(crate) fn seen_by(&self, j: usize, queries: usize, keys: usize) -> Range<usize> {
        let earlier = keys - queries;
        let first = j.saturating_sub(earlier);
        match self.mask {
            Mask::Full => 0..queries,
            Mask::Causal => first..queries,
            Mask::Sliding { window } => {
                let end = j.saturating_add(window).saturating_sub(earlier).min(queries);
                first.min(end)..end
            }
        }
    }
}

/// The boundaries of sequences: which rows of the queries and which of the keys belong to each segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segments {
    /// Segment n holds the queries `query_starts[n]..query_starts[n+1]`.
    query_starts: Vec<usize>,
    keys: Vec<Range<usize>>,
    /// S.
    rows: usize,
}

impl Segments {
    /// Sequences that attend to themselves, one after another.
    pub fn packed(lengths: impl IntoIterator<Item = usize>) -> Self {
        let query_starts = starts(lengths);
        let keys = ranges(&query_starts).collect();
        Segments { rows: last(&query_starts), query_starts, keys }
    }

    /// Sequences whose queries are the last of their keys, as (queries, keys) lengths; all one after another.
    ///
    /// # Errors
    /// Where a segment has fewer keys than queries.
    pub fn cached(lengths: &[(usize, usize)]) -> Result<Self> {
        let key_starts = starts(lengths.iter().map(|length| length.1));
        let held: Vec<_> = lengths.iter().map(|length| length.0).zip(ranges(&key_starts)).collect();
        Segments::within(last(&key_starts), &held)
    }

    /// The same with keys anywhere in a store of `rows` rows, as (queries, rows of the keys). For the forward pass:
    /// the backward leaves the gradients of rows that are nobody's unspecified.
    ///
    /// # Errors
    /// Where a segment has fewer keys than queries, or keys outside the store.
    pub fn within(rows: usize, segments: &[(usize, Range<usize>)]) -> Result<Self> {
        let failed = |message| Err(Error::Value { op: "attention", message });
        for (queries, keys) in segments {
            if *queries > keys.len() {
                return failed(format!("a segment of {queries} queries has only {} keys", keys.len()));
            }
            if keys.end > rows {
                return failed(format!("keys {keys:?} in a store of S={rows} rows"));
            }
        }
        let query_starts = starts(segments.iter().map(|segment| segment.0));
        Ok(Segments { query_starts, keys: segments.iter().map(|segment| segment.1.clone()).collect(), rows })
    }

    /// T, all queries.
    pub fn queries(&self) -> usize {
        last(&self.query_starts)
    }

    /// S, all rows of keys.
    pub fn keys(&self) -> usize {
        self.rows
    }

    /// The number of segments.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// True where nothing is packed.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The queries and keys of every segment.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (Range<usize>, Range<usize>)> + '_ {
        ranges(&self.query_starts).zip(self.keys.iter().cloned())
    }
}

fn last(starts: &[usize]) -> usize {
    starts.last().copied().unwrap_or(0)
}

fn ranges(starts: &[usize]) -> impl ExactSizeIterator<Item = Range<usize>> + '_ {
    starts.windows(2).map(|pair| pair[0]..pair[1])
}

fn starts(lengths: impl IntoIterator<Item = usize>) -> Vec<usize> {
    let mut starts = vec![0];
    let mut end = 0;
    starts.extend(lengths.into_iter().map(|length| {
        end += length;
        end
    }));
    starts
}
