//! The r x r family, LoRA-SB and LoRA-XS: `W = W0 + s B R A`.
//!
//! `A [r, in]` and `B [out, r]` are frozen and only `R [r, r]` is trained; the two methods differ in where the
//! three start, which is [`method`](crate::method)'s business. Trained: r^2 values a site. Kept for backward: the
//! `[T, r]` product `u`, and nothing of the size `[T, in]`.
//!
//! ```text
//! u = x A^T      h = s u R^T    y = x W0^T + h B^T + b
//! v = dy B       dR += s v^T u  w = s v R      dx = dy W0 + w A
//! ```
//!
//! The last product of each line is one pass over y and dx. Where the model computes in `bf16`, u, v and the products
//! with R are `f32` all the same; h and w are rounded, since products read them.
//!
//! dR is `s B^T dW A^T` for the weight's gradient `dW = dy^T x`: Lemma 2 of arXiv 2411.19557, with `dy^T x`
//! never formed. With dropout, x is what is left of it, and dx passes the same mask; see
//! [`dropout`](super::dropout).

use std::collections::BTreeMap;

use lora_sb_kernels::{Accum, GroupLayer, Kernels, LatentBackward, LatentPart, Result, Tensor};
use lora_sb_model::{Layer, LinearHook, Site, SiteSaved, hook};

use super::dropout::InputDropout;
use super::{Adapter, Factors, Part, Pass, Visitor, saved_product};

/// The adapter of one weight `[out, in]`. All tensors are f32.
#[derive(Debug)]
pub struct LatentSite {
    a: Tensor,
    b: Tensor,
    r: Tensor,
}

impl LatentSite {
    /// An adapter from `a [r, in]`, `b [out, r]` and `r [r, r]`.
    pub fn new(a: Tensor, b: Tensor, r: Tensor) -> Self {
        LatentSite { a, b, r }
    }

    fn part(&self, scale: f32) -> LatentPart<'_> {
        LatentPart { a: &self.a, r: &self.r, b: &self.b, scale }
    }
}

/// LoRA-SB or LoRA-XS on any number of sites.
#[derive(Debug)]
pub struct Latent {
    scale: f32,
    dropout: InputDropout,
    sites: BTreeMap<Site, LatentSite>,
    /// That of each R.
    gradients: BTreeMap<Site, Tensor>,
}

impl Latent {
    /// The adapter of all `sites`, with the scale `s` and the rate of dropout.
    ///
    /// # Errors
    /// Where the device has no room for the gradients.
    pub fn new(
        kernels: &dyn Kernels,
        scale: f32,
        dropout: f64,
        sites: BTreeMap<Site, LatentSite>,
    ) -> Result<Self> {
        let zeros = |(&site, state): (&Site, &LatentSite)| Ok((site, kernels.zeros(state.r.shape())?));
        let gradients = sites.iter().map(zeros).collect::<Result<_>>()?;
        Ok(Latent { scale, dropout: InputDropout::new(dropout), sites, gradients })
    }

