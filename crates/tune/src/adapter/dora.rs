//! DoRA: `W = m (W0 + s B A) / |W0 + s B A|`, the norm that of each row (Liu et al., arXiv 2402.09353).
//!
//! The magnitude `m [out]`, `A [r, in]` and `B [out, r]` are trained: r (in + out) + out values a site. With
//! `c = m / |W0 + s B A|`, a factor for each row, and b the layer's bias:
//!
//! ```text
//! u = s x A^T    z = x W0^T + u B^T                y = c z + b
//! e = c dy       dm = sum over t of dy z / norm    dB += e^T u    v = s e B    dA += v^T x    dx = e W0 + v A
//! ```
//!
//! The norm counts as a constant in the backward pass (the paper's section 4.3, and PEFT). Kept for backward: u
//! and z `[T, out]`; the gradient of A needs x as well.
//!
//! With dropout D, as in PEFT, what is rescaled sees D(x), and the layer's own product sees x:
//! `z = D(x) W0^T + u B^T` with `u = s D(x) A^T`, `y = x W0^T + b + c z - D(x) W0^T`, and
//! `dx = dy W0 + D ((e - dy) W0 + v A)`: two more products with W0.
//!
//! # Norms of rows
//!
//! `|W0 + s B A|^2 = |W0|^2 + 2 s <W0, B A> + s^2 |B A|^2` without forming `B A [out, in]`:
//!
//! ```text
//! q = 2 s A W0^T + s^2 (A A^T) B^T    [r, out]
//! |W0 + s B A|^2 = |W0|^2 + the sum over r of q B^T
//! ```
//!
//! It changes with A and B alone, so it is computed once between two visits of the optimizer.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use lora_sb_kernels::{Accum, Kernels, Result, Tensor};
use lora_sb_model::{Frozen, Layer, LinearHook, Site, SiteSaved};

use super::dropout::InputDropout;
use super::{Adapter, Factors, Part, Pass, Visitor, missing, scaled};

const OP: &str = "dora adapter";

/// The adapter of one weight `[out, in]`. All tensors are f32.
#[derive(Debug)]
pub struct DoraSite {
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    a_gradient: Tensor,
    b_gradient: Tensor,
    magnitude_gradient: Tensor,
    /// `|W0|^2` of each row.
    weight_squares: Tensor,
    /// What follows from the tensors above as they are now.
    rescaling: OnceLock<Rescaling>,
}

/// The factors of a weight's rows, `[out]`.
#[derive(Debug)]
struct Rescaling {
    /// `c = m / norm`.
    factors: Tensor,
    /// `1 / norm`.
    inverse_norms: Tensor,
}

impl Rescaling {
    /// `sum over t of dy z / norm`; z and dy `[T, out]`, the result `[out]`.
    fn magnitude_gradient(&self, kernels: &dyn Kernels, z: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let out = self.factors.len();
        let mut sums = kernels.empty(&[out])?;
        kernels.channel_products(z, dy, Accum::Replace, &mut sums)?;
        let mut row = sums.reshape(&[1, out])?;
        kernels.scale_channels(&self.inverse_norms, &mut row)?;
        row.reshape(&[out])
    }
}

impl DoraSite {
    /// An adapter from `a [r, in]`, `b [out, r]` and `magnitude [out]`, of a `weight [out, in]` of any floating type.
    ///
    /// # Errors
    /// Where the device has no room for the gradients.
    pub fn new(
        kernels: &dyn Kernels,
        weight: &Tensor,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor,
    ) -> Result<Self> {
        let weight_squares = row_squares(kernels, weight)?;
        let [a_gradient, b_gradient, magnitude_gradient] =
            [&a, &b, &magnitude].map(|tensor| kernels.zeros(tensor.shape()));
        let (a_gradient, b_gradient, magnitude_gradient) = (a_gradient?, b_gradient?, magnitude_gradient?);
        let rescaling = OnceLock::new();
        Ok(DoraSite {
            a,
            b,
            magnitude,
            a_gradient,
            b_gradient,
            magnitude_gradient,
            weight_squares,
            rescaling,
        })
    }

