//! Attention, forward and backward.

use half::bf16;
use lora_sb_kernels::op::attention;
use lora_sb_kernels::op::elementwise::naive::soft_capped;
use lora_sb_kernels::{Attention, AttentionShape, Cpu, DType, Kernels, Mask, Memory, Segments, Tensor};

use crate::common::{DTYPES, Draw, EPS, close, devices, sum_error, widen};

/// Relative error of one rounding of a result or of a probability to the operands' type.
pub(crate) fn rounding(dtype: DType) -> f64 {
    if dtype == DType::Bf16 { f64::from(bf16::EPSILON) / 2.0 } else { 0.0 }
}

/// The nearest numbers of a type.
fn rounded(dtype: DType, values: Vec<f32>) -> Vec<f32> {
    match dtype {
        DType::Bf16 => values.into_iter().map(|value| bf16::from_f32(value).to_f32()).collect(),
        _ => values,
    }
}

pub(crate) fn tensor(kernels: &dyn Kernels, dtype: DType, values: &[f32], shape: &[usize]) -> Tensor {
    let mut tensor = kernels.empty_of(dtype, shape).unwrap();
    kernels.write_f32(&mut tensor, values).unwrap();
    tensor
}

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
    // Lengths around the edges of registers, panels, tiles and blocks, and windows that begin and end inside them.
    for length in [11, 12, 13, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 191, 255, 256, 257, 517]
    {
        for mask in [Mask::Full, Mask::Causal, Mask::Sliding { window: 100 }] {
            add("edges", (3, 1, 18), mask, None, &packed(&[length]));
        }
    }
    for window in [1, 2, 16, 127, 128, 129, 300, usize::MAX] {
        add("windows", (2, 1, 20), Mask::Sliding { window }, None, &packed(&[301, 13]));
        add(
            "windows",
            (1, 1, 7),
            Mask::Sliding { window },
            None,
            &cached(&[(70, 300), (5, 261), (129, 131)]),
        );
    }
    for head_size in [1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 48, 80, 97, 112, 256] {
        add("head sizes", (2, 1, head_size), Mask::Causal, None, &packed(&[70, 2]));
        add("head sizes", (2, 2, head_size), Mask::Full, Some(3.0), &cached(&[(9, 140)]));
    }
    for heads in [(7, 1), (8, 2), (12, 1), (40, 1), (300, 1)] {
        add("groups", (heads.0, heads.1, 8), Mask::Causal, None, &packed(&[37, 70]));
        add("groups", (heads.0, heads.1, 8), Mask::Full, None, &cached(&[(1, 150), (2, 40)]));
    }
    // More keys than one warp goes over, and heads that are larger than tiles.
    for mask in masks {
        add("long caches", (4, 2, 64), mask, None, &cached(&[(1, 600), (3, 515), (2, 256), (1, 257)]));
        add("long caches", (2, 2, 24), mask, Some(4.0), &cached(&[(20, 1000)]));
        add("large heads", (4, 2, 270), mask, Some(2.0), &cached(&[(5, 39), (1, 3)]));
        add("large heads", (2, 1, 600), mask, None, &packed(&[35, 0, 2]));
    }
    add("no tokens", (2, 1, 8), Mask::Causal, None, &packed(&[]));
    add("an empty segment", (2, 1, 8), Mask::Causal, Some(2.0), &packed(&[3, 0, 5]));
    cases
}

