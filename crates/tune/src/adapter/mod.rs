//! Adapters: what is added to a linear layer's output, and how its gradients are taken.
//!
//! An adapter holds its tensors for all sites and is a [`LinearHook`] of the model: at each adapted site it computes
//! `y [T, out]` with its part on the way forward and `dx [T, in]` on the way back, each in one pass, and adds up the
//! gradients of what it trains. One file a form of update, which several [methods](crate::method) share; each begins with its
//! formulas, its source and its parameter count.

pub mod dora;
pub mod dropout;
pub mod full;
pub mod latent;
pub mod lora;

use std::fmt::Debug;

use lora_sb_kernels::{Accum, Error, Kernels, Result, Tensor};
use lora_sb_model::{LinearHook, Site, SiteSaved};

/// One tensor of an adapter at a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// `A [r, in]`.
    A,
    /// `B [out, r]`.
    B,
    /// `R [r, r]`.
    R,
    /// DoRA's magnitude of each row, `[out]`.
    Magnitude,
    /// `A [r, in]` as it was at the start, which the update is taken relative to.
    StartA,
    /// `B [out, r]` as it was at the start.
    StartB,
}

impl Part {
    /// The name after the module's in files and for the optimizer.
    pub fn name(self) -> &'static str {
        match self {
            Part::A => "lora_A",
            Part::B => "lora_B",
            Part::R => "lora_R",
            Part::Magnitude => "lora_magnitude_vector",
            Part::StartA => "lora_A_start",
            Part::StartB => "lora_B_start",
        }
    }

    /// The shape at a weight `[out, input]`.
    pub fn shape(self, rank: usize, (out, input): (usize, usize)) -> Vec<usize> {
        match self {
            Part::A | Part::StartA => vec![rank, input],
            Part::B | Part::StartB => vec![out, rank],
            Part::R => vec![rank, rank],
            Part::Magnitude => vec![out],
        }
    }
}

/// A plain LoRA of the same effect with scale 1: the update of the weight is `b a`. With a magnitude it is a
/// DoRA: the weight is `magnitude (W0 + b a) / norm of its rows`.
#[derive(Debug)]
pub struct Factors {
    /// `[q, in]`, f32; q is the rank r, or 2r where the update is taken relative to its start.
    pub a: Tensor,
    /// `[out, q]`, f32, with the scale (and R, where there is one) folded in.
    pub b: Tensor,
    /// `[out]`, f32.
    pub magnitude: Option<Tensor>,
}

/// What a pass through the model is for: in training, elements of an adapter's input are dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pass {
    /// Nothing is dropped.
    #[default]
    Evaluation,
    /// What is dropped follows from this seed and the site alone, so that a block that is run again drops the same.
    Training {
        /// Of this micro-batch.
        seed: u64,
    },
}

/// What the optimizer sees of one tensor: its site, its part, its value and its gradient.
pub type Visitor<'a> = dyn FnMut(Site, Part, &mut Tensor, &mut Tensor) -> crate::Result<()> + 'a;

/// An adapter of a whole model.
pub trait Adapter: LinearHook + Debug + Send + Sync {
    /// The adapted sites, in the order of the forward pass.
    fn sites(&self) -> Vec<Site>;

    /// Visits every trained tensor with its gradient, sites in order.
    ///
    /// # Errors
    /// What the visitor returns.
    fn visit(&mut self, visitor: &mut Visitor<'_>) -> crate::Result<()>;

    /// The tensors that are trained, in the order of [`visit`](Adapter::visit).
    fn trained(&self) -> Vec<(Site, Part, &Tensor)>;

    /// Their gradients, in the same order.
    fn gradients(&self) -> Vec<&Tensor>;

    /// The tensors that never change after the initialisation.
    fn frozen(&self) -> Vec<(Site, Part, &Tensor)>;

    /// Says what the passes that follow are for.
    fn begin(&mut self, pass: Pass);

    /// Changes the gradients of a whole optimizer step before the optimizer sees them; once a step.
    ///
    /// # Errors
    /// Where the device fails.
    fn adjust_gradients(&mut self, _kernels: &dyn Kernels) -> Result<()> {
        Ok(())
    }

    /// The plain LoRA of the same effect at a site; `None` where the site is not adapted.
    ///
    /// # Errors
    /// Where the device fails.
    fn fold(&self, kernels: &dyn Kernels, site: Site) -> Result<Option<Factors>>;

    /// What is added to the `weight [out, in]` of a site, in f32; `None` where the site is not adapted.
    ///
    /// # Errors
    /// Where the device fails.
    fn delta(&self, kernels: &dyn Kernels, site: Site, _weight: &Tensor) -> Result<Option<Tensor>> {
        let Some(Factors { a, b, .. }) = self.fold(kernels, site)? else { return Ok(None) };
        let mut delta = kernels.empty(&[b.shape()[0], a.shape()[1]])?; // [out, in]
        kernels.linear_input_gradient(&b, &a, 1.0, Accum::Replace, &mut delta)?; // b a
        Ok(Some(delta))
    }
}

/// `alpha x`, a new tensor.
fn scaled(kernels: &dyn Kernels, alpha: f32, x: &Tensor) -> Result<Tensor> {
    let mut out = kernels.zeros(x.shape())?;
    kernels.add(alpha, x, &mut out)?;
    Ok(out)
}

/// `x - y`, a new tensor.
fn difference(kernels: &dyn Kernels, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let mut out = scaled(kernels, 1.0, x)?;
    kernels.add(-1.0, y, &mut out)?;
    Ok(out)
}

/// The one product `[T, r]` that an adapter's forward saved.
fn saved_product(op: &'static str, saved: SiteSaved) -> Result<Tensor> {
    let [product] = saved.0.try_into().map_err(|_| missing(op, "what its forward saved"))?;
    Ok(product)
}

fn missing(op: &'static str, what: &str) -> Error {
    Error::Value { op, message: format!("backward needs {what}, which was not handed in") }
}
