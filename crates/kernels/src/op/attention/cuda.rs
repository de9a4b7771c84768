//! Attention on a GPU: `forward.cu`, `backward_queries.cu` and `backward_keys.cu`, and `plain.cu` for larger heads.

pub(crate) mod tiling;
pub(crate) mod work;

use self::tiling::Tiling;
use self::work::{Cut, Part, Table};
use super::{Attention, AttentionShape, Mask, Segments, check, one_type};
use crate::cuda::launch::{Argument, Launch};
use crate::cuda::memory::granules;
use crate::{Cuda, DType, Result, Tensor};

/// Warps of a block of the plain kernels, and of those that join.
const WARPS: usize = 4;

impl Attention for Cuda {
    fn attention(
        &self,
        geometry: &AttentionShape,
        segments: &Segments,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        o: &mut Tensor,
        lse: &mut Tensor,
    ) -> Result<()> {
        let op = "attention";
        check(op, geometry, segments, (q, k, v), o, lse)?;
        one_type(op, q, &[("k", k), ("v", v), ("o", o)])?;
        let operands = [self.floats(op, "q", q)?, self.floats(op, "k", k)?, self.floats(op, "v", v)?]
            .map(|operand| operand.address);
        let (o, lse) = (self.floats_mut(op, "o", o)?, self.f32_mut(op, "lse", lse)?);
        let call = Call { device: self, op, geometry, segments, dtype: q.dtype() };
        let arguments = words(&[operands[0], operands[1], operands[2], o.address, lse]);
        match call.tiling() {
            Some(tiling) => call.forward(tiling, arguments, o.into(), lse),
            None => call.plain("forward", Cut::Rows { tile: WARPS }, arguments, &[]),
        }
    }

    fn attention_backward(
        &self,
        geometry: &AttentionShape,
        segments: &Segments,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        o: &Tensor,
        lse: &Tensor,
        d_o: &Tensor,
        (dq, dk, dv): (&mut Tensor, &mut Tensor, &mut Tensor),
    ) -> Result<()> {
        let op = "attention_backward";
        check(op, geometry, segments, (q, k, v), o, lse)?;
        check(op, geometry, segments, (dq, dk, dv), d_o, lse)?;
        one_type(op, q, &[("k", k), ("v", v), ("o", o), ("do", d_o), ("dq", dq), ("dk", dk), ("dv", dv)])?;
        let call = Call { device: self, op, geometry, segments, dtype: q.dtype() };
        let delta = self.scratch(op, size_of::<f32>() * lse.len())?;
        let lanes = geometry.head_size.div_ceil(4).next_power_of_two().min(32);
        let blocks = (lse.len() * lanes).div_ceil(256);
        let (o, d_o) = (self.floats(op, "o", o)?, self.floats(op, "do", d_o)?);
        let arguments = [o.into(), d_o.into(), delta.address().into(), (lse.len() as u64).into()];
        let shape = [(geometry.head_size as u32).into(), (lanes as u32).into()];
        self.launch(op, "attention_delta", Launch::blocks(blocks, 256), &[&arguments[..], &shape].concat())?;

        let inputs = [self.floats(op, "q", q)?, self.floats(op, "k", k)?, self.floats(op, "v", v)?, d_o]
            .map(|operand| operand.address);
        let inputs = words(&[&inputs[..], &[self.f32(op, "lse", lse)?, delta.address()]].concat());
        let dq = self.floats_mut(op, "dq", dq)?.address;
        let (dk, dv) = (self.floats_mut(op, "dk", dk)?, self.floats_mut(op, "dv", dv)?);
        let (to_queries, to_keys) = (
            [&inputs[..], &words(&[dq])].concat(),
            [&inputs[..], &words(&[dk.address, dv.address])].concat(),
        );
        let scale = [geometry.scale.into()];
        match call.tiling() {
            Some(tiling) => {
                call.queries(tiling, to_queries)?;
                call.keys(tiling, to_keys, [dk.into(), dv.into()])
            }
            None => {
                call.plain("queries", Cut::Rows { tile: WARPS }, to_queries, &scale)?;
                call.plain("keys", Cut::WholeKeys { tile: WARPS }, to_keys, &scale)
            }
        }
    }
}

