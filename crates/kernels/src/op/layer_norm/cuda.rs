//! Layer normalisation on a GPU, and the gradients of both norms' gains and shifts.

use super::{LayerNorm, width};
use crate::cuda::launch::{DeviceFloats, Launch, THREADS};
use crate::cuda::row::teams;
use crate::{Accum, Cuda, DType, Result, Tensor, shape};

/// No tensor.
pub(crate) const NOTHING: DeviceFloats = DeviceFloats { address: 0, dtype: DType::F32 };

impl LayerNorm for Cuda {
    fn layer_norm(
        &self,
        x: &Tensor,
        gain: &Tensor,
        shift: &Tensor,
        eps: f32,
        y: &mut Tensor,
        mean: &mut Tensor,
        rstd: &mut Tensor,
    ) -> Result<()> {
        let op = "layer_norm";
        let d = width(op, x, gain, ("y", y), (mean, rstd))?;
        shape::expect(op, "shift", shift, &[("D", d)])?;
        let (t, x) = (x.shape()[0], self.floats(op, "x", x)?);
        self.normed_and_shifted((op, NOTHING, x), (gain, shift, eps), y, (mean, rstd), (t, d))
    }

    fn add_layer_norm(
        &self,
        f: &Tensor,
        x: &mut Tensor,
        gain: &Tensor,
        shift: &Tensor,
        eps: f32,
        y: &mut Tensor,
        mean: &mut Tensor,
        rstd: &mut Tensor,
    ) -> Result<()> {
        let op = "add_layer_norm";
        let d = width(op, x, gain, ("y", y), (mean, rstd))?;
        let t = x.shape()[0];
        shape::expect(op, "shift", shift, &[("D", d)])?;
        shape::expect(op, "f", f, &[("T", t), ("D", d)])?;
        let (f, x) = (self.floats(op, "f", f)?, self.floats_mut(op, "x", x)?);
        self.normed_and_shifted((op, f, x), (gain, shift, eps), y, (mean, rstd), (t, d))
    }

