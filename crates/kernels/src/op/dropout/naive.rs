//! Specification of dropout: the mask's definition, one element after another.

use super::DropoutMask;
use crate::{Accum, Number};

/// `y (+)= x mask / (1 - rate)`.
pub fn dropout<F: Number>(mask: DropoutMask, scale: F, x: &[F], accum: Accum, y: &mut [F]) {
    for (index, (&x, y)) in x.iter().zip(y).enumerate() {
        let value = if mask.keeps(index) { scale * x } else { F::of(0.0) };
        match accum {
            Accum::Replace => *y = value,
            Accum::Add => *y += value,
        }
    }
}