    /// The rows' factors as A, B and the magnitude are now.
    fn rescaling(&self, kernels: &dyn Kernels, scale: f32, weight: &Tensor) -> Result<&Rescaling> {
        if let Some(known) = self.rescaling.get() {
            return Ok(known);
        }
        let norms = row_norms(kernels, scale, weight, &self.weight_squares, (&self.a, &self.b))?;
        let inverse_norms: Vec<f32> = norms.iter().map(|norm| norm.recip()).collect();
        // Divided, not multiplied by the inverse: at the start m is the norm, and the factor has to be 1.
        let magnitudes = kernels.to_f32(&self.magnitude)?;
        let factors: Vec<f32> = magnitudes.iter().zip(&norms).map(|(m, norm)| m / norm).collect();
        let upload = |values: &[f32]| kernels.from_f32(values, self.magnitude.shape());
        let (factors, inverse_norms) = (upload(&factors)?, upload(&inverse_norms)?);
        Ok(self.rescaling.get_or_init(|| Rescaling { factors, inverse_norms }))
    }
}

/// The squared norms `[out]` of the rows of a weight `[out, in]`.
fn row_squares(kernels: &dyn Kernels, weight: &Tensor) -> Result<Tensor> {
    let mut squares = kernels.empty(&[weight.shape()[0]])?;
    kernels.row_products(weight, weight, 1.0, Accum::Replace, &mut squares)?;
    Ok(squares)
}

/// The norms of the rows of `W0 [out, in]`: the magnitude with which DoRA starts.
///
/// # Errors
/// Where the device fails.
pub fn weight_norms(kernels: &dyn Kernels, weight: &Tensor) -> Result<Tensor> {
    let squares = kernels.to_f32(&row_squares(kernels, weight)?)?;
    kernels.from_f32(&roots(&squares), &[weight.shape()[0]])
}

/// The norms of the rows of `W0 + s B A`.
fn row_norms(
    kernels: &dyn Kernels,
    scale: f32,
    weight: &Tensor,
    weight_squares: &Tensor,
    (a, b): (&Tensor, &Tensor),
) -> Result<Vec<f32>> {
    let (out, rank) = (b.shape()[0], b.shape()[1]);
    let mut identity = vec![0.0; rank * rank];
    identity.iter_mut().step_by(rank + 1).for_each(|entry| *entry = 1.0);
    let identity = kernels.from_f32(&identity, &[rank, rank])?;
    let mut b_transposed = kernels.empty(&[rank, out])?;
    kernels.linear(&identity, b, 1.0, Accum::Replace, &mut b_transposed)?;
    let mut gram = identity;
    kernels.linear(a, a, 1.0, Accum::Replace, &mut gram)?; // A A^T
    let mut q = kernels.empty(&[rank, out])?;
    kernels.linear(a, weight, 2.0 * scale, Accum::Replace, &mut q)?; // 2 s A W0^T
    kernels.linear(&gram, b, scale * scale, Accum::Add, &mut q)?; // + s^2 (A A^T) B^T
    let mut squares = kernels.to_owned_f32(weight_squares)?;
    kernels.channel_products(&q, &b_transposed, Accum::Add, &mut squares)?;
    Ok(roots(&kernels.to_f32(&squares)?))
}

/// Rounding may leave a square below zero where B A takes W0 away; and a row of zeros is divided by.
fn roots(squares: &[f32]) -> Vec<f32> {
    squares.iter().map(|square| square.max(f32::MIN_POSITIVE).sqrt()).collect()
}

/// DoRA on any number of sites.
#[derive(Debug)]
pub struct Dora {
    scale: f32,
    dropout: InputDropout,
    sites: BTreeMap<Site, DoraSite>,
}

impl Dora {
    /// The adapter of all `sites`, with the scale `s` and the rate of dropout.
    pub fn new(scale: f32, dropout: f64, sites: BTreeMap<Site, DoraSite>) -> Self {
        Dora { scale, dropout: InputDropout::new(dropout), sites }
    }
}

