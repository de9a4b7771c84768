//! Products of two factors: `W = W0 + s B A`, with `A [r, in]` and `B [out, r]` trained (Hu et al., arXiv 2106.09685).
//!
//! LoRA, rsLoRA, PiSSA, LoRA-GA and LoRA-Pro differ in the scale s, in where A and B start, and in what is made of
//! their gradients: [`method`](crate::method)'s business. Trained: r (in + out) values a site. Kept for backward:
//! the `[T, r]` product `u`; the gradient of A needs the layer's input `x [T, in]` as well.
//!
//! ```text
//! u = s x A^T    y = x W0^T + u B^T + b
//! v = s dy B     dB += dy^T u    dA += v^T x    dx = dy W0 + v A
//! ```
//!
//! The last product of each line is one pass over y and dx. u and v are of the type that the model computes in.
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
//! W0, to the bit. Both terms are one of rank 2r, `[u - u0, u0] [B, B - B0]^T`, and so are those of dx,
//! `[v - v0, v] [A0; A - A0]`. With dropout the terms do not cancel, as in PEFT, where the changed W0 sees all of x:
//! `y += s (D(x) A^T B^T - x A0^T B0^T)`.

use std::collections::BTreeMap;

use lora_sb_kernels::{Accum, Kernels, Result, Tensor};
use lora_sb_model::{Frozen, Layer, LinearHook, Site, SiteSaved};

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

    /// `y (+)= ...`, and u; `dropped` is what dropout left of x, if there is any.
    fn forward(
        &self,
        kernels: &dyn Kernels,
        layer: Layer<'_>,
        scale: f32,
        (x, dropped): (&Tensor, Option<&Tensor>),
        accum: Accum,
        y: &mut Tensor,
    ) -> Result<Tensor> {
        let seen = dropped.unwrap_or(x);
        let Some(start) = &self.start else {
            let u = down(kernels, seen, &self.a, scale)?; // u = s x A^T
            layer.forward(kernels, x, Some((&u, &self.b)), accum, y)?; // y = x W0^T + u B^T
            return Ok(u);
        };
        if dropped.is_some() {
            let (u, u0) = (down(kernels, seen, &self.a, scale)?, down(kernels, x, &start.a, -scale)?);
            let (h, b) = (side_by_side(kernels, [&u, &u0])?, side_by_side(kernels, [&self.b, &start.b])?);
            layer.forward(kernels, x, Some((&h, &b)), accum, y)?; // y = x W0^T + u B^T - u0 B0^T
            return Ok(u);
        }
        let (a_moved, b_moved) = self.moved(kernels, start)?;
        let (mut u, u0) = (down(kernels, x, &a_moved, scale)?, down(kernels, x, &start.a, scale)?); // u - u0, u0
        let (h, b) = (side_by_side(kernels, [&u, &u0])?, side_by_side(kernels, [&self.b, &b_moved])?);
        layer.forward(kernels, x, Some((&h, &b)), accum, y)?; // y = x W0^T + (u - u0) B^T + u0 (B - B0)^T
        kernels.add(1.0, &u0, &mut u)?;
        Ok(u)
    }

    /// `dx (+)= ...` from v `[T, r]`; `dropping` where elements of x were dropped.
    fn input_gradient(
        &self,
        kernels: &dyn Kernels,
        layer: Layer<'_>,
        (scale, dropout): (f32, InputDropout),
        (dy, v): (&Tensor, &Tensor),
        dropping: bool,
        (dx, accum): (&mut Tensor, Accum),
    ) -> Result<()> {
        let Some(start) = &self.start else {
            return dropout.input_gradient(kernels, layer, dy, (v, &self.a), (dx, accum)); // dx = dy W0 + v A
        };
        if dropping {
            dropout.input_gradient(kernels, layer, dy, (v, &self.a), (dx, accum))?;
            let v0 = up(kernels, dy, &start.b, -scale)?; // v0 = -s dy B0
            return kernels.linear_input_gradient(&v0, &start.a, 1.0, Accum::Add, dx); // dx += v0 A0
        }
        let (a_moved, b_moved) = self.moved(kernels, start)?;
        let v0 = up(kernels, dy, &b_moved, scale)?; // v - v0
        let (w, a) = (side_by_side(kernels, [&v0, v])?, stacked(kernels, [&start.a, &a_moved])?);
        layer.input_gradient(kernels, dy, Some((&w, &a)), accum, dx) // dx = dy W0 + (v - v0) A0 + v (A - A0)
    }
}

