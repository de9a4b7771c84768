//! One linear layer with its hook, and the layers that read one input.
//!
//! Query, key and value read one input, and so do gate and up. A model holds them apart, or as one weight whose
//! rows follow one another ([`FUSED`]); what calls [`Model::linear_parts`] sees the same parts either way.

use std::ops::Deref;

use lora_sb_kernels::{Accum, Tensor};

use crate::{Gradients, Layer, LinearHook, Model, Parameter, Projection, Result, Site, SiteSaved};

/// Projections that hold others, in the order of their rows.
const FUSED: [(Projection, &[Projection]); 2] = [
    (Projection::QueryKeyValue, &[Projection::Query, Projection::Key, Projection::Value]),
    (Projection::GateUp, &[Projection::Gate, Projection::Up]),
];

/// What a product reads; gone with its last reader where nobody else holds it.
#[derive(Debug)]
pub(crate) enum Operand<'x> {
    Held(&'x Tensor),
    Own(Tensor),
}

impl Deref for Operand<'_> {
    type Target = Tensor;

    fn deref(&self) -> &Tensor {
        match self {
            Operand::Held(tensor) => tensor,
            Operand::Own(tensor) => tensor,
        }
    }
}

impl Model {
    fn layer(&self, site: Site) -> Result<Layer<'_>> {
        let weight = self.weights.required(Parameter::Weight(site))?;
        Ok(Layer { site, weight, bias: self.weights.get(Parameter::Bias(site)) })
    }

    /// `y (+)= x W^T + b` and the hook's part; x `[T, K]`, y `[T, N]`.
    pub(crate) fn linear(
        &self,
        site: Site,
        x: &Tensor,
        accum: Accum,
        y: &mut Tensor,
        hook: &dyn LinearHook,
    ) -> Result<SiteSaved> {
        Ok(hook.forward(&*self.kernels, self.layer(site)?, x, accum, y)?)
    }

    /// A new tensor of the type that products read and activations are held in.
    pub(crate) fn operand(&self, shape: &[usize]) -> Result<Tensor> {
        Ok(self.kernels.empty_of(self.dtype, shape)?)
    }

    /// x as products read it: rounded once for all that read it, where it is not of that type already.
    pub(crate) fn as_operand<'x>(&self, x: &'x Tensor) -> Result<Operand<'x>> {
        if x.dtype() == self.dtype {
            return Ok(Operand::Held(x));
        }
        let mut rounded = self.operand(x.shape())?;
        self.kernels.cast(x, &mut rounded)?;
        Ok(Operand::Own(rounded))
    }

    /// A copy of x.
    pub(crate) fn copied(&self, x: &Tensor) -> Result<Tensor> {
        let mut copy = self.kernels.empty_of(x.dtype(), x.shape())?;
        self.kernels.cast(x, &mut copy)?;
        Ok(copy)
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

    /// Whether the backward of a layer that reads the block's input, where no norm stands before it, asks for it.
    pub(crate) fn block_reads_input(
        &self,
        layer: usize,
        hook: &dyn LinearHook,
        gradients: &mut dyn Gradients,
    ) -> bool {
        let parts = [Projection::Query, Projection::Key, Projection::Value, Projection::QueryKeyValue];
        parts.into_iter().any(|part| self.linear_needs_input(part.of(layer), hook, gradients))
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
        self.own_gradients(site, x, dy, gradients)?;
        Ok(hook.backward(&*self.kernels, self.layer(site)?, saved, x, dy, dx)?)
    }

    /// `dW += dy^T x`, `db += sum over t of dy`, where they are trained.
    fn own_gradients(
        &self,
        site: Site,
        x: Option<&Tensor>,
        dy: &Tensor,
        gradients: &mut dyn Gradients,
    ) -> Result<()> {
        if let (Some(x), Some(dw)) = (x, gradients.of(Parameter::Weight(site))) {
            self.kernels.linear_weight_gradient(dy, x, 1.0, Accum::Add, dw)?;
        }
        if self.weights.get(Parameter::Bias(site)).is_some()
            && let Some(db) = gradients.of(Parameter::Bias(site))
        {
            self.kernels.bias_gradient(dy, db)?;
        }
        Ok(())
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
        let tokens = x.shape()[0];
        let room = |part: Projection| self.operand(&[tokens, self.config.site_shape(part.of(layer)).0]); // [T, N]
        let Some(fused) = self.fused(&parts) else {
            let layers: Vec<Layer<'_>> =
                parts.iter().map(|part| self.layer(part.of(layer))).collect::<Result<_>>()?;
            let mut ys: Vec<Tensor> = parts.into_iter().map(room).collect::<Result<_>>()?;
            let mut out: Vec<&mut Tensor> = ys.iter_mut().collect();
            let saved = hook.forward_group(&*self.kernels, &layers, x, Accum::Replace, &mut out)?;
            return Ok((array(ys), saved));
        };
        let mut y = room(fused)?; // [T, W], W the sum of all N
        let saved = self.linear(fused.of(layer), x, Accum::Replace, &mut y, hook)?;
        let (mut ys, mut from) = (Vec::with_capacity(P), 0);
        for part in parts {
            let mut part = room(part)?; // [T, N]
            self.kernels.take_columns(&y, from, &mut part)?;
            from += part.shape()[1];
            ys.push(part);
        }
        Ok((array(ys), vec![saved]))
    }

    /// The gradient dx `[T, K]` of the layers' input, where it is wanted: `dx = sum over the parts of dy W`.
    ///
    /// dys `[T, N]` each; `x` gives the input again and is called only if a trained part reads it.
    pub(crate) fn linear_parts_backward<'x, const P: usize>(
        &self,
        layer: usize,
        parts: [Projection; P],
        saved: Vec<SiteSaved>,
        x: impl FnOnce() -> Result<Operand<'x>>,
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
        let mut dx = if wanted { Some(self.operand(&[tokens, k])?) } else { None }; // [T, K]
        for (&site, dy) in sites.iter().zip(&dys) {
            self.own_gradients(site, x.as_deref(), dy, gradients)?;
        }
        let layers: Vec<Layer<'_>> = sites.into_iter().map(|site| self.layer(site)).collect::<Result<_>>()?;
        let dys: Vec<&Tensor> = dys.iter().collect();
        let out = dx.as_mut().map(|dx| (dx, Accum::Replace));
        hook.backward_group(&*self.kernels, &layers, saved, x.as_deref(), &dys, out)?;
        Ok(dx)
    }

    /// The parts `[T, N]` side by side, `[T, W]`.
    fn join_columns<const P: usize>(&self, parts: [Tensor; P]) -> Result<Tensor> {
        let width = parts.iter().map(|part| part.shape()[1]).sum();
        let mut whole = self.operand(&[parts[0].shape()[0], width])?; // [T, W]
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
