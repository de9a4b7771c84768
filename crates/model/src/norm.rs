//! Norms: of the residual stream `[T, D]`, and of each head's query and key `[T, H*E]`.

use lora_sb_kernels::{Accum, RmsGain, Tensor};

use crate::config::NormKind;
use crate::{Gradients, Model, Norm, Parameter, Result};

/// What a norm keeps for its backward; each `[T]`, or `[T*H]` where heads are normed.
#[derive(Debug)]
pub(crate) enum NormSaved {
    /// The reciprocal root of the mean square.
    Rms { gain: RmsGain, rstd: Tensor },
    /// The mean, and the reciprocal of the standard deviation.
    Layer { mean: Tensor, rstd: Tensor },
}

impl Model {
    fn norm_kind(&self, norm: Norm) -> NormKind {
        match (norm, self.config.norm) {
            (Norm::Query(_) | Norm::Key(_), NormKind::Layer) => NormKind::Rms(RmsGain::Weight),
            (_, kind) => kind,
        }
    }

    /// Whether a gradient of the norm's own is asked for.
    pub(crate) fn norm_is_trained(&self, norm: Norm, gradients: &mut dyn Gradients) -> bool {
        [Parameter::Gain(norm), Parameter::Shift(norm)].into_iter().any(|p| gradients.of(p).is_some())
    }

    /// `y = gain * x * rstd`, or `y = gain * (x - mean) * rstd + shift`; x and y `[T, D]`.
    pub(crate) fn norm(&self, norm: Norm, x: &Tensor) -> Result<(Tensor, NormSaved)> {
        let gain = self.weights.required(Parameter::Gain(norm))?; // [D]
        let eps = self.config.norm_eps as f32;
        let mut y = self.kernels.empty(x.shape())?; // [T, D]
        let mut rstd = self.kernels.empty(&x.shape()[..1])?; // [T]
        let saved = match self.norm_kind(norm) {
            NormKind::Rms(kind) => {
                self.kernels.rms_norm(x, gain, kind, eps, &mut y, &mut rstd)?;
                NormSaved::Rms { gain: kind, rstd }
            }
            NormKind::Layer => {
                let shift = self.weights.required(Parameter::Shift(norm))?; // [D]
                let mut mean = self.kernels.empty(&x.shape()[..1])?; // [T]
                self.kernels.layer_norm(x, gain, shift, eps, &mut y, &mut mean, &mut rstd)?;
                NormSaved::Layer { mean, rstd }
            }
        };
        Ok((y, saved))
    }

    /// `dx (+)= ...`, `dgain += ...`, `dshift += sum over t of dy`; x, dy and dx `[T, D]`.
    pub(crate) fn norm_backward(
        &self,
        norm: Norm,
        x: &Tensor,
        saved: &NormSaved,
        dy: &Tensor,
        accum: Accum,
        dx: &mut Tensor,
        gradients: &mut dyn Gradients,
    ) -> Result<()> {
        let gain = self.weights.required(Parameter::Gain(norm))?; // [D]
        let dgain = gradients.of(Parameter::Gain(norm));
        match saved {
            NormSaved::Rms { gain: kind, rstd } => {
                self.kernels.rms_norm_backward(x, gain, *kind, rstd, dy, accum, dx, dgain)?;
            }
            NormSaved::Layer { mean, rstd } => {
                self.kernels.layer_norm_backward(x, gain, (mean, rstd), dy, accum, dx, dgain, None)?;
                // A bias's gradient: so that one gradient is borrowed at a time.
                if let Some(dshift) = gradients.of(Parameter::Shift(norm)) {
                    self.kernels.bias_gradient(dy, dshift)?;
                }
            }
        }
        Ok(())
    }
}
