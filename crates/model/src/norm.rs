//! Norms: of the residual stream `[T, D]`, and of each head's query and key `[T, H*E]`.

use lora_sb_kernels::{Accum, DType, RmsGain, Tensor};

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

/// What is normed.
enum Normed<'a> {
    /// x `[T, D]`.
    Plain(&'a Tensor),
    /// f and x `[T, D]`, after `x += f`.
    Sum(&'a Tensor, &'a mut Tensor),
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

    /// `y = gain * x * rstd`, or `y = gain * (x - mean) * rstd + shift`; x and y `[T, D]`, y of type `dtype`.
    pub(crate) fn norm(&self, norm: Norm, x: &Tensor, dtype: DType) -> Result<(Tensor, NormSaved)> {
        self.normed(norm, Normed::Plain(x), dtype)
    }

    /// `x += f`, and in the same pass the norm of that; all `[T, D]`.
    pub(crate) fn add_norm(
        &self,
        norm: Norm,
        f: &Tensor,
        x: &mut Tensor,
        dtype: DType,
    ) -> Result<(Tensor, NormSaved)> {
        self.normed(norm, Normed::Sum(f, x), dtype)
    }

    fn normed(&self, norm: Norm, x: Normed<'_>, dtype: DType) -> Result<(Tensor, NormSaved)> {
        let kernels = &self.kernels;
        let (gain, eps) = (self.weights.required(Parameter::Gain(norm))?, self.config.norm_eps as f32); // [D]
        let (Normed::Plain(&ref of) | Normed::Sum(_, &mut ref of)) = x;
        let mut y = kernels.empty_of(dtype, of.shape())?; // [T, D]
        let mut rstd = kernels.empty(&of.shape()[..1])?; // [T]
        let saved = match self.norm_kind(norm) {
            NormKind::Rms(kind) => {
                match x {
                    Normed::Plain(x) => kernels.rms_norm(x, gain, kind, eps, &mut y, &mut rstd)?,
                    Normed::Sum(f, x) => kernels.add_rms_norm(f, x, gain, kind, eps, &mut y, &mut rstd)?,
                }
                NormSaved::Rms { gain: kind, rstd }
            }
            NormKind::Layer => {
                let shift = self.weights.required(Parameter::Shift(norm))?; // [D]
                let mut mean = kernels.empty(rstd.shape())?; // [T]
                let (y, mean_out, rstd_out) = (&mut y, &mut mean, &mut rstd);
                match x {
                    Normed::Plain(x) => kernels.layer_norm(x, gain, shift, eps, y, mean_out, rstd_out)?,
                    Normed::Sum(f, x) => {
                        kernels.add_layer_norm(f, x, gain, shift, eps, y, mean_out, rstd_out)?;
                    }
                }
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
