//! Where a method of fine-tuning meets the model: a hook at each linear layer, and a place for gradients.

use lora_sb_kernels::{Accum, Extra, GroupLayer, Kernels, LatentPart, Result, Tensor};

use crate::{Parameter, Site};

/// A linear layer as a hook sees it.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// Which one it is.
    pub site: Site,
    /// `[N, K]`, in the type that the model holds it in.
    pub weight: &'a Tensor,
    /// `[N]`, in its file's type.
    pub bias: Option<&'a Tensor>,
}

impl Layer<'_> {
    /// `y (+)= x W^T + b`, and in the same pass the thin product `h B^T` of a `term` (h, B).
    ///
    /// x `[T, K]`, y `[T, N]`; h `[T, r]` of x's type, B `[N, r]`.
    ///
    /// # Errors
    /// Where the shapes do not match or the device fails.
    pub fn forward(
        &self,
        kernels: &dyn Kernels,
        x: &Tensor,
        term: Option<(&Tensor, &Tensor)>,
        accum: Accum,
        y: &mut Tensor,
    ) -> Result<()> {
        kernels.linear_fused(x, self.weight, Extra { bias: self.bias, term }, accum, y)
    }

    /// The layer with a latent part in a group of layers that read one input.
    pub fn in_group<'a>(&self, latent: Option<LatentPart<'a>>) -> GroupLayer<'a>
    where
        Self: 'a,
    {
        GroupLayer { weight: self.weight, bias: self.bias, latent }
    }

    /// `dx (+)= dy W`, and in the same pass the thin product `v A` of a `term` (v, A).
    ///
    /// dy `[T, N]`, dx `[T, K]`; v `[T, r]` of dy's type, A `[r, K]`.
    ///
    /// # Errors
    /// As [`Layer::forward`].
    pub fn input_gradient(
        &self,
        kernels: &dyn Kernels,
        dy: &Tensor,
        term: Option<(&Tensor, &Tensor)>,
        accum: Accum,
        dx: &mut Tensor,
    ) -> Result<()> {
        kernels.linear_input_gradient_fused(dy, self.weight, term, accum, dx)
    }
}

/// Plain layers, as a group of a device's takes them.
fn plain<'a>(layers: &[Layer<'a>]) -> Vec<GroupLayer<'a>> {
    layers.iter().map(|layer| layer.in_group(None)).collect()
}

/// What is done at each linear layer. The model never learns which method it is.
///
/// A hook computes the whole layer, so that what it adds can ride in the pass of the layer's own product:
/// [`Layer::forward`] and [`Layer::input_gradient`]. Operands of products, x and dy, are of the type that the model
/// computes in; results are of any.
pub trait LinearHook {
    /// `y (+)= x W^T + b` and the hook's part; x `[T, K]`, y `[T, N]`.
    ///
    /// What the backward pass will want is returned, and handed back to it.
    fn forward(
        &self,
        kernels: &dyn Kernels,
        layer: Layer<'_>,
        x: &Tensor,
        accum: Accum,
        y: &mut Tensor,
    ) -> Result<SiteSaved>;

    /// Whether [`LinearHook::backward`] wants `x`; the model then computes it again if it was not kept.
    fn needs_input(&self, site: Site) -> bool;

    /// `dx (+)= dy W` and the hook's part of it, and the hook's own gradients.
    ///
    /// dy `[T, N]`; x `[T, K]` where it is wanted; dx `[T, K]`, absent where nothing before this layer is trained.
    fn backward(
        &mut self,
        kernels: &dyn Kernels,
        layer: Layer<'_>,
        saved: SiteSaved,
        x: Option<&Tensor>,
        dy: &Tensor,
        dx: Option<(&mut Tensor, Accum)>,
    ) -> Result<()>;

