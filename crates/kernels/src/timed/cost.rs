//! What a call is worth: floating-point operations of products and attention, bytes of operands.
//!
//! | operation | floating-point operations |
//! |---|---|
//! | product of `[T, K]` and a weight `[N, K]`, any orientation | `2 T N K` |
//! | with a thin product `h B^T` of rank r | `2 T N r` more |
//! | attention, P pairs of a query and a key that it sees | `4 P H E`: scores, and their sum of values |
//! | its backward | `10 P H E`: scores once more, dp, dv, dq, dk |
//! | cross-entropy of N rows | `2 N V D` for the logits, as much for each of dx and dW |

use crate::{AttentionShape, Segments, Tensor};

/// What one call is worth.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Cost {
    /// The weight `[N, K]` of a product.
    pub(super) weight: Option<[usize; 2]>,
    pub(super) operations: f64,
    pub(super) bytes: f64,
}

impl Cost {
    pub(super) fn of_bytes(bytes: usize) -> Cost {
        Cost { bytes: bytes as f64, ..Cost::default() }
    }

    /// Each tensor read or written once.
    pub(super) fn moved(tensors: &[&Tensor]) -> Cost {
        Cost::of_bytes(tensors.iter().map(|tensor| tensor.bytes()).sum())
    }

    /// The product of `rows` tokens with a weight `[N, K]`, in any of its orientations.
    pub(super) fn product(rows: usize, weight: &Tensor, moved: &[&Tensor]) -> Cost {
        let (n, k) = (axis(weight, 0), axis(weight, 1));
        let operations = 2.0 * (rows * n * k) as f64;
        Cost { weight: Some([n, k]), operations, ..Cost::moved(&[&[weight], moved].concat()) }
    }

    /// The same with a thin product beside it: h `[T, r]` and its factor, `[N, r]` or `[r, K]`.
    pub(super) fn and_term(mut self, term: Option<(&Tensor, &Tensor)>) -> Cost {
        let Some((h, factor)) = term else { return self };
        self.operations += 2.0 * (axis(h, 0) * factor.len()) as f64;
        self.bytes += (h.bytes() + factor.bytes()) as f64;
        self
    }

    /// `products` products of each query with each key that it sees.
    pub(super) fn attention(
        products: usize,
        geometry: &AttentionShape,
        segments: &Segments,
        moved: &[&Tensor],
    ) -> Cost {
        let elements = pairs(geometry, segments) * geometry.heads * geometry.head_size;
        Cost { operations: 2.0 * (products * elements) as f64, ..Cost::moved(moved) }
    }

    /// The loss of rows x under a vocabulary w `[V, D]`, `products` times.
    pub(super) fn vocabulary(products: usize, x: &Tensor, w: &Tensor, moved: &[&Tensor]) -> Cost {
        let operations = 2.0 * (products * x.len() * axis(w, 0)) as f64;
        Cost { operations, ..Cost::moved(&[&[x, w], moved].concat()) }
    }
}

/// How many pairs of a query and a key that it sees there are.
fn pairs(geometry: &AttentionShape, segments: &Segments) -> usize {
    let seen = |queries: usize, keys: usize| -> usize {
        (0..queries).map(|i| geometry.visible(i, queries, keys).len()).sum()
    };
    segments.iter().map(|(queries, keys)| seen(queries.len(), keys.len())).sum()
}

/// An axis' size; 0 where the tensor has no such axis, which the operation itself refuses.
pub(super) fn axis(tensor: &Tensor, axis: usize) -> usize {
    tensor.shape().get(axis).copied().unwrap_or(0)
}