/// Operands of a type and, by the specification in `f64`, results with the errors allowed to them.
struct Truth {
    dtype: DType,
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
    fn new(case: &Case, dtype: DType, spread: f32) -> Self {
        let a = &case.shape;
        let (queries, keys) = (case.segments.queries(), case.segments.keys());
        let (q_size, kv_size) = (queries * a.heads * a.head_size, keys * a.kv_heads * a.head_size);
        let mut draw = Draw::new((q_size * 7 + kv_size) as u64);
        let inputs = [draw.normal(q_size), draw.normal(kv_size), draw.normal(kv_size)];
        let [q, k, v] = inputs.map(|values| rounded(dtype, values));
        let q = rounded(dtype, q.iter().map(|q| q * spread).collect());
        let d_o = rounded(dtype, draw.normal(q_size));
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
            dtype,
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
        let new = |values: &[f32], shape: &[usize]| tensor(kernels, self.dtype, values, shape);
        let q = new(&self.inputs[0], &q_shape);
        let (k, v) = (new(&self.inputs[1], &kv_shape), new(&self.inputs[2], &kv_shape));
        let nan = |shape: &[usize]| new(&vec![f32::NAN; shape.iter().product()], shape);
        let mut o = nan(&q_shape);
        let mut lse = tensor(
            kernels,
            DType::F32,
            &vec![f32::NAN; segments.queries() * a.heads],
            &[segments.queries(), a.heads],
        );
        kernels.attention(a, segments, &q, &k, &v, &mut o, &mut lse).unwrap();
        let (name, rounding) = (format!("{}, {}", case.name, self.dtype), rounding(self.dtype));
        // Of the probabilities and of the result.
        let error = self.error + 2.0 * rounding;
        close(&format!("{name}: o"), &kernels.to_f32(&o).unwrap(), &self.o, error, &self.o_magnitude);
        let lse_error = self.score_error + self.error;
        let sizes: Vec<f64> = self.lse.iter().map(|lse| 1.0 + EPS / lse_error * 4.0 * lse.abs()).collect();
        close(&format!("{name}: lse"), &kernels.to_f32(&lse).unwrap(), &self.lse, lse_error, &sizes);

        let d_o = new(&self.d_o, &q_shape);
        let (mut dq, mut dk, mut dv) = (nan(&q_shape), nan(&kv_shape), nan(&kv_shape));
        let gradients = (&mut dq, &mut dk, &mut dv);
        kernels.attention_backward(a, segments, (&q, &k, &v), &o, &lse, &d_o, gradients).unwrap();
        for (which, gradient) in [dq, dk, dv].iter().enumerate() {
            let (truth, magnitude) = (&self.gradients[which], &self.gradient_magnitudes[which]);
            let label = format!("{name}: {}", ["dq", "dk", "dv"][which]);
            // The probability, the output inside delta and the log-sum-exp each bring their own error. The output
            // has been rounded twice, the gradient of the score once, the result once; both of dv's factors are
            // the probability and the result.
            let error = 3.0 * self.error + if which == 2 { 2.0 } else { 4.0 } * rounding;
            close(&label, &kernels.to_f32(gradient).unwrap(), truth, error, magnitude);
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
    let devices = devices();
    for (case, dtype) in cases().iter().flat_map(|case| DTYPES.map(|dtype| (case, dtype))) {
        let truth = Truth::new(case, dtype, 1.0);
        devices.iter().for_each(|kernels| truth.check(case, &**kernels));
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
            for dtype in DTYPES {
                Truth::new(&case, dtype, 100.0).check(&case, &*kernels);
            }
        }
    }
}

/// Causal attention of a few heads over two sequences, one after another.
struct Pair<'a> {
    kernels: &'a dyn Kernels,
    dtype: DType,
    lengths: [usize; 2],
}

/// H = G heads of a [`Pair`], and their E.
const PAIR_HEADS: (usize, usize) = (2, 8);

impl Pair<'_> {
    fn o(&self, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
        let (tokens, (heads, head_size)) = (self.lengths.iter().sum(), PAIR_HEADS);
        let (mask, soft_cap) = (Mask::Causal, None);
        let shape = AttentionShape { heads, kv_heads: heads, head_size, scale: 0.5, mask, soft_cap };
        let segments = Segments::packed(self.lengths);
        let [q, k, v] =
            [q, k, v].map(|values| tensor(self.kernels, self.dtype, values, &[tokens, heads * head_size]));
        let mut o = self.kernels.empty_of(self.dtype, q.shape()).unwrap();
        let mut lse = self.kernels.empty(&[tokens, heads]).unwrap();
        self.kernels.attention(&shape, &segments, &q, &k, &v, &mut o, &mut lse).unwrap();
        self.kernels.to_f32(&o).unwrap()
    }
}

/// What a key outside the mask or in another segment holds does not reach a query.
#[test]
fn masked_keys_are_not_read() {
    for kernels in devices() {
        for (lengths, dtype) in
            [[19usize, 23], [147, 130]].into_iter().flat_map(|lengths| DTYPES.map(|dtype| (lengths, dtype)))
        {
            hide_keys(&Pair { kernels: &*kernels, dtype, lengths });
        }
    }
}

fn hide_keys(pair: &Pair<'_>) {
    let (first, width) = (pair.lengths[0], PAIR_HEADS.0 * PAIR_HEADS.1);
    let (tokens, last) = (pair.lengths.iter().sum::<usize>(), first - 1);
    let mut draw = Draw::new(6);
    let [q, mut k, mut v] = [(); 3].map(|()| draw.normal(tokens * width));
    let before = pair.o(&q, &k, &v);
    // The last key of the first segment: only its own query sees it.
    k[last * width..][..width].fill(1e30);
    v[last * width..][..width].fill(1e30);
    let after = pair.o(&q, &k, &v);
    for t in (0..tokens).filter(|&t| t != last) {
        assert_eq!(before[t * width..][..width], after[t * width..][..width], "token {t}");
    }
    // Another sequence of the batch may hold anything.
    k[first * width..].fill(f32::NAN);
    v[first * width..].fill(f32::INFINITY);
    assert_eq!(pair.o(&q, &k, &v)[..first * width], after[..first * width], "the first segment");
    // Inside the segment, too; there the sum is taken in another order.
    for special in [f32::NAN, f32::INFINITY] {
        k[last * width..][..width].fill(special);
        v[last * width..][..width].fill(-special);
        let found = pair.o(&q, &k, &v);
        let largest = v[..last * width].iter().fold(0.0f32, |largest, v| largest.max(v.abs()));
        let (truth, magnitude) = (widen(&before[..last * width]), vec![f64::from(largest); last * width]);
        let error = 2.0 * sum_error(last) + 2.0 * rounding(pair.dtype);
        close(&format!("{special}"), &found[..last * width], &truth, error, &magnitude);
        assert!(found[last * width..][..width].iter().all(|o| o.is_nan()), "{special} where it is seen");
    }
}

