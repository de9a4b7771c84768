//! Results have the same bits on any number of threads, in any order of a GPU's threads, and in every run.

mod common;

use common::{Draw, Source, activation, devices, weight};
use lora_sb_kernels::cuda::ThreadOrder;
use lora_sb_kernels::{
    Accum, Activation, AdamWStep, AttentionShape, Cpu, Cuda, DType, GroupLayer, Kernels, LatentBackward,
    LatentPart, Mask, RmsGain, RopeScaling, RopeTable, Segments, Tensor,
};

/// Sizes that give every operation several blocks of work with a rest: T, D, N, V.
const T: usize = 263;
const D: usize = 517;
const N: usize = 389;
const V: usize = 1031;

/// Results by name, each as its elements' bits.
type Outputs = Vec<(&'static str, Vec<u64>)>;

/// The outputs of one operation after another.
struct Record<'a> {
    kernels: &'a dyn Kernels,
    draw: Draw,
    outputs: Outputs,
}

impl Record<'_> {
    fn tensor(&mut self, shape: &[usize]) -> Tensor {
        self.kernels.from_f32(&self.draw.normal(shape.iter().product()), shape).unwrap()
    }

    fn bf16(&mut self, shape: &[usize]) -> Tensor {
        let values = self.draw.normal(shape.iter().product());
        activation(self.kernels, DType::Bf16, &values, shape).0
    }

    fn weight(&mut self, dtype: DType, shape: &[usize]) -> Tensor {
        let values = self.draw.normal(shape.iter().product());
        weight(self.kernels, Source::File(dtype), &values, shape).0
    }

    fn output(&mut self, name: &'static str, tensor: &Tensor) {
        let values = self.kernels.to_f32(tensor).unwrap();
        assert!(values.iter().all(|value| !value.is_nan()), "{name} holds NaN");
        self.outputs.push((name, values.iter().map(|value| u64::from(value.to_bits())).collect()));
    }
}

type Operation = fn(&mut Record);

fn run(kernels: &dyn Kernels, operation: Operation) -> Outputs {
    let mut record = Record { kernels, draw: Draw::new(1), outputs: Vec::new() };
    operation(&mut record);
    record.outputs
}

fn on_any_number_of_threads(operation: Operation) {
    let of = |threads: usize| run(&Cpu::new(threads).unwrap(), operation);
    let one = of(1);
    for threads in [2, 3, 5] {
        same(&format!("1 and {threads} threads"), &one, &of(threads));
    }
}

/// Threads of a block that write where others read find it here.
fn in_any_order_of_threads(operation: Operation) {
    let gpu = |order: ThreadOrder| Cuda::emulated(order).unwrap();
    if let (Some(first), Some(second)) = (gpu(ThreadOrder::Forward), gpu(ThreadOrder::Backward)) {
        same("the first and the last thread first", &run(&first, operation), &run(&second, operation));
    }
}

fn in_two_runs(operation: Operation) {
    for kernels in devices() {
        same(
            &format!("two runs on {}", kernels.name()),
            &run(&*kernels, operation),
            &run(&*kernels, operation),
        );
    }
}

fn same(case: &str, first: &Outputs, second: &Outputs) {
    assert_eq!(first.len(), second.len(), "{case}: number of outputs");
    for ((name, first), (_, second)) in first.iter().zip(second) {
        let difference = first.iter().zip(second).position(|(a, b)| a != b);
        assert_eq!(difference, None, "{case}: first different element of {name}");
    }
}

macro_rules! same_bits {
    ($($law:ident: $($operation:ident)*;)*) => {
        $(mod $law {
            $(#[test]
            fn $operation() {
                super::$law(super::$operation);
            })*
        })*
    };
}

macro_rules! operations {
    ($($operation:ident)*) => {
        same_bits! {
            on_any_number_of_threads: $($operation)*;
            in_any_order_of_threads: $($operation)*;
            in_two_runs: $($operation)*;
        }
    };
}

operations! {
    linear linear_group few_tokens elements rows normalisation rotation optimizer attention channels loss bf16_activations
}

