//! One linear layer with its hook, and the layers that read one input.
//!
//! Query, key and value read one input, and so do gate and up. A model holds them apart, or as one weight whose
//! rows follow one another ([`FUSED`]); what calls [`Model::linear_parts`] sees the same parts either way.

use lora_sb_kernels::{Accum, Tensor};

use crate::{Gradients, Layer, LinearHook, Model, Parameter, Projection, Result, Site, SiteSaved};

/// Projections that hold others, in the order of their rows.
const FUSED: [(Projection, &[Projection]); 2] = [
    (Projection::QueryKeyValue, &[Projection::Query, Projection::Key, Projection::Value]),
    (Projection::GateUp, &[Projection::Gate, Projection::Up]),
];

impl Model {
    fn layer(&self, site: Site) -> Result<Layer<'_>> {
        let weight = self.weights.required(Parameter::Weight(site))?;
        Ok(Layer { site, weight, bias: self.weights.get(Parameter::Bias(site)) })
    }

    /// `y = x W^T + b`, and the hook's part; x `[T, K]`, y `[T, N]`.
    pub(crate) fn linear(
        &self,
        site: Site,
        x: &Tensor,
        hook: &dyn LinearHook,
    ) -> Result<(Tensor, SiteSaved)> {
        let layer = self.layer(site)?;
        let mut y = self.kernels.empty(&[x.shape()[0], layer.weight.shape()[0]])?; // [T, N]
        self.kernels.linear(x, layer.weight, 1.0, Accum::Replace, &mut y)?;
        if let Some(b) = layer.bias {
            self.kernels.bias(b, &mut y)?;
        }
        let saved = hook.forward(&*self.kernels, layer, x, &mut y)?;
        Ok((y, saved))
    }

    /// Whether [`Model::linear_backward`] reads the layer's input.
    pub(crate) fn linear_needs_input(
        &self,
        site: Site,
        hook: &dyn LinearHook,
        gradients: &mut dyn Gradients,
    ) -> bool {
        hook.needs_input(site) || gradients.of(Parameter::Weight(site)).is_some()
    }

    /// `dx (+)= dy W`, `dW += dy^T x`, `db += sum over t of dy`, and the hook's parts.
    ///
    /// dy `[T, N]`; x `[T, K]` where it is needed; dx `[T, K]` where it is wanted.
    pub(crate) fn linear_backward(
        &self,
        site: Site,
        saved: SiteSaved,
        x: Option<&Tensor>,
        dy: &Tensor,
        dx: Option<(&mut Tensor, Accum)>,
        hook: &mut dyn LinearHook,
        gradients: &mut dyn Gradients,
    ) -> Result<()> {
        let layer = self.layer(site)?;
        let mut hook_dx = None;
        if let Some((dx, accum)) = dx {
            self.kernels.linear_input_gradient(dy, layer.weight, 1.0, accum, dx)?;
            hook_dx = Some(dx);
        }
        if let (Some(x), Some(dw)) = (x, gradients.of(Parameter::Weight(site))) {
            self.kernels.linear_weight_gradient(dy, x, 1.0, Accum::Add, dw)?;
        }
        if layer.bias.is_some()
            && let Some(db) = gradients.of(Parameter::Bias(site))
        {
            self.kernels.bias_gradient(dy, db)?;
        }
        Ok(hook.backward(&*self.kernels, layer, saved, x, dy, hook_dx)?)
    }

    /// What the layers `parts` make of x `[T, K]`, `[T, N]` each, and what they saved: one entry for each, or one
    /// where they are fused.
    pub(crate) fn linear_parts<const P: usize>(
        &self,
        layer: usize,
        parts: [Projection; P],
        x: &Tensor,
        hook: &dyn LinearHook,
    ) -> Result<([Tensor; P], Vec<SiteSaved>)> {
        let Some(fused) = self.fused(&parts) else {
            let made: Vec<_> =
                parts.iter().map(|part| self.linear(part.of(layer), x, hook)).collect::<Result<_>>()?;
            let (ys, saved): (Vec<Tensor>, _) = made.into_iter().unzip();
            return Ok((array(ys), saved));
        };
        let (y, saved) = self.linear(fused.of(layer), x, hook)?; // [T, W], W the sum of all N
        let (mut ys, mut from) = (Vec::with_capacity(P), 0);
        for part in parts {
            let n = self.config.site_shape(part.of(layer)).0;
            let mut part = self.kernels.empty(&[x.shape()[0], n])?; // [T, N]
            self.kernels.take_columns(&y, from, &mut part)?;
            ys.push(part);
            from += n;
        }
        Ok((array(ys), vec![saved]))
    }

    /// The gradient dx `[T, K]` of the layers' input, where it is wanted: `dx = sum over the parts of dy W`.
    ///
    /// dys `[T, N]` each; `x` gives the input again and is called only if a trained part reads it.
    pub(crate) fn linear_parts_backward<const P: usize>(
        &self,
        layer: usize,
        parts: [Projection; P],
        saved: Vec<SiteSaved>,
        x: impl FnOnce() -> Result<Tensor>,
        dys: [Tensor; P],
        wanted: bool,
        hook: &mut dyn LinearHook,
        gradients: &mut dyn Gradients,
    ) -> Result<Option<Tensor>> {
        let tokens = dys[0].shape()[0];
        let (projections, dys) = match self.fused(&parts) {
            Some(fused) => (vec![fused], vec![self.join_columns(dys)?]),
            None => (parts.to_vec(), Vec::from(dys)),
        };
        let sites: Vec<Site> = projections.into_iter().map(|projection| projection.of(layer)).collect();
        let read = sites.iter().any(|&site| self.linear_needs_input(site, hook, gradients));
        let x = if read { Some(x()?) } else { None }; // [T, K]
        let k = self.config.site_shape(sites[0]).1;
        let mut dx = if wanted { Some(self.kernels.empty(&[tokens, k])?) } else { None }; // [T, K]
        let mut accum = Accum::Replace;
        for ((site, saved), dy) in sites.into_iter().zip(saved).zip(dys) {
            let dx = dx.as_mut().map(|dx| (dx, accum));
            self.linear_backward(site, saved, x.as_ref(), &dy, dx, hook, gradients)?;
            accum = Accum::Add;
        }
        Ok(dx)
    }

    /// The parts `[T, N]` side by side, `[T, W]`.
    fn join_columns<const P: usize>(&self, parts: [Tensor; P]) -> Result<Tensor> {
        let width = parts.iter().map(|part| part.shape()[1]).sum();
        let mut whole = self.kernels.empty(&[parts[0].shape()[0], width])?; // [T, W]
        let mut from = 0;
        for part in parts {
            self.kernels.put_columns(&part, from, &mut whole)?;
            from += part.shape()[1];
        }
        Ok(whole)
    }

    /// The one weight that holds `parts`, where the model has them so.
    fn fused(&self, parts: &[Projection]) -> Option<Projection> {
        let (fused, _) = FUSED.into_iter().find(|(_, held)| *held == parts)?;
        self.config.projections.contains(&fused).then_some(fused)
    }
}

fn array<const P: usize>(tensors: Vec<Tensor>) -> [Tensor; P] {
    tensors.try_into().expect("one tensor for each part")
}
