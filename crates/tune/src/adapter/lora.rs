//! LoRA: `W = W0 + s B A`, with `A [r, in]` and `B [out, r]` trained (Hu et al., arXiv 2106.09685).
//!
//! Trained: r (in + out) values a site. Kept for backward: the `[T, r]` product `u`; the gradient of A needs the
//! layer's input `x [T, in]` as well.
//!
//! ```text
//! u = x A^T    y += s u B^T
//! v = dy B     dB += s dy^T u    dA += s v^T x    dx += s v A
//! ```

use std::collections::BTreeMap;

use lora_sb_kernels::{Accum, Kernels, Result, Tensor};
use lora_sb_model::{LinearHook, Site, SiteSaved};

use super::{Adapter, Factors, Part, Visitor, missing, saved_product};

/// The adapter of one weight `[out, in]`. All tensors are f32.
#[derive(Debug)]
pub struct LoraSite {
    a: Tensor,
    b: Tensor,
    a_gradient: Tensor,
    b_gradient: Tensor,
}

impl LoraSite {
    /// An adapter from `a [r, in]` and `b [out, r]`.
    ///
    /// # Errors
    /// Where the device has no room for the gradients.
    pub fn new(kernels: &dyn Kernels, a: Tensor, b: Tensor) -> Result<Self> {
        let (a_gradient, b_gradient) = (kernels.zeros(a.shape())?, kernels.zeros(b.shape())?);
        Ok(LoraSite { a, b, a_gradient, b_gradient })
    }
}

/// LoRA on any number of sites.
#[derive(Debug)]
pub struct Lora {
    scale: f32,
    sites: BTreeMap<Site, LoraSite>,
}

impl Lora {
    /// The adapter of all `sites`, with the scale `s`.
    pub fn new(scale: f32, sites: BTreeMap<Site, LoraSite>) -> Self {
        Lora { scale, sites }
    }
}

impl LinearHook for Lora {
    fn forward(&self, kernels: &dyn Kernels, site: Site, x: &Tensor, y: &mut Tensor) -> Result<SiteSaved> {
        let Some(LoraSite { a, b, .. }) = self.sites.get(&site) else { return Ok(SiteSaved(Vec::new())) };
        let mut u = kernels.empty(&[x.shape()[0], a.shape()[0]])?; // [T, r]
        kernels.linear(x, a, 1.0, Accum::Replace, &mut u)?; // u = x A^T
        kernels.linear(&u, b, self.scale, Accum::Add, y)?; // y += s u B^T
        Ok(SiteSaved(vec![u]))
    }

    fn needs_input(&self, site: Site) -> bool {
        self.sites.contains_key(&site)
    }

    fn backward(
        &mut self,
        kernels: &dyn Kernels,
        site: Site,
        saved: SiteSaved,
        x: Option<&Tensor>,
        dy: &Tensor,
        dx: Option<&mut Tensor>,
    ) -> Result<()> {
        let Some(LoraSite { a, b, a_gradient, b_gradient }) = self.sites.get_mut(&site) else {
            return Ok(());
        };
        let u = saved_product("lora adapter", saved)?;
        let x = x.ok_or_else(|| missing("lora adapter", "the layer's input"))?;
        let mut v = kernels.empty(u.shape())?; // [T, r]
        kernels.linear_input_gradient(dy, b, 1.0, Accum::Replace, &mut v)?; // v = dy B
        kernels.linear_weight_gradient(dy, &u, self.scale, Accum::Add, b_gradient)?; // dB += s dy^T u
        kernels.linear_weight_gradient(&v, x, self.scale, Accum::Add, a_gradient)?; // dA += s v^T x
        let Some(dx) = dx else { return Ok(()) };
        kernels.linear_input_gradient(&v, a, self.scale, Accum::Add, dx) // dx += s v A
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
        Vec::new()
    }

    /// `A`, and `s B`.
    fn fold(&self, kernels: &dyn Kernels, site: Site) -> Result<Option<Factors>> {
        let Some(LoraSite { a, b, .. }) = self.sites.get(&site) else { return Ok(None) };
        let mut scaled = kernels.zeros(b.shape())?; // [out, r]
        kernels.add(self.scale, b, &mut scaled)?;
        Ok(Some(Factors { a: kernels.to_owned_f32(a)?, b: scaled }))
    }
}
