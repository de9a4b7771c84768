//! Products of two factors: `W = W0 + s B A`, with `A [r, in]` and `B [out, r]` trained (Hu et al., arXiv 2106.09685).
//!
//! LoRA, rsLoRA, PiSSA, LoRA-GA and LoRA-Pro differ in the scale s, in where A and B start, and in what is made of
//! their gradients: [`method`](crate::method)'s business. Trained: r (in + out) values a site. Kept for backward:
//! the `[T, r]` product `u`; the gradient of A needs the layer's input `x [T, in]` as well.
//!
//! ```text
//! u = x A^T    y += s u B^T
//! v = dy B     dB += s dy^T u    dA += s v^T x    dx += s v A
//! ```
//!
//! With dropout, x is what is left of it, and dx passes the same mask; see [`dropout`](super::dropout).
//!
//! # Updates relative to their start
//!
//! PiSSA and LoRA-GA start at factors A0, B0 that are not zero and take them off again, `W0 + s (B A - B0 A0)`, so
//! that training begins at W0. PEFT does so by changing W0, and rounds the difference to W0's type; here W0 stays
//! and A0, B0 are kept beside it. The difference is computed as
//!
//! ```text
//! B A - B0 A0 = B (A - A0) + (B - B0) A0
//! ```
//!
//! where nothing is left of either term as long as the factors are those of the start: the first forward is that of
//! W0, to the bit. With dropout the terms do not cancel, as in PEFT, where the changed W0 sees all of x:
//! `y += s (D(x) A^T B^T - x A0^T B0^T)`.

use std::collections::BTreeMap;

use lora_sb_kernels::{Accum, Kernels, Result, Tensor};
use lora_sb_model::{Layer, LinearHook, Site, SiteSaved};

use super::dropout::InputDropout;
use super::{Adapter, Factors, Part, Pass, Visitor, difference, missing, saved_product, scaled};
use crate::method::lora_pro;

/// The adapter of one weight `[out, in]`. All tensors are f32.
#[derive(Debug)]
pub struct LoraSite {
    a: Tensor,
    b: Tensor,
    a_gradient: Tensor,
    b_gradient: Tensor,
    start: Option<Start>,
}

/// The factors that the update is taken relative to.
#[derive(Debug)]
struct Start {
    a: Tensor,
    b: Tensor,
}

impl LoraSite {
    /// An adapter from `a [r, in]` and `b [out, r]`.
    ///
    /// # Errors
    /// Where the device has no room for the gradients.
    pub fn new(kernels: &dyn Kernels, a: Tensor, b: Tensor) -> Result<Self> {
        let (a_gradient, b_gradient) = (kernels.zeros(a.shape())?, kernels.zeros(b.shape())?);
        Ok(LoraSite { a, b, a_gradient, b_gradient, start: None })
    }

    /// The same, relative to `start`, an earlier `a` and `b`.
    ///
    /// # Errors
    /// Where the device has no room for the gradients.
    pub fn relative(kernels: &dyn Kernels, a: Tensor, b: Tensor, start: (Tensor, Tensor)) -> Result<Self> {
        let start = Some(Start { a: start.0, b: start.1 });
        Ok(LoraSite { start, ..LoraSite::new(kernels, a, b)? })
    }

    /// An adapter that begins at `a` and `b` and is relative to them.
    ///
    /// # Errors
    /// Where the device has no room for their copies and the gradients.
    pub fn relative_to_itself(kernels: &dyn Kernels, a: Tensor, b: Tensor) -> Result<Self> {
        let start = (kernels.to_owned_f32(&a)?, kernels.to_owned_f32(&b)?);
        LoraSite::relative(kernels, a, b, start)
    }

    /// `A - A0` and `B - B0`.
    fn moved(&self, kernels: &dyn Kernels, start: &Start) -> Result<(Tensor, Tensor)> {
        Ok((difference(kernels, &self.a, &start.a)?, difference(kernels, &self.b, &start.b)?))
    }

