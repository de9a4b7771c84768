//! Wrong operands are refused with the operation's name, the operand's, and the axes by name.

mod common;

use std::sync::Arc;

use common::{Draw, Source, devices, weight};
use lora_sb_kernels::{
    Accum, Activation, AdamWStep, AttentionShape, Cpu, DType, Error, Kernels, Mask, Result, RopeScaling,
    RopeTable, Segments, SharedBytes, Tensor,
};

fn zeros(kernels: &dyn Kernels, shape: &[usize]) -> Tensor {
    kernels.zeros(shape).unwrap()
}

/// Checks that the message holds every one of `parts`.
#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T>, parts: &[&str]) {
    let message = result.expect_err("wrong operands are refused").to_string();
    for part in parts {
        assert!(message.contains(part), "`{message}` lacks `{part}`");
    }
}

#[test]
fn shapes() {
    for k in devices() {
        let z = |shape: &[usize]| zeros(&*k, shape);
        let replace = Accum::Replace;
        let result = k.linear(&z(&[3, 5]), &z(&[7, 4]), 1.0, replace, &mut z(&[3, 7]));
        refused(result, &["linear", "w", "[7, 4]", "N=7", "K=5"]);
        let result = k.linear(&z(&[3, 5]), &z(&[7, 5]), 1.0, replace, &mut z(&[7, 3]));
        refused(result, &["linear", "y", "[7, 3]", "T=3", "N=7"]);
        let result = k.linear(&z(&[5]), &z(&[7, 5]), 1.0, replace, &mut z(&[1, 7]));
        refused(result, &["linear", "x", "[5]", "two axes"]);
        let result = k.linear_input_gradient(&z(&[3, 6]), &z(&[7, 5]), 1.0, replace, &mut z(&[3, 5]));
        refused(result, &["linear_input_gradient", "dy", "[3, 6]", "N=7"]);
        let result = k.linear_weight_gradient(&z(&[3, 7]), &z(&[3, 5]), 1.0, replace, &mut z(&[5, 7]));
        refused(result, &["linear_weight_gradient", "dw", "[5, 7]", "K=5"]);
        refused(k.bias(&z(&[4]), &mut z(&[2, 3])), &["bias", "[4]", "N=3"]);
        let result = k.rms_norm(&z(&[2, 3]), &z(&[4]), 1e-6, &mut z(&[2, 3]), &mut z(&[2]));
        refused(result, &["rms_norm", "gain", "[4]", "D=3"]);
        let (x, gain, rstd) = (z(&[2, 3]), z(&[3]), z(&[2]));
        let result = k.rms_norm_backward(&x, &gain, &rstd, &x, replace, &mut z(&[2, 3]), Some(&mut z(&[2])));
        refused(result, &["rms_norm_backward", "dgain", "[2]", "D=3"]);
        let result = k.rms_norm_backward(&x, &gain, &rstd, &x, replace, &mut z(&[3, 2]), None);
        refused(result, &["rms_norm_backward", "[3, 2]", "T=2", "D=3"]);
        let result = k.gated_activation(Activation::Silu, &z(&[2, 3]), &z(&[2, 4]), &mut z(&[2, 3]));
        refused(result, &["gated_activation", "up", "[2, 4]", "F=3"]);
        refused(k.add(1.0, &z(&[2, 3]), &mut z(&[3, 2])), &["add", "x", "[2, 3]", "3"]);
        let mut p = [z(&[3]), z(&[2]), z(&[3])];
        let [p, m, v] = &mut p;
        refused(k.adamw(&STEP, &z(&[3]), p, m, v), &["adamw", "m", "[2]"]);
    }
}

const STEP: AdamWStep = AdamWStep {
    learning_rate: 1e-3,
    beta1: 0.9,
    beta2: 0.95,
    epsilon: 1e-8,
    weight_decay: 0.0,
    gradient_scale: 1.0,
    step: 1,
};

