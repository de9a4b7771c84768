//! Matrix products of `bf16` with `f32` sums: `C (+)= alpha sum of A B + bias`, several products into one result.
//!
//! A is packed once for all threads, B panel by panel by the thread that needs it. A tile's sums stay in registers
//! over the whole depth of all terms, so C is touched once, whatever its type: at 28 cycles for a step of
//! 128 + 56 bytes the caches keep up without blocking the depth. Every element is one sum in one order, whatever
//! the number of threads and whatever rows stand beside it.

mod micro;
mod pack;

use std::ops::Range;
use std::sync::Arc;

use half::bf16;
use rayon::prelude::*;

use super::output::SharedRows;
use super::pack::{Side, View};
use crate::Accum;
use crate::buffer::{FloatsMut, Recycler, allocated_bytes};
use crate::cpu::gemm::Output;
use crate::cpu::vector::{lanes, vectorised};
use micro::{Micro, TILE, TILE_ROWS};
use pack::{Place, pack_panels};

/// Rows of A in one task: enough to pay for packing a panel of B.
const TASK_ROWS: usize = 1024;
/// Bytes of B's panels in one task, which stay in the second-level cache while all rows pass by.
const TASK_PANEL_BYTES: usize = 192 << 10;
/// Panels of B that are packed together where its rows run across them: a row's part is read once, from one page.
const ACROSS_PANELS: usize = 4;
/// Tasks below which they are cut smaller, so that several threads have work.
const TASKS: usize = 12;
/// Products below this many multiplications are not worth waking other threads for.
const SERIAL_BELOW: usize = 96 * 96 * 96;

/// One product of a sum: A `[M, K]`, B `[K, N]`, rounded to `bf16` as they are packed.
pub(crate) type Term<'a> = (View<'a>, View<'a>);