    /// Adds the site's part to y and returns u; `dropped` is what dropout left of x, if there is any.
    fn forward(
        &self,
        kernels: &dyn Kernels,
        scale: f32,
        x: &Tensor,
        dropped: Option<&Tensor>,
        y: &mut Tensor,
    ) -> Result<Tensor> {
        let shape = [x.shape()[0], self.a.shape()[0]]; // [T, r]
        let (mut u, a, b) = (kernels.empty(&shape)?, &self.a, &self.b);
        let Some(start) = &self.start else {
            kernels.linear(dropped.unwrap_or(x), a, 1.0, Accum::Replace, &mut u)?; // u = x A^T
            kernels.linear(&u, b, scale, Accum::Add, y)?; // y += s u B^T
            return Ok(u);
        };
        let mut u0 = kernels.empty(&shape)?;
        kernels.linear(x, &start.a, 1.0, Accum::Replace, &mut u0)?; // u0 = x A0^T
        if let Some(dropped) = dropped {
            kernels.linear(dropped, a, 1.0, Accum::Replace, &mut u)?;
            kernels.linear(&u, b, scale, Accum::Add, y)?;
            kernels.linear(&u0, &start.b, -scale, Accum::Add, y)?; // y -= s u0 B0^T
            return Ok(u);
        }
        let (a_moved, b_moved) = self.moved(kernels, start)?;
        kernels.linear(x, &a_moved, 1.0, Accum::Replace, &mut u)?; // u - u0
        kernels.linear(&u, b, scale, Accum::Add, y)?; // y += s (u - u0) B^T
        kernels.linear(&u0, &b_moved, scale, Accum::Add, y)?; // y += s u0 (B - B0)^T
        kernels.add(1.0, &u0, &mut u)?;
        Ok(u)
    }
}

/// What the optimizer is given of the gradients of A and B.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gradients {
    /// Themselves.
    Plain,
    /// Those whose step moves W nearest to where the full gradient points: [`lora_pro`].
    Nearest,
}

/// A product of two trained factors on any number of sites.
#[derive(Debug)]
pub struct Lora {
    scale: f32,
    dropout: InputDropout,
    gradients: Gradients,
    sites: BTreeMap<Site, LoraSite>,
}

impl Lora {
    /// The adapter of all `sites`, with the scale `s` and the rate of dropout.
    pub fn new(scale: f32, dropout: f64, gradients: Gradients, sites: BTreeMap<Site, LoraSite>) -> Self {
        Lora { scale, dropout: InputDropout::new(dropout), gradients, sites }
    }
}

impl LinearHook for Lora {
    fn forward(
        &self,
        kernels: &dyn Kernels,
        layer: Layer<'_>,
        x: &Tensor,
        y: &mut Tensor,
    ) -> Result<SiteSaved> {
        let Some(state) = self.sites.get(&layer.site) else { return Ok(SiteSaved(Vec::new())) };
        let dropped = self.dropout.apply(kernels, layer.site, x)?; // [T, in]
        Ok(SiteSaved(vec![state.forward(kernels, self.scale, x, dropped.as_ref(), y)?]))
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
        dx: Option<&mut Tensor>,
    ) -> Result<()> {
        let Some(state) = self.sites.get_mut(&layer.site) else { return Ok(()) };
        let (scale, dropout) = (self.scale, self.dropout);
        let u = saved_product("lora adapter", saved)?;
        let x = x.ok_or_else(|| missing("lora adapter", "the layer's input"))?;
        let dropped = dropout.apply(kernels, layer.site, x)?; // [T, in]
        let mut v = kernels.empty(u.shape())?; // [T, r]
        kernels.linear_input_gradient(dy, &state.b, 1.0, Accum::Replace, &mut v)?; // v = dy B
        kernels.linear_weight_gradient(dy, &u, scale, Accum::Add, &mut state.b_gradient)?; // dB += s dy^T u
        let seen = dropped.as_ref().unwrap_or(x);
        kernels.linear_weight_gradient(&v, seen, scale, Accum::Add, &mut state.a_gradient)?; // dA += s v^T x
        let Some(dx) = dx else { return Ok(()) };
        let Some(start) = &state.start else {
            return dropout.backward(kernels, layer.site, dx, |dx| {
                kernels.linear_input_gradient(&v, &state.a, scale, Accum::Add, dx) // dx += s v A
            });
        };
        let mut v0 = u; // u is spent
        if dropped.is_some() {
            kernels.linear_input_gradient(dy, &start.b, 1.0, Accum::Replace, &mut v0)?; // v0 = dy B0
            kernels.linear_input_gradient(&v0, &start.a, -scale, Accum::Add, dx)?; // dx -= s v0 A0
            return dropout.backward(kernels, layer.site, dx, |dx| {
                kernels.linear_input_gradient(&v, &state.a, scale, Accum::Add, dx)
            });
        }
        let (a_moved, b_moved) = state.moved(kernels, start)?;
        kernels.linear_input_gradient(dy, &b_moved, 1.0, Accum::Replace, &mut v0)?; // v - v0
        kernels.linear_input_gradient(&v0, &start.a, scale, Accum::Add, dx)?; // dx += s (v - v0) A0
        kernels.linear_input_gradient(&v, &a_moved, scale, Accum::Add, dx) // dx += s v (A - A0)
    }
}

