//! One result: how it is cut into tasks, and how a task computes its rectangle.

use std::sync::Arc;

use half::bf16;

use super::micro::{Micro, Segment, TILE, TILE_ROWS};
use super::pack::{Place, pack_panels};
use super::rows::PackedRows;
use crate::Accum;
use crate::buffer::{FloatsMut, Recycler, allocated_bytes};
use crate::cpu::gemm::pack::{Side, View};
use crate::cpu::gemm::{Output, SharedRows};
use crate::cpu::vector::{lanes, vectorised};

/// Rows of A in one task, at most: a panel of B is packed once for all of them.
const TASK_ROWS: usize = 2688;
/// Bytes of B's panels in one task, which stay in the second-level cache while all rows pass by.
const TASK_PANEL_BYTES: usize = 192 << 10;
/// Panels of B that are packed together where its rows run across them: a row's part is read once, from one page.
const ACROSS_PANELS: usize = 4;

/// C, of either type.
pub(super) enum Rows<'c> {
    F32(SharedRows<'c, f32>),
    Bf16(SharedRows<'c, bf16>),
}

impl<'c> Rows<'c> {
    /// Rows of `columns` elements.
    pub(super) fn of(c: FloatsMut<'c>, columns: usize) -> Self {
        match c {
            FloatsMut::F32(values) => Rows::F32(Output::rows(values, columns).share()),
            FloatsMut::Bf16(values) => Rows::Bf16(Output::rows(values, columns).share()),
        }
    }
}

/// `C (+)= alpha sum of A B + bias` for some rows of C.
pub(super) struct Sum<'a> {
    /// A `[rows, *]` and B `[*, columns]` of each product.
    pub(super) terms: Vec<(&'a PackedRows, View<'a>)>,
    /// The first row of C.
    pub(super) first_row: usize,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) alpha: f32,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) accum: Accum,
    pub(super) c: &'a Rows<'a>,
}

/// How B lies.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lines {
    /// A column's elements side by side.
    Along,
    /// A row's.
    Across,
}

/// How C is cut: rectangles of whole panels.
pub(super) struct Tasks {
    row_panels: usize,
    /// Packed together.
    column_panels: usize,
    /// Of these, used together.
    resident_panels: usize,
    rows: usize,
    columns: usize,
}

impl Tasks {
    /// `at_least`: tasks below which they are cut smaller, so that several threads have work.
    fn new(micro: Micro, (m, n): (usize, usize), pairs: usize, lines: Lines, at_least: usize) -> Self {
        let (all_rows, all_columns) = (m.div_ceil(micro.rows), n.div_ceil(micro.columns));
        let panel_bytes = (pairs * micro.columns * size_of::<u32>()).max(1);
        let resident_panels = (TASK_PANEL_BYTES / panel_bytes).clamp(1, all_columns.max(1));
        let mut column_panels = match lines {
            Lines::Along => resident_panels,
            Lines::Across => resident_panels.max(ACROSS_PANELS.min(all_columns)),
        };
        let mut row_panels = TASK_ROWS.div_ceil(micro.rows).min(all_rows.max(1));
        let count = |rows: usize, columns: usize| all_rows.div_ceil(rows) * all_columns.div_ceil(columns);
        while count(row_panels, column_panels) < at_least && column_panels > 1 {
            column_panels = column_panels.div_ceil(2);
        }
        while count(row_panels, column_panels) < at_least && row_panels > 12 {
            row_panels = row_panels.div_ceil(2);
        }
        let (rows, columns) = (all_rows.div_ceil(row_panels), all_columns.div_ceil(column_panels));
        let resident_panels = resident_panels.min(column_panels);
        Tasks { row_panels, column_panels, resident_panels, rows, columns }
    }

    pub(super) fn count(&self) -> usize {
        self.rows * self.columns
    }
}

/// Bytes of B's panels that one thread holds for a product of depth `2 pairs`.
pub(super) fn panel_bytes(micro: Micro, m: usize, n: usize, pairs: usize, at_least: usize) -> usize {
    let tasks = Tasks::new(micro, (m, n), pairs, Lines::Across, at_least);
    allocated_bytes(tasks.column_panels * micro.columns * pairs)
}