fn linear(r: &mut Record) {
    let (x, dy) = (r.tensor(&[T, D]), r.tensor(&[T, N]));
    for dtype in [DType::F32, DType::Bf16] {
        let w = r.weight(dtype, &[N, D]);
        let (mut y, mut dx) = (r.kernels.empty(&[T, N]).unwrap(), r.tensor(&[T, D]));
        r.kernels.linear(&x, &w, 0.5, Accum::Replace, &mut y).unwrap();
        r.output("linear", &y);
        r.kernels.linear_input_gradient(&dy, &w, 0.5, Accum::Add, &mut dx).unwrap();
        r.output("linear_input_gradient", &dx);
    }
    let mut dw = r.tensor(&[N, D]);
    r.kernels.linear_weight_gradient(&dy, &x, 0.5, Accum::Add, &mut dw).unwrap();
    r.output("linear_weight_gradient", &dw);
}

/// Two layers of one input with latent parts, forward and backward.
fn linear_group(r: &mut Record) {
    const RANK: usize = 24;
    for dtype in [DType::F32, DType::Bf16] {
        let typed = |r: &mut Record, shape: &[usize]| {
            let values = r.tensor(shape);
            let mut tensor = r.kernels.empty_of(dtype, shape).unwrap();
            r.kernels.cast(&values, &mut tensor).unwrap();
            tensor
        };
        let (x, dys) = (typed(r, &[T, D]), [typed(r, &[T, N]), typed(r, &[T, N])]);
        let weights = [r.weight(DType::Bf16, &[N, D]), r.weight(DType::F32, &[N, D])];
        let (a, square, b) = (r.tensor(&[RANK, D]), r.tensor(&[RANK, RANK]), r.tensor(&[N, RANK]));
        let latent = Some(LatentPart { a: &a, r: &square, b: &b, scale: 0.5 });
        let layers = weights.each_ref().map(|weight| GroupLayer { weight, bias: None, latent });
        let mut ys = [typed(r, &[T, N]), typed(r, &[T, N])];
        let [first, second] = &mut ys;
        let us = r.kernels.linear_group(&x, &layers, Accum::Replace, &mut [first, second]).unwrap();
        let (mut dx, mut gradients) = (r.tensor(&[T, D]), [r.tensor(&[RANK, RANK]), r.tensor(&[RANK, RANK])]);
        let parts = us.iter().flatten().zip(&mut gradients);
        let mut latents: Vec<_> = parts.map(|(u, gradient)| Some(LatentBackward { u, gradient })).collect();
        let dys = dys.each_ref();
        r.kernels.linear_group_backward(&dys, &layers, &mut latents, Some((&mut dx, Accum::Add))).unwrap();
        for tensor in ys.iter().chain(us.iter().flatten()).chain(&gradients).chain([&dx]) {
            r.output("linear_group", tensor);
        }
    }
}

fn few_tokens(r: &mut Record) {
    for t in [1, 3] {
        let (x, w, dy) = (r.tensor(&[t, D]), r.weight(DType::Bf16, &[V, D]), r.tensor(&[t, V]));
        let (mut y, mut dx) = (r.kernels.empty(&[t, V]).unwrap(), r.kernels.empty(&[t, D]).unwrap());
        r.kernels.linear(&x, &w, 1.0, Accum::Replace, &mut y).unwrap();
        r.output("linear of few tokens", &y);
        r.kernels.linear_input_gradient(&dy, &w, 1.0, Accum::Replace, &mut dx).unwrap();
        r.output("linear_input_gradient of few tokens", &dx);
        // r x r: a long sum over the tokens with a small result.
        let (a, b) = (r.tensor(&[T * 8, t]), r.tensor(&[T * 8, 5]));
        let mut small = r.kernels.empty(&[t, 5]).unwrap();
        r.kernels.linear_weight_gradient(&a, &b, 1.0, Accum::Replace, &mut small).unwrap();
        r.output("linear_weight_gradient of few columns", &small);
    }
}

