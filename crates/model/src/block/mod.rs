//! One block of the residual stream: attention and feed-forward layer, each with its norms and its residual.
//!
//! Where the norms stand is a matter of the family; `before.rs` and `behind.rs` have a drawing each.
//!
//! # Rows that are read
//!
//! Of the last block's output only R of the T rows are read: those of the labelled tokens, each sequence's first where
//! it is classified, or its last where it is continued. Behind its attention the last block computes these rows and no
//! others, forward and backward. In all other blocks R = T.
//!
//! # Types
//!
//! The residual stream and its gradient are `f32`. What products read, and what they make within a sub-layer, is of the
//! type that the [model computes in](Model::dtype); the gradient of the stream is rounded once for all products of a
//! sub-layer that read it.

mod before;
mod behind;

use lora_sb_kernels::Tensor;

use crate::attention::Attend;
use crate::config::NormPlacement;
use crate::linear::Operand;
use crate::{Batch, Gradients, InputGradient, LinearHook, Model, Result};

/// What a block keeps for its backward. Normed inputs and the activated product are not among it: they are
/// cheap to compute again, and mostly nobody asks for them.
#[derive(Debug)]
pub struct BlockSaved(Placed);

#[derive(Debug)]
enum Placed {
    /// Norms before, or around.
    Before(Box<before::BlockSaved>),
    Behind(Box<behind::BlockSaved>),
}

impl BlockSaved {
    /// The block's input `[T, D]`; the rest is dropped.
    ///
    /// # Panics
    /// On what was kept whole for the backward pass, where nothing asks for the input.
    pub fn into_input(self) -> Tensor {
        match self.0 {
            Placed::Before(saved) => saved.x,
            Placed::Behind(saved) => saved.x.expect("it is dropped only from what is kept whole"),
        }
    }

    /// Drops the block's input where only layers read it whose weights and hooks do not ask for it.
    pub(crate) fn forget_input(&mut self) {
        if let Placed::Behind(saved) = &mut self.0 {
            saved.x = None;
        }
    }
}

impl Model {
    /// The block's output `[R, D]` from its input x `[T, D]`, which is kept in what is saved.
    ///
    /// # Errors
    /// Where there is no such layer or the device is out of memory.
    pub fn block_forward(
        &self,
        layer: usize,
        x: Tensor,
        batch: &Batch,
        hook: &dyn LinearHook,
    ) -> Result<(Tensor, BlockSaved)> {
        let rows = self.read_behind(layer, &batch.rows);
        self.block_of_batch(layer, x, batch, rows, hook)
    }

    /// The same with the rows of one's own choice.
    pub(crate) fn block_of_batch(
        &self,
        layer: usize,
        x: Tensor,
        batch: &Batch,
        rows: Option<&Tensor>,
        hook: &dyn LinearHook,
    ) -> Result<(Tensor, BlockSaved)> {
        let attend: Attend<'_> = &mut |q, k, v| self.attend(layer, &batch.segments, q, k, v);
        self.block(layer, x, &batch.positions, attend, rows, hook)
    }

    /// The same, whatever the queries see; x `[T, D]`, positions `[T]`.
    pub(crate) fn block(
        &self,
        layer: usize,
        x: Tensor,
        positions: &Tensor,
        attend: Attend<'_>,
        rows: Option<&Tensor>,
        hook: &dyn LinearHook,
    ) -> Result<(Tensor, BlockSaved)> {
        match self.config.norm_placement {
            NormPlacement::Before | NormPlacement::Around => {
                let (y, saved) = self.block_before(layer, x, positions, attend, rows, hook)?;
                Ok((y, BlockSaved(Placed::Before(Box::new(saved)))))
            }
            NormPlacement::Behind => {
                let (y, saved) = self.block_behind(layer, x, positions, attend, rows, hook)?;
                Ok((y, BlockSaved(Placed::Behind(Box::new(saved)))))
            }
        }
    }

    /// The gradient `[T, D]` of the block's input, where it is wanted, from that of its output, dy `[R, D]`.
    ///
    /// The gradients of the block's own parameters and of the hook's are added where they belong.
    ///
    /// # Errors
    /// Where there is no such layer or the device is out of memory.
    pub fn block_backward(
        &self,
        layer: usize,
        saved: BlockSaved,
        batch: &Batch,
        dy: Tensor,
        hook: &mut dyn LinearHook,
        gradients: &mut dyn Gradients,
        wanted: InputGradient,
    ) -> Result<Option<Tensor>> {
        let rows = self.read_behind(layer, &batch.rows);
        match saved.0 {
            Placed::Before(saved) => {
                self.block_before_backward(layer, *saved, batch, dy, rows, hook, gradients, wanted)
            }
            Placed::Behind(saved) => {
                self.block_behind_backward(layer, *saved, batch, dy, rows, hook, gradients, wanted)
            }
        }
    }

    /// The rows `[R]` that are read of the last block's output; none where they are all of another block's.
    pub(crate) fn read_behind<'r>(&self, layer: usize, rows: &'r Tensor) -> Option<&'r Tensor> {
        (layer + 1 == self.config.num_hidden_layers).then_some(rows)
    }

    /// The rows of x `[T, *]` that are read, `[R, *]`.
    pub(crate) fn read_rows<'x>(&self, rows: Option<&Tensor>, x: &'x Tensor) -> Result<Operand<'x>> {
        let Some(rows) = rows else { return Ok(Operand::Held(x)) };
        let mut few = self.kernels.empty_of(x.dtype(), &[rows.len(), x.shape()[1]])?; // [R, *]
        self.kernels.gather_rows(rows, x, &mut few)?;
        Ok(Operand::Own(few))
    }

    /// The gradient of all `tokens` rows from that of those which are read, dy `[R, *]`: the others' is zero.
    pub(crate) fn spread_rows(&self, rows: Option<&Tensor>, dy: Tensor, tokens: usize) -> Result<Tensor> {
        let Some(rows) = rows else { return Ok(dy) };
        let mut all = self.kernels.empty_of(dy.dtype(), &[tokens, dy.shape()[1]])?; // [T, *]
        self.kernels.scatter_rows(rows, &dy, &mut all)?;
        Ok(all)
    }
}