    /// [`LinearHook::forward`] of layers that read one input, whose y are `ys`: for hooks that compute them together.
    fn forward_group(
        &self,
        kernels: &dyn Kernels,
        layers: &[Layer<'_>],
        x: &Tensor,
        accum: Accum,
        ys: &mut [&mut Tensor],
    ) -> Result<Vec<SiteSaved>> {
        forward_each(self, kernels, layers, x, accum, ys)
    }

    /// [`LinearHook::backward`] of the same layers, whose dy are `dys`; dx is the sum over them.
    fn backward_group(
        &mut self,
        kernels: &dyn Kernels,
        layers: &[Layer<'_>],
        saved: Vec<SiteSaved>,
        x: Option<&Tensor>,
        dys: &[&Tensor],
        dx: Option<(&mut Tensor, Accum)>,
    ) -> Result<()> {
        backward_each(self, kernels, layers, saved, x, dys, dx)
    }
}

/// [`LinearHook::forward`] of layers that read one input, one after another.
///
/// # Errors
/// What the hook returns.
pub fn forward_each<H: LinearHook + ?Sized>(
    hook: &H,
    kernels: &dyn Kernels,
    layers: &[Layer<'_>],
    x: &Tensor,
    accum: Accum,
    ys: &mut [&mut Tensor],
) -> Result<Vec<SiteSaved>> {
    let each = layers.iter().zip(ys);
    each.map(|(layer, y)| hook.forward(kernels, *layer, x, accum, y)).collect()
}

/// [`LinearHook::backward`] of the same layers, one after another.
///
/// # Errors
/// What the hook returns.
pub fn backward_each<H: LinearHook + ?Sized>(
    hook: &mut H,
    kernels: &dyn Kernels,
    layers: &[Layer<'_>],
    saved: Vec<SiteSaved>,
    x: Option<&Tensor>,
    dys: &[&Tensor],
    mut dx: Option<(&mut Tensor, Accum)>,
) -> Result<()> {
    for ((layer, saved), dy) in layers.iter().zip(saved).zip(dys) {
        let of_layer = dx.as_mut().map(|(dx, accum)| (&mut **dx, *accum));
        hook.backward(kernels, *layer, saved, x, dy, of_layer)?;
        dx = dx.map(|(dx, _)| (dx, Accum::Add));
    }
    Ok(())
}

/// What a hook keeps from forward to backward: an adapter's `[T, r]` products.
#[derive(Debug, Default)]
pub struct SiteSaved(pub Vec<Tensor>);

/// The hook that adds nothing: the model as it was loaded.
#[derive(Clone, Copy, Debug, Default)]
pub struct Frozen;

impl LinearHook for Frozen {
    fn forward(
        &self,
        kernels: &dyn Kernels,
        layer: Layer<'_>,
        x: &Tensor,
        accum: Accum,
        y: &mut Tensor,
    ) -> Result<SiteSaved> {
        layer.forward(kernels, x, None, accum, y)?;
        Ok(SiteSaved::default())
    }

    fn needs_input(&self, _: Site) -> bool {
        false
    }

    fn backward(
        &mut self,
        kernels: &dyn Kernels,
        layer: Layer<'_>,
        _: SiteSaved,
        _: Option<&Tensor>,
        dy: &Tensor,
        dx: Option<(&mut Tensor, Accum)>,
    ) -> Result<()> {
        match dx {
            Some((dx, accum)) => layer.input_gradient(kernels, dy, None, accum, dx),
            None => Ok(()),
        }
    }

    fn forward_group(
        &self,
        kernels: &dyn Kernels,
        layers: &[Layer<'_>],
        x: &Tensor,
        accum: Accum,
        ys: &mut [&mut Tensor],
    ) -> Result<Vec<SiteSaved>> {
        kernels.linear_group(x, &plain(layers), accum, ys)?;
        Ok(layers.iter().map(|_| SiteSaved::default()).collect())
    }

    fn backward_group(
        &mut self,
        kernels: &dyn Kernels,
        layers: &[Layer<'_>],
        _: Vec<SiteSaved>,
        _: Option<&Tensor>,
        dys: &[&Tensor],
        dx: Option<(&mut Tensor, Accum)>,
    ) -> Result<()> {
        let mut latents: Vec<_> = layers.iter().map(|_| None).collect();
        match dx {
            Some(dx) => kernels.linear_group_backward(dys, &plain(layers), &mut latents, Some(dx)),
            None => Ok(()),
        }
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
    /// So many blocks, from the first on, as in [`Recompute::Block`], and the others as in [`Recompute::None`].
    First(usize),
}

impl Recompute {
    /// How many of a model's `layers` blocks, from the first on, are run again.
    pub fn blocks(self, layers: usize) -> usize {
        match self {
            Recompute::None => 0,
            Recompute::Block => layers,
            Recompute::First(blocks) => blocks.min(layers),
        }
    }
}