#[test]
fn indices_outside_their_range() {
    for k in devices() {
        let z = |shape: &[usize]| zeros(&*k, shape);
        let ids = k.from_u32(&[0, 7], &[2]).unwrap();
        refused(k.embedding(&ids, &z(&[7, 3]), &mut z(&[2, 3])), &["embedding", "id 7", "V=7"]);
        let result = k.embedding_gradient(&ids, &z(&[2, 3]), &mut z(&[7, 3]));
        refused(result, &["embedding_gradient", "id 7", "V=7"]);
        let result = k.cross_entropy(&z(&[2, 3]), &z(&[7, 3]), &ids, &z(&[2]), 8, None, None);
        refused(result, &["cross_entropy", "label 7", "V=7"]);
        refused(k.gather_rows(&ids, &z(&[7, 3]), &mut z(&[2, 3])), &["gather_rows", "row 7", "T=7"]);
        refused(k.scatter_rows(&ids, &z(&[2, 3]), &mut z(&[7, 3])), &["scatter_rows", "row 7", "T=7"]);
        let table = RopeTable::new(&*k, 1e4, &RopeScaling::Default, 4, 7).unwrap();
        refused(k.rope(&table, &ids, &mut z(&[2, 8])), &["rope", "position 7", "7"]);
        refused(k.rope_backward(&table, &ids, &mut z(&[2, 6])), &["rope_backward", "[2, 6]", "E=4"]);
        refused(RopeTable::new(&*k, 1e4, &RopeScaling::Default, 5, 7), &["rope", "E=5", "even"]);
    }
}

#[test]
fn element_types() {
    for k in devices() {
        let z = |shape: &[usize]| zeros(&*k, shape);
        let ids = k.from_u32(&[0, 1], &[2]).unwrap();
        let (mut half, _) = weight(&*k, Source::File(DType::Bf16), &Draw::new(0).normal(6), &[2, 3]);
        refused(k.sum_of_squares(&ids), &["sum_of_squares", "u32", "f32"]);
        refused(k.sum_of_squares(&half), &["sum_of_squares", "bf16", "f32"]);
        refused(k.fill(0.0, &mut half), &["fill", "x", "bf16"]);
        let result = k.linear(&half, &z(&[5, 3]), 1.0, Accum::Replace, &mut z(&[2, 5]));
        refused(result, &["linear", "x", "bf16", "f32"]);
        let result = k.linear(&z(&[2, 3]), &z(&[2, 3]), 1.0, Accum::Replace, &mut half);
        assert!(result.is_err(), "a file's elements are no output");
        refused(k.embedding(&z(&[2]), &z(&[7, 3]), &mut z(&[2, 3])), &["embedding", "ids", "f32", "u32"]);
        let result = k.cross_entropy(&z(&[2, 3]), &z(&[7, 3]), &z(&[2]), &z(&[2]), 8, None, None);
        refused(result, &["cross_entropy", "labels", "f32", "u32"]);
        refused(k.bias(&ids, &mut z(&[5, 2])), &["b", "u32", "f32"]);
    }
}

#[test]
fn attention_operands() {
    for k in devices() {
        let z = |shape: &[usize]| zeros(&*k, shape);
        let shape = AttentionShape { heads: 4, kv_heads: 2, head_size: 3, scale: 1.0, mask: Mask::Causal };
        let segments = Segments::packed([2, 3]);
        let run = |shape: &AttentionShape, q: &Tensor, kv: &Tensor| {
            k.attention(shape, &segments, q, kv, kv, &mut z(&[5, 12]), &mut z(&[5, 4]))
        };
        run(&shape, &z(&[5, 12]), &z(&[5, 6])).unwrap();
        refused(run(&shape, &z(&[4, 12]), &z(&[5, 6])), &["attention", "q", "[4, 12]", "T=5", "H*E=12"]);
        refused(run(&shape, &z(&[5, 12]), &z(&[5, 12])), &["attention", "k", "[5, 12]", "S=5", "G*E=6"]);
        let uneven = AttentionShape { heads: 3, ..shape };
        refused(run(&uneven, &z(&[5, 9]), &z(&[5, 6])), &["attention", "H=3", "G=2"]);
        refused(Segments::cached(&[(1, 4), (3, 2)]), &["attention", "3 queries", "2 keys"]);
    }
}

#[test]
fn memory() {
    for k in devices() {
        refused(k.from_f32(&[1.0, 2.0], &[3]), &["from_f32", "[3]", "2 elements"]);
        refused(zeros(&*k, &[2, 3]).reshape(&[4]), &["reshape", "[2, 3]", "4"]);
        let bytes = |count: usize| SharedBytes::new(Arc::new(vec![0u8; count]), 0..count).unwrap();
        refused(k.from_bytes(bytes(7), DType::Bf16, &[3]), &["from_bytes", "7 bytes", "bf16"]);
        refused(k.from_bytes(bytes(8), DType::F32, &[3]), &["from_bytes", "[3]", "2 elements"]);
        refused(SharedBytes::new(Arc::new(vec![0u8; 4]), 2..5), &["2..5", "4"]);
    }
    let error = Cpu::new(0).expect_err("0 threads");
    assert!(matches!(error, Error::Device { .. }) && error.hint().is_some(), "{error}");
}