fn elements(r: &mut Record) {
    let (x, mut y) = (r.tensor(&[T, D]), r.tensor(&[T, D]));
    r.kernels.add(-0.3, &x, &mut y).unwrap();
    r.output("add", &y);
    r.kernels.scaled_sign(0.1, &mut y).unwrap();
    r.output("scaled_sign", &y);
    r.kernels.fill(0.1, &mut y).unwrap();
    r.output("fill", &y);
    let sum = r.kernels.sum_of_squares(&x).unwrap();
    r.outputs.push(("sum_of_squares", vec![sum.to_bits()]));
    let sums = r.kernels.sums_of_squares(&[&x, &y]).unwrap();
    r.outputs.push(("sums_of_squares", sums.into_iter().map(f64::to_bits).collect()));
    for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Tanh] {
        let (mut gate, mut up, dh) = (r.tensor(&[T, D]), r.tensor(&[T, D]), r.tensor(&[T, D]));
        let mut h = r.kernels.empty(&[T, D]).unwrap();
        r.kernels.gated_activation(activation, &gate, &up, &mut h).unwrap();
        r.output("gated_activation", &h);
        r.kernels.gated_activation_backward(activation, &mut gate, &mut up, &dh).unwrap();
        r.output("gated_activation_backward, gate", &gate);
        r.output("gated_activation_backward, up", &up);
        r.kernels.activation(activation, &up, &mut h).unwrap();
        r.output("activation", &h);
        r.kernels.activation_backward(activation, &mut up, &dh).unwrap();
        r.output("activation_backward", &up);
    }
}

fn rows(r: &mut Record) {
    let (table, dx, mut dtable) = (r.weight(DType::F16, &[V, D]), r.tensor(&[T, D]), r.tensor(&[V, D]));
    // Few different ids: rows that many tokens add to.
    let ids = r.kernels.from_u32(&r.draw.indices(T, 17), &[T]).unwrap();
    let mut x = r.kernels.empty(&[T, D]).unwrap();
    r.kernels.embedding(&ids, &table, &mut x).unwrap();
    r.output("embedding", &x);
    r.kernels.embedding_gradient(&ids, &dx, &mut dtable).unwrap();
    r.output("embedding_gradient", &dtable);
    let (b, mut db) = (r.weight(DType::Bf16, &[D]), r.tensor(&[D]));
    r.kernels.bias(&b, &mut x).unwrap();
    r.output("bias", &x);
    r.kernels.bias_gradient(&dx, &mut db).unwrap();
    r.output("bias_gradient", &db);
    let selected = r.kernels.from_u32(&r.draw.distinct(101, T), &[101]).unwrap();
    let mut few = r.kernels.empty(&[101, D]).unwrap();
    r.kernels.gather_rows(&selected, &x, &mut few).unwrap();
    r.output("gather_rows", &few);
    r.kernels.scatter_rows(&selected, &few, &mut x).unwrap();
    r.output("scatter_rows", &x);
    let from = r.kernels.from_u32(&r.draw.indices(101, T), &[101]).unwrap();
    let mut cache = r.tensor(&[V, D]);
    r.kernels.copy_rows(&from, &x, &selected, &mut cache).unwrap();
    r.output("copy_rows", &cache);
    let mut part = r.kernels.empty(&[T, 129]).unwrap();
    r.kernels.take_columns(&x, 31, &mut part).unwrap();
    r.output("take_columns", &part);
    r.kernels.put_columns(&part, 200, &mut x).unwrap();
    r.output("put_columns", &x);
}