impl Sum<'_> {
    pub(super) fn pairs(&self) -> usize {
        self.terms.iter().map(|(a, _)| a.pairs).sum()
    }

    pub(super) fn tasks(&self, micro: Micro, at_least: usize) -> Tasks {
        let across = self.terms.iter().any(|(_, b)| b.column_stride == 1);
        let lines = if across { Lines::Across } else { Lines::Along };
        Tasks::new(micro, (self.rows, self.columns), self.pairs(), lines, at_least)
    }

    /// Computes one rectangle of C from the packed A and its own panels of B.
    #[expect(unsafe_code, reason = "calls the micro-kernel, which works on pointers")]
    pub(super) fn run(&self, micro: Micro, tasks: &Tasks, task: usize, recycler: &Arc<Recycler>) {
        let Micro { rows, columns, run } = micro;
        let (row, column) = (task % tasks.rows, task / tasks.rows);
        let row_panels = row * tasks.row_panels..self.rows.div_ceil(rows).min((row + 1) * tasks.row_panels);
        let first = column * tasks.column_panels;
        let column_panels = first..self.columns.div_ceil(columns).min(first + tasks.column_panels);
        let b_panel = self.pairs() * columns;
        let mut packed = recycler.take(column_panels.len() * b_panel);
        let b: &mut [u32] = bytemuck::cast_slice_mut(packed.as_mut_slice());
        let mut first_word = 0;
        for (a, view) in &self.terms {
            let place = Place { width: columns, panel_words: b_panel, first_word };
            pack_panels(view, Side::B, column_panels.clone(), place, b);
            first_word += a.pairs * columns;
        }
        let mut tile = [0.0f32; TILE];
        let mut segments = Vec::with_capacity(self.terms.len());
        for resident in column_panels.clone().step_by(tasks.resident_panels) {
            let resident = resident..column_panels.end.min(resident + tasks.resident_panels);
            for p in row_panels.clone() {
                for q in resident.clone() {
                    let mut b = &b[(q - first) * b_panel..][..b_panel];
                    segments.clear();
                    for (a, _) in &self.terms {
                        segments.push(Segment { pairs: a.pairs, a: a.panel(p).as_ptr(), b: b.as_ptr() });
                        b = &b[a.pairs * columns..];
                    }
                    self.fetch(micro, p * rows, q * columns);
                    // SAFETY: the panels hold `pairs` steps of `rows` and `columns` words, as the kernel reads.
                    unsafe { run(&segments, &mut tile) };
                    self.store(micro, &tile, p * rows, q * columns);
                }
            }
        }
    }

    /// Has the part of C that a tile is added to on its way while the tile is computed: its rows are far apart, where no
    /// processor looks ahead, and what is added to has long left the caches.
    fn fetch(&self, micro: Micro, row: usize, column: usize) {
        if self.accum == Accum::Replace {
            return;
        }
        let (height, width) = (micro.rows.min(self.rows - row), micro.columns.min(self.columns - column));
        let from = |i: usize| (self.first_row + row + i) * self.columns + column;
        for i in 0..height {
            match self.c {
                Rows::F32(c) => c.fetch(from(i), width),
                Rows::Bf16(c) => c.fetch(from(i), width),
            }
        }
    }

    /// Writes the part of a tile that is inside C, whose first element is (row, column).
    #[expect(unsafe_code, reason = "writes its own rectangle of an output shared between tasks")]
    fn store(&self, micro: Micro, tile: &[f32; TILE], row: usize, column: usize) {
        let (height, width) = (micro.rows.min(self.rows - row), micro.columns.min(self.columns - column));
        let bias = self.bias.map(|bias| &bias[column..column + width]);
        let to = |i: usize| (self.first_row + row + i) * self.columns + column;
        match self.c {
            Rows::F32(c) => {
                // SAFETY: no other task has this row's columns.
                let row = |i| if i < height { unsafe { c.slice(to(i), width) } } else { &mut [] };
                let mut rows: [&mut [f32]; TILE_ROWS] = std::array::from_fn(row);
                store_f32(tile, micro.columns, self.alpha, bias, self.accum, &mut rows[..height]);
            }
            Rows::Bf16(c) => {
                // SAFETY: as above.
                let row = |i| if i < height { unsafe { c.slice(to(i), width) } } else { &mut [] };
                let mut rows: [&mut [bf16]; TILE_ROWS] = std::array::from_fn(row);
                store_bf16(tile, micro.columns, self.alpha, bias, self.accum, &mut rows[..height]);
            }
        }
    }
}

/// `out (+)= alpha tile + bias` over the rows of `out`.
macro_rules! store {
    ($name:ident, $type:ty, $read:expr, $write:expr) => {
        vectorised! {
            fn $name<L>(
                tile: &[f32],
                columns: usize,
                alpha: f32,
                bias: Option<&[f32]>,
                accum: Accum,
                out: &mut [&mut [$type]],
            ) {
                for (sums, out) in tile.chunks_exact(columns).zip(out) {
                    match (accum, bias) {
                        (Accum::Replace, None) => {
                            out.iter_mut().zip(sums).for_each(|(out, &sum)| *out = $write(alpha * sum));
                        }
                        (Accum::Replace, Some(bias)) => {
                            let sums = sums.iter().zip(bias);
                            let write = |(out, (&sum, &bias)): (&mut $type, (&f32, &f32))| {
                                *out = $write(lanes::fma::<L>(alpha, sum, bias));
                            };
                            out.iter_mut().zip(sums).for_each(write);
                        }
                        (Accum::Add, None) => out.iter_mut().zip(sums).for_each(|(out, &sum)| {
                            *out = $write(lanes::fma::<L>(alpha, sum, $read(*out)));
                        }),
                        (Accum::Add, Some(bias)) => {
                            let sums = sums.iter().zip(bias);
                            let write = |(out, (&sum, &bias)): (&mut $type, (&f32, &f32))| {
                                *out = $write(lanes::fma::<L>(alpha, sum, $read(*out)) + bias);
                            };
                            out.iter_mut().zip(sums).for_each(write);
                        }
                    }
                }
            }
        }
    };
}

store!(store_f32, f32, |x: f32| x, |x: f32| x);
store!(store_bf16, bf16, lanes::wide, lanes::round);
