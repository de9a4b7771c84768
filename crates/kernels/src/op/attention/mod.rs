//! Scaled dot-product attention over packed sequences.
//!
//! For every query i of a segment and every key j it sees: `s_ij = scale q_i . k_j`,
//! `p_ij = exp(s_ij - lse_i)` with `lse_i = ln sum_j exp(s_ij)`, `o_i = sum_j p_ij v_j`.
//! Source: Vaswani et al., arXiv 1706.03762, equation 1; grouped key/value heads: arXiv 2305.13245.
//!
//! With a soft cap c, as in Gemma 2 (arXiv 2408.00118, section 2), `s_ij = c tanh(scale q_i . k_j / c)`.
//!
//! Backward, from `do` with `delta_i = do_i . o_i` (arXiv 2205.14135, appendix B.4):
//! `dv_j = sum_i p_ij do_i`, `ds_ij = p_ij (do_i . v_j - delta_i)`,
//! `dq_i = scale sum_j ds_ij k_j`, `dk_j = scale sum_i ds_ij q_i`.
//! With a soft cap, `ds_ij` is multiplied by its derivative, `1 - (s_ij / c)^2`.
//! Probabilities are computed again from `lse`; no more than a tile of them exists at a time.
//!
//! Operands, results and their gradients are all `f32` or all `bf16`, lse `f32` either way. With `bf16`, a device may
//! round probabilities and the gradients of scores to `bf16` before it multiplies them by other operands.

mod backward;
mod cpu;
pub(crate) mod cuda;
mod forward;
mod geometry;
pub mod naive;
mod operands;
mod tile;

pub(crate) use cpu::attention_scratch_bytes;
pub(crate) use cuda::attention_gpu_scratch_bytes;
pub use geometry::{AttentionShape, Mask, Segments};

use crate::{DType, Error, Result, Tensor, shape};

/// Attention over packed sequences; q `[T, H*E]`, k and v `[S, G*E]`, where S = T except when generating.
pub trait Attention {
    /// o `[T, H*E]`, lse `[T, H]` (kept for the backward). Nothing that a key outside the mask or in another
    /// segment holds reaches a query, not even infinities and NaN.
    fn attention(
        &self,
        geometry: &AttentionShape,
        segments: &Segments,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        o: &mut Tensor,
        lse: &mut Tensor,
    ) -> Result<()>;

    /// Gradients of all three inputs, replaced: dq `[T, H*E]`, dk and dv `[S, G*E]`. An infinite or NaN operand
    /// of one token may make NaN of any gradient in its segment.
    fn attention_backward(
        &self,
        geometry: &AttentionShape,
        segments: &Segments,
        inputs: (&Tensor, &Tensor, &Tensor),
        o: &Tensor,
        lse: &Tensor,
        d_o: &Tensor,
        gradients: (&mut Tensor, &mut Tensor, &mut Tensor),
    ) -> Result<()>;
}

/// Checks the forward's operands, which the backward's mirror.
pub(crate) fn check(
    op: &'static str,
    geometry: &AttentionShape,
    segments: &Segments,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    o: &Tensor,
    lse: &Tensor,
) -> Result<()> {
    geometry.check(op)?;
    let (t, s) = (segments.queries(), segments.keys());
    let (heads, kv_heads, e) = (geometry.heads, geometry.kv_heads, geometry.head_size);
    shape::expect(op, "q", q, &[("T", t), ("H*E", heads * e)])?;
    shape::expect(op, "k", k, &[("S", s), ("G*E", kv_heads * e)])?;
    shape::expect(op, "v", v, &[("S", s), ("G*E", kv_heads * e)])?;
    shape::expect(op, "o", o, &[("T", t), ("H*E", heads * e)])?;
    shape::expect(op, "lse", lse, &[("T", t), ("H", heads)])
}

/// Refuses operands of another type than q, and q of a type that is no activation's.
pub(crate) fn one_type(op: &'static str, q: &Tensor, others: &[(&'static str, &Tensor)]) -> Result<()> {
    let expected = match q.dtype() {
        DType::F32 => "f32, as q",
        DType::Bf16 => "bf16, as q",
        found => return Err(Error::Type { op, operand: "q", found, expected: "f32 or bf16" }),
    };
    match others.iter().find(|(_, tensor)| tensor.dtype() != q.dtype()) {
        None => Ok(()),
        Some(&(operand, tensor)) => Err(Error::Type { op, operand, found: tensor.dtype(), expected }),
    }
}
