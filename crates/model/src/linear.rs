//! One linear layer with its hook.

use lora_sb_kernels::{Accum, Tensor};

use crate::{Gradients, LinearHook, Model, Parameter, Result, Site, SiteSaved};

impl Model {
    /// `y = x W^T + b`, and the hook's part; x `[T, K]`, y `[T, N]`.
    pub(crate) fn linear(
        &self,
        site: Site,
        x: &Tensor,
        hook: &dyn LinearHook,
    ) -> Result<(Tensor, SiteSaved)> {
        let w = self.weights.required(Parameter::Weight(site))?; // [N, K]
        let mut y = self.kernels.empty(&[x.shape()[0], w.shape()[0]])?; // [T, N]
        self.kernels.linear(x, w, 1.0, Accum::Replace, &mut y)?;
        if let Some(b) = self.weights.get(Parameter::Bias(site)) {
            self.kernels.bias(b, &mut y)?;
        }
        let saved = hook.forward(&*self.kernels, site, x, &mut y)?;
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
        let mut hook_dx = None;
        if let Some((dx, accum)) = dx {
            let w = self.weights.required(Parameter::Weight(site))?; // [N, K]
            self.kernels.linear_input_gradient(dy, w, 1.0, accum, dx)?;
            hook_dx = Some(dx);
        }
        if let (Some(x), Some(dw)) = (x, gradients.of(Parameter::Weight(site))) {
            self.kernels.linear_weight_gradient(dy, x, 1.0, Accum::Add, dw)?;
        }
        if self.weights.get(Parameter::Bias(site)).is_some()
            && let Some(db) = gradients.of(Parameter::Bias(site))
        {
            self.kernels.bias_gradient(dy, db)?;
        }
        Ok(hook.backward(&*self.kernels, site, saved, x, dy, hook_dx)?)
    }
}
