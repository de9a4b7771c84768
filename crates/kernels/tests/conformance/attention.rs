//! Attention, forward and backward.

use lora_sb_kernels::op::attention;
use lora_sb_kernels::op::elementwise::naive::soft_capped;
use lora_sb_kernels::{AttentionShape, Kernels, Mask, Segments};

use crate::common::{Draw, EPS, close, devices, sum_error, widen};

/// Heads: (H, G, E).
type Heads = (usize, usize, usize);

struct Case {
    name: String,
    shape: AttentionShape,
    segments: Segments,
}

fn cases() -> Vec<Case> {
    let packed = |lengths: &[usize]| Segments::packed(lengths.iter().copied());
    let cached = |lengths: &[(usize, usize)]| Segments::cached(lengths).unwrap();
    let masks = [Mask::Full, Mask::Causal, Mask::Sliding { window: 5 }];
    let layouts = [
        ("one token", packed(&[1])),
        ("1-token segments", packed(&[1, 1, 1, 1, 1])),
        ("uneven segments", packed(&[33, 1, 7, 64, 2, 17])),
        ("cached", cached(&[(1, 1), (1, 37), (5, 21), (16, 65), (1, 130)])),
    ];
    let all_heads: [Heads; 6] = [(2, 2, 8), (4, 1, 16), (3, 3, 40), (4, 1, 64), (2, 1, 128), (5, 5, 1)];
    let mut cases = Vec::new();
    let mut add = |name: &str, (heads, kv_heads, head_size): Heads, mask, soft_cap, segments: &Segments| {
        let scale = (head_size as f32).powf(-0.5);
        cases.push(Case {
            name: format!("{name}, H={heads} G={kv_heads} E={head_size}, {mask:?}, soft cap {soft_cap:?}"),
            shape: AttentionShape { heads, kv_heads, head_size, scale, mask, soft_cap },
            segments: segments.clone(),
        });
    };
    for (name, segments) in &layouts {
        for mask in masks {
            all_heads.into_iter().for_each(|heads| add(name, heads, mask, None, segments));
            // The first cap bends most scores, the second hardly any.
            for (heads, cap) in [((3, 3, 40), 0.8), ((4, 1, 16), 50.0), ((5, 5, 1), 2.0)] {
                add(name, heads, mask, Some(cap), segments);
            }
        }
    }
    for mask in [Mask::Full, Mask::Causal, Mask::Sliding { window: 1 }, Mask::Sliding { window: 130 }] {
        add("length 300", (4, 2, 16), mask, None, &packed(&[300]));
        add("length 300", (2, 1, 24), mask, Some(1.5), &packed(&[300]));
    }
    add("no tokens", (2, 1, 8), Mask::Causal, None, &packed(&[]));
    add("an empty segment", (2, 1, 8), Mask::Causal, Some(2.0), &packed(&[3, 0, 5]));
    cases
}

/// Operands and, by the specification in `f64`, results with the errors allowed to them.
struct Truth {
    inputs: [Vec<f32>; 3],
    d_o: Vec<f32>,
    o: Vec<f64>,
    lse: Vec<f64>,
    gradients: [Vec<f64>; 3],
    o_magnitude: Vec<f64>,
    gradient_magnitudes: [Vec<f64>; 3],
    /// Absolute error of a score, and of a log-sum-exp.
    score_error: f64,
    /// Relative error of a sum of products with probabilities.
    error: f64,
}

