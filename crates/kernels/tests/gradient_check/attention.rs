//! Attention under every mask, with and without a soft cap.

use lora_sb_kernels::op::attention;
use lora_sb_kernels::{AttentionShape, Mask, Segments};

use crate::check;
use crate::common::Draw;

#[test]
fn attention_of_queries_keys_and_values() {
    let packed = |lengths: &[usize]| Segments::packed(lengths.iter().copied());
    let cached = |lengths: &[(usize, usize)]| Segments::cached(lengths).unwrap();
    let sliding = |window| Mask::Sliding { window };
    let cases = [
        ("one token", Mask::Causal, (1, 1, 2), packed(&[1])),
        ("full", Mask::Full, (2, 2, 3), packed(&[5])),
        ("causal", Mask::Causal, (2, 2, 3), packed(&[7])),
        ("sliding 1", sliding(1), (2, 1, 3), packed(&[5])),
        ("sliding 3", sliding(3), (2, 2, 1), packed(&[7])),
        ("grouped 2:1", Mask::Causal, (4, 2, 3), packed(&[5])),
        ("grouped 4:1", Mask::Full, (4, 1, 2), packed(&[4])),
        ("segments", Mask::Causal, (2, 1, 3), packed(&[3, 1, 5, 1])),
        ("segments, full", Mask::Full, (2, 2, 2), packed(&[1, 4, 2])),
        ("segments, sliding", sliding(2), (3, 1, 2), packed(&[4, 1, 3])),
        ("cached", Mask::Causal, (2, 1, 3), cached(&[(2, 5)])),
        ("cached segments", Mask::Causal, (2, 2, 2), cached(&[(1, 4), (3, 3), (2, 6)])),
        ("cached, sliding", sliding(3), (2, 1, 2), cached(&[(2, 6), (1, 2)])),
        ("cached, full", Mask::Full, (2, 1, 2), cached(&[(1, 3), (2, 4)])),
    ];
    let caps = [None, Some(0.7), Some(50.0)];
    for ((name, mask, (heads, kv_heads, head_size), segments), soft_cap) in
        cases.iter().flat_map(|case| caps.map(|cap| (case, cap)))
    {
        let (heads, kv_heads, head_size, mask) = (*heads, *kv_heads, *head_size, *mask);
        let a = AttentionShape { heads, kv_heads, head_size, scale: 0.6, mask, soft_cap };
        let (q_size, kv_size) =
            (segments.queries() * heads * head_size, segments.keys() * kv_heads * head_size);
        let mut draw = Draw::new((q_size * 1000 + kv_size) as u64);
        let inputs = [draw.normal_f64(q_size), draw.normal_f64(kv_size), draw.normal_f64(kv_size)];
        let run = |i: &[Vec<f64>]| {
            let (mut o, mut lse) = (vec![f64::NAN; q_size], vec![f64::NAN; segments.queries() * heads]);
            attention::naive::forward(&a, segments, (&i[0], &i[1], &i[2]), &mut o, &mut lse);
            (o, lse)
        };
        check(&format!("attention, {name}, soft cap {soft_cap:?}"), &inputs, &|i| run(i).0, &|i, d_o| {
            let (o, lse) = run(i);
            let [mut dq, mut dk, mut dv] =
                [vec![f64::NAN; q_size], vec![f64::NAN; kv_size], vec![f64::NAN; kv_size]];
            let gradients = (&mut dq[..], &mut dk[..], &mut dv[..]);
            attention::naive::backward(&a, segments, (&i[0], &i[1], &i[2]), &o, &lse, d_o, gradients);
            vec![dq, dk, dv]
        });
    }
}
