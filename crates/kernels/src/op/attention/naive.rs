//! Specification of attention: one query and head after another, the whole row of scores at once.

use super::{AttentionShape, Segments};
use crate::Number;
use crate::op::elementwise::naive::soft_capped;

/// Row `index` of a `[rows, heads*E]` array, head `head`.
fn head<F>(x: &[F], index: usize, heads: usize, head: usize, e: usize) -> &[F] {
    &x[(index * heads + head) * e..][..e]
}

fn dot<F: Number>(a: &[F], b: &[F]) -> F {
    a.iter().zip(b).map(|(&a, &b)| a * b).sum()
}

/// q `[T, H*E]`, k and v `[S, G*E]`, o `[T, H*E]`, lse `[T, H]`.
pub fn forward<F: Number>(
    a: &AttentionShape,
    segments: &Segments,
    (q, k, v): (&[F], &[F], &[F]),
    o: &mut [F],
    lse: &mut [F],
) {
    let (e, scale) = (a.head_size, F::of(f64::from(a.scale)));
    for (queries, keys) in segments.iter() {
        for (i, t) in queries.clone().enumerate() {
            for h in 0..a.heads {
                let g = h / a.group();
                let seen = a.visible(i, queries.len(), keys.len());
                let row = |j: usize| keys.start + j;
                let q = head(q, t, a.heads, h, e);
                let score = |j| scale * dot(q, head(k, row(j), a.kv_heads, g, e));
                let scores: Vec<F> = seen.clone().map(|j| soft_capped(a.soft_cap, score(j)).0).collect();
                let max = scores.iter().copied().fold(scores[0], |max, s| if s > max { s } else { max });
                let total: F = scores.iter().map(|&s| (s - max).exp()).sum();
                lse[t * a.heads + h] = max + total.ln();
                let o = &mut o[(t * a.heads + h) * e..][..e];
                o.fill(F::of(0.0));
                for (j, &s) in seen.zip(&scores) {
                    let p = (s - max).exp() / total;
                    let v = head(v, row(j), a.kv_heads, g, e);
                    o.iter_mut().zip(v).for_each(|(o, &v)| *o += p * v);
                }
            }
        }
    }
}

/// `ds_ij = p_ij (do_i . v_j - delta_i)`; dq, dk and dv are replaced.
pub fn backward<F: Number>(
    a: &AttentionShape,
    segments: &Segments,
    (q, k, v): (&[F], &[F], &[F]),
    o: &[F],
    lse: &[F],
    d_o: &[F],
    (dq, dk, dv): (&mut [F], &mut [F], &mut [F]),
) {
    let (e, scale) = (a.head_size, F::of(f64::from(a.scale)));
    [&mut *dq, &mut *dk, &mut *dv].into_iter().for_each(|gradient| gradient.fill(F::of(0.0)));
    for (queries, keys) in segments.iter() {
        for (i, t) in queries.clone().enumerate() {
            for h in 0..a.heads {
                let g = h / a.group();
                let (q, d_o) = (head(q, t, a.heads, h, e), head(d_o, t, a.heads, h, e));
                let delta = dot(d_o, head(o, t, a.heads, h, e));
                for j in a.visible(i, queries.len(), keys.len()) {
                    let s = keys.start + j;
                    let (k, v) = (head(k, s, a.kv_heads, g, e), head(v, s, a.kv_heads, g, e));
                    let (score, slope) = soft_capped(a.soft_cap, scale * dot(q, k));
                    let p = (score - lse[t * a.heads + h]).exp();
                    let ds = p * (dot(d_o, v) - delta) * slope * scale;
                    let key = (s * a.kv_heads + g) * e;
                    for c in 0..e {
                        dv[key + c] += p * d_o[c];
                        dk[key + c] += ds * q[c];
                        dq[(t * a.heads + h) * e + c] += ds * k[c];
                    }
                }
            }
        }
    }
}