impl Truth {
    /// `spread` multiplies the queries, and with them the scores.
    fn new(case: &Case, spread: f32) -> Self {
        let a = &case.shape;
        let (queries, keys) = (case.segments.queries(), case.segments.keys());
        let (q_size, kv_size) = (queries * a.heads * a.head_size, keys * a.kv_heads * a.head_size);
        let mut draw = Draw::new((q_size * 7 + kv_size) as u64);
        let inputs = [draw.normal(q_size), draw.normal(kv_size), draw.normal(kv_size)];
        let [q, k, v] = inputs;
        let q: Vec<f32> = q.iter().map(|q| q * spread).collect();
        let d_o = draw.normal(q_size);
        let wide = [widen(&q), widen(&k), widen(&v)];
        let (mut o, mut lse) = (vec![f64::NAN; q_size], vec![f64::NAN; queries * a.heads]);
        attention::naive::forward(a, &case.segments, (&wide[0], &wide[1], &wide[2]), &mut o, &mut lse);
        let mut gradients = [vec![f64::NAN; q_size], vec![f64::NAN; kv_size], vec![f64::NAN; kv_size]];
        let [dq, dk, dv] = &mut gradients;
        let wide_d_o = widen(&d_o);
        let outputs = (&mut dq[..], &mut dk[..], &mut dv[..]);
        attention::naive::backward(
            a,
            &case.segments,
            (&wide[0], &wide[1], &wide[2]),
            &o,
            &lse,
            &wide_d_o,
            outputs,
        );
        let sizes = Sizes::new(case, &wide, &o, &lse, &wide_d_o);
        // A cap's derivative is at most 1; its own roundings count against its result. The error of a score
        // moves the derivative 1 - t^2 by a relative 2 |t| / cap of it.
        let cap = a.soft_cap.map_or(f64::INFINITY, f64::from);
        let bend = if cap.is_finite() { 8.0 * EPS * sizes.largest_score.min(cap) } else { 0.0 };
        let score_error = sum_error(a.head_size) * sizes.largest_score + bend;
        let longest = case.segments.iter().map(|(_, keys)| keys.len()).max().unwrap_or(0) * a.group();
        // A probability: the errors of its score and of the log-sum-exp, then exp and the sums around it.
        let error = 2.0 * score_error * (1.0 + cap.recip())
            + 2.0 * sum_error(longest)
            + sum_error(a.head_size)
            + 8.0 * EPS;
        Truth {
            inputs: [q, k, v],
            d_o,
            o,
            lse,
            gradients,
            o_magnitude: sizes.o,
            gradient_magnitudes: sizes.gradients,
            score_error,
            error,
        }
    }

    fn check(&self, case: &Case, kernels: &dyn Kernels) {
        let (a, segments) = (&case.shape, &case.segments);
        let q_shape = [segments.queries(), a.heads * a.head_size];
        let kv_shape = [segments.keys(), a.kv_heads * a.head_size];
        let q = kernels.from_f32(&self.inputs[0], &q_shape).unwrap();
        let k = kernels.from_f32(&self.inputs[1], &kv_shape).unwrap();
        let v = kernels.from_f32(&self.inputs[2], &kv_shape).unwrap();
        let nan = |shape: &[usize]| kernels.from_f32(&vec![f32::NAN; shape.iter().product()], shape).unwrap();
        let (mut o, mut lse) = (nan(&q_shape), nan(&[segments.queries(), a.heads]));
        kernels.attention(a, segments, &q, &k, &v, &mut o, &mut lse).unwrap();
        let name = &case.name;
        close(&format!("{name}: o"), &kernels.to_f32(&o).unwrap(), &self.o, self.error, &self.o_magnitude);
        let lse_error = self.score_error + self.error;
        let sizes: Vec<f64> = self.lse.iter().map(|lse| 1.0 + EPS / lse_error * 4.0 * lse.abs()).collect();
        close(&format!("{name}: lse"), &kernels.to_f32(&lse).unwrap(), &self.lse, lse_error, &sizes);

        let d_o = kernels.from_f32(&self.d_o, &q_shape).unwrap();
        let (mut dq, mut dk, mut dv) = (nan(&q_shape), nan(&kv_shape), nan(&kv_shape));
        let gradients = (&mut dq, &mut dk, &mut dv);
        kernels.attention_backward(a, segments, (&q, &k, &v), &o, &lse, &d_o, gradients).unwrap();
        for (which, gradient) in [dq, dk, dv].iter().enumerate() {
            let (truth, magnitude) = (&self.gradients[which], &self.gradient_magnitudes[which]);
            let label = format!("{name}: {}", ["dq", "dk", "dv"][which]);
            // The probability, the output inside delta and the log-sum-exp each bring their own error.
            close(&label, &kernels.to_f32(gradient).unwrap(), truth, 3.0 * self.error, magnitude);
        }
    }
}

/// The sums of the specification over terms without signs.
struct Sizes {
    largest_score: f64,
    o: Vec<f64>,
    gradients: [Vec<f64>; 3],
}

