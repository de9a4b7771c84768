//! Matrix products of `bf16` with `f32` sums: `C (+)= alpha sum of A B + bias`, several products into one result and
//! several results of the same operands.
//!
//! A is packed once for all threads, [`CHUNK_ROWS`] rows at a time at most, B panel by panel by the thread that needs it. A
//! tile's sums stay in registers over the whole depth of all terms, so C is touched once, whatever its type: at 28 cycles
//! for a step of 128 + 56 bytes the caches keep up without blocking the depth. Every element is one sum in one order,
//! whatever the number of threads and whatever rows stand beside it.
//!
//! `rows.rs` is A in panels, `sum.rs` one result, `latent.rs` the thin products of an adapter, which read the same panels,
//! and `group.rs` what is done together.

mod group;
mod latent;
mod micro;
mod pack;
mod rows;
mod sum;

use std::sync::Arc;

use super::pack::View;
use crate::Accum;
use crate::buffer::{FloatsMut, Recycler, allocated_bytes};
use crate::cpu::team::Team;
use micro::Micro;

pub(crate) use group::{Group, Source, Target, pack_rows};
pub(crate) use latent::{Latent, Square, SquareGradient};
pub(crate) use rows::PackedRows;

/// Rows of A that are packed at a time, at most: enough for B's packing and for calling the threads together to be little
/// beside the product.
const CHUNK_ROWS: usize = 2688;

/// Rows of each chunk of M: as equal as whole panels allow, since a small last one would pack all of B for a few rows.
fn chunk_rows(micro: Micro, m: usize) -> usize {
    m.div_ceil(m.div_ceil(CHUNK_ROWS).max(1)).next_multiple_of(micro.rows).max(micro.rows)
}

/// Tasks that a product is cut into at least, where it can be, so that several threads have work.
const TASKS: usize = 12;

/// Products below this many multiplications are not worth waking other threads for.
const SERIAL_BELOW: usize = 96 * 96 * 96;

/// One product of a sum: A `[M, K]`, B `[K, N]`, rounded to `bf16` as they are packed.
pub(crate) type Term<'a> = (View<'a>, View<'a>);

/// `C (+)= alpha sum of A B + bias`; c `[M, N]`, bias `[N]`.
pub(crate) fn gemm(
    team: &Team,
    recycler: &Arc<Recycler>,
    terms: &[Term<'_>],
    alpha: f32,
    bias: Option<&[f32]>,
    accum: Accum,
    c: FloatsMut<'_>,
) {
    product(Micro::detect(), team, recycler, terms, alpha, bias, accum, c);
}

fn product(
    micro: Micro,
    team: &Team,
    recycler: &Arc<Recycler>,
    terms: &[Term<'_>],
    alpha: f32,
    bias: Option<&[f32]>,
    accum: Accum,
    c: FloatsMut<'_>,
) {
    let operands = terms.iter().map(|(a, _)| *a).collect();
    let terms = terms.iter().enumerate().map(|(index, (_, b))| (Source::Operand(index), *b)).collect();
    let targets = vec![Target { terms, alpha, bias, accum, c }];
    Group { operands, latents: Vec::new(), targets }.run(micro, team, recycler);
}

/// Bytes of `rows` packed rows of `columns` elements.
pub(crate) fn packed_bytes(rows: usize, columns: usize) -> usize {
    allocated_bytes(rows.next_multiple_of(Micro::detect().rows) * columns.div_ceil(2))
}

/// Bytes that [`gemm`] takes beside operands and result, for one term `[M, K]`, `[K, N]`.
pub(crate) fn scratch_bytes(m: usize, n: usize, k: usize, threads: usize) -> usize {
    let micro = Micro::detect();
    let rows = m.min(chunk_rows(micro, m));
    packed_bytes(rows, k) + threads * sum::panel_bytes(micro, rows, n, k.div_ceil(2), TASKS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::Floats;

    /// Small integers, whose sums are exact whatever the order.
    #[test]
    fn every_micro_kernel_gives_the_same_product() {
        let team = Team::new(2).unwrap();
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
            product(micro, &team, &recycler, &terms, 2.0, Some(&bias), Accum::Add, to);
            for (at, &found) in c.iter().enumerate() {
                assert_eq!(found, sum(at / n, at % n), "{} rows a tile, element {at}", micro.rows);
            }
        }
    }
}