/// Bytes that attention takes on a GPU beside its operands, forward and backward, for so many tokens of any segments that
/// attend to themselves.
///
/// # Errors
/// Where there are more tokens than a GPU counts.
pub(crate) fn attention_gpu_scratch_bytes(
    dtype: DType,
    geometry: &AttentionShape,
    tokens: usize,
) -> Result<usize> {
    let op = "attention_backward";
    let fixed = granules(size_of::<f32>() * tokens * geometry.heads) + work::table_bytes(geometry, tokens);
    let Some(tiling) = Tiling::of(dtype, geometry.head_size) else { return Ok(fixed) };
    let tile = tiling.keys.band * tiling.keys.warps;
    let parts = work::most_parts(op, geometry, tokens, tile)? * geometry.kv_heads;
    Ok(fixed + 2 * granules(size_of::<f32>() * parts * tile * tiling.width))
}

/// One call of either direction.
struct Call<'a> {
    device: &'a Cuda,
    op: &'static str,
    geometry: &'a AttentionShape,
    segments: &'a Segments,
    dtype: DType,
}

impl Call<'_> {
    fn tiling(&self) -> Option<&'static Tiling> {
        Tiling::of(self.dtype, self.geometry.head_size)
    }

    fn table(&self, cut: Cut) -> Result<std::sync::Arc<Table>> {
        self.device.attention.table(self.op, self.device, self.geometry, self.segments, cut)
    }

    /// Bytes of shared memory that a block may take.
    fn limit(&self) -> usize {
        self.device.gpu().shared_bytes
    }

    /// H, G, E, the window, and the scale of scores as powers of 2: what all kernels take behind their operands.
    fn shape(&self) -> Vec<Argument> {
        let AttentionShape { heads, kv_heads, head_size, scale, mask, soft_cap } = *self.geometry;
        let window = match mask {
            Mask::Full => 0,
            Mask::Causal => u32::MAX,
            Mask::Sliding { window } => u32::try_from(window).unwrap_or(u32::MAX),
        };
        let log2_e = std::f32::consts::LOG2_E;
        // A masked score is an infinity that stays one when it is scaled.
        let scale = if scale == 0.0 { f32::MIN_POSITIVE } else { scale };
        let (factor, bound) = match soft_cap {
            None => (scale * log2_e, 0.0),
            Some(cap) => (scale / cap, cap * log2_e),
        };
        let [heads, kv_heads, head_size] = [heads, kv_heads, head_size].map(|size| (size as u32).into());
        vec![heads, kv_heads, head_size, window.into(), factor.into(), bound.into()]
    }

    /// One block for each item and key/value head, and so many for each of these.
    fn launch(
        &self,
        kernel: &'static str,
        items: Part,
        (warps, shared_bytes): (usize, usize),
        blocks: usize,
        arguments: &[&[Argument]],
    ) -> Result<()> {
        let grid = [items.count * self.geometry.kv_heads, blocks, 1];
        let launch = Launch { grid, threads: 32 * warps as u32, shared_bytes };
        let arguments = [&[items.address.into()], &arguments.concat()[..]].concat();
        self.device.launch(self.op, kernel, launch, &arguments)
    }

    /// q, k, v, o and lse are the arguments.
    fn forward(&self, tiling: &Tiling, arguments: Vec<Argument>, o: Argument, lse: u64) -> Result<()> {
        let (pass, width, kv_heads) = (tiling.forward, tiling.width, self.geometry.kv_heads);
        let (many, few) =
            (tiling.forward_block(pass.warps, self.limit()), tiling.forward_block(1, self.limit()));
        let table = self.table(Cut::Forward { tile: pass.band * many.warps, few: pass.band })?;
        let rows = table.slots * kv_heads * pass.band;
        let parts = self.device.scratch(self.op, size_of::<f32>() * rows * width)?;
        let part_lse = self.device.scratch(self.op, size_of::<f32>() * rows)?;
        let (parts, part_lse) = (parts.address(), part_lse.address());
        let scratch = words(&[parts, part_lse]);
        for (items, block) in [(table.items, many), (table.few, few)] {
            let arguments = [&arguments[..], &scratch, &self.shape()];
            self.launch(pass.kernel, items, (block.warps, block.shared_bytes), 1, &arguments)?;
        }
        let shape: Vec<Argument> = [pass.band, self.geometry.heads, kv_heads, self.geometry.head_size, width]
            .map(|size| (size as u32).into())
            .to_vec();
        let operands = words(&[table.joins.address, parts, part_lse]);
        let arguments = [&operands[..], &[o, lse.into()], &shape].concat();
        let grid = [table.joins.count, kv_heads, pass.band.div_ceil(WARPS)];
        let launch = Launch { grid, threads: 32 * WARPS as u32, shared_bytes: 0 };
        self.device.launch(self.op, "attention_join", launch, &arguments)
    }

    /// q, k, v, do, lse, delta and dq are the arguments.
    fn queries(&self, tiling: &Tiling, arguments: Vec<Argument>) -> Result<()> {
        let (pass, block) = (tiling.queries, tiling.queries_block(self.limit()));
        let table = self.table(Cut::Rows { tile: pass.band * block.warps })?;
        let rest = [self.geometry.scale.into(), (block.stages as u32).into()];
        let arguments = [&arguments[..], &self.shape(), &rest];
        self.launch(pass.kernel, table.items, (block.warps, block.shared_bytes), 1, &arguments)
    }

    /// q, k, v, do, lse, delta, dk and dv are the arguments.
    fn keys(&self, tiling: &Tiling, arguments: Vec<Argument>, gradients: [Argument; 2]) -> Result<()> {
        let (pass, block, kv_heads) = (tiling.keys, tiling.keys_block(self.limit()), self.geometry.kv_heads);
        let tile = pass.band * block.warps;
        let table = self.table(Cut::Keys { tile })?;
        let bytes = size_of::<f32>() * table.slots * kv_heads * tile * tiling.width;
        let (dk, dv) = (self.device.scratch(self.op, bytes)?, self.device.scratch(self.op, bytes)?);
        let parts = words(&[dk.address(), dv.address()]);
        let rest = [self.geometry.scale.into(), (block.stages as u32).into()];
        let all = [&arguments[..], &parts, &self.shape(), &rest];
        self.launch(pass.kernel, table.items, (block.warps, block.shared_bytes), tiling.key_blocks, &all)?;
        let shape = [tile, kv_heads, self.geometry.head_size, tiling.width].map(|size| (size as u32).into());
        let arguments = [&words(&[table.joins.address])[..], &parts, &gradients, &shape].concat();
        let launch = Launch { grid: [table.joins.count, kv_heads, 2], threads: 256, shared_bytes: 0 };
        self.device.launch(self.op, "attention_keys_sum", launch, &arguments)
    }

    /// The kernels for heads of any size; `rest` stands behind the shape.
    fn plain(&self, direction: &str, cut: Cut, arguments: Vec<Argument>, rest: &[Argument]) -> Result<()> {
        let kernel = match (direction, self.dtype) {
            ("forward", DType::F32) => "attention_plain_forward_f32",
            ("forward", _) => "attention_plain_forward_bf16",
            ("queries", DType::F32) => "attention_plain_queries_f32",
            ("queries", _) => "attention_plain_queries_bf16",
            (_, DType::F32) => "attention_plain_keys_f32",
            (_, _) => "attention_plain_keys_bf16",
        };
        let table = self.table(cut)?;
        self.launch(kernel, table.items, (WARPS, 0), 1, &[&arguments, &self.shape(), rest])
    }
}

fn words(addresses: &[u64]) -> Vec<Argument> {
    addresses.iter().map(|&address| address.into()).collect()
}