impl Sizes {
    fn new(case: &Case, [q, k, v]: &[Vec<f64>; 3], o: &[f64], lse: &[f64], d_o: &[f64]) -> Self {
        let (a, e) = (&case.shape, case.shape.head_size);
        let mut sizes = Sizes {
            largest_score: 0.0,
            o: vec![0.0; q.len()],
            gradients: [vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]],
        };
        let scale = f64::from(a.scale);
        let products = |x: &[f64], y: &[f64]| -> (f64, f64) {
            let terms = || x.iter().zip(y).map(|(x, y)| x * y);
            (terms().sum(), terms().map(f64::abs).sum())
        };
        for (queries, keys) in case.segments.iter() {
            for (i, t) in queries.clone().enumerate() {
                for h in 0..a.heads {
                    let query = (t * a.heads + h) * e..(t * a.heads + h + 1) * e;
                    let delta = products(&d_o[query.clone()], &o[query.clone()]).1;
                    for j in a.visible(i, queries.len(), keys.len()) {
                        let start = ((keys.start + j) * a.kv_heads + h / a.group()) * e;
                        let key = start..start + e;
                        let (dot, size) = products(&q[query.clone()], &k[key.clone()]);
                        sizes.largest_score = sizes.largest_score.max(scale * size);
                        let (score, slope) = soft_capped(a.soft_cap, scale * dot);
                        let p = (score - lse[t * a.heads + h]).exp();
                        // 1 - t^2 is off by up to 8 EPS however small it is; 3 errors are more than 64 EPS.
                        let slope = if a.soft_cap.is_some() { slope + 0.125 } else { slope };
                        let ds =
                            p * slope * scale * (products(&d_o[query.clone()], &v[key.clone()]).1 + delta);
                        for c in 0..e {
                            sizes.o[query.start + c] += p * v[start + c].abs();
                            sizes.gradients[0][query.start + c] += ds * k[start + c].abs();
                            sizes.gradients[1][start + c] += ds * q[query.start + c].abs();
                            sizes.gradients[2][start + c] += p * d_o[query.start + c].abs();
                        }
                    }
                }
            }
        }
        sizes
    }
}

#[test]
fn attention_and_its_gradients() {
    for kernels in devices() {
        for case in cases() {
            Truth::new(&case, 1.0).check(&case, &*kernels);
        }
    }
}

#[test]
fn large_scores_do_not_overflow() {
    for kernels in devices() {
        for soft_cap in [None, Some(50.0)] {
            let segments = Segments::packed([37, 3]);
            let (heads, kv_heads, head_size, scale, mask) = (2, 1, 16, 0.25, Mask::Causal);
            let shape = AttentionShape { heads, kv_heads, head_size, scale, mask, soft_cap };
            let case = Case { name: format!("large scores, soft cap {soft_cap:?}"), shape, segments };
            Truth::new(&case, 100.0).check(&case, &*kernels);
        }
    }
}

/// What a key outside the mask or in another segment holds does not reach a query.
#[test]
fn masked_keys_are_not_read() {
    for kernels in devices() {
        let (lengths, width) = ([19usize, 23], 16);
        let tokens: usize = lengths.iter().sum();
        let (mask, soft_cap) = (Mask::Causal, None);
        let shape = AttentionShape { heads: 2, kv_heads: 2, head_size: 8, scale: 0.5, mask, soft_cap };
        let segments = Segments::packed(lengths);
        let mut draw = Draw::new(6);
        let [q, mut k, mut v] = [(); 3].map(|()| draw.normal(tokens * width));
        let run = |k: &[f32], v: &[f32]| {
            let tensor = |values: &[f32]| kernels.from_f32(values, &[tokens, width]).unwrap();
            let (mut o, mut lse) = (tensor(&q), kernels.empty(&[tokens, 2]).unwrap());
            kernels
                .attention(&shape, &segments, &tensor(&q), &tensor(k), &tensor(v), &mut o, &mut lse)
                .unwrap();
            kernels.to_f32(&o).unwrap()
        };
        let before = run(&k, &v);
        // The last key of the first segment: only its own query sees it.
        k[18 * width..][..width].fill(1e30);
        v[18 * width..][..width].fill(1e30);
        let after = run(&k, &v);
        for t in (0..tokens).filter(|&t| t != 18) {
            assert_eq!(before[t * width..][..width], after[t * width..][..width], "token {t}");
        }
        // Another sequence of the batch may hold anything.
        k[19 * width..].fill(f32::NAN);
        v[19 * width..].fill(f32::INFINITY);
        assert_eq!(run(&k, &v)[..19 * width], after[..19 * width], "the first segment");
        // Inside the segment, too; there the sum is taken in another order.
        for special in [f32::NAN, f32::INFINITY] {
            k[18 * width..][..width].fill(special);
            v[18 * width..][..width].fill(-special);
            let found = run(&k, &v);
            let largest = v[..18 * width].iter().fold(0.0f32, |largest, v| largest.max(v.abs()));
            let (truth, magnitude) = (widen(&before[..18 * width]), vec![f64::from(largest); 18 * width]);
            close(&format!("{special}"), &found[..18 * width], &truth, 2.0 * sum_error(18), &magnitude);
            assert!(found[18 * width..][..width].iter().all(|o| o.is_nan()), "{special} where it is seen");
        }
    }
}
