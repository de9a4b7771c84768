//! Wrong operands are refused with the operation's name, the operand's, and the axes by name.

mod common;

use std::sync::Arc;

use common::{Draw, Source, devices, weight};
use lora_sb_kernels::{
    Accum, Activation, AdamWStep, AttentionShape, Cpu, DType, Error, Kernels, Mask, Result, RmsGain,
    RopeScaling, RopeTable, Segments, SharedBytes, Tensor,
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
        let w = RmsGain::Weight;
        let result = k.rms_norm(&z(&[2, 3]), &z(&[4]), w, 1e-6, &mut z(&[2, 3]), &mut z(&[2]));
        refused(result, &["rms_norm", "gain", "[4]", "D=3"]);
        let result =
            k.add_rms_norm(&z(&[3, 3]), &mut z(&[2, 3]), &z(&[3]), w, 1e-6, &mut z(&[2, 3]), &mut z(&[2]));
        refused(result, &["add_rms_norm", "f", "[3, 3]", "T=2", "D=3"]);
        let (x, gain, rstd) = (z(&[2, 3]), z(&[3]), z(&[2]));
        let result =
            k.rms_norm_backward(&x, &gain, w, &rstd, &x, replace, &mut z(&[2, 3]), Some(&mut z(&[2])));
        refused(result, &["rms_norm_backward", "dgain", "[2]", "D=3"]);
        let result = k.rms_norm_backward(&x, &gain, w, &rstd, &x, replace, &mut z(&[3, 2]), None);
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
fn shapes_of_layer_norm() {
    for k in devices() {
        let z = |shape: &[usize]| zeros(&*k, shape);
        let run = |gain: &[usize], shift: &[usize], mean: &[usize]| {
            let (mut y, mut rstd) = (z(&[2, 3]), z(&[2]));
            k.layer_norm(&z(&[2, 3]), &z(gain), &z(shift), 1e-6, &mut y, &mut z(mean), &mut rstd)
        };
        run(&[3], &[3], &[2]).unwrap();
        refused(run(&[4], &[3], &[2]), &["layer_norm", "gain", "[4]", "D=3"]);
        refused(run(&[3], &[1], &[2]), &["layer_norm", "shift", "[1]", "D=3"]);
        refused(run(&[3], &[3], &[3]), &["layer_norm", "mean", "[3]", "T=2"]);
        let (mut sum, mut y, mut mean, mut rstd) = (z(&[2, 3]), z(&[2, 3]), z(&[2]), z(&[2]));
        let (f, gain, shift) = (z(&[2, 4]), z(&[3]), z(&[3]));
        let result = k.add_layer_norm(&f, &mut sum, &gain, &shift, 1e-6, &mut y, &mut mean, &mut rstd);
        refused(result, &["add_layer_norm", "f", "[2, 4]", "T=2", "D=3"]);
        let (x, gain, row) = (z(&[2, 3]), z(&[3]), z(&[2]));
        let run = |dy: &[usize], dx: &[usize], dgain: &[usize], dshift: &[usize]| {
            let (mut dgain, mut dshift) = (z(dgain), z(dshift));
            let (dy, mut dx) = (z(dy), z(dx));
            let wanted = (Some(&mut dgain), Some(&mut dshift));
            k.layer_norm_backward(&x, &gain, (&row, &row), &dy, Accum::Replace, &mut dx, wanted.0, wanted.1)
        };
        run(&[2, 3], &[2, 3], &[3], &[3]).unwrap();
        refused(run(&[3, 3], &[2, 3], &[3], &[3]), &["layer_norm_backward", "dy", "[3, 3]", "T=2"]);
        refused(run(&[2, 3], &[3, 2], &[3], &[3]), &["layer_norm_backward", "dx", "[3, 2]", "T=2"]);
        refused(run(&[2, 3], &[2, 3], &[2], &[3]), &["layer_norm_backward", "dgain", "[2]", "D=3"]);
        refused(run(&[2, 3], &[2, 3], &[3], &[4]), &["layer_norm_backward", "dshift", "[4]", "D=3"]);
    }
}

#[test]
fn shapes_of_activations() {
    for k in devices() {
        let z = |shape: &[usize]| zeros(&*k, shape);
        let result = k.activation(Activation::Gelu, &z(&[2, 3]), &mut z(&[6]));
        refused(result, &["activation", "y", "[6]", "2", "3"]);
        let result = k.activation_backward(Activation::Gelu, &mut z(&[2, 3]), &z(&[3, 2]));
        refused(result, &["activation_backward", "dy", "[3, 2]"]);
    }
}

#[test]
fn ranges_of_columns() {
    for k in devices() {
        let z = |shape: &[usize]| zeros(&*k, shape);
        refused(
            k.take_columns(&z(&[2, 5]), 3, &mut z(&[2, 3])),
            &["take_columns", "3 columns from 3", "W=5"],
        );
        refused(k.put_columns(&z(&[2, 3]), 3, &mut z(&[2, 5])), &["put_columns", "3 columns from 3", "W=5"]);
        let result = k.take_columns(&z(&[2, 5]), usize::MAX, &mut z(&[2, 3]));
        refused(result, &["take_columns", "W=5"]);
        refused(k.put_columns(&z(&[3, 2]), 0, &mut z(&[2, 5])), &["put_columns", "y", "[3, 2]", "T=2"]);
    }
}

#[test]
fn copies_of_rows() {
    for k in devices() {
        let rows = |rows: &[u32]| k.from_u32(rows, &[rows.len()]).unwrap();
        let run = |from: &[u32], to: &[u32], y: &[usize]| {
            k.copy_rows(&rows(from), &zeros(&*k, &[3, 2]), &rows(to), &mut zeros(&*k, y))
        };
        run(&[2, 2, 0], &[6, 1, 4], &[7, 2]).unwrap();
        refused(run(&[3], &[0], &[7, 2]), &["copy_rows", "row 3", "S=3"]);
        refused(run(&[0], &[7], &[7, 2]), &["copy_rows", "row 7", "P=7"]);
        refused(run(&[0, 1], &[6], &[7, 2]), &["copy_rows", "to", "[1]", "N=2"]);
        refused(run(&[0, 1, 2], &[6, 5, 6], &[7, 2]), &["copy_rows", "row 6", "twice"]);
        refused(run(&[0], &[0], &[7, 3]), &["copy_rows", "y", "[7, 3]", "D=2"]);
    }
}

#[test]
fn indices_outside_their_range() {
    for k in devices() {
        let z = |shape: &[usize]| zeros(&*k, shape);
        let ids = k.from_u32(&[0, 7], &[2]).unwrap();
        refused(k.embedding(&ids, &z(&[7, 3]), &mut z(&[2, 3])), &["embedding", "id 7", "V=7"]);
        let result = k.embedding_gradient(&ids, &z(&[2, 3]), &mut z(&[7, 3]));
        refused(result, &["embedding_gradient", "id 7", "V=7"]);
        let result = k.cross_entropy(&z(&[2, 3]), &z(&[7, 3]), &ids, &z(&[2]), None, 8, None, None);
        refused(result, &["cross_entropy", "label 7", "V=7"]);
        refused(k.gather_rows(&ids, &z(&[7, 3]), &mut z(&[2, 3])), &["gather_rows", "row 7", "T=7"]);
        refused(k.scatter_rows(&ids, &z(&[2, 3]), &mut z(&[7, 3])), &["scatter_rows", "row 7", "T=7"]);
        let table = RopeTable::new(&*k, 1e4, &RopeScaling::Default, 4, 4, 7).unwrap();
        refused(k.rope(&table, &ids, &mut z(&[2, 8])), &["rope", "position 7", "7"]);
        refused(k.rope_backward(&table, &ids, &mut z(&[2, 6])), &["rope_backward", "[2, 6]", "E=4"]);
        for rotary_size in [0, 5, 8] {
            let result = RopeTable::new(&*k, 1e4, &RopeScaling::Default, 7, rotary_size, 7);
            refused(result, &["rope", &format!("U={rotary_size}"), "E=7", "even"]);
        }
    }
}

#[test]
fn element_types() {
    for k in devices() {
        let z = |shape: &[usize]| zeros(&*k, shape);
        let ids = k.from_u32(&[0, 1], &[2]).unwrap();
        let (mut half, _) = weight(&*k, Source::File(DType::Bf16), &Draw::new(0).normal(6), &[2, 3]);
        refused(k.sum_of_squares(&ids), &["sum_of_squares", "u32", "f32"]);
        refused(k.fill(0.0, &mut half), &["fill", "x", "bf16"]);
        let indices = k.from_u32(&[0; 6], &[2, 3]).unwrap();
        let result = k.linear(&indices, &z(&[5, 3]), 1.0, Accum::Replace, &mut z(&[2, 5]));
        refused(result, &["linear", "x", "u32", "f32, bf16 or f16"]);
        let result = k.linear(&z(&[2, 3]), &z(&[2, 3]), 1.0, Accum::Replace, &mut half);
        assert!(result.is_err(), "a file's elements are no output");
        refused(k.embedding(&z(&[2]), &z(&[7, 3]), &mut z(&[2, 3])), &["embedding", "ids", "f32", "u32"]);
        let result = k.cross_entropy(&z(&[2, 3]), &z(&[7, 3]), &z(&[2]), &z(&[2]), None, 8, None, None);
        refused(result, &["cross_entropy", "labels", "f32", "u32"]);
        refused(k.bias(&ids, &mut z(&[5, 2])), &["b", "u32", "f32"]);
    }
}

#[test]
fn attention_operands() {
    for k in devices() {
        let z = |shape: &[usize]| zeros(&*k, shape);
        let shape = AttentionShape {
            heads: 4,
            kv_heads: 2,
            head_size: 3,
            scale: 1.0,
            mask: Mask::Causal,
            soft_cap: None,
        };
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
    let many = Cpu::new(100_000).expect_err("100,000 threads").to_string();
    assert!(many.contains("100000 threads") && many.contains("1024"), "{many}");
    let error = Cpu::new(0).expect_err("0 threads");
    assert!(matches!(error, Error::Device { .. }) && error.hint().is_some(), "{error}");
}

#[test]
fn operands_of_losses_channels_and_dropout() {
    for k in devices() {
        let z = |shape: &[usize]| zeros(&*k, shape);
        let ids = k.from_u32(&[0, 7], &[2]).unwrap();
        let result = k.cross_entropy_of_logits(&mut z(&[2, 7]), &ids, &z(&[2]));
        refused(result, &["cross_entropy_of_logits", "label 7", "C=7"]);
        let result = k.cross_entropy_of_logits(&mut z(&[3, 8]), &ids, &z(&[3]));
        refused(result, &["cross_entropy_of_logits", "labels", "[2]", "N=3"]);
        let result = k.cross_entropy_of_logits(&mut z(&[2, 8]), &ids, &z(&[2, 1]));
        refused(result, &["cross_entropy_of_logits", "weights", "[2, 1]", "N=2"]);
        let result = k.squared_error(&mut z(&[3]), &z(&[2]), &z(&[3]));
        refused(result, &["squared_error", "targets", "[2]", "N=3"]);
        let result = k.squared_error(&mut z(&[3, 1]), &z(&[3]), &z(&[3]));
        refused(result, &["squared_error", "z", "[3, 1]", "N=3"]);

        refused(k.scale_channels(&z(&[4]), &mut z(&[2, 3])), &["scale_channels", "c", "[4]", "N=3"]);
        refused(k.scale_channels(&ids, &mut z(&[3, 2])), &["c", "u32", "f32"]);
        let result = k.channel_products(&z(&[2, 3]), &z(&[3, 3]), Accum::Add, &mut z(&[3]));
        refused(result, &["channel_products", "b", "[3, 3]", "T=2", "N=3"]);
        let result = k.channel_products(&z(&[2, 3]), &z(&[2, 3]), Accum::Add, &mut z(&[2]));
        refused(result, &["channel_products", "out", "[2]", "N=3"]);
        let result = k.row_products(&z(&[2, 3]), &z(&[2, 4]), 1.0, Accum::Add, &mut z(&[2]));
        refused(result, &["row_products", "b", "[2, 4]", "N=2", "K=3"]);
        let result = k.row_products(&z(&[2, 3]), &z(&[2, 3]), 1.0, Accum::Add, &mut z(&[3]));
        refused(result, &["row_products", "out", "[3]", "N=2"]);

        for rate in [-0.1, 1.0, 1.5, f32::NAN, f32::INFINITY] {
            let result = k.dropout(rate, 1, &z(&[2]), Accum::Replace, &mut z(&[2]));
            refused(result, &["dropout", &format!("rate of {rate}"), "below 1"]);
        }
        let result = k.dropout(0.5, 1, &z(&[2, 3]), Accum::Replace, &mut z(&[3, 2]));
        refused(result, &["dropout", "x", "[2, 3]"]);
    }
}

#[test]
fn soft_caps() {
    for k in devices() {
        let z = |shape: &[usize]| zeros(&*k, shape);
        let (labels, segments) = (k.from_u32(&[0, 1], &[2]).unwrap(), Segments::packed([2]));
        for cap in [0.0, -30.0, f32::NAN, f32::INFINITY] {
            let parts = |op| [op, "soft cap of", "positive"];
            refused(k.soft_cap(cap, &mut z(&[2])), &parts("soft_cap"));
            let result =
                k.cross_entropy(&z(&[2, 3]), &z(&[7, 3]), &labels, &z(&[2]), Some(cap), 8, None, None);
            refused(result, &parts("cross_entropy"));
            let (heads, kv_heads, head_size, mask) = (1, 1, 3, Mask::Causal);
            let soft_cap = Some(cap);
            let shape = AttentionShape { heads, kv_heads, head_size, scale: 1.0, mask, soft_cap };
            let x = z(&[2, 3]);
            let result = k.attention(&shape, &segments, &x, &x, &x, &mut z(&[2, 3]), &mut z(&[2, 1]));
            refused(result, &parts("attention"));
            let mut gradients = [z(&[2, 3]), z(&[2, 3]), z(&[2, 3])];
            let [dq, dk, dv] = &mut gradients;
            let lse = z(&[2, 1]);
            let result = k.attention_backward(&shape, &segments, (&x, &x, &x), &x, &lse, &x, (dq, dk, dv));
            refused(result, &parts("attention_backward"));
        }
    }
}