impl LinearHook for Dora {
    fn forward(
        &self,
        kernels: &dyn Kernels,
        layer: Layer<'_>,
        x: &Tensor,
        accum: Accum,
        y: &mut Tensor,
    ) -> Result<SiteSaved> {
        let Some(state) = self.sites.get(&layer.site) else {
            return Frozen.forward(kernels, layer, x, accum, y);
        };
        let factors = &state.rescaling(kernels, self.scale, layer.weight)?.factors;
        let unbiased = Layer { bias: None, ..layer };
        let dropped = self.dropout.apply(kernels, layer.site, x)?; // [T, in]
        let mut u = kernels.empty_of(x.dtype(), &[x.shape()[0], state.a.shape()[0]])?; // [T, r]
        let seen = dropped.as_ref().unwrap_or(x);
        kernels.linear(seen, &state.a, self.scale, Accum::Replace, &mut u)?; // u = s x A^T
        let mut z = kernels.empty_of(y.dtype(), y.shape())?; // [T, out]
        let Some(dropped) = dropped else {
            unbiased.forward(kernels, x, Some((&u, &state.b)), Accum::Replace, &mut z)?;
            match accum {
                Accum::Replace => {
                    kernels.cast(&z, y)?;
                    kernels.scale_channels(factors, y)?;
                }
                Accum::Add => kernels.add(1.0, &rescaled(kernels, factors, &z)?, y)?,
            }
            if let Some(bias) = layer.bias {
                kernels.bias(bias, y)?; // y = c z + b
            }
            return Ok(SiteSaved(vec![u, z]));
        };
        unbiased.forward(kernels, &dropped, None, Accum::Replace, &mut z)?;
        drop(dropped);
        layer.forward(kernels, x, None, accum, y)?;
        kernels.add(-1.0, &z, y)?; // y = x W0^T + b - D(x) W0^T
        kernels.linear(&u, &state.b, 1.0, Accum::Add, &mut z)?;
        kernels.add(1.0, &rescaled(kernels, factors, &z)?, y)?; // y += c z
        Ok(SiteSaved(vec![u, z]))
    }

    fn needs_input(&self, site: Site) -> bool {
        self.sites.contains_key(&site)
    }

    fn backward(
        &mut self,
        kernels: &dyn Kernels,
        layer: Layer<'_>,
        saved: SiteSaved,
        x: Option<&Tensor>,
        dy: &Tensor,
        dx: Option<(&mut Tensor, Accum)>,
    ) -> Result<()> {
        let Some(state) = self.sites.get_mut(&layer.site) else {
            return Frozen.backward(kernels, layer, saved, x, dy, dx);
        };
        let (scale, dropout) = (self.scale, self.dropout);
        let [u, z] = saved.0.try_into().map_err(|_| missing(OP, "what its forward saved"))?;
        let x = x.ok_or_else(|| missing(OP, "the layer's input"))?;
        let rescaling = state.rescaling(kernels, scale, layer.weight)?;
        let slope = rescaling.magnitude_gradient(kernels, &z, dy)?; // [out]
        drop(z);
        let mut e = rescaled(kernels, &rescaling.factors, dy)?; // e = c dy; [T, out]
        kernels.add(1.0, &slope, &mut state.magnitude_gradient)?; // dm += sum over t of dy z / norm
        let mut v = kernels.empty_of(dy.dtype(), u.shape())?; // [T, r]
        kernels.linear_input_gradient(&e, &state.b, scale, Accum::Replace, &mut v)?; // v = s e B
        kernels.linear_weight_gradient(&e, &u, 1.0, Accum::Add, &mut state.b_gradient)?; // dB += e^T u
        let dropped = dropout.apply(kernels, layer.site, x)?; // [T, in]
        let seen = dropped.as_ref().unwrap_or(x);
        kernels.linear_weight_gradient(&v, seen, 1.0, Accum::Add, &mut state.a_gradient)?; // dA += v^T x
        let dropping = dropped.is_some();
        drop(dropped);
        let Some((dx, accum)) = dx else { return Ok(()) };
        if !dropping {
            return layer.input_gradient(kernels, &e, Some((&v, &state.a)), accum, dx); // dx = e W0 + v A
        }
        layer.input_gradient(kernels, dy, None, accum, dx)?; // dx = dy W0
        kernels.add(-1.0, dy, &mut e)?;
        dropout.backward(kernels, layer.site, dx, |seen| {
            layer.input_gradient(kernels, &e, Some((&v, &state.a)), Accum::Replace, seen) // (e - dy) W0 + v A
        })
    }
}