    /// [`LinearHook::forward_group`] where nothing is dropped of what the adapted layers read.
    fn forward_together(
        &self,
        kernels: &dyn Kernels,
        layers: &[Layer<'_>],
        x: &Tensor,
        accum: Accum,
        ys: &mut [&mut Tensor],
    ) -> Result<Vec<SiteSaved>> {
        let us = kernels.linear_group(x, &group(&self.sites, self.scale, layers), accum, ys)?;
        Ok(us.into_iter().map(|u| SiteSaved(Vec::from_iter(u))).collect())
    }

    /// [`LinearHook::backward_group`] of the same.
    fn backward_together(
        &mut self,
        kernels: &dyn Kernels,
        layers: &[Layer<'_>],
        saved: Vec<SiteSaved>,
        dys: &[&Tensor],
        dx: Option<(&mut Tensor, Accum)>,
    ) -> Result<()> {
        let mut us = BTreeMap::new();
        for (layer, saved) in layers.iter().zip(saved) {
            if self.sites.contains_key(&layer.site) {
                us.insert(layer.site, saved_product("latent adapter", saved)?); // [T, r]
            }
        }
        let mut gradients: BTreeMap<_, _> = self.gradients.iter_mut().collect();
        let mut latents = Vec::with_capacity(layers.len());
        for layer in layers {
            let u_and_gradient = us.get(&layer.site).zip(gradients.remove(&layer.site));
            latents.push(u_and_gradient.map(|(u, gradient)| LatentBackward { u, gradient }));
        }
        kernels.linear_group_backward(dys, &group(&self.sites, self.scale, layers), &mut latents, dx)
    }
}

/// The layers with the latent parts of those that are adapted.
fn group<'a>(sites: &'a BTreeMap<Site, LatentSite>, scale: f32, layers: &[Layer<'a>]) -> Vec<GroupLayer<'a>> {
    let part = |layer: &Layer<'_>| sites.get(&layer.site).map(|site| site.part(scale));
    layers.iter().map(|layer| layer.in_group(part(layer))).collect()
}

impl LinearHook for Latent {
    fn forward(
        &self,
        kernels: &dyn Kernels,
        layer: Layer<'_>,
        x: &Tensor,
        accum: Accum,
        y: &mut Tensor,
    ) -> Result<SiteSaved> {
        let dropped = match self.sites.contains_key(&layer.site) {
            true => self.dropout.apply(kernels, layer.site, x)?, // [T, in]
            false => None,
        };
        let (Some(dropped), Some(LatentSite { a, b, r, .. })) = (dropped, self.sites.get(&layer.site)) else {
            let mut saved = self.forward_together(kernels, &[layer], x, accum, &mut [y])?;
            return Ok(saved.pop().unwrap_or_default());
        };
        let shape = [x.shape()[0], r.shape()[0]]; // [T, r]
        let (mut u, mut h) = (kernels.empty(&shape)?, kernels.empty_of(x.dtype(), &shape)?);
        kernels.linear(&dropped, a, 1.0, Accum::Replace, &mut u)?; // u = x A^T
        drop(dropped);
        kernels.linear(&u, r, self.scale, Accum::Replace, &mut h)?; // h = s u R^T
        layer.forward(kernels, x, Some((&h, b)), accum, y)?; // y = x W0^T + h B^T + b
        Ok(SiteSaved(vec![u]))
    }

    fn forward_group(
        &self,
        kernels: &dyn Kernels,
        layers: &[Layer<'_>],
        x: &Tensor,
        accum: Accum,
        ys: &mut [&mut Tensor],
    ) -> Result<Vec<SiteSaved>> {
        match self.dropout.drops() {
            true => hook::forward_each(self, kernels, layers, x, accum, ys),
            false => self.forward_together(kernels, layers, x, accum, ys),
        }
    }

    fn needs_input(&self, _site: Site) -> bool {
        false
    }

    fn backward(
        &mut self,
        kernels: &dyn Kernels,
        layer: Layer<'_>,
        saved: SiteSaved,
        _: Option<&Tensor>,
        dy: &Tensor,
        dx: Option<(&mut Tensor, Accum)>,
    ) -> Result<()> {
        if !self.dropout.drops() || !self.sites.contains_key(&layer.site) {
            return self.backward_together(kernels, &[layer], vec![saved], &[dy], dx);
        }
        let (site, gradient) = (self.sites.get(&layer.site), self.gradients.get_mut(&layer.site));
        let Some((LatentSite { a, b, r }, gradient)) = site.zip(gradient) else { return Ok(()) };
        let u = saved_product("latent adapter", saved)?;
        let mut v = kernels.empty(u.shape())?; // [T, r]
        kernels.linear_input_gradient(dy, b, 1.0, Accum::Replace, &mut v)?; // v = dy B
        kernels.linear_weight_gradient(&v, &u, self.scale, Accum::Add, gradient)?; // dR += s v^T u
        let Some(dx) = dx else { return Ok(()) };
        let mut w = kernels.empty_of(dy.dtype(), u.shape())?; // [T, r]
        drop(u);
        kernels.linear_input_gradient(&v, r, self.scale, Accum::Replace, &mut w)?; // w = s v R
        drop(v);
        self.dropout.input_gradient(kernels, layer, dy, (&w, a), dx) // dx = dy W0 + w A
    }

    fn backward_group(
        &mut self,
        kernels: &dyn Kernels,
        layers: &[Layer<'_>],
        saved: Vec<SiteSaved>,
        x: Option<&Tensor>,
        dys: &[&Tensor],
        dx: Option<(&mut Tensor, Accum)>,
    ) -> Result<()> {
        match self.dropout.drops() {
            true => hook::backward_each(self, kernels, layers, saved, x, dys, dx),
            false => self.backward_together(kernels, layers, saved, dys, dx),
        }
    }
}

impl Adapter for Latent {
    fn sites(&self) -> Vec<Site> {
        self.sites.keys().copied().collect()
    }

    fn visit(&mut self, visitor: &mut Visitor<'_>) -> crate::Result<()> {
        for ((&site, state), gradient) in self.sites.iter_mut().zip(self.gradients.values_mut()) {
            visitor(site, Part::R, &mut state.r, gradient)?;
        }
        Ok(())
    }

    fn trained(&self) -> Vec<(Site, Part, &Tensor)> {
        self.sites.iter().map(|(&site, state)| (site, Part::R, &state.r)).collect()
    }

    fn gradients(&self) -> Vec<&Tensor> {
        self.gradients.values().collect()
    }

    fn begin(&mut self, pass: Pass) {
        self.dropout.begin(pass);
    }

    fn frozen(&self) -> Vec<(Site, Part, &Tensor)> {
        let parts =
            self.sites.iter().map(|(&site, state)| [(site, Part::A, &state.a), (site, Part::B, &state.b)]);
        parts.flatten().collect()
    }

    /// `A`, and `s B R`.
    fn fold(&self, kernels: &dyn Kernels, site: Site) -> Result<Option<Factors>> {
        let Some(LatentSite { a, b, r, .. }) = self.sites.get(&site) else { return Ok(None) };
        let mut folded = kernels.empty(b.shape())?; // [out, r]
        kernels.linear_input_gradient(b, r, self.scale, Accum::Replace, &mut folded)?;
        Ok(Some(Factors { a: kernels.to_owned_f32(a)?, b: folded, magnitude: None }))
    }
}
