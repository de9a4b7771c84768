//! The embedding on a GPU: copies, bound by memory.

use super::{Embedding, check_ids, dims};
use crate::cuda::launch::Launch;
use crate::op::rows::cuda::{Place, RowCopy};
use crate::{Cuda, Result, Tensor};

impl Embedding for Cuda {
    fn embedding(&self, ids: &Tensor, table: &Tensor, x: &mut Tensor) -> Result<()> {
        let op = "embedding";
        let (v, d) = dims(op, ids, x, table)?;
        check_ids(op, ids.u32(op, "ids")?, v)?;
        let (n, rows) = (x.shape()[0], self.indices(op, "ids", ids)?);
        let from = Place { x: self.floats(op, "table", table)?, stride: d, rows };
        let to = Place { x: self.floats_mut(op, "x", x)?, stride: d, rows: 0 };
        self.copy(op, RowCopy { from, to, n, width: d })
    }

    /// A block adds all of a table's row, so that the order of the tokens is kept; which tokens those are is sorted on the
    /// host, where the ids are known.
    fn embedding_gradient(&self, ids: &Tensor, dx: &Tensor, dtable: &mut Tensor) -> Result<()> {
        let op = "embedding_gradient";
        let (v, d) = dims(op, ids, dx, dtable)?;
        let ids_on_host = ids.u32(op, "ids")?;
        check_ids(op, ids_on_host, v)?;
        self.indices(op, "ids", ids)?;
        let (empty, dx) = (dx.is_empty(), self.floats(op, "dx", dx)?);
        let dtable = self.f32_mut(op, "dtable", dtable)?;
        if empty {
            return Ok(());
        }
        let lists = Lists::of(ids_on_host);
        let (rows, starts, ids) = (lists.rows, ids_on_host.len(), ids_on_host.len() + lists.rows + 1);
        let space = self.scratch(op, size_of_val(&lists.words[..]))?;
        self.upload(op, &space, &lists.words)?;
        let address = |word: usize| space.address() + (word * size_of::<u32>()) as u64;
        let columns = if d.is_multiple_of(4) { 4 * BLOCK } else { BLOCK } as usize;
        self.launch(
            op,
            "embedding_gradient",
            Launch { grid: [rows, d.div_ceil(columns), 1], threads: BLOCK, shared_bytes: 0 },
            &[
                dx.into(),
                address(0).into(),
                address(starts).into(),
                address(ids).into(),
                (d as u32).into(),
                dtable.into(),
            ],
        )
    }
}

/// Threads of a block; few, since every row of the table has at least one.
const BLOCK: u32 = 128;

/// Which tokens each row of the table receives.
struct Lists {
    /// The tokens `[T]` sorted by id, those of one id in their order; where each id's begin, and where the last one's end
    /// `[rows + 1]`; the ids `[rows]`.
    words: Vec<u32>,
    rows: usize,
}

impl Lists {
    fn of(ids: &[u32]) -> Self {
        let id = |token: u32| ids[token as usize];
        let mut words: Vec<u32> = (0..ids.len() as u32).collect();
        words.sort_by_key(|&token| id(token)); // stable: a row's tokens keep their order
        let first = |&place: &usize| place == 0 || id(words[place]) != id(words[place - 1]);
        let starts: Vec<u32> = (0..ids.len()).filter(first).map(|place| place as u32).collect();
        let touched: Vec<u32> = starts.iter().map(|&start| id(words[start as usize])).collect();
        words.extend(starts.iter().copied().chain([ids.len() as u32]).chain(touched));
        Lists { words, rows: starts.len() }
    }
}
