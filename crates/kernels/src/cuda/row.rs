//! How kernels of `row.cuh` are launched: a team of threads for each row of a matrix.

use super::launch::Launch;

/// Elements of a row that a thread holds, and the most threads of a block: those of `row.cuh`.
const HELD: usize = 16;
const MOST_THREADS: u32 = 512;

/// The most elements of a row that a team holds at once.
pub(crate) const SLAB: usize = HELD * MOST_THREADS as usize;

/// The fewest threads of a block; teams that are smaller share one.
const FEWEST_THREADS: u32 = 128;

/// The fewest of a team: the elements that so many lanes read beside each other are 32 bytes of `bf16`.
const FEWEST: usize = 4;

/// The threads of a team for a row of `width` elements: a power of two of them.
fn team(width: usize) -> u32 {
    width.div_ceil(HELD).next_power_of_two().clamp(FEWEST, MOST_THREADS as usize) as u32
}

/// The launch for every row of a matrix, and the threads of a team.
pub(crate) fn teams(rows: usize, width: usize) -> (Launch, u32) {
    let team = team(width);
    let threads = team.max(FEWEST_THREADS);
    (Launch::blocks(rows.div_ceil((threads / team) as usize), threads), team)
}
