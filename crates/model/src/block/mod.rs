//! One block of the residual stream: attention and feed-forward layer, each with its norms and its residual.
//!
//! Where the norms stand is a matter of the family; `before.rs` and `behind.rs` have a drawing each.

mod before;
mod behind;

use lora_sb_kernels::Tensor;

use crate::attention::Attend;
use crate::config::NormPlacement;
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
    pub fn into_input(self) -> Tensor {
        match self.0 {
            Placed::Before(saved) => saved.x,
            Placed::Behind(saved) => saved.x,
        }
    }
}

impl Model {
    /// The block's output `[T, D]` from its input x `[T, D]`, which is kept in what is saved.
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
        let attend: Attend<'_> = &mut |q, k, v| self.attend(layer, &batch.segments, q, k, v);
        self.block(layer, x, &batch.positions, attend, hook)
    }

    /// The same, whatever the queries see; x `[T, D]`, positions `[T]`.
    pub(crate) fn block(
        &self,
        layer: usize,
        x: Tensor,
        positions: &Tensor,
        attend: Attend<'_>,
        hook: &dyn LinearHook,
    ) -> Result<(Tensor, BlockSaved)> {
        match self.config.norm_placement {
            NormPlacement::Before | NormPlacement::Around => {
                let (y, saved) = self.block_before(layer, x, positions, attend, hook)?;
                Ok((y, BlockSaved(Placed::Before(Box::new(saved)))))
            }
            NormPlacement::Behind => {
                let (y, saved) = self.block_behind(layer, x, positions, attend, hook)?;
                Ok((y, BlockSaved(Placed::Behind(Box::new(saved)))))
            }
        }
    }

    /// The gradient `[T, D]` of the block's input, where it is wanted, from that of its output, dy `[T, D]`.
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
        match saved.0 {
            Placed::Before(saved) => {
                self.block_before_backward(layer, *saved, batch, dy, hook, gradients, wanted)
            }
            Placed::Behind(saved) => {
                self.block_behind_backward(layer, *saved, batch, dy, hook, gradients, wanted)
            }
        }
    }
}