/// `c y`, a new tensor of y's type; c `[out]`, y `[T, out]`.
fn rescaled(kernels: &dyn Kernels, factors: &Tensor, y: &Tensor) -> Result<Tensor> {
    let mut out = kernels.empty_of(y.dtype(), y.shape())?;
    kernels.cast(y, &mut out)?;
    kernels.scale_channels(factors, &mut out)?;
    Ok(out)
}

impl Adapter for Dora {
    fn sites(&self) -> Vec<Site> {
        self.sites.keys().copied().collect()
    }

    fn visit(&mut self, visitor: &mut Visitor<'_>) -> crate::Result<()> {
        for (&site, state) in &mut self.sites {
            // The visitor may change what the rows' factors follow from.
            state.rescaling.take();
            visitor(site, Part::A, &mut state.a, &mut state.a_gradient)?;
            visitor(site, Part::B, &mut state.b, &mut state.b_gradient)?;
            visitor(site, Part::Magnitude, &mut state.magnitude, &mut state.magnitude_gradient)?;
        }
        Ok(())
    }

    fn trained(&self) -> Vec<(Site, Part, &Tensor)> {
        let parts = self.sites.iter().map(|(&site, DoraSite { a, b, magnitude, .. })| {
            [(site, Part::A, a), (site, Part::B, b), (site, Part::Magnitude, magnitude)]
        });
        parts.flatten().collect()
    }

    fn gradients(&self) -> Vec<&Tensor> {
        let gradients =
            self.sites.values().map(|DoraSite { a_gradient, b_gradient, magnitude_gradient, .. }| {
                [a_gradient, b_gradient, magnitude_gradient]
            });
        gradients.flatten().collect()
    }

    fn frozen(&self) -> Vec<(Site, Part, &Tensor)> {
        Vec::new()
    }

    fn begin(&mut self, pass: Pass) {
        self.dropout.begin(pass);
    }

    /// `A`, `s B`, and the magnitude.
    fn fold(&self, kernels: &dyn Kernels, site: Site) -> Result<Option<Factors>> {
        let Some(DoraSite { a, b, magnitude, .. }) = self.sites.get(&site) else { return Ok(None) };
        let [a, magnitude] = [a, magnitude].map(|tensor| kernels.to_owned_f32(tensor));
        Ok(Some(Factors { a: a?, b: scaled(kernels, self.scale, b)?, magnitude: Some(magnitude?) }))
    }

    /// `c (W0 + s B A) - W0`.
    fn delta(&self, kernels: &dyn Kernels, site: Site, weight: &Tensor) -> Result<Option<Tensor>> {
        let Some(state) = self.sites.get(&site) else { return Ok(None) };
        let mut update = kernels.empty(weight.shape())?; // [out, in]
        kernels.linear_input_gradient(&state.b, &state.a, self.scale, Accum::Replace, &mut update)?; // s B A
        let factors = kernels.to_f32(&state.rescaling(kernels, self.scale, weight)?.factors)?;
        let (mut delta, weights) = (kernels.to_f32(&update)?, kernels.to_f32(weight)?);
        let columns = weight.shape()[1].max(1);
        let rows = delta.chunks_exact_mut(columns).zip(weights.chunks_exact(columns));
        for ((row, weights), factor) in rows.zip(factors) {
            row.iter_mut().zip(weights).for_each(|(d, w)| *d = factor * *d + (factor - 1.0) * w);
        }
        kernels.write_f32(&mut update, &delta)?;
        Ok(Some(update))
    }
}