fn normalisation(r: &mut Record) {
    let (mut x, dy, gain) = (r.tensor(&[T, D]), r.tensor(&[T, D]), r.weight(DType::Bf16, &[D]));
    let (mut y, mut rstd) = (r.kernels.empty(&[T, D]).unwrap(), r.kernels.empty(&[T]).unwrap());
    let kind = RmsGain::OnePlusWeight;
    r.kernels.rms_norm(&x, &gain, kind, 1e-6, &mut y, &mut rstd).unwrap();
    r.output("rms_norm", &y);
    r.output("rms_norm, rstd", &rstd);
    let mut dgain = r.tensor(&[D]);
    r.kernels
        .rms_norm_backward(&x, &gain, kind, &rstd, &dy, Accum::Replace, &mut y, Some(&mut dgain))
        .unwrap();
    r.output("rms_norm_backward, dx", &y);
    r.output("rms_norm_backward, dgain", &dgain);
    let (shift, mut mean, mut dshift) =
        (r.weight(DType::F16, &[D]), r.kernels.empty(&[T]).unwrap(), r.tensor(&[D]));
    r.kernels.layer_norm(&x, &gain, &shift, 1e-6, &mut y, &mut mean, &mut rstd).unwrap();
    r.output("layer_norm", &y);
    r.output("layer_norm, mean", &mean);
    r.output("layer_norm, rstd", &rstd);
    let (statistics, gradients) = ((&mean, &rstd), (Some(&mut dgain), Some(&mut dshift)));
    r.kernels
        .layer_norm_backward(&x, &gain, statistics, &dy, Accum::Add, &mut y, gradients.0, gradients.1)
        .unwrap();
    r.output("layer_norm_backward, dx", &y);
    r.output("layer_norm_backward, dgain", &dgain);
    r.output("layer_norm_backward, dshift", &dshift);
    r.kernels.add_rms_norm(&dy, &mut y, &gain, kind, 1e-6, &mut x, &mut rstd).unwrap();
    r.output("add_rms_norm, x", &y);
    r.output("add_rms_norm, y", &x);
    r.kernels.add_layer_norm(&dy, &mut y, &gain, &shift, 1e-6, &mut x, &mut mean, &mut rstd).unwrap();
    r.output("add_layer_norm, x", &y);
    r.output("add_layer_norm, y", &x);
}

fn bf16_activations(r: &mut Record) {
    let (mut x, mut y, mut z) = (r.bf16(&[T, D]), r.bf16(&[T, D]), r.bf16(&[T, D]));
    let (gain, mut rstd, mut sums) =
        (r.weight(DType::Bf16, &[D]), r.kernels.empty(&[T]).unwrap(), r.tensor(&[D]));
    r.kernels.add_rms_norm(&y, &mut x, &gain, RmsGain::Weight, 1e-6, &mut z, &mut rstd).unwrap();
    r.output("bf16 add_rms_norm, x", &x);
    r.output("bf16 add_rms_norm, y", &z);
    let (kind, wanted) = (RmsGain::Weight, Some(&mut sums));
    r.kernels.rms_norm_backward(&x, &gain, kind, &rstd, &z, Accum::Add, &mut y, wanted).unwrap();
    r.output("bf16 rms_norm_backward, dx", &y);
    r.output("bf16 rms_norm_backward, dgain", &sums);
    r.kernels.bias_gradient(&x, &mut sums).unwrap();
    r.output("bf16 bias_gradient", &sums);
    r.kernels.channel_products(&x, &y, Accum::Add, &mut sums).unwrap();
    r.output("bf16 channel_products", &sums);
    r.kernels.gated_activation(Activation::Silu, &x, &y, &mut z).unwrap();
    r.output("bf16 gated_activation", &z);
    r.kernels.gated_activation_backward(Activation::Gelu, &mut x, &mut y, &z).unwrap();
    r.output("bf16 gated_activation_backward, gate", &x);
    r.output("bf16 gated_activation_backward, up", &y);
    r.kernels.dropout(0.3, 5, &x, Accum::Add, &mut z).unwrap();
    r.output("bf16 dropout", &z);
    r.kernels.add(0.7, &x, &mut z).unwrap();
    r.output("bf16 add", &z);
}

fn rotation(r: &mut Record) {
    let table = RopeTable::new(r.kernels, 1e4, &RopeScaling::Default, 23, 22, 99).unwrap();
    let positions = r.kernels.from_u32(&r.draw.indices(T, 99), &[T]).unwrap();
    let mut x = r.tensor(&[T, 23 * 19]);
    r.kernels.rope(&table, &positions, &mut x).unwrap();
    r.output("rope", &x);
    r.kernels.rope_backward(&table, &positions, &mut x).unwrap();
    r.output("rope_backward", &x);
}

fn optimizer(r: &mut Record) {
    let (g, mut p) = (r.tensor(&[T, D]), r.tensor(&[T, D]));
    let (mut m, mut v) = (r.kernels.zeros(&[T, D]).unwrap(), r.kernels.zeros(&[T, D]).unwrap());
    let step = AdamWStep {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        epsilon: 1e-8,
        weight_decay: 0.1,
        gradient_scale: 0.3,
        step: 1,
    };
    r.kernels.adamw(&step, &g, &mut p, &mut m, &mut v).unwrap();
    r.output("adamw, p", &p);
    r.output("adamw, m", &m);
    r.output("adamw, v", &v);
}

