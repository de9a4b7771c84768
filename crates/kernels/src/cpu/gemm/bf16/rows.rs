//! An operand's rows in panels.

use std::sync::Arc;

use super::micro::Micro;
use super::pack::{Place, pack_panels};
use crate::buffer::{Recycled, Recycler};
use crate::cpu::gemm::pack::{Side, View};
use crate::cpu::gemm::{Output, SharedRows};

/// Panels of `panel_rows` rows, `[panels, pairs, panel_rows]`: what the products read of A, whatever the type and
/// orientation it was packed from.
pub(crate) struct PackedRows {
    words: Recycled,
    pub(super) rows: usize,
    panel_rows: usize,
    pub(super) pairs: usize,
}

impl PackedRows {
    /// Room for `rows` rows of `columns` elements.
    pub(super) fn room(recycler: &Arc<Recycler>, micro: Micro, rows: usize, columns: usize) -> Self {
        let pairs = columns.div_ceil(2);
        let words = recycler.take(rows.next_multiple_of(micro.rows) * pairs);
        PackedRows { words, rows, panel_rows: micro.rows, pairs }
    }

    pub(super) fn panels(&self) -> usize {
        self.rows.div_ceil(self.panel_rows)
    }

    fn panel_words(&self) -> usize {
        self.pairs * self.panel_rows
    }

    /// One panel, `[pairs, panel_rows]`.
    pub(super) fn panel(&self, panel: usize) -> &[u32] {
        let words = self.panel_words();
        &bytemuck::cast_slice(self.words.as_slice())[panel * words..][..words]
    }

    /// All panels, to be written by several tasks.
    pub(super) fn open(&mut self) -> OpenRows<'_> {
        let (width, words) = (self.panel_rows, self.panel_words());
        let all: &mut [u32] = bytemuck::cast_slice_mut(self.words.as_mut_slice());
        OpenRows { panels: Output::rows(all, words.max(1)).share(), width, words }
    }
}

/// Panels that several tasks write, each its own.
pub(super) struct OpenRows<'a> {
    panels: SharedRows<'a, u32>,
    width: usize,
    words: usize,
}

impl OpenRows<'_> {
    /// The words `[pairs, width]` of one panel.
    ///
    /// # Safety
    /// No other task may have this panel at the time.
    #[expect(unsafe_code, clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub(super) unsafe fn panel(&self, panel: usize) -> &mut [u32] {
        // SAFETY: passed on.
        unsafe { self.panels.slice(panel * self.words, self.words) }
    }

    /// Packs one panel of the rows `view`.
    ///
    /// # Safety
    /// As [`OpenRows::panel`].
    #[expect(unsafe_code, reason = "passes its caller's promise on")]
    pub(super) unsafe fn pack(&self, view: &View<'_>, panel: usize) {
        let place = Place { width: self.width, panel_words: self.words, first_word: 0 };
        // SAFETY: passed on.
        pack_panels(view, Side::A, panel..panel + 1, place, unsafe { self.panel(panel) });
    }
}
