//! The bias on a GPU.

use super::{Bias, width};
use crate::cuda::launch::{Argument, DeviceFloats, Launch, THREADS};
use crate::{Accum, Cuda, DType, Result, Tensor};

/// Columns and rows of one block of an operation on the columns of a matrix: `TILE` and `WARPS * AT_ONCE` of `columns.cuh`.
const BLOCK_COLUMNS: usize = 128;
const BLOCK_ROWS: usize = 32;

/// Rows that one block adds up: few enough that narrow matrices have work for the whole GPU, and several times what its warps
/// read at once.
const CHUNK_ROWS: usize = 128;

impl Bias for Cuda {
    fn bias(&self, b: &Tensor, y: &mut Tensor) -> Result<()> {
        let op = "bias";
        let n = width(op, y, b)?;
        let rows = y.shape()[0];
        let (b, y) = (self.floats(op, "b", b)?, self.floats_mut(op, "y", y)?);
        self.apply_columns(op, b, y, [rows, n])
    }

    fn bias_gradient(&self, dy: &Tensor, db: &mut Tensor) -> Result<()> {
        let op = "bias_gradient";
        let n = width(op, dy, db)?;
        let rows = dy.shape()[0];
        let (dy, db) = (self.floats(op, "dy", dy)?, self.f32_mut(op, "db", db)?);
        if rows == 0 {
            return Ok(());
        }
        self.sum_rows(op, "row_sums", &[dy], [rows, n], Accum::Add, db)
    }
}

impl Cuda {
    /// Runs the kernel `op` of a vector `c` [N] and a matrix `y` [T, N] that it changes.
    pub(crate) fn apply_columns(
        &self,
        op: &'static str,
        c: DeviceFloats,
        y: DeviceFloats,
        [rows, n]: [usize; 2],
    ) -> Result<()> {
        let blocks = rows.div_ceil(BLOCK_ROWS) * n.div_ceil(BLOCK_COLUMNS);
        let arguments = [c.into(), y.into(), (rows as u64).into(), (n as u64).into()];
        self.launch(op, op, Launch::blocks(blocks, THREADS), &arguments)
    }

    /// `out (+)= sum over the rows` of the product of `operands` [T, N], out [N] in `f32`, by a kernel that adds up a chunk of
    /// rows a block. The chunks' sums are added up in the same way, so the order depends on the number of rows alone.
    pub(crate) fn sum_rows(
        &self,
        op: &'static str,
        kernel: &'static str,
        operands: &[DeviceFloats],
        [rows, n]: [usize; 2],
        accum: Accum,
        out: u64,
    ) -> Result<()> {
        let chunks = rows.div_ceil(CHUNK_ROWS).max(1);
        let launch = |add: bool, out: u64| {
            let sizes = [Argument::Word(rows as u64), Argument::Word(n as u64)];
            let chunk =
                [Argument::U32(CHUNK_ROWS as u32), Argument::U32(u32::from(add)), Argument::Word(out)];
            let operands = operands.iter().map(|&operand| operand.into());
            let arguments: Vec<_> = operands.chain(sizes).chain(chunk).collect();
            let blocks = chunks * n.div_ceil(BLOCK_COLUMNS);
            self.launch(op, kernel, Launch::blocks(blocks, THREADS), &arguments)
        };
        if chunks == 1 {
            return launch(accum == Accum::Add, out);
        }
        let sums = self.scratch(op, chunks * n * size_of::<f32>())?;
        launch(false, sums.address())?;
        let sums = DeviceFloats { address: sums.address(), dtype: DType::F32 };
        self.sum_rows(op, "row_sums", &[sums], [chunks, n], accum, out)
    }
}
