//! The keys and values of the tokens that growing texts already hold.
//!
//! A text has a range of rows in the cache of every block: as many as its tokens will need, or as many as the
//! block's window has where that is less. Token p stands in row `p mod rows` of its range, so that a window's rows
//! are a ring, in which a new token takes the place of the one that has just left the window.

use std::ops::Range;

use lora_sb_kernels::{Mask, Segments, Tensor};

use crate::{Model, Result};

/// New tokens of one text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) text: usize,
    /// Tokens that the text held before.
    pub(super) held: usize,
    pub(super) new: usize,
}

/// Where each text's rows lie, the same for all blocks of one window.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) mask: Mask,
    texts: Vec<Range<usize>>,
    /// P, the rows of all texts.
    rows: usize,
}

impl Layout {
    /// For texts that grow up to `rooms` tokens.
    pub(super) fn new(mask: Mask, rooms: &[usize]) -> Self {
        let (mut texts, mut rows) = (Vec::new(), 0);
        for &room in rooms {
            let size = cache_rows(mask, room);
            texts.push(rows..rows + size);
            rows += size;
        }
        Layout { mask, texts, rows }
    }

    /// The row of a text's token.
    fn row(&self, text: usize, position: usize) -> usize {
        let Range { start, end } = self.texts[text];
        start + position % (end - start)
    }

    /// What an advance by `pieces` does in the caches of this layout.
    pub(super) fn step(&self, model: &Model, pieces: &[Piece]) -> Result<Step> {
        // A ring that several tokens run through does not hold what the first of them sees.
        let overrun = |piece: &Piece| piece.new > 1 && piece.held + piece.new > self.texts[piece.text].len();
        if pieces.iter().any(overrun) { self.gathered(model, pieces) } else { self.in_place(model, pieces) }
    }

    /// The queries read the cache, the new tokens' rows included.
    fn in_place(&self, model: &Model, pieces: &[Piece]) -> Result<Step> {
        let (mut store, mut segments, mut token) = (Pairs::default(), Vec::new(), 0);
        for &Piece { text, held, new } in pieces {
            store.add(token..token + new, (held..held + new).map(|position| self.row(text, position)));
            token += new;
            let Range { start, end } = self.texts[text];
            segments.push((new, start..end.min(start + held + new)));
        }
        let segments = Segments::within(self.rows, &segments)?;
        Ok(Step { gather: None, store: store.upload(model)?, segments })
    }

    /// The queries read rows of their own: for each text its cached ones in order, then the new ones.
    fn gathered(&self, model: &Model, pieces: &[Piece]) -> Result<Step> {
        let (mut cached, mut fresh, mut store) = (Pairs::default(), Pairs::default(), Pairs::default());
        let (mut lengths, mut token, mut behind) = (Vec::new(), 0, 0);
        for &Piece { text, held, new } in pieces {
            let row = |position| self.row(text, position);
            let size = self.texts[text].len();
            let old = held - held.min(size)..held;
            cached.add(old.clone().map(row), behind..behind + old.len());
            behind += old.len();
            fresh.add(token..token + new, behind..behind + new);
            behind += new;
            let kept = new - new.min(size)..new;
            store.add(kept.clone().map(|i| token + i), kept.map(|i| row(held + i)));
            token += new;
            lengths.push((new, old.len() + new));
        }
        Ok(Step {
            gather: Some([cached.upload(model)?, fresh.upload(model)?]),
            store: store.upload(model)?,
            segments: Segments::cached(&lengths)?,
        })
    }
}

/// Rows of a text of up to `room` tokens in a block's cache.
pub(crate) fn cache_rows(mask: Mask, room: usize) -> usize {
    match mask {
        Mask::Full | Mask::Causal => room,
        Mask::Sliding { window } => room.min(window),
    }
}

/// Rows that are copied, `y[to[i]] = x[from[i]]`.
#[derive(Default)]
struct Pairs {
    from: Vec<u32>,
    to: Vec<u32>,
}

impl Pairs {
    fn add(&mut self, from: impl Iterator<Item = usize>, to: impl Iterator<Item = usize>) {
        self.from.extend(from.map(|row| row as u32));
        self.to.extend(to.map(|row| row as u32));
    }

    fn upload(self, model: &Model) -> Result<Copies> {
        let upload = |rows: &[u32]| model.kernels.from_u32(rows, &[rows.len()]);
        Ok(Copies { from: upload(&self.from)?, to: upload(&self.to)? })
    }
}

/// The same on the device; both `[N]`.
#[derive(Debug)]
struct Copies {
    from: Tensor,
    to: Tensor,
}

/// What an advance does in a block's cache.
#[derive(Debug)]
pub(super) struct Step {
    /// Cached and new rows on their way to sequences `[S, G*E]` of their own; none where the queries read the
    /// cache itself.
    gather: Option<[Copies; 2]>,
    /// New rows on their way into the cache.
    store: Copies,
    /// Of what the queries read.
    segments: Segments,
}

/// One block's keys and values, `[P, G*E]` each.
#[derive(Debug)]
pub(super) struct LayerCache {
    k: Tensor,
    v: Tensor,
}

impl LayerCache {
    pub(super) fn new(model: &Model, layout: &Layout) -> Result<Self> {
        let shape = [layout.rows, model.config.num_key_value_heads * model.config.head_dim];
        Ok(LayerCache { k: model.operand(&shape)?, v: model.operand(&shape)? })
    }

    /// Keeps the new tokens' k and v `[T, G*E]`; o `[T, H*E]` and lse `[T, H]` of their queries q `[T, H*E]`.
    pub(super) fn attend(
        &mut self,
        model: &Model,
        layer: usize,
        step: &Step,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let kernels = &model.kernels;
        let store =
            |x: &Tensor, cache: &mut Tensor| kernels.copy_rows(&step.store.from, x, &step.store.to, cache);
        let Some([cached, fresh]) = &step.gather else {
            store(k, &mut self.k)?;
            store(v, &mut self.v)?;
            return model.attend(layer, &step.segments, q, &self.k, &self.v);
        };
        let gathered = |cache: &Tensor, x: &Tensor| -> Result<Tensor> {
            let mut all = model.operand(&[step.segments.keys(), x.shape()[1]])?; // [S, G*E]
            kernels.copy_rows(&cached.from, cache, &cached.to, &mut all)?;
            kernels.copy_rows(&fresh.from, x, &fresh.to, &mut all)?;
            Ok(all)
        };
        let (all_k, all_v) = (gathered(&self.k, k)?, gathered(&self.v, v)?);
        store(k, &mut self.k)?;
        store(v, &mut self.v)?;
        model.attend(layer, &step.segments, q, &all_k, &all_v)
    }
}
