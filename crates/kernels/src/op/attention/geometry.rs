//! Who sees whom: heads, masks and the boundaries of packed sequences.

use std::ops::Range;

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
}

impl AttentionShape {
    /// Query heads per key/value head, H/G.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    pub(crate) fn check(&self, op: &'static str) -> Result<()> {
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
}

/// The boundaries of packed sequences: segment n holds the queries `query_starts[n]..query_starts[n+1]`
/// and the keys `key_starts[n]..key_starts[n+1]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segments {
    query_starts: Vec<usize>,
    key_starts: Vec<usize>,
}

impl Segments {
    /// Sequences that attend to themselves, one after another.
    pub fn packed(lengths: impl IntoIterator<Item = usize>) -> Self {
        let starts = starts(lengths);
        Segments { query_starts: starts.clone(), key_starts: starts }
    }

    /// Sequences whose queries are the last of their keys, as (queries, keys) lengths.
    ///
    /// # Errors
    /// Where a segment has fewer keys than queries.
    pub fn cached(lengths: &[(usize, usize)]) -> Result<Self> {
        if let Some((queries, keys)) = lengths.iter().find(|(queries, keys)| queries > keys) {
            let message = format!("a segment of {queries} queries has only {keys} keys");
            return Err(Error::Value { op: "attention", message });
        }
        let query_starts = starts(lengths.iter().map(|length| length.0));
        Ok(Segments { query_starts, key_starts: starts(lengths.iter().map(|length| length.1)) })
    }

    /// T, all queries.
    pub fn queries(&self) -> usize {
        self.query_starts.last().copied().unwrap_or(0)
    }

    /// S, all keys.
    pub fn keys(&self) -> usize {
        self.key_starts.last().copied().unwrap_or(0)
    }

    /// The number of segments.
    pub fn len(&self) -> usize {
        self.query_starts.len() - 1
    }

    /// True where nothing is packed.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The queries and keys of every segment.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (Range<usize>, Range<usize>)> + '_ {
        let queries = self.query_starts.windows(2).map(|pair| pair[0]..pair[1]);
        queries.zip(self.key_starts.windows(2).map(|pair| pair[0]..pair[1]))
    }
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
