//! Attention where a GPU cuts segments, splits their keys and adds parts up.

use lora_sb_kernels::cuda::ThreadOrder;
use lora_sb_kernels::{AttentionShape, Cuda, DType, Kernels, Mask, Memory, Place, Segments, Tensor};

use crate::attention::{rounding, tensor};
use crate::common::{DTYPES, Draw, close, devices, gpu, sum_error, widen};

/// o and lse of random operands, in whose keys and values `alter` may change rows.
fn forward(
    kernels: &dyn Kernels,
    dtype: DType,
    shape: &AttentionShape,
    segments: &Segments,
    alter: impl Fn(&mut [f32], usize),
) -> [Vec<f32>; 2] {
    let (width, kv_width) = (shape.heads * shape.head_size, shape.kv_heads * shape.head_size);
    let mut draw = Draw::new(9);
    let q = draw.normal(segments.queries() * width);
    let q = tensor(kernels, dtype, &q, &[segments.queries(), width]);
    let [k, v] = [(); 2].map(|()| {
        let mut values = draw.normal(segments.keys() * kv_width);
        alter(&mut values, kv_width);
        tensor(kernels, dtype, &values, &[segments.keys(), kv_width])
    });
    let mut o = kernels.empty_of(dtype, q.shape()).unwrap();
    let mut lse = kernels.empty(&[segments.queries(), shape.heads]).unwrap();
    kernels.attention(shape, segments, &q, &k, &v, &mut o, &mut lse).unwrap();
    [kernels.to_f32(&o).unwrap(), kernels.to_f32(&lse).unwrap()]
}

/// In a cache whose keys are split between blocks, what only the first query sees does not reach the others.
#[test]
fn keys_behind_a_window_are_not_read() {
    let (queries, keys, window, heads, head_size) = (3, 700, 520, 4, 24);
    let (scale, mask, soft_cap) = (0.2, Mask::Sliding { window }, None);
    let shape = AttentionShape { heads, kv_heads: 2, head_size, scale, mask, soft_cap };
    let segments = Segments::cached(&[(queries, keys)]).unwrap();
    let first = keys - queries + 1 - window;
    for (kernels, dtype) in devices().iter().flat_map(|kernels| DTYPES.map(|dtype| (kernels, dtype))) {
        let found = |special: f32| {
            let hide = |values: &mut [f32], width: usize| values[first * width..][..width].fill(special);
            forward(&**kernels, dtype, &shape, &segments, hide)
        };
        let before = found(0.5);
        for special in [f32::NAN, f32::INFINITY] {
            let after = found(special);
            for (which, width) in [(0, heads * head_size), (1, heads)] {
                let truth = widen(&before[which][width..]);
                let magnitude = vec![10.0; truth.len()];
                let error = 2.0 * sum_error(window) + 2.0 * rounding(dtype);
                close(&format!("{special}"), &after[which][width..], &truth, error, &magnitude);
                assert!(after[which][..width].iter().all(|value| !value.is_finite()), "{special}, seen");
            }
        }
    }
}

/// Keys lie anywhere in a store: the bits are those of the same keys one segment after another.
#[test]
fn keys_in_a_store() {
    let held = [(1, 5..41), (4, 60..77), (2, 100..400)];
    let lengths = held.clone().map(|(queries, keys)| (queries, keys.len()));
    let shape =
        |mask| AttentionShape { heads: 4, kv_heads: 2, head_size: 8, scale: 0.4, mask, soft_cap: None };
    for (kernels, dtype) in devices().iter().flat_map(|kernels| DTYPES.map(|dtype| (kernels, dtype))) {
        for mask in [Mask::Full, Mask::Causal, Mask::Sliding { window: 20 }] {
            let row = |i: usize, column: usize| ((i * 37 + column * 11) % 19) as f32 / 10.0 - 0.9;
            let store = |values: &mut [f32], width: usize| {
                values.fill(f32::NAN);
                for (n, at) in held.iter().flat_map(|segment| segment.1.clone()).enumerate() {
                    (0..width).for_each(|column| values[at * width + column] = row(n, column));
                }
            };
            let close_together = |values: &mut [f32], width: usize| {
                values.iter_mut().enumerate().for_each(|(i, x)| *x = row(i / width, i % width));
            };
            let within = Segments::within(450, &held).unwrap();
            let found = forward(&**kernels, dtype, &shape(mask), &within, store);
            let cached = Segments::cached(&lengths).unwrap();
            let truth = forward(&**kernels, dtype, &shape(mask), &cached, close_together);
            assert!(truth[0].iter().all(|o| o.is_finite()));
            assert_eq!(found, truth, "{mask:?}, {dtype}");
        }
    }
}

