//! The group on a GPU: what is small is done for all layers at once, or in one kernel.
//!
//! The A of all layers are rounded one behind the other, so that all u are one product that reads x once, and that the
//! latent part of dx is one product, whose depth is the sum of the ranks.

#[cfg(all(test, feature = "emulator"))]
mod tests;

use super::{GroupLayer, LatentBackward, LatentPart, LinearGroup, check, check_backward, composed};
use crate::cuda::blas::Matrix;
use crate::cuda::launch::{Argument, DeviceFloats, Launch, THREADS};
use crate::cuda::memory::Storage;
use crate::op::linear::cuda::plan::FEW_ROWS;
use crate::op::linear::cuda::product::{Parts, Sum, word};
use crate::op::linear::cuda::{beta, of};
use crate::{Accum, Cuda, DType, Memory, Result, Tensor};

impl LinearGroup for Cuda {
    fn linear_group(
        &self,
        x: &Tensor,
        layers: &[GroupLayer<'_>],
        accum: Accum,
        ys: &mut [&mut Tensor],
    ) -> Result<Vec<Option<Tensor>>> {
        let op = "linear_group";
        check(x, layers, ys)?;
        let (t, k) = (x.shape()[0], x.shape()[1]);
        let x_matrix = of(self.floats(op, "x", x)?, t, k);
        if t <= FEW_ROWS || layers.iter().all(|layer| layer.latent.is_none()) {
            return composed::forward(self, x, layers, accum, ys);
        }
        let held = self.gather(op, x.dtype(), layers, k)?;
        let parts = self.parts(op, x_matrix, held.a.transposed())?;
        let (mut us, mut column) = (Vec::with_capacity(layers.len()), 0);
        for ((layer, y), b) in layers.iter().zip(ys).zip(&held.bs) {
            let n = layer.weight.shape()[0];
            let w = self.weight(op, ("w", layer.weight), x.dtype())?;
            let bias = layer.bias.map(|bias| self.floats(op, "bias", bias)).transpose()?;
            let (mut second, mut own) = (None, None);
            if let Some((part, b)) = layer.latent.zip(*b) {
                let r = part.r.shape()[0];
                let mut u = self.empty(&[t, r])?;
                let h = self.scratch(op, t * r * x.dtype().size())?;
                let h_matrix = of(DeviceFloats { address: h.address(), dtype: x.dtype() }, t, r);
                self.latent(op, (&parts, column), &mut u, Some((part, Way::Transposed, h_matrix)))?;
                second = Some((h_matrix, b.transposed()));
                own = Some((u, h));
                column += r;
            }
            let c = of(self.floats_mut(op, "y", y)?, t, n);
            let first = (x_matrix, of(w.floats, n, k).transposed());
            self.sum(op, &Sum { first, second, c, alpha: 1.0, beta: beta(accum), bias })?;
            us.push(own.map(|(u, _)| u));
        }
        Ok(us)
    }

    fn linear_group_backward(
        &self,
        dys: &[&Tensor],
        layers: &[GroupLayer<'_>],
        latents: &mut [Option<LatentBackward<'_>>],
        mut dx: Option<(&mut Tensor, Accum)>,
    ) -> Result<()> {
        let op = "linear_group_backward";
        check_backward(dys, layers, latents, dx.as_ref().map(|(dx, _)| &**dx))?;
        let Some((dy, layer)) = dys.first().zip(layers.first()) else { return Ok(()) };
        let (t, k, dtype) = (dy.shape()[0], layer.weight.shape()[1], dy.dtype());
        let held = self.gather(op, dtype, layers, k)?;
        let ranks = held.a.rows;
        let wanted = if dx.is_some() { t * ranks } else { 0 };
        let space = self.scratch(op, wanted * dtype.size())?;
        let ws = of(DeviceFloats { address: space.address(), dtype }, t, ranks);
        let mut column = 0;
        for (((dy, layer), latent), b) in dys.iter().zip(layers).zip(latents).zip(&held.bs) {
            let Some(((part, LatentBackward { u, gradient }), b)) = layer.latent.zip(latent.as_mut()).zip(*b)
            else {
                continue;
            };
            let w = dx.is_some().then(|| (part, Way::AsItIs, columns(ws, column, u.shape()[1])));
            self.latent_backward(op, (dy, b), (u, gradient), part.scale, w)?;
            column += u.shape()[1];
        }
        let Some((dx, accum)) = &mut dx else { return Ok(()) };
        let mut second = (ranks > 0).then_some((ws, held.a));
        for (dy, layer) in dys.iter().zip(layers) {
            let n = layer.weight.shape()[0];
            let w = self.weight(op, ("w", layer.weight), dtype)?;
            let first = (of(self.floats(op, "dy", dy)?, t, n), of(w.floats, n, k));
            let c = of(self.floats_mut(op, "dx", dx)?, t, k);
            let second = second.take();
            self.sum(op, &Sum { first, second, c, alpha: 1.0, beta: beta(*accum), bias: None })?;
            *accum = Accum::Add;
        }
        Ok(())
    }
}

/// All A and B of a group, in the type of its products.
struct Held {
    /// The A one behind the other, `[sum of r, K]`.
    a: Matrix,
    /// Each layer's B `[N, r]`.
    bs: Vec<Option<Matrix>>,
    _scratch: Vec<Storage>,
}

/// How R is read in the product behind u or v.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Transposed,
    AsItIs,
}

/// Ranks up to which u (or v) and the product with R are one kernel: its shared memory holds 32 rows of u.
const FUSED_RANK: usize = 256;
/// Rows of a block of that kernel.
const ROWS: usize = 32;
/// What it pads a row of u to, and by.
const DEPTH: usize = 32;
const PADDING: usize = 4;

impl Cuda {
    /// The A and B of layers `[*, K]` as products with activations of a type read them.
    fn gather(&self, op: &'static str, dtype: DType, layers: &[GroupLayer<'_>], k: usize) -> Result<Held> {
        let parts: Vec<LatentPart<'_>> = layers.iter().filter_map(|layer| layer.latent).collect();
        let ranks: usize = parts.iter().map(|part| part.r.shape()[0]).sum();
        let (mut casts, mut scratch) = (Vec::new(), Vec::new());
        let a = match parts[..] {
            // One alone stays where it is if a product reads its type.
            [part] if dtype == DType::F32 || part.a.dtype() == dtype => self.floats(op, "a", part.a)?,
            _ => {
                let space = self.scratch(op, ranks * k * dtype.size())?;
                let mut to = DeviceFloats { address: space.address(), dtype };
                for part in &parts {
                    casts.push((self.floats(op, "a", part.a)?, to, part.a.len()));
                    to.address += (part.a.len() * dtype.size()) as u64;
                }
                let address = space.address();
                scratch.push(space);
                DeviceFloats { address, dtype }
            }
        };
        let mut bs = Vec::with_capacity(layers.len());
        for layer in layers {
            let Some(LatentPart { b, r, .. }) = layer.latent else {
                bs.push(None);
                continue;
            };
            let mut floats = self.floats(op, "b", b)?;
            if dtype == DType::Bf16 && floats.dtype != dtype {
                let space = self.scratch(op, b.len() * dtype.size())?;
                let to = DeviceFloats { address: space.address(), dtype };
                casts.push((floats, to, b.len()));
                scratch.push(space);
                floats = to;
            }
            bs.push(Some(of(floats, b.shape()[0], r.shape()[0])));
        }
        self.cast_all(op, &casts)?;
        Ok(Held { a: of(a, ranks, k), bs, _scratch: scratch })
    }

    /// Casts elements from one place to another, so many of each.
    fn cast_all(&self, op: &'static str, casts: &[(DeviceFloats, DeviceFloats, usize)]) -> Result<()> {
        for casts in casts.chunks(4) {
            let most = casts.iter().map(|cast| cast.2).max().unwrap_or(0);
            let nothing = (DeviceFloats { address: 0, dtype: DType::F32 }, casts[0].1, 0);
            let four = (0..4).map(|which| casts.get(which).copied().unwrap_or(nothing));
            let arguments: Vec<Argument> =
                four.flat_map(|(x, y, count)| [x.into(), y.into(), Argument::Word(count as u64)]).collect();
            let blocks = most.div_ceil(4 * THREADS as usize);
            let launch = Launch { grid: [blocks, casts.len(), 1], threads: THREADS, shared_bytes: 0 };
            self.launch(op, "cast_four", launch, &arguments)?;
        }
        Ok(())
    }

    /// z `[T, r]` = columns of the parts' sum from one on, and where it is asked for `h = s z R` or `s z R^T` `[T, r]`.
    fn latent(
        &self,
        op: &'static str,
        (parts, column): (&Parts, usize),
        z: &mut Tensor,
        then: Option<(LatentPart<'_>, Way, Matrix)>,
    ) -> Result<()> {
        let (t, r) = (z.shape()[0], z.shape()[1]);
        let fused = then.filter(|_| r <= FUSED_RANK);
        let address = self.f32_mut(op, "z", z)?;
        let pitch = r.next_multiple_of(DEPTH) + PADDING;
        let (square, way, scale, h, stride) = match fused {
            Some((part, way, h)) => (self.f32(op, "r", part.r)?, way, part.scale, h.address, h.stride),
            None => (0, Way::AsItIs, 0.0, 0, 0),
        };
        let h = DeviceFloats { address: h, dtype: then.map_or(DType::F32, |(_, _, h)| h.dtype) };
        let shared_bytes = if fused.is_some() { ROWS * pitch * size_of::<f32>() } else { 0 };
        let launch = Launch { grid: [t.div_ceil(ROWS), 1, 1], threads: THREADS, shared_bytes };
        let arguments: [Argument; 12] = [
            (parts.storage.address() + (column * size_of::<f32>()) as u64).into(),
            (parts.count as u32).into(),
            ((parts.rows * parts.columns) as u64).into(),
            word(op, parts.columns)?.into(),
            word(op, t)?.into(),
            word(op, r)?.into(),
            address.into(),
            square.into(),
            u32::from(way == Way::Transposed).into(),
            scale.into(),
            h.into(),
            (stride as u64).into(),
        ];
        self.launch(op, "latent", launch, &arguments)?;
        let Some((part, way, h)) = then.filter(|_| r > FUSED_RANK) else { return Ok(()) };
        let z = of(DeviceFloats { address, dtype: DType::F32 }, t, r);
        let square = of(DeviceFloats { address: self.f32(op, "r", part.r)?, dtype: DType::F32 }, r, r);
        let square = if way == Way::Transposed { square.transposed() } else { square };
        self.sum(
            op,
            &Sum { first: (z, square), second: None, c: h, alpha: part.scale, beta: 0.0, bias: None },
        )
    }

    /// `v = dy B` `[T, r]`, `dR += s v^T u`, and where it is asked for `w = s v R`.
    fn latent_backward(
        &self,
        op: &'static str,
        (dy, b): (&Tensor, Matrix),
        (u, gradient): (&Tensor, &mut Tensor),
        scale: f32,
        w: Option<(LatentPart<'_>, Way, Matrix)>,
    ) -> Result<()> {
        let (t, r) = (u.shape()[0], u.shape()[1]);
        let mut v = self.empty(&[t, r])?;
        let parts = self.parts(op, of(self.floats(op, "dy", dy)?, t, dy.shape()[1]), b)?;
        self.latent(op, (&parts, 0), &mut v, w)?;
        let first = (of(self.floats(op, "v", &v)?, t, r).transposed(), of(self.floats(op, "u", u)?, t, r));
        let c =
            of(DeviceFloats { address: self.f32_mut(op, "gradient", gradient)?, dtype: DType::F32 }, r, r);
        self.sum(op, &Sum { first, second: None, c, alpha: scale, beta: 1.0, bias: None })
    }
}

/// `count` columns of a matrix from one on.
fn columns(matrix: Matrix, first: usize, count: usize) -> Matrix {
    let address = matrix.address + (first * matrix.dtype.size()) as u64;
    Matrix { address, columns: count, ..matrix }
}