    fn layer_norm_backward(
        &self,
        x: &Tensor,
        gain: &Tensor,
        statistics: (&Tensor, &Tensor),
        dy: &Tensor,
        accum: Accum,
        dx: &mut Tensor,
        dgain: Option<&mut Tensor>,
        dshift: Option<&mut Tensor>,
    ) -> Result<()> {
        let op = "layer_norm_backward";
        let d = width(op, x, gain, ("dy", dy), statistics)?;
        let t = x.shape()[0];
        shape::expect(op, "dx", dx, &[("T", t), ("D", d)])?;
        for (name, gradient) in [("dgain", &dgain), ("dshift", &dshift)] {
            if let Some(gradient) = gradient {
                shape::expect(op, name, gradient, &[("D", d)])?;
            }
        }
        let gain = self.floats(op, "gain", gain)?;
        let (mean, rstd) = (self.f32(op, "mean", statistics.0)?, self.f32(op, "rstd", statistics.1)?);
        let (x, dy) = (self.floats(op, "x", x)?, self.floats(op, "dy", dy)?);
        let dx = self.floats_mut(op, "dx", dx)?;
        if t * d == 0 {
            return Ok(());
        }
        let dgain = dgain.map(|dgain| self.f32_mut(op, "dgain", dgain)).transpose()?;
        let dshift = dshift.map(|dshift| self.f32_mut(op, "dshift", dshift)).transpose()?;
        self.gain_gradient(op, GainGradient { x, mean, rstd, dy, t, d, dgain, dshift })?;
        let ((launch, team), add) = (teams(t, d), u32::from(accum == Accum::Add));
        self.launch(
            op,
            "layer_norm_backward",
            launch,
            &[
                x.into(),
                gain.into(),
                mean.into(),
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

/// Columns that a warp sums, and that a block of the sums' sums has: those of `layer_norm.cu`.
const WARP_COLUMNS: usize = 128;
const BLOCK_COLUMNS: usize = 32;

/// Into how many chunks the rows of a gain's gradient are cut, at most, and how many rows one has at least: enough chunks to
/// fill a GPU, so few that their sums are little beside the rows. They depend on the rows alone, so that every GPU adds in one
/// order.
const MOST_CHUNKS: usize = 128;
const FEWEST_ROWS: usize = 64;

/// What a norm's gain and shift receive: `dgain += sum over t of dy (x - mean) rstd`, `dshift += sum over t of dy`.
pub(crate) struct GainGradient {
    /// `[T, D]`.
    pub(crate) x: DeviceFloats,
    /// `[T]` in `f32`, as rstd; 0 where the norm subtracts none.
    pub(crate) mean: u64,
    pub(crate) rstd: u64,
    /// `[T, D]`.
    pub(crate) dy: DeviceFloats,
    pub(crate) t: usize,
    pub(crate) d: usize,
    /// `[D]` in `f32`, as dshift.
    pub(crate) dgain: Option<u64>,
    pub(crate) dshift: Option<u64>,
}

impl Cuda {
    /// Adds to what is wanted.
    pub(crate) fn gain_gradient(&self, op: &'static str, of: GainGradient) -> Result<()> {
        let wanted = usize::from(of.dgain.is_some()) + usize::from(of.dshift.is_some());
        if wanted == 0 {
            return Ok(());
        }
        let chunk_rows = of.t.div_ceil(MOST_CHUNKS).max(FEWEST_ROWS);
        let chunks = of.t.div_ceil(chunk_rows);
        let bytes = chunks * of.d * size_of::<f32>();
        let space = self.scratch(op, wanted * bytes)?; // [chunks, D] of each
        let gains = of.dgain.map_or(0, |_| space.address());
        let shifts = of.dshift.map_or(0, |_| space.address() + ((wanted - 1) * bytes) as u64);
        let grid = [of.d.div_ceil(WARP_COLUMNS), chunks, 1];
        self.launch(
            op,
            "norm_gradient_parts",
            Launch { grid, threads: THREADS, shared_bytes: 0 },
            &[
                of.x.into(),
                of.mean.into(),
                of.rstd.into(),
                of.dy.into(),
                (of.t as u64).into(),
                (of.d as u32).into(),
                (chunk_rows as u32).into(),
                gains.into(),
                shifts.into(),
            ],
        )?;
        let outputs = [(gains, of.dgain), (shifts, of.dshift)];
        for (parts, out) in outputs.into_iter().filter_map(|(parts, out)| Some((parts, out?))) {
            let launch = Launch::blocks(of.d.div_ceil(BLOCK_COLUMNS), THREADS);
            let arguments = [parts.into(), (chunks as u32).into(), (of.d as u32).into(), out.into()];
            self.launch(op, "norm_gradient", launch, &arguments)?;
        }
        Ok(())
    }

    /// y `[T, D]`, mean and rstd `[T]` of x `[T, D]`, or where there is an f `[T, D]`, of x + f, which x becomes.
    fn normed_and_shifted(
        &self,
        (op, f, x): (&'static str, DeviceFloats, DeviceFloats),
        (gain, shift, eps): (&Tensor, &Tensor, f32),
        y: &mut Tensor,
        (mean, rstd): (&mut Tensor, &mut Tensor),
        (t, d): (usize, usize),
    ) -> Result<()> {
        let (gain, shift) = (self.floats(op, "gain", gain)?, self.floats(op, "shift", shift)?);
        let y = self.floats_mut(op, "y", y)?;
        let (mean, rstd) = (self.f32_mut(op, "mean", mean)?, self.f32_mut(op, "rstd", rstd)?);
        if t * d == 0 {
            return Ok(());
        }
        let (launch, team) = teams(t, d);
        self.launch(
            op,
            "layer_norm",
            launch,
            &[
                f.into(),
                x.into(),
                gain.into(),
                shift.into(),
                eps.into(),
                y.into(),
                mean.into(),
                rstd.into(),
                (t as u64).into(),
                (d as u32).into(),
                team.into(),
            ],
        )
    }
}
