//! Matrix product `C (+)= alpha A B` on strided views; the one place where most of a step's time is spent.
//!
//! Both operands are copied ("packed") into panels that the innermost loop reads front to back, widened to
//! `f32` on the way, so every orientation and every weight type runs through the same arithmetic. The
//! blocking follows Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (ACM TOMS
//! 34(3), 2008). The sum over K is never split between threads and its blocks have a fixed size, so an
//! element of C has the same bits whatever the number of threads and whatever other rows stand beside it.

pub(crate) mod bf16;
mod micro;
mod output;
mod pack;

pub(crate) use output::{Output, SharedRows};
pub(crate) use pack::View;

use crate::buffer::{Recycler, allocated_bytes};
use crate::cpu::team::Team;
use crate::{Accum, DType};
use micro::{Micro, TILE};
use pack::{Side, pack_panel};
use std::sync::Arc;

/// Depth of a block: a panel of B, 256 x 32 floats, fits the first-level cache.
const DEPTH: usize = 256;
/// Columns of B packed at a time: 256 x 4096 floats, 4 MiB, stay in the last-level cache.
const COLUMNS: usize = 4096;
/// Rows of a task, in panels of A: 10 x 14 x 256 floats, 140 KiB, stay in the second-level cache.
const TASK_ROW_PANELS: usize = 10;
/// Columns of a task, in panels of B.
const TASK_COLUMN_PANELS: usize = 16;
/// Products below this many multiplications are not worth waking other threads for.
const SERIAL_BELOW: usize = 64 * 64 * 64;
/// Nor are results of so few elements, as the gradient of an r x r matrix: a deep sum meets its threads once a block.
const SERIAL_UP_TO: usize = 64 * 64;

/// Whether the processor multiplies pairs of `bf16` and adds them up in `f32` in one instruction.
pub(crate) fn has_bf16_dot_products() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bf16")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// `C (+)= alpha A B` with the threads of `team`; a `[M, K]`, b `[K, N]`, c `[M, N]`.
pub(crate) fn gemm(
    team: &Team,
    recycler: &Arc<Recycler>,
    a: View<'_>,
    b: View<'_>,
    alpha: f32,
    accum: Accum,
    c: Output<'_>,
) {
    let few = a.rows * b.columns <= SERIAL_UP_TO || a.rows * b.columns * a.columns < SERIAL_BELOW;
    let serial = few || team.threads() == 1;
    let product = Product::new(a, b, alpha, c);
    let (packed_a, packed_b) = product.micro.packed_sizes(product.m, product.n, product.k);
    let (mut packed_a, mut packed_b) = (recycler.take(packed_a), recycler.take(packed_b));
    let (packed_a, packed_b) = (packed_a.as_mut_slice(), packed_b.as_mut_slice());
    if serial {
        return product.run(&a, &b, accum, packed_a, packed_b, &|count, work| (0..count).for_each(work));
    }
    product.run(&a, &b, accum, packed_a, packed_b, &|count, work| team.each(count, work));
}

/// Bytes that the product of `[M, K]` and `[K, N]` takes beside its operands and its result, for activations of a type: the
/// packed blocks; in `bf16`, with the panels of a few threads.
pub(crate) fn product_scratch_bytes_of(dtype: DType, m: usize, n: usize, k: usize) -> usize {
    if dtype == DType::Bf16 {
        return bf16::scratch_bytes(m, n, k, COUNTED_THREADS);
    }
    let (packed_a, packed_b) = Micro::detect().packed_sizes(m, n, k);
    allocated_bytes(packed_a) + allocated_bytes(packed_b)
}

/// Threads whose panels are counted: each has some 200 KiB.
const COUNTED_THREADS: usize = 4;

impl Micro {
    /// Floats of the packed blocks of A `[M, K]` and B `[K, N]`.
    fn packed_sizes(&self, m: usize, n: usize, k: usize) -> (usize, usize) {
        let depth = k.min(DEPTH);
        (m.next_multiple_of(self.rows) * depth, n.min(COLUMNS).next_multiple_of(self.columns) * depth)
    }
}

/// What is done for each number of a range, on any thread and in any order.
type Work<'a> = &'a (dyn Fn(usize) + Sync);

/// A product whose operands' sizes have been checked against each other.
struct Product<'c> {
    micro: Micro,
    m: usize,
    n: usize,
    k: usize,
    alpha: f32,
    c: SharedRows<'c>,
}

impl<'c> Product<'c> {
    fn new(a: View<'_>, b: View<'_>, alpha: f32, c: Output<'c>) -> Self {
        let (m, n, k) = (a.rows, b.columns, a.columns);
        assert_eq!(b.rows, k, "gemm: B has {} rows, A has K={k} columns", b.rows);
        assert!(c.holds(m, n), "gemm: C is too small for M={m}, N={n}");
        Product { micro: Micro::detect(), m, n, k, alpha, c: c.share() }
    }