impl Adapter for Lora {
    fn sites(&self) -> Vec<Site> {
        self.sites.keys().copied().collect()
    }

    fn visit(&mut self, visitor: &mut Visitor<'_>) -> crate::Result<()> {
        for (&site, state) in &mut self.sites {
            visitor(site, Part::A, &mut state.a, &mut state.a_gradient)?;
            visitor(site, Part::B, &mut state.b, &mut state.b_gradient)?;
        }
        Ok(())
    }

    fn trained(&self) -> Vec<(Site, Part, &Tensor)> {
        let parts =
            self.sites.iter().map(|(&site, state)| [(site, Part::A, &state.a), (site, Part::B, &state.b)]);
        parts.flatten().collect()
    }

    fn frozen(&self) -> Vec<(Site, Part, &Tensor)> {
        let mut parts = Vec::new();
        for (&site, state) in &self.sites {
            let Some(start) = &state.start else { continue };
            parts.extend([(site, Part::StartA, &start.a), (site, Part::StartB, &start.b)]);
        }
        parts
    }

    fn begin(&mut self, pass: Pass) {
        self.dropout.begin(pass);
    }

    fn adjust_gradients(&mut self, kernels: &dyn Kernels) -> Result<()> {
        if self.gradients == Gradients::Plain {
            return Ok(());
        }
        for LoraSite { a, b, a_gradient, b_gradient, .. } in self.sites.values_mut() {
            lora_pro::adjust(kernels, self.scale, (a, b), (a_gradient, b_gradient))?;
        }
        Ok(())
    }

    /// `A` and `s B`; relative to a start, `[A - A0; A0]` and `[s B, s (B - B0)]`, of rank 2r: zero at the start.
    fn fold(&self, kernels: &dyn Kernels, site: Site) -> Result<Option<Factors>> {
        let Some(state) = self.sites.get(&site) else { return Ok(None) };
        let b = scaled(kernels, self.scale, &state.b)?; // [out, r]
        let Some(start) = &state.start else {
            return Ok(Some(Factors { a: kernels.to_owned_f32(&state.a)?, b, magnitude: None }));
        };
        let (a_moved, b_moved) = state.moved(kernels, start)?;
        let ([rank, input], out) = ([a_moved.shape()[0], a_moved.shape()[1]], b.shape()[0]);
        let stacked = [kernels.to_f32(&a_moved)?, kernels.to_f32(&start.a)?].concat();
        let mut joined = kernels.empty(&[out, 2 * rank])?;
        kernels.put_columns(&b, 0, &mut joined)?;
        kernels.put_columns(&scaled(kernels, self.scale, &b_moved)?, rank, &mut joined)?;
        let a = kernels.from_f32(&stacked, &[2 * rank, input])?;
        Ok(Some(Factors { a, b: joined, magnitude: None }))
    }
}