/// `alpha x A^T` `[T, r]`, of the type of x `[T, in]`.
fn down(kernels: &dyn Kernels, x: &Tensor, a: &Tensor, alpha: f32) -> Result<Tensor> {
    let mut u = kernels.empty_of(x.dtype(), &[x.shape()[0], a.shape()[0]])?;
    kernels.linear(x, a, alpha, Accum::Replace, &mut u)?;
    Ok(u)
}

/// `alpha dy B` `[T, r]`, of the type of dy `[T, out]`.
fn up(kernels: &dyn Kernels, dy: &Tensor, b: &Tensor, alpha: f32) -> Result<Tensor> {
    let mut v = kernels.empty_of(dy.dtype(), &[dy.shape()[0], b.shape()[1]])?;
    kernels.linear_input_gradient(dy, b, alpha, Accum::Replace, &mut v)?;
    Ok(v)
}

/// Two matrices of one type side by side: `[N, r]` each, the result `[N, 2r]`.
fn side_by_side(kernels: &dyn Kernels, parts: [&Tensor; 2]) -> Result<Tensor> {
    let [n, r] = [parts[0].shape()[0], parts[0].shape()[1]];
    let mut joined = kernels.empty_of(parts[0].dtype(), &[n, 2 * r])?;
    kernels.put_columns(parts[0], 0, &mut joined)?;
    kernels.put_columns(parts[1], r, &mut joined)?;
    Ok(joined)
}

/// Two matrices one above the other: `[r, K]` each, the result `[2r, K]` in f32.
fn stacked(kernels: &dyn Kernels, parts: [&Tensor; 2]) -> Result<Tensor> {
    let [r, k] = [parts[0].shape()[0], parts[0].shape()[1]];
    let mut joined = kernels.empty(&[2 * r, k])?;
    let rows: Vec<u32> = (0..2 * r as u32).collect();
    let upload = |rows: &[u32]| kernels.from_u32(rows, &[rows.len()]);
    let from = upload(&rows[..r])?;
    kernels.copy_rows(&from, parts[0], &from, &mut joined)?;
    kernels.copy_rows(&from, parts[1], &upload(&rows[r..])?, &mut joined)?;
    Ok(joined)
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
        accum: Accum,
        y: &mut Tensor,
    ) -> Result<SiteSaved> {
        let Some(state) = self.sites.get(&layer.site) else {
            return Frozen.forward(kernels, layer, x, accum, y);
        };
        let dropped = self.dropout.apply(kernels, layer.site, x)?; // [T, in]
        let u = state.forward(kernels, layer, self.scale, (x, dropped.as_ref()), accum, y)?;
        Ok(SiteSaved(vec![u]))
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
        let u = saved_product("lora adapter", saved)?;
        let x = x.ok_or_else(|| missing("lora adapter", "the layer's input"))?;
        let dropped = dropout.apply(kernels, layer.site, x)?; // [T, in]
        let v = up(kernels, dy, &state.b, scale)?; // v = s dy B
        kernels.linear_weight_gradient(dy, &u, 1.0, Accum::Add, &mut state.b_gradient)?; // dB += dy^T u
        drop(u);
        let seen = dropped.as_ref().unwrap_or(x);
        kernels.linear_weight_gradient(&v, seen, 1.0, Accum::Add, &mut state.a_gradient)?; // dA += v^T x
        let dropping = dropped.is_some();
        drop(dropped);
        let Some(dx) = dx else { return Ok(()) };
        state.input_gradient(kernels, layer, (scale, dropout), (dy, &v), dropping, dx)
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

    fn gradients(&self) -> Vec<&Tensor> {
        self.sites.values().flat_map(|state| [&state.a_gradient, &state.b_gradient]).collect()
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
        let a = stacked(kernels, [&a_moved, &start.a])?;
        let b = side_by_side(kernels, [&b, &scaled(kernels, self.scale, &b_moved)?])?;
        Ok(Some(Factors { a, b, magnitude: None }))
    }
}
