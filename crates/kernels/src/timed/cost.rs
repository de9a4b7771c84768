//! What a call is worth: floating-point operations of products and attention, bytes of operands.
//!
//! | operation | floating-point operations |
//! |---|---|
//! | product of `[T, K]` and a weight `[N, K]`, any orientation | `2 T N K` |
//! | with a thin product `h B^T` of rank r | `2 T N r` more |
//! | group of layers, forward | `2 T N K` each, and `2 T r (K + r + N)` for a latent part |
//! | group of layers, backward | the same, and `2 T r r` for the gradient of R; without dx `2 T r (N + r)` alone |
//! | attention, P pairs of a query and a key that it sees | `4 P H E`: scores, and their sum of values |
//! | its backward | `10 P H E`: scores once more, dp, dv, dq, dk |
//! | cross-entropy of N rows | `2 N V D` for the logits, as much for each of dx and dW |

use crate::{AttentionShape, GroupLayer, Segments, Tensor};

/// What one call is worth.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Cost {
    /// The weight `[N, K]` of a product.
    pub(super) weight: Option<[usize; 2]>,
    pub(super) operations: f64,
    pub(super) bytes: f64,
}

/// What is done with a group of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Forward,
    /// With dx.
    Backward,
    /// The gradients of R alone.
    GradientAlone,
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

    /// Layers of one input of `rows` rows; the weight is all of them below one another.
    pub(super) fn group(
        rows: usize,
        layers: &[GroupLayer<'_>],
        direction: Direction,
        moved: &[&Tensor],
    ) -> Cost {
        let (mut operations, mut bytes, mut outputs) = (0, 0, 0);
        for layer in layers {
            let (n, k) = (axis(layer.weight, 0), axis(layer.weight, 1));
            outputs += n;
            bytes += layer.weight.bytes();
            let r = layer.latent.map_or(0, |part| axis(part.r, 0));
            operations += match direction {
                Direction::Forward => n * k + r * (k + r + n),
                Direction::Backward => n * k + r * (k + 2 * r + n),
                Direction::GradientAlone => r * (n + r),
            };
        }
        let k = layers.first().map_or(0, |layer| axis(layer.weight, 1));
        let operations = 2.0 * (rows * operations) as f64;
        Cost { weight: Some([outputs, k]), operations, ..Cost::moved(moved) }.and_bytes(bytes)
    }

    fn and_bytes(self, bytes: usize) -> Cost {
        Cost { bytes: self.bytes + bytes as f64, ..self }
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
