//! The embedding on the CPU: copies, bound by memory.

use super::{Embedding, check_ids, dims};
use crate::cpu::blocks::{COLUMNS, Room, rows_per_block};
use crate::cpu::vector;
use crate::{Cpu, Result, Tensor};

impl Embedding for Cpu {
    fn embedding(&self, ids: &Tensor, table: &Tensor, x: &mut Tensor) -> Result<()> {
        let op = "embedding";
        let (v, d) = dims(op, ids, x, table)?;
        let (ids, table) = (ids.u32(op, "ids")?, table.floats(op, "table")?);
        check_ids(op, ids, v)?;
        let (length, x) = (x.len(), x.floats_mut(op, "x")?);
        if length == 0 {
            return Ok(());
        }
        let rows = rows_per_block(d);
        self.each(length, ids.chunks(rows).zip(x.chunks(rows * d)), |(ids, x)| {
            for (&id, x) in ids.iter().zip(x.chunks(d)) {
                x.copy(table.slice(id as usize * d..(id as usize + 1) * d));
            }
        });
        Ok(())
    }

    fn embedding_gradient(&self, ids: &Tensor, dx: &Tensor, dtable: &mut Tensor) -> Result<()> {
        let op = "embedding_gradient";
        let (v, d) = dims(op, ids, dx, dtable)?;
        let (ids, dx) = (ids.u32(op, "ids")?, dx.floats(op, "dx")?);
        check_ids(op, ids, v)?;
        let dtable = dtable.f32_mut(op, "dtable")?;
        if dx.len() == 0 {
            return Ok(());
        }
        let mut tokens: Vec<u32> = (0..ids.len() as u32).collect();
        tokens.sort_by_key(|&t| ids[t as usize]); // stable: a row's tokens keep their order
        let rows = touched_rows(&tokens, ids, dtable, d);
        let blocks = rows.into_iter().flat_map(|(tokens, row)| {
            row.chunks_mut(COLUMNS).enumerate().map(move |(block, row)| (tokens, block * COLUMNS, row))
        });
        self.each(dx.len(), blocks, |(tokens, column, row)| {
            let mut room = Room::default();
            for &t in tokens {
                let start = t as usize * d + column;
                vector::axpy(1.0, room.read(dx.slice(start..start + row.len())), row);
            }
        });
        Ok(())
    }
}

/// The rows of `dtable` that occur among `ids`, each with its tokens; `tokens` is sorted by id.
fn touched_rows<'a>(
    tokens: &'a [u32],
    ids: &[u32],
    mut dtable: &'a mut [f32],
    d: usize,
) -> Vec<(&'a [u32], &'a mut [f32])> {
    let mut next = 0;
    let same_id = tokens.chunk_by(|&a, &b| ids[a as usize] == ids[b as usize]);
    let rows = same_id.map(|tokens| {
        let id = ids[tokens[0] as usize] as usize;
        let from_row = std::mem::take(&mut dtable).split_at_mut((id - next) * d).1;
        let (row, behind) = from_row.split_at_mut(d);
        (dtable, next) = (behind, id + 1);
        (tokens, row)
    });
    rows.collect()
}