/// o, lse, dq, dk, dv of packed sequences on a device.
fn results(kernels: &dyn Kernels, dtype: DType, shape: &AttentionShape, lengths: &[usize]) -> [Vec<f32>; 5] {
    let segments = Segments::packed(lengths.iter().copied());
    let (tokens, mut draw) = (segments.queries(), Draw::new(4));
    let mut operand = |heads: usize| {
        let width = heads * shape.head_size;
        tensor(kernels, dtype, &draw.normal(tokens * width), &[tokens, width])
    };
    let [q, d_o] = [(); 2].map(|()| operand(shape.heads));
    let [k, v] = [(); 2].map(|()| operand(shape.kv_heads));
    let like = |tensor: &Tensor| kernels.empty_of(dtype, tensor.shape()).unwrap();
    let (mut o, mut lse) = (like(&q), kernels.empty(&[tokens, shape.heads]).unwrap());
    let (mut dq, mut dk, mut dv) = (like(&q), like(&k), like(&v));
    kernels.attention(shape, &segments, &q, &k, &v, &mut o, &mut lse).unwrap();
    let gradients = (&mut dq, &mut dk, &mut dv);
    kernels.attention_backward(shape, &segments, (&q, &k, &v), &o, &lse, &d_o, gradients).unwrap();
    [o, lse, dq, dk, dv].map(|tensor| kernels.to_f32(&tensor).unwrap())
}

/// On a GPU, the bits do not depend on the order in which threads run.
#[test]
fn a_gpu_repeats_its_bits() {
    let orders = [ThreadOrder::Forward, ThreadOrder::Backward].map(|order| Cuda::emulated(order).unwrap());
    let [Some(forward), Some(backward)] = orders else { return };
    for (heads, kv_heads, head_size) in
        [(4, 1, 64), (24, 1, 20), (2, 2, 96), (2, 1, 128), (2, 1, 256), (1, 1, 300)]
    {
        let (scale, mask, soft_cap) = (0.1, Mask::Sliding { window: 90 }, None);
        let shape = AttentionShape { heads, kv_heads, head_size, scale, mask, soft_cap };
        for dtype in DTYPES {
            let found = results(&forward, dtype, &shape, &[131, 5]);
            assert_eq!(found, results(&backward, dtype, &shape, &[131, 5]), "{shape:?}, {dtype}");
            assert_eq!(found, results(&forward, dtype, &shape, &[131, 5]), "{shape:?}, {dtype}, again");
        }
    }
}

/// What the plan counts is enough for any cut of a batch's tokens.
#[test]
fn a_gpu_takes_no_more_than_planned() {
    let cases: [(usize, usize, usize, &[usize]); 5] = [
        (4, 2, 8, &[70, 1, 9]),
        (48, 1, 8, &[100]),
        (48, 1, 8, &[50, 50]),
        (64, 2, 8, &[97, 3]),
        (2, 1, 260, &[20, 9]),
    ];
    for (heads, kv_heads, head_size, lengths) in cases {
        for dtype in DTYPES {
            let Some(gpu) = gpu() else { return };
            let (scale, mask, soft_cap) = (0.1, Mask::Causal, None);
            let shape = AttentionShape { heads, kv_heads, head_size, scale, mask, soft_cap };
            let tokens: usize = lengths.iter().sum();
            let planned = Place::Cuda.attention_scratch_bytes(dtype, &shape, tokens);
            results(&gpu, dtype, &shape, lengths);
            let operands =
                (4 * heads + 4 * kv_heads) * head_size * tokens * dtype.size() + 4 * heads * tokens;
            let found = gpu.usage().peak_bytes;
            assert!(found <= planned + operands + 9 * 512, "{shape:?}, {dtype}: {found}, planned {planned}");
        }
    }
}
