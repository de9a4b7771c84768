//! Rotary position embedding.
//!
//! The two halves of a head's first U elements are the real and imaginary parts of U/2 numbers; number i at
//! position p is turned by the angle `p * f_i`: `y1 = x1 cos - x2 sin`, `y2 = x2 cos + x1 sin`. The other E - U
//! elements stay what they are; mostly U = E. A rotation's transpose is its inverse, so the backward turns by
//! the opposite angle.
//! Source: Su et al., "RoFormer", arXiv 2104.09864, section 3.2, in the half-split layout of transformers, where
//! U/E is called `partial_rotary_factor`.

mod cpu;
mod cuda;
mod frequencies;
pub mod naive;

pub use frequencies::RopeScaling;

use crate::{Error, Memory, Result, Tensor, shape};

/// Cosines and sines of every position and frequency.
#[derive(Debug)]
pub struct RopeTable {
    /// `[P, U/2]`.
    pub(crate) cos: Tensor,
    /// `[P, U/2]`.
    pub(crate) sin: Tensor,
    /// E.
    head_size: usize,
}

impl RopeTable {
    /// The table for positions `0..positions` and heads of `head_size` elements, of which the first
    /// `rotary_size` (U, even) turn.
    ///
    /// # Errors
    /// Where the rotary size is odd, zero or larger than the head, or the device has no memory for the table.
    pub fn new(
        memory: &dyn Memory,
        theta: f64,
        scaling: &RopeScaling,
        head_size: usize,
        rotary_size: usize,
        positions: usize,
    ) -> Result<Self> {
        if rotary_size == 0 || !rotary_size.is_multiple_of(2) || rotary_size > head_size {
            let message = format!(
                "U={rotary_size} of E={head_size} elements turn; a rotation needs an even, positive number"
            );
            return Err(Error::Value { op: "rope", message });
        }
        let frequencies = frequencies::inverse(theta, scaling, rotary_size);
        // The angle is rounded to f32 before its cosine is taken because transformers does so: at position
        // 100,000 the rounding is visible, and the trained weights have seen it.
        let angles = (0..positions).flat_map(|p| frequencies.iter().map(move |&f| f64::from(p as f32 * f)));
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.map(|a| (a.cos() as f32, a.sin() as f32)).unzip();
        let shape = [positions, rotary_size / 2];
        let (cos, sin) = (memory.from_f32(&cos, &shape)?, memory.from_f32(&sin, &shape)?);
        Ok(RopeTable { cos, sin, head_size })
    }

    /// The number of positions.
    pub fn positions(&self) -> usize {
        self.cos.shape()[0]
    }
}

/// Rotation of queries or keys, in place; `f32` or `bf16`.
pub trait Rope {
    /// Turns every head of `x [T, H*E]` forward by its token's position; positions `[T]` of u32.
    ///
    /// # Errors
    /// Where a position lies behind the table's end.
    fn rope(&self, table: &RopeTable, positions: &Tensor, x: &mut Tensor) -> Result<()>;

    /// Turns every head of `dx [T, H*E]` backward: the gradient of [`Rope::rope`].
    fn rope_backward(&self, table: &RopeTable, positions: &Tensor, dx: &mut Tensor) -> Result<()>;
}

/// Checks the operands; returns (H*E, E, U/2).
pub(crate) fn widths(
    op: &'static str,
    table: &RopeTable,
    positions: &Tensor,
    x: &Tensor,
) -> Result<(usize, usize, usize)> {
    let (t, width) = shape::matrix(op, "x", x)?;
    let (p, half) = shape::matrix(op, "table", &table.cos)?;
    shape::expect(op, "positions", positions, &[("T", t)])?;
    if !width.is_multiple_of(table.head_size) {
        let expected = format!("a multiple of E={} columns", table.head_size);
        return Err(Error::Shape { op, operand: "x", found: x.shape().to_vec(), expected });
    }
    match positions.u32(op, "positions")?.iter().find(|&&position| position as usize >= p) {
        None => Ok((width, table.head_size, half)),
        Some(position) => Err(Error::Value { op, message: format!("position {position} in a table of {p}") }),
    }
}
