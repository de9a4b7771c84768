//! Where a method of fine-tuning meets the model: a hook at each linear layer, and a place for gradients.

use lora_sb_kernels::{Kernels, Result, Tensor};

use crate::{Parameter, Site};

/// A linear layer as a hook sees it.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// Which one it is.
    pub site: Site,
    /// `[N, K]`, in its file's type.
    pub weight: &'a Tensor,
    /// `[N]`, in its file's type.
    pub bias: Option<&'a Tensor>,
}

/// What is done at each linear layer besides its own product. The model never learns which method it is.
pub trait LinearHook {
    /// Adds the hook's part to `y`, which already holds `x W^T` and the bias; x `[T, K]`, y `[T, N]`.
    ///
    /// What the backward pass will want is returned, and handed back to it.
    fn forward(
        &self,
        kernels: &dyn Kernels,
        layer: Layer<'_>,
        x: &Tensor,
        y: &mut Tensor,
    ) -> Result<SiteSaved>;

    /// Whether [`LinearHook::backward`] wants `x`; the model then computes it again if it was not kept.
    fn needs_input(&self, site: Site) -> bool;

    /// Adds the hook's part to `dx` and accumulates the hook's own gradients.
    ///
    /// dy `[T, N]`; x `[T, K]` where it is wanted; dx `[T, K]`, already holding `dy W`, absent where nothing
    /// before this layer is trained.
    fn backward(
        &mut self,
        kernels: &dyn Kernels,
        layer: Layer<'_>,
        saved: SiteSaved,
        x: Option<&Tensor>,
        dy: &Tensor,
        dx: Option<&mut Tensor>,
    ) -> Result<()>;
}

/// What a hook keeps from forward to backward: an adapter's `[T, r]` products.
#[derive(Debug, Default)]
pub struct SiteSaved(pub Vec<Tensor>);

/// The hook that does nothing: the model as it was loaded.
#[derive(Clone, Copy, Debug, Default)]
pub struct Frozen;

impl LinearHook for Frozen {
    fn forward(&self, _: &dyn Kernels, _: Layer<'_>, _: &Tensor, _: &mut Tensor) -> Result<SiteSaved> {
        Ok(SiteSaved::default())
    }

    fn needs_input(&self, _: Site) -> bool {
        false
    }

    fn backward(
        &mut self,
        _: &dyn Kernels,
        _: Layer<'_>,
        _: SiteSaved,
        _: Option<&Tensor>,
        _: &Tensor,
        _: Option<&mut Tensor>,
    ) -> Result<()> {
        Ok(())
    }
}

/// Where the gradients of the model's own parameters go.
pub trait Gradients {
    /// The tensor, of the parameter's shape, that its gradient is added to; `None` where the parameter is
    /// frozen, and its gradient is then not computed.
    ///
    /// Where the head is tied to the embedding, only [`Parameter::Embedding`] is asked for: it receives the
    /// gradients of both uses.
    fn of(&mut self, parameter: Parameter) -> Option<&mut Tensor>;
}

/// Every parameter frozen.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoGradients;

impl Gradients for NoGradients {
    fn of(&mut self, _: Parameter) -> Option<&mut Tensor> {
        None
    }
}

/// One tensor for each trained parameter.
impl Gradients for std::collections::BTreeMap<Parameter, Tensor> {
    fn of(&mut self, parameter: Parameter) -> Option<&mut Tensor> {
        self.get_mut(&parameter)
    }
}

/// Whether a part's backward computes the gradient of what came into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputGradient {
    /// Something before it is trained.
    Wanted,
    /// Nothing is.
    Unwanted,
}

/// What is kept between a block's forward and its backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    /// All that the backward reads.
    None,
    /// The block's input alone; the block is run forward again, with the same bits, before its backward.
    Block,
}
