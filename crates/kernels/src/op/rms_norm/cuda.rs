//! Root mean square normalisation on a GPU.

use super::{RmsGain, RmsNorm, width};
use crate::cuda::launch::DeviceFloats;
use crate::cuda::row::teams;
use crate::op::layer_norm::cuda::{GainGradient, NOTHING};
use crate::{Accum, Cuda, Result, Tensor, shape};

impl RmsNorm for Cuda {
    fn rms_norm(
        &self,
        x: &Tensor,
        gain: &Tensor,
        kind: RmsGain,
        eps: f32,
        y: &mut Tensor,
        rstd: &mut Tensor,
    ) -> Result<()> {
        let op = "rms_norm";
        let d = width(op, x, gain, y, rstd)?;
        let (t, x) = (x.shape()[0], self.floats(op, "x", x)?);
        self.normed((op, NOTHING, x), (gain, kind, eps), y, rstd, (t, d))
    }

    fn add_rms_norm(
        &self,
        f: &Tensor,
        x: &mut Tensor,
        gain: &Tensor,
        kind: RmsGain,
        eps: f32,
        y: &mut Tensor,
        rstd: &mut Tensor,
    ) -> Result<()> {
        let op = "add_rms_norm";
        let d = width(op, x, gain, y, rstd)?;
        let t = x.shape()[0];
        shape::expect(op, "f", f, &[("T", t), ("D", d)])?;
        let (f, x) = (self.floats(op, "f", f)?, self.floats_mut(op, "x", x)?);
        self.normed((op, f, x), (gain, kind, eps), y, rstd, (t, d))
    }

    fn rms_norm_backward(
        &self,
        x: &Tensor,
        gain: &Tensor,
        kind: RmsGain,
        rstd: &Tensor,
        dy: &Tensor,
        accum: Accum,
        dx: &mut Tensor,
        dgain: Option<&mut Tensor>,
    ) -> Result<()> {
        let op = "rms_norm_backward";
        let d = width(op, x, gain, dy, rstd)?;
        let t = x.shape()[0];
        shape::expect(op, "dx", dx, &[("T", t), ("D", d)])?;
        if let Some(dgain) = &dgain {
            shape::expect(op, "dgain", dgain, &[("D", d)])?;
        }
        let (gain, rstd) = (self.floats(op, "gain", gain)?, self.f32(op, "rstd", rstd)?);
        let (x, dy) = (self.floats(op, "x", x)?, self.floats(op, "dy", dy)?);
        let dx = self.floats_mut(op, "dx", dx)?;
        if t * d == 0 {
            return Ok(());
        }
        if let Some(dgain) = dgain {
            let dgain = self.f32_mut(op, "dgain", dgain)?;
            let gradient = GainGradient { x, mean: 0, rstd, dy, t, d, dgain: Some(dgain), dshift: None };
            self.gain_gradient(op, gradient)?;
        }
        let ((launch, team), add) = (teams(t, d), u32::from(accum == Accum::Add));
        self.launch(
            op,
            "rms_norm_backward",
            launch,
            &[
                x.into(),
                gain.into(),
                kind.offset().into(),
                rstd.into(),
                dy.into(),
                add.into(),
                dx.into(),
                (t as u64).into(),
                (d as u32).into(),
                team.into(),
            ],
        )
    }
}

impl RmsGain {
    /// What is added to the stored gain.
    fn offset(self) -> f32 {
        match self {
            RmsGain::Weight => 0.0,
            RmsGain::OnePlusWeight => 1.0,
        }
    }
}

impl Cuda {
    /// y `[T, D]` and rstd `[T]` of x `[T, D]`, or where there is an f `[T, D]`, of x + f, which x becomes.
    fn normed(
        &self,
        (op, f, x): (&'static str, DeviceFloats, DeviceFloats),
        (gain, kind, eps): (&Tensor, RmsGain, f32),
        y: &mut Tensor,
        rstd: &mut Tensor,
        (t, d): (usize, usize),
    ) -> Result<()> {
        let gain = self.floats(op, "gain", gain)?;
        let (y, rstd) = (self.floats_mut(op, "y", y)?, self.f32_mut(op, "rstd", rstd)?);
        if t * d == 0 {
            return Ok(());
        }
        let (launch, team) = teams(t, d);
        self.launch(
            op,
            "rms_norm",
            launch,
            &[
                f.into(),
                x.into(),
                gain.into(),
                kind.offset().into(),
                eps.into(),
                y.into(),
                rstd.into(),
                (t as u64).into(),
                (d as u32).into(),
                team.into(),
            ],
        )
    }
}