fn attention(r: &mut Record) {
    let segments = Segments::packed([140, 1, 37, 65, 20]);
    let sliding = Mask::Sliding { window: 19 };
    for (heads, kv_heads, head_size, mask, soft_cap) in
        [(4, 1, 24, Mask::Causal, None), (3, 3, 40, Mask::Full, Some(1.5)), (4, 2, 16, sliding, Some(30.0))]
    {
        let shape = AttentionShape { heads, kv_heads, head_size, scale: 0.2, mask, soft_cap };
        let (q, d_o) = (r.tensor(&[T, heads * head_size]), r.tensor(&[T, heads * head_size]));
        let (k, v) = (r.tensor(&[T, kv_heads * head_size]), r.tensor(&[T, kv_heads * head_size]));
        let like = |tensor: &Tensor| r.kernels.empty(tensor.shape()).unwrap();
        let (mut o, mut lse) = (like(&q), r.kernels.empty(&[T, heads]).unwrap());
        let (mut dq, mut dk, mut dv) = (like(&q), like(&k), like(&v));
        r.kernels.attention(&shape, &segments, &q, &k, &v, &mut o, &mut lse).unwrap();
        let gradients = (&mut dq, &mut dk, &mut dv);
        r.kernels.attention_backward(&shape, &segments, (&q, &k, &v), &o, &lse, &d_o, gradients).unwrap();
        r.output("attention, o", &o);
        r.output("attention, lse", &lse);
        r.output("attention_backward, dq", &dq);
        r.output("attention_backward, dk", &dk);
        r.output("attention_backward, dv", &dv);
    }
}

fn loss(r: &mut Record) {
    let (x, w) = (r.tensor(&[T, 67]), r.weight(DType::Bf16, &[V, 67]));
    let labels = r.kernels.from_u32(&r.draw.indices(T, V), &[T]).unwrap();
    let weights = r.kernels.from_f32(&[1.0 / T as f32; T], &[T]).unwrap();
    let (mut dx, mut dw) = (r.kernels.empty(&[T, 67]).unwrap(), r.tensor(&[V, 67]));
    for cap in [None, Some(3.0)] {
        let gradients = (Some(&mut dx), Some(&mut dw));
        let loss =
            r.kernels.cross_entropy(&x, &w, &labels, &weights, cap, 50, gradients.0, gradients.1).unwrap();
        r.outputs.push(("cross_entropy", vec![loss.to_bits()]));
        r.output("cross_entropy, dx", &dx);
        r.output("cross_entropy, dw", &dw);
    }
    let mut logits = r.tensor(&[T, V]);
    let loss = r.kernels.cross_entropy_of_logits(&mut logits, &labels, &weights).unwrap();
    r.outputs.push(("cross_entropy_of_logits", vec![loss.to_bits()]));
    r.output("cross_entropy_of_logits, logits", &logits);
    let (mut z, targets) = (r.tensor(&[T]), r.tensor(&[T]));
    let loss = r.kernels.squared_error(&mut z, &targets, &weights).unwrap();
    r.outputs.push(("squared_error", vec![loss.to_bits()]));
    r.output("squared_error, z", &z);
}

fn channels(r: &mut Record) {
    let (c, a, mut b) = (r.weight(DType::Bf16, &[D]), r.tensor(&[T, D]), r.tensor(&[T, D]));
    r.kernels.scale_channels(&c, &mut b).unwrap();
    r.output("scale_channels", &b);
    let (mut sums, mut rows) = (r.tensor(&[D]), r.tensor(&[T]));
    r.kernels.channel_products(&a, &b, Accum::Add, &mut sums).unwrap();
    r.output("channel_products", &sums);
    r.kernels.row_products(&a, &b, 0.3, Accum::Add, &mut rows).unwrap();
    r.output("row_products", &rows);
    r.kernels.dropout(0.3, 17, &a, Accum::Add, &mut b).unwrap();
    r.output("dropout", &b);
    r.kernels.soft_cap(1.5, &mut b).unwrap();
    r.output("soft_cap", &b);
    r.kernels.scale(-0.3, &mut b).unwrap();
    r.output("scale", &b);
}
