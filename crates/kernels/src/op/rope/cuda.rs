//! The rotation on a GPU.

use super::{Rope, RopeTable, widths};
use crate::cuda::launch::{Launch, THREADS};
use crate::{Cuda, DType, Result, Tensor};

impl Rope for Cuda {
    fn rope(&self, table: &RopeTable, positions: &Tensor, x: &mut Tensor) -> Result<()> {
        self.turn("rope", table, positions, "x", x, 1.0)
    }

    fn rope_backward(&self, table: &RopeTable, positions: &Tensor, dx: &mut Tensor) -> Result<()> {
        self.turn("rope_backward", table, positions, "dx", dx, -1.0)
    }
}

/// Pairs that a thread turns at a time: 16 bytes of each half of a head where the halves begin at such, or 8 bytes.
fn piece(dtype: DType, head_size: usize, half: usize) -> usize {
    let fits = |piece: &usize| head_size.is_multiple_of(*piece) && half.is_multiple_of(*piece);
    let pieces: &[usize] = if dtype == DType::Bf16 { &[8, 4] } else { &[4] };
    pieces.iter().copied().find(fits).unwrap_or(1)
}

impl Cuda {
    /// Turns every head of `x [T, H*E]`, forward for `direction` 1 and backward for -1.
    fn turn(
        &self,
        op: &'static str,
        table: &RopeTable,
        positions: &Tensor,
        name: &'static str,
        x: &mut Tensor,
        direction: f32,
    ) -> Result<()> {
        let (width, head_size, half) = widths(op, table, positions, x)?;
        let (cos, sin) = (self.f32(op, "cos", &table.cos)?, self.f32(op, "sin", &table.sin)?);
        let (t, positions) = (x.shape()[0], self.indices(op, "positions", positions)?);
        let x = self.floats_mut(op, name, x)?;
        if t * width == 0 {
            return Ok(());
        }
        let (heads, piece) = (width / head_size, piece(x.dtype, head_size, half));
        // Several tokens where one has less for each thread of a block than a piece.
        let tokens = (THREADS as usize / (heads * half / piece)).max(1);
        self.launch(
            op,
            "rope",
            Launch::blocks(t.div_ceil(tokens), THREADS),
            &[
                cos.into(),
                sin.into(),
                positions.into(),
                x.into(),
                (t as u64).into(),
                (heads as u32).into(),
                (head_size as u32).into(),
                (half as u32).into(),
                (tokens as u32).into(),
                direction.into(),
                (piece as u32).into(),
            ],
        )
    }
}