/// o, lse, dq, dk, dv of a causal sequence, the bits of its own rows alone, with others packed around it.
fn bits(threads: usize, dtype: DType, length: usize, around: [usize; 2]) -> [Vec<u32>; 5] {
    let cpu = Cpu::new(threads).unwrap();
    let (heads, kv_heads, head_size) = (3, 1, 20);
    let (mask, soft_cap) = (Mask::Sliding { window: length - 1 }, None);
    let shape = AttentionShape { heads, kv_heads, head_size, scale: 0.2, mask, soft_cap };
    let segments = Segments::packed([around[0], length, around[1]]);
    let (tokens, mut draw, mut other) = (segments.queries(), Draw::new(length as u64), Draw::new(3));
    let mut operand = |width: usize| {
        let mut values = other.normal(tokens * width);
        values[around[0] * width..][..length * width].copy_from_slice(&draw.normal(length * width));
        tensor(&cpu, dtype, &values, &[tokens, width])
    };
    let [q, d_o] = [(); 2].map(|()| operand(heads * head_size));
    let [k, v] = [(); 2].map(|()| operand(kv_heads * head_size));
    let like = |tensor: &Tensor| cpu.empty_of(dtype, tensor.shape()).unwrap();
    let (mut o, mut lse) = (like(&q), cpu.empty(&[tokens, heads]).unwrap());
    let (mut dq, mut dk, mut dv) = (like(&q), like(&k), like(&v));
    cpu.attention(&shape, &segments, &q, &k, &v, &mut o, &mut lse).unwrap();
    let gradients = (&mut dq, &mut dk, &mut dv);
    cpu.attention_backward(&shape, &segments, (&q, &k, &v), &o, &lse, &d_o, gradients).unwrap();
    [o, lse, dq, dk, dv].map(|tensor| {
        let (values, width) = (cpu.to_f32(&tensor).unwrap(), tensor.shape()[1]);
        assert!(values.iter().all(|value| value.is_finite()));
        values[around[0] * width..][..length * width].iter().map(|value| value.to_bits()).collect()
    })
}

/// One long sequence is cut into other tasks for several threads than for one, and beside long sequences than alone.
#[test]
fn threads_and_neighbours_leave_the_bits() {
    for dtype in DTYPES {
        for length in [2, 129, 401] {
            let alone = bits(1, dtype, length, [0, 0]);
            for (threads, around) in [(2, [0, 0]), (5, [0, 0]), (1, [37, 3]), (3, [1, 900]), (5, [450, 77])] {
                let found = bits(threads, dtype, length, around);
                let same = alone.iter().zip(&found).map(|(alone, found)| alone == found).collect::<Vec<_>>();
                assert_eq!(same, [true; 5], "{dtype}, length {length}, {threads} threads, {around:?} around");
            }
        }
    }
}

#[test]
fn operands_of_different_types_are_refused() {
    devices().iter().for_each(|kernels| refuse_different_types(&**kernels));
}

fn refuse_different_types(kernels: &dyn Kernels) {
    let segments = Segments::packed([3]);
    let (heads, kv_heads, head_size, scale, mask) = (1, 1, 2, 1.0, Mask::Full);
    let shape = AttentionShape { heads, kv_heads, head_size, scale, mask, soft_cap: None };
    let new = |dtype| tensor(kernels, dtype, &[0.5; 6], &[3, 2]);
    let (q, k, mut lse) = (new(DType::Bf16), new(DType::F32), kernels.empty(&[3, 1]).unwrap());
    let mut o = new(DType::Bf16);
    let message = kernels.attention(&shape, &segments, &q, &k, &q, &mut o, &mut lse).unwrap_err().to_string();
    assert_eq!(message, "attention: k holds f32, expected bf16, as q");
    kernels.attention(&shape, &segments, &q, &q, &q, &mut o, &mut lse).unwrap();
    let (mut dq, mut dk, mut dv) = (new(DType::Bf16), new(DType::Bf16), new(DType::F32));
    let gradients = (&mut dq, &mut dk, &mut dv);
    let result = kernels.attention_backward(&shape, &segments, (&q, &q, &q), &o, &lse, &q, gradients);
    assert_eq!(result.unwrap_err().to_string(), "attention_backward: dv holds f32, expected bf16, as q");
}