    /// Packs and multiplies block by block; `each(count, work)` does `work` for all numbers below `count`.
    #[expect(unsafe_code, reason = "panels are packed by several tasks into one buffer")]
    fn run(
        &self,
        a: &View<'_>,
        b: &View<'_>,
        accum: Accum,
        packed_a: &mut [f32],
        packed_b: &mut [f32],
        each: &dyn Fn(usize, Work<'_>),
    ) {
        if self.nothing_to_sum(accum) {
            return;
        }
        let micro = self.micro;
        for (block, k0) in (0..self.k).step_by(DEPTH).enumerate() {
            let depth = DEPTH.min(self.k - k0);
            let accum = if block == 0 { accum } else { Accum::Add };
            let panel = micro.rows * depth;
            let panels = Output::rows(packed_a, panel).share();
            each(self.m.div_ceil(micro.rows), &|p| {
                // SAFETY: each panel is one task's.
                pack_panel(a, Side::A, p, micro.rows, k0, depth, unsafe { panels.slice(p * panel, panel) });
            });
            for n0 in (0..self.n).step_by(COLUMNS) {
                let columns = COLUMNS.min(self.n - n0);
                let (first, panel) = (n0 / micro.columns, micro.columns * depth);
                let panels = Output::rows(packed_b, panel).share();
                each(columns.div_ceil(micro.columns), &|p| {
                    // SAFETY: each panel is one task's.
                    let out = unsafe { panels.slice(p * panel, panel) };
                    pack_panel(b, Side::B, first + p, micro.columns, k0, depth, out);
                });
                let tasks = self.tasks(columns);
                let (packed_a, packed_b) = (&*packed_a, &*packed_b);
                each(tasks.0 * tasks.1, &|task| {
                    let (row, column) = (task / tasks.1, task % tasks.1);
                    self.run_task(row, column, (n0, columns), depth, packed_a, packed_b, accum);
                });
            }
        }
    }

    /// Handles a sum over no terms, which is 0.
    #[expect(unsafe_code, reason = "writes rows of the output through its pointer")]
    fn nothing_to_sum(&self, accum: Accum) -> bool {
        if self.k == 0 && accum == Accum::Replace {
            for row in 0..self.m {
                // SAFETY: one row at a time, on the only thread that has the output yet.
                unsafe { self.c.slice(row * self.c.stride(), self.n) }.fill(0.0);
            }
        }
        self.k == 0 || self.m == 0 || self.n == 0
    }

    /// Tasks along M and along the `columns` columns of one packed block.
    fn tasks(&self, columns: usize) -> (usize, usize) {
        let rows = self.m.div_ceil(self.micro.rows * TASK_ROW_PANELS);
        (rows, columns.div_ceil(self.micro.columns * TASK_COLUMN_PANELS))
    }

    /// Computes the rectangle (row_task, column_task) of the block of `columns` columns from `n0` on.
    #[expect(unsafe_code, reason = "calls the micro-kernel, which works on pointers")]
    fn run_task(
        &self,
        row_task: usize,
        column_task: usize,
        (n0, columns): (usize, usize),
        depth: usize,
        packed_a: &[f32],
        packed_b: &[f32],
        accum: Accum,
    ) {
        let micro = self.micro;
        let row_panels =
            row_task * TASK_ROW_PANELS..self.m.div_ceil(micro.rows).min((row_task + 1) * TASK_ROW_PANELS);
        let column_panels = column_task * TASK_COLUMN_PANELS
            ..columns.div_ceil(micro.columns).min((column_task + 1) * TASK_COLUMN_PANELS);
        let mut edge = [0.0f32; TILE];
        for q in column_panels {
            let b = &packed_b[q * micro.columns * depth..][..micro.columns * depth];
            let column = n0 + q * micro.columns;
            let width = micro.columns.min(n0 + columns - column);
            for p in row_panels.clone() {
                let a = &packed_a[p * micro.rows * depth..][..micro.rows * depth];
                let row = p * micro.rows;
                let height = micro.rows.min(self.m - row);
                // SAFETY: row + height <= m and column + width <= n, so the rectangle lies inside the output
                // (checked in `new`), and no other task of this block has the same (p, q). The panels hold
                // `depth` steps of `rows` and `columns` values, as the kernel reads. A tile at the edge is
                // computed into `edge`, which holds a whole tile.
                unsafe {
                    let (c, stride) = (self.c.at(row * self.c.stride() + column), self.c.stride());
                    if height == micro.rows && width == micro.columns {
                        (micro.run)(depth, a.as_ptr(), b.as_ptr(), self.alpha, accum, c, stride);
                    } else {
                        let tile = edge.as_mut_ptr();
                        (micro.run)(
                            depth,
                            a.as_ptr(),
                            b.as_ptr(),
                            self.alpha,
                            Accum::Replace,
                            tile,
                            micro.columns,
                        );
                        for i in 0..height {
                            let out = std::slice::from_raw_parts_mut(c.add(i * stride), width);
                            write_row(&edge[i * micro.columns..][..width], accum, out);
                        }
                    }
                }
            }
        }
    }
}

fn write_row(values: &[f32], accum: Accum, out: &mut [f32]) {
    match accum {
        Accum::Replace => out.copy_from_slice(values),
        Accum::Add => out.iter_mut().zip(values).for_each(|(out, &value)| *out += value),
    }
}