/// `C (+)= alpha sum of A B + bias`; c `[M, N]`, bias `[N]`.
pub(crate) fn gemm(
    pool: &rayon::ThreadPool,
    recycler: &Arc<Recycler>,
    terms: &[Term<'_>],
    alpha: f32,
    bias: Option<&[f32]>,
    accum: Accum,
    c: FloatsMut<'_>,
) {
    run(pool, recycler, &Product::new(Micro::detect(), terms, alpha, bias, accum, c));
}

fn run(pool: &rayon::ThreadPool, recycler: &Arc<Recycler>, product: &Product<'_>) {
    if product.m == 0 || product.n == 0 {
        return;
    }
    let multiplications = 2 * product.pairs * product.m * product.n;
    let serial = multiplications < SERIAL_BELOW || pool.current_num_threads() == 1;
    let mut packed = recycler.take(product.packed_a());
    let a: &mut [u32] = bytemuck::cast_slice_mut(packed.as_mut_slice());
    let panel = product.pairs * product.micro.rows;
    let tasks = product.tasks();
    if serial {
        a.chunks_mut(panel.max(1)).enumerate().for_each(|(p, out)| product.pack(Side::A, p..p + 1, out));
        (0..tasks.count()).for_each(|task| product.run(&tasks, task, a, recycler));
    } else {
        pool.install(|| {
            let panels = a.par_chunks_mut(panel.max(1)).enumerate();
            panels.for_each(|(p, out)| product.pack(Side::A, p..p + 1, out));
            let a = &*a;
            let each = (0..tasks.count()).into_par_iter().with_max_len(1);
            each.for_each(|task| product.run(&tasks, task, a, recycler));
        });
    }
}

/// Bytes that [`gemm`] takes beside operands and result, for one term `[M, K]`, `[K, N]`.
pub(crate) fn scratch_bytes(m: usize, n: usize, k: usize, threads: usize) -> usize {
    let (micro, pairs) = (Micro::detect(), k.div_ceil(2));
    let tasks = Tasks::new(micro, m, n, pairs, Lines::Across);
    allocated_bytes(m.next_multiple_of(micro.rows) * pairs)
        + threads * allocated_bytes(tasks.column_panels * micro.columns * pairs)
}

/// C, of either type.
enum Rows<'c> {
    F32(SharedRows<'c, f32>),
    Bf16(SharedRows<'c, bf16>),
}

/// A sum of products whose operands' sizes have been checked against each other.
struct Product<'c> {
    micro: Micro,
    terms: &'c [Term<'c>],
    m: usize,
    n: usize,
    /// Of all terms.
    pairs: usize,
    alpha: f32,
    bias: Option<&'c [f32]>,
    accum: Accum,
    c: Rows<'c>,
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
struct Tasks {
    row_panels: usize,
    /// Packed together.
    column_panels: usize,
    /// Of these, used together.
    resident_panels: usize,
    rows: usize,
    columns: usize,
}

impl Tasks {
    fn new(micro: Micro, m: usize, n: usize, pairs: usize, lines: Lines) -> Self {
        let (all_rows, all_columns) = (m.div_ceil(micro.rows), n.div_ceil(micro.columns));
        let panel_bytes = (pairs * micro.columns * size_of::<u32>()).max(1);
        let resident_panels = (TASK_PANEL_BYTES / panel_bytes).clamp(1, all_columns.max(1));
        let mut column_panels = match lines {
            Lines::Along => resident_panels,
            Lines::Across => resident_panels.max(ACROSS_PANELS.min(all_columns)),
        };
        let mut row_panels = TASK_ROWS.div_ceil(micro.rows).min(all_rows.max(1));
        let count = |rows: usize, columns: usize| all_rows.div_ceil(rows) * all_columns.div_ceil(columns);
        while count(row_panels, column_panels) < TASKS && column_panels > 1 {
            column_panels = column_panels.div_ceil(2);
        }
        while count(row_panels, column_panels) < TASKS && row_panels > 12 {
            row_panels = row_panels.div_ceil(2);
        }
        let (rows, columns) = (all_rows.div_ceil(row_panels), all_columns.div_ceil(column_panels));
        let resident_panels = resident_panels.min(column_panels);
        Tasks { row_panels, column_panels, resident_panels, rows, columns }
    }

    fn count(&self) -> usize {
        self.rows * self.columns
    }
}

impl<'c> Product<'c> {
    fn new(
        micro: Micro,
        terms: &'c [Term<'c>],
        alpha: f32,
        bias: Option<&'c [f32]>,
        accum: Accum,
        c: FloatsMut<'c>,
    ) -> Self {
        let (m, n) = (terms[0].0.rows, terms[0].1.columns);
        for (a, b) in terms {
            assert_eq!(
                (a.rows, b.columns),
                (m, n),
                "gemm: a term's A has M={m} rows and its B N={n} columns"
            );
            assert_eq!(a.columns, b.rows, "gemm: a term's A has as many columns as its B has rows");
        }
        assert!(bias.is_none_or(|bias| bias.len() == n), "gemm: the bias has N={n} elements");
        assert!(c.len() >= m * n, "gemm: C is too small for M={m}, N={n}");
        let c = match c {
            FloatsMut::F32(values) => Rows::F32(Output::rows(values, n).share()),
            FloatsMut::Bf16(values) => Rows::Bf16(Output::rows(values, n).share()),
        };
        let pairs = terms.iter().map(|(a, _)| a.columns.div_ceil(2)).sum();
        Product { micro, terms, m, n, pairs, alpha, bias, accum, c }
    }

    fn packed_a(&self) -> usize {
        self.m.next_multiple_of(self.micro.rows) * self.pairs
    }

    fn tasks(&self) -> Tasks {
        let across = self.terms.iter().any(|(_, b)| b.column_stride == 1);
        let lines = if across { Lines::Across } else { Lines::Along };
        Tasks::new(self.micro, self.m, self.n, self.pairs, lines)
    }

    /// Packs panels of all terms, one after another in each: `[panels, pairs, rows]` of A or
    /// `[panels, pairs, columns]` of B.
    fn pack(&self, side: Side, panels: Range<usize>, out: &mut [u32]) {
        let mut first_pair = 0;
        for (a, b) in self.terms {
            let (view, width) = match side {
                Side::A => (a, self.micro.rows),
                Side::B => (b, self.micro.columns),
            };
            let pairs = a.columns.div_ceil(2);
            let place = Place { width, panel_words: self.pairs * width, first_word: first_pair * width };
            pack_panels(view, side, panels.clone(), place, out);
            first_pair += pairs;
        }
    }

    /// Computes one rectangle of C from the packed A and its own panels of B.
    #[expect(unsafe_code, reason = "calls the micro-kernel, which works on pointers")]
    fn run(&self, tasks: &Tasks, task: usize, a: &[u32], recycler: &Arc<Recycler>) {
        let Micro { rows, columns, run } = self.micro;
        let (row, column) = (task % tasks.rows, task / tasks.rows);
        let row_panels = row * tasks.row_panels..self.m.div_ceil(rows).min((row + 1) * tasks.row_panels);
        let first = column * tasks.column_panels;
        let column_panels = first..self.n.div_ceil(columns).min(first + tasks.column_panels);
        let (a_panel, b_panel) = (self.pairs * rows, self.pairs * columns);
        let mut packed = recycler.take(column_panels.len() * b_panel);
        let b: &mut [u32] = bytemuck::cast_slice_mut(packed.as_mut_slice());
        self.pack(Side::B, column_panels.clone(), b);
        let mut tile = [0.0f32; TILE];
        for resident in column_panels.clone().step_by(tasks.resident_panels) {
            let resident = resident..column_panels.end.min(resident + tasks.resident_panels);
            for p in row_panels.clone() {
                let a = &a[p * a_panel..][..a_panel];
                for q in resident.clone() {
                    let b = &b[(q - first) * b_panel..][..b_panel];
                    // SAFETY: the panels hold `pairs` steps of `rows` and `columns` words, as the kernel reads.
                    unsafe { run(self.pairs, a.as_ptr(), b.as_ptr(), &mut tile) };
                    self.store(&tile, p * rows, q * columns);
                }
            }
        }
    }

    /// Writes the part of a tile that is inside C, whose first element is (row, column).
    #[expect(unsafe_code, reason = "writes its own rectangle of an output shared between tasks")]
    fn store(&self, tile: &[f32; TILE], row: usize, column: usize) {
        let (height, width) = (self.micro.rows.min(self.m - row), self.micro.columns.min(self.n - column));
        let bias = self.bias.map(|bias| &bias[column..column + width]);
        let to = |i: usize| (row + i) * self.n + column;
        match &self.c {
            Rows::F32(c) => {
                // SAFETY: no other task has this row's columns.
                let row = |i| if i < height { unsafe { c.slice(to(i), width) } } else { &mut [] };
                let mut rows: [&mut [f32]; TILE_ROWS] = std::array::from_fn(row);
                store_f32(tile, self.micro.columns, self.alpha, bias, self.accum, &mut rows[..height]);
            }
            Rows::Bf16(c) => {
                // SAFETY: as above.
                let row = |i| if i < height { unsafe { c.slice(to(i), width) } } else { &mut [] };
                let mut rows: [&mut [bf16]; TILE_ROWS] = std::array::from_fn(row);
                store_bf16(tile, self.micro.columns, self.alpha, bias, self.accum, &mut rows[..height]);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::Floats;

    /// Small integers, whose sums are exact whatever the order.
    #[test]
    fn every_micro_kernel_gives_the_same_product() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let recycler = Arc::new(Recycler::default());
        let (m, n, k, r) = (67, 101, 133, 5);
        let values = |count: usize, modulus: usize| -> Vec<f32> {
            (0..count).map(|i| (i * 31 % modulus) as f32 - (modulus / 2) as f32).collect()
        };
        let (a, b, h, w) = (values(m * k, 7), values(n * k, 11), values(m * r, 5), values(r * n, 13));
        let bias = values(n, 17);
        let rows = |data, rows, columns| View::rows(Floats::F32(data), 0, rows, columns, columns);
        let terms = [(rows(&a, m, k), rows(&b, n, k).transposed()), (rows(&h, m, r), rows(&w, r, n))];
        let sum = |i: usize, j: usize| -> f32 {
            let long: f32 = (0..k).map(|x| a[i * k + x] * b[j * k + x]).sum();
            let thin: f32 = (0..r).map(|x| h[i * r + x] * w[x * n + j]).sum();
            3.0 + 2.0 * (long + thin) + bias[j]
        };
        for micro in [micro::WIDENED, Micro::detect()] {
            let mut c = vec![3.0; m * n];
            let to = FloatsMut::F32(&mut c);
            run(&pool, &recycler, &Product::new(micro, &terms, 2.0, Some(&bias), Accum::Add, to));
            for (at, &found) in c.iter().enumerate() {
                assert_eq!(found, sum(at / n, at % n), "{} rows a tile, element {at}", micro.rows);
            }
        }
    }
}
