//! An operand that lies on another device is refused, each by itself: the processor's on a GPU, a GPU's on the processor,
//! and one GPU's on another.

mod common;

use common::gpu;
use lora_sb_kernels::{
    Accum, Activation, AdamWStep, AttentionShape, Cpu, Error, Extra, GroupLayer, Kernels, LatentBackward,
    LatentPart, Mask, Memory, Result, RmsGain, RopeScaling, RopeTable, Rows, Segments, Tensor,
};

/// Makes the operands of one call, of zeros.
struct Operands<'a> {
    own: &'a dyn Kernels,
    other: &'a dyn Kernels,
    /// Which of them lies on the other device.
    foreign: usize,
    made: usize,
}

impl Operands<'_> {
    fn z(&mut self, shape: &[usize]) -> Tensor {
        let place = if self.made == self.foreign { self.other } else { self.own };
        self.made += 1;
        place.zeros(shape).unwrap()
    }
}

type Call = fn(&dyn Kernels, &mut Operands<'_>) -> Result<()>;

/// Checks that `call` refuses every one of its operands on another device, and takes them where none is.
fn check(name: &str, call: Call) {
    let (Some(first), Some(second)) = (gpu(), gpu()) else { return };
    let cpu = Cpu::new(1).unwrap();
    let pairs: [[&dyn Kernels; 2]; 3] = [[&cpu, &first], [&first, &cpu], [&first, &second]];
    for [own, other] in pairs {
        for foreign in 0.. {
            let mut operands = Operands { own, other, foreign, made: 0 };
            let result = call(own, &mut operands);
            let case = format!("{name}, operand {foreign} of {} on {}", operands.made, own.name());
            match result {
                Ok(()) if foreign >= operands.made => break,
                Err(Error::Place { expected, .. }) if foreign < operands.made => {
                    assert!(own.name().starts_with(&expected), "{case}: {expected}");
                }
                other => panic!("{case}: {other:?}"),
            }
        }
    }
}

macro_rules! refuses {
    ($($operation:ident: $call:expr;)*) => {
        $(#[test]
        fn $operation() {
            check(stringify!($operation), $call);
        })*
    };
}

const SILU: Activation = Activation::Silu;
const ADD: Accum = Accum::Add;
const REPLACE: Accum = Accum::Replace;

const STEP: AdamWStep = AdamWStep {
    learning_rate: 1e-3,
    beta1: 0.9,
    beta2: 0.95,
    epsilon: 1e-8,
    weight_decay: 0.0,
    gradient_scale: 1.0,
    step: 1,
};

refuses! {
    to_f32: |k, o| k.to_f32(&o.z(&[2])).map(drop);
    write_f32: |k, o| k.write_f32(&mut o.z(&[2]), &[1.0, 2.0]);
    cast: |k, o| k.cast(&o.z(&[2]), &mut o.z(&[2]));
    add: |k, o| k.add(0.5, &o.z(&[2]), &mut o.z(&[2]));
    fill: |k, o| k.fill(0.5, &mut o.z(&[2]));
    scaled_sign: |k, o| k.scaled_sign(0.5, &mut o.z(&[2]));
    scale: |k, o| k.scale(0.5, &mut o.z(&[2]));
    soft_cap: |k, o| k.soft_cap(0.5, &mut o.z(&[2]));
    activation: |k, o| k.activation(SILU, &o.z(&[2]), &mut o.z(&[2]));
    activation_backward: |k, o| k.activation_backward(SILU, &mut o.z(&[2]), &o.z(&[2]));
    gated_activation: |k, o| k.gated_activation(SILU, &o.z(&[2, 3]), &o.z(&[2, 3]), &mut o.z(&[2, 3]));
    gated_activation_backward: |k, o| {
        k.gated_activation_backward(SILU, &mut o.z(&[2, 3]), &mut o.z(&[2, 3]), &o.z(&[2, 3]))
    };
    dropout: |k, o| k.dropout(0.5, 1, &o.z(&[2]), REPLACE, &mut o.z(&[2]));
    adamw: |k, o| k.adamw(&STEP, &o.z(&[2]), &mut o.z(&[2]), &mut o.z(&[2]), &mut o.z(&[2]));
    sum_of_squares: |k, o| k.sum_of_squares(&o.z(&[2])).map(drop);
    sums_of_squares: |k, o| k.sums_of_squares(&[&o.z(&[2]), &o.z(&[0]), &o.z(&[3])]).map(drop);
    squared_error: |k, o| k.squared_error(&mut o.z(&[2]), &o.z(&[2]), &o.z(&[2])).map(drop);
    bias: |k, o| k.bias(&o.z(&[3]), &mut o.z(&[2, 3]));
    bias_gradient: |k, o| k.bias_gradient(&o.z(&[2, 3]), &mut o.z(&[3]));
    scale_channels: |k, o| k.scale_channels(&o.z(&[3]), &mut o.z(&[2, 3]));
    channel_products: |k, o| k.channel_products(&o.z(&[2, 3]), &o.z(&[2, 3]), ADD, &mut o.z(&[3]));
    row_products: |k, o| k.row_products(&o.z(&[2, 3]), &o.z(&[2, 3]), 0.5, ADD, &mut o.z(&[2]));
}

refuses! {
    linear: |k, o| k.linear(&o.z(&[2, 3]), &o.z(&[5, 3]), 0.5, ADD, &mut o.z(&[2, 5]));
    linear_fused: |k, o| {
        let (bias, h, b) = (o.z(&[5]), o.z(&[2, 1]), o.z(&[5, 1]));
        let extra = Extra { bias: Some(&bias), term: Some((&h, &b)) };
        k.linear_fused(&o.z(&[2, 3]), &o.z(&[5, 3]), extra, REPLACE, &mut o.z(&[2, 5]))
    };
    linear_input_gradient: |k, o| {
        k.linear_input_gradient(&o.z(&[2, 5]), &o.z(&[5, 3]), 0.5, ADD, &mut o.z(&[2, 3]))
    };
    linear_input_gradient_fused: |k, o| {
        let (h, a) = (o.z(&[2, 1]), o.z(&[1, 3]));
        k.linear_input_gradient_fused(&o.z(&[2, 5]), &o.z(&[5, 3]), Some((&h, &a)), ADD, &mut o.z(&[2, 3]))
    };
    linear_weight_gradient: |k, o| {
        k.linear_weight_gradient(&o.z(&[2, 5]), &o.z(&[2, 3]), 0.5, ADD, &mut o.z(&[5, 3]))
    };
    linear_group: |k, o| {
        let (weight, bias, a, r, b) = (o.z(&[5, 3]), o.z(&[5]), o.z(&[2, 3]), o.z(&[2, 2]), o.z(&[5, 2]));
        let latent = Some(LatentPart { a: &a, r: &r, b: &b, scale: 0.5 });
        let layer = GroupLayer { weight: &weight, bias: Some(&bias), latent };
        k.linear_group(&o.z(&[2, 3]), &[layer], REPLACE, &mut [&mut o.z(&[2, 5])]).map(drop)
    };
    linear_group_backward: |k, o| {
        let (weight, a, r, b) = (o.z(&[5, 3]), o.z(&[2, 3]), o.z(&[2, 2]), o.z(&[5, 2]));
        let layer = GroupLayer { weight: &weight, bias: None, latent: Some(LatentPart { a: &a, r: &r, b: &b, scale: 0.5 }) };
        let (u, mut gradient, mut dx) = (o.z(&[2, 2]), o.z(&[2, 2]), o.z(&[2, 3]));
        let latent = Some(LatentBackward { u: &u, gradient: &mut gradient });
        k.linear_group_backward(&[&o.z(&[2, 5])], &[layer], &mut [latent], Some((&mut dx, ADD)))
    };
}

const HEADS: AttentionShape =
    AttentionShape { heads: 2, kv_heads: 1, head_size: 4, scale: 0.5, mask: Mask::Causal, soft_cap: None };

refuses! {
    attention: |k, o| {
        let (q, key, value) = (o.z(&[2, 8]), o.z(&[2, 4]), o.z(&[2, 4]));
        k.attention(&HEADS, &Segments::packed([2]), &q, &key, &value, &mut o.z(&[2, 8]), &mut o.z(&[2, 2]))
    };
    attention_backward: |k, o| {
        let (q, key, value) = (o.z(&[2, 8]), o.z(&[2, 4]), o.z(&[2, 4]));
        let (out, lse, d_o) = (o.z(&[2, 8]), o.z(&[2, 2]), o.z(&[2, 8]));
        let gradients = (&mut o.z(&[2, 8]), &mut o.z(&[2, 4]), &mut o.z(&[2, 4]));
        k.attention_backward(&HEADS, &Segments::packed([2]), (&q, &key, &value), &out, &lse, &d_o, gradients)
    };
    cross_entropy: |k, o| {
        let (labels, mut dx, mut dw) = (k.from_u32(&[0, 4], &[2])?, o.z(&[2, 3]), o.z(&[5, 3]));
        let gradients = (Some(&mut dx), Some(&mut dw));
        let (x, w, weights) = (o.z(&[2, 3]), o.z(&[5, 3]), o.z(&[2]));
        k.cross_entropy(&x, &w, &labels, &weights, None, 8, gradients.0, gradients.1).map(drop)
    };
    cross_entropy_of_logits: |k, o| {
        let labels = k.from_u32(&[0, 4], &[2])?;
        k.cross_entropy_of_logits(&mut o.z(&[2, 5]), &labels, &o.z(&[2])).map(drop)
    };
    rms_norm: |k, o| {
        let kind = RmsGain::Weight;
        k.rms_norm(&o.z(&[2, 3]), &o.z(&[3]), kind, 1e-6, &mut o.z(&[2, 3]), &mut o.z(&[2]))
    };
    add_rms_norm: |k, o| {
        let (f, mut x, gain, kind) = (o.z(&[2, 3]), o.z(&[2, 3]), o.z(&[3]), RmsGain::Weight);
        k.add_rms_norm(&f, &mut x, &gain, kind, 1e-6, &mut o.z(&[2, 3]), &mut o.z(&[2]))
    };
    rms_norm_backward: |k, o| {
        let (x, gain, rstd, dy, kind) = (o.z(&[2, 3]), o.z(&[3]), o.z(&[2]), o.z(&[2, 3]), RmsGain::Weight);
        k.rms_norm_backward(&x, &gain, kind, &rstd, &dy, ADD, &mut o.z(&[2, 3]), Some(&mut o.z(&[3])))
    };
    layer_norm: |k, o| {
        let (x, gain, shift, mut y) = (o.z(&[2, 3]), o.z(&[3]), o.z(&[3]), o.z(&[2, 3]));
        k.layer_norm(&x, &gain, &shift, 1e-6, &mut y, &mut o.z(&[2]), &mut o.z(&[2]))
    };
    add_layer_norm: |k, o| {
        let (f, mut x, gain, shift) = (o.z(&[2, 3]), o.z(&[2, 3]), o.z(&[3]), o.z(&[3]));
        let (mut y, mut mean, mut rstd) = (o.z(&[2, 3]), o.z(&[2]), o.z(&[2]));
        k.add_layer_norm(&f, &mut x, &gain, &shift, 1e-6, &mut y, &mut mean, &mut rstd)
    };
    layer_norm_backward: |k, o| {
        let (x, gain, mean, rstd, dy) = (o.z(&[2, 3]), o.z(&[3]), o.z(&[2]), o.z(&[2]), o.z(&[2, 3]));
        let (mut dx, mut dgain, mut dshift) = (o.z(&[2, 3]), o.z(&[3]), o.z(&[3]));
        let wanted = (Some(&mut dgain), Some(&mut dshift));
        k.layer_norm_backward(&x, &gain, (&mean, &rstd), &dy, ADD, &mut dx, wanted.0, wanted.1)
    };
    rope: |k, o| {
        let table = RopeTable::new(k, 1e4, &RopeScaling::Default, 4, 4, 7)?;
        k.rope(&table, &k.from_u32(&[0, 6], &[2])?, &mut o.z(&[2, 8]))
    };
    rope_backward: |k, o| {
        let table = RopeTable::new(k, 1e4, &RopeScaling::Default, 4, 4, 7)?;
        k.rope_backward(&table, &k.from_u32(&[0, 6], &[2])?, &mut o.z(&[2, 8]))
    };
    take_columns: |k, o| k.take_columns(&o.z(&[2, 5]), 1, &mut o.z(&[2, 3]));
    put_columns: |k, o| k.put_columns(&o.z(&[2, 3]), 1, &mut o.z(&[2, 5]));
    gather_rows: |k, o| k.gather_rows(&k.from_u32(&[1, 0], &[2])?, &o.z(&[3, 4]), &mut o.z(&[2, 4]));
    scatter_rows: |k, o| k.scatter_rows(&k.from_u32(&[1, 0], &[2])?, &o.z(&[2, 4]), &mut o.z(&[3, 4]));
    copy_rows: |k, o| {
        let (from, to) = (k.from_u32(&[1, 0], &[2])?, k.from_u32(&[0, 4], &[2])?);
        k.copy_rows(&from, &o.z(&[3, 4]), &to, &mut o.z(&[5, 4]))
    };
    embedding: |k, o| k.embedding(&k.from_u32(&[1, 0], &[2])?, &o.z(&[3, 4]), &mut o.z(&[2, 4]));
    embedding_gradient: |k, o| {
        k.embedding_gradient(&k.from_u32(&[1, 0], &[2])?, &o.z(&[2, 4]), &mut o.z(&[3, 4]))
    };
}

/// A GPU reads its own copy of indices, so those of another device are no operand of it.
#[test]
fn indices() {
    let (Some(gpu), cpu) = (gpu(), Cpu::new(1).unwrap()) else { return };
    let (ids, x) = (cpu.from_u32(&[1, 0], &[2]).unwrap(), gpu.zeros(&[3, 4]).unwrap());
    let result = gpu.gather_rows(&ids, &x, &mut gpu.zeros(&[2, 4]).unwrap());
    assert!(matches!(result, Err(Error::Place { operand: "rows", .. })), "{result:?}");
}
