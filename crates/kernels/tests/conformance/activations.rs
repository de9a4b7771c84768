//! The activations, alone and as gates.

use lora_sb_kernels::op::{self, gated_activation};
use lora_sb_kernels::{Activation, DType, Tensor};

use crate::common::{Draw, EPS, activation, close_in, devices, type_triples, widen};

const ACTIVATIONS: [Activation; 4] =
    [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Tanh];

/// No elements, one, one register and a rest, several blocks of work and a rest.
const SHAPES: [[usize; 2]; 5] = [[0, 5], [1, 1], [1, 17], [3, 1009], [31, 1601]];

/// Where exp(-z) overflows, where it vanishes, where 1 + exp(-z) rounds to 1, the last digits of the normal
/// distribution's tail, and the border between two formulas for tanh.
const SPECIAL: [f32; 17] = [
    0.0, -0.0, 200.0, -200.0, 87.0, -88.0, -89.0, 17.0, -17.0, 14.0, -14.0, -5.5, 5.5, 0.625, -0.625, 1e-30,
    -1e-6,
];

fn arguments(draw: &mut Draw, length: usize) -> Vec<f32> {
    let mut z = draw.normal(length);
    z.iter_mut().zip(SPECIAL).for_each(|(z, special)| *z = special);
    z
}

/// The errors allowed to the value and to the slope at `z`, in roundings; with a product behind them.
///
/// The exponential function's argument is off by some roundings of itself, so the smaller side of a sigmoid is
/// off by that much relatively, and the larger side, its difference from 1, by as much absolutely.
fn sizes(activation: Activation, z: f64) -> (f64, f64) {
    // Where the exponential function leaves the normal numbers, it may be 0.
    let flushed = f64::from(f32::MIN_POSITIVE) / EPS;
    let s_like = |s: f64, argument: f64| s + (1.0 + argument.abs()) * s.min(1.0 - s) + flushed;
    match activation {
        Activation::Silu => {
            let s = 1.0 / (1.0 + (-z).exp());
            // s (1 + z (1 - s)): each of the two terms, before one cancels the other.
            (8.0 * (s + flushed) * z.abs(), 12.0 * (s + flushed) * (1.0 + z.abs()))
        }
        Activation::Gelu => {
            let (value, slope) = op::activation::naive::value_and_slope(activation, z);
            let phi = if z == 0.0 { 0.5 } else { value / z };
            let (size, density) = (s_like(phi, z * z / 2.0), slope - phi);
            let second = density.abs() * (1.0 + z * z / 2.0) + z.abs() * flushed;
            (16.0 * z.abs() * size, 16.0 * (size + second))
        }
        Activation::GeluTanh => {
            let (scale, cubic) = ((8.0 / std::f64::consts::PI).sqrt(), 0.044715);
            let argument = scale * (z + cubic * z * z * z);
            let s = 1.0 / (1.0 + (-argument).exp());
            let (size, steepness) = (s_like(s, argument), scale * (1.0 + 3.0 * cubic * z * z));
            let product = s / (1.0 + argument.exp()) * (1.0 + argument.abs()) + flushed;
            (16.0 * z.abs() * size, 16.0 * (size + z.abs() * product * steepness))
        }
        Activation::Tanh => (6.0 * z.tanh().abs(), 12.0),
    }
}

/// Every function with every combination of three operands' types and every shape.
fn cases() -> impl Iterator<Item = (Activation, [DType; 3], [usize; 2])> {
    ACTIVATIONS
        .into_iter()
        .flat_map(|function| type_triples().map(move |types| (function, types)))
        .flat_map(|(function, types)| SHAPES.map(|shape| (function, types, shape)))
}

#[test]
fn activations_and_their_gradients() {
    for kernels in devices() {
        for (function, [x_type, y_type, dy_type], shape) in cases() {
            let length = shape[0] * shape[1];
            let mut draw = Draw::new(length as u64);
            let (mut x, z) = activation(&*kernels, x_type, &arguments(&mut draw, length), &shape);
            let (dy_tensor, dy) = activation(&*kernels, dy_type, &draw.normal(length), &shape);
            let mut y = kernels.empty_of(y_type, &shape).unwrap();
            kernels.activation(function, &x, &mut y).unwrap();
            kernels.activation_backward(function, &mut x, &dy_tensor).unwrap();

            let (z, dy) = (widen(&z), widen(&dy));
            let (mut value, mut gradient) = (vec![f64::NAN; length], z.clone());
            op::activation::naive::forward(function, &z, &mut value);
            op::activation::naive::backward(function, &mut gradient, &dy);
            let size: Vec<f64> = z.iter().map(|&z| sizes(function, z).0).collect();
            let case = format!("{function:?} of {shape:?}, {x_type} to {y_type}, dy {dy_type}");
            close_in(y_type, &case, &kernels.to_f32(&y).unwrap(), &value, EPS, &size);
            let size: Vec<f64> = z.iter().zip(&dy).map(|(&z, dy)| sizes(function, z).1 * dy.abs()).collect();
            let case = format!("{case}: dx");
            close_in(x_type, &case, &kernels.to_f32(&x).unwrap(), &gradient, EPS, &size);
        }
    }
}

#[test]
fn gated_activations_and_their_gradients() {
    for kernels in devices() {
        for (function, [gate_type, up_type, h_type], shape) in cases() {
            let length = shape[0] * shape[1];
            let mut draw = Draw::new(length as u64);
            let tensor = |dtype, values: &[f32]| activation(&*kernels, dtype, values, &shape);
            let (mut gate_tensor, gate) = tensor(gate_type, &arguments(&mut draw, length));
            let (mut up_tensor, up) = tensor(up_type, &draw.normal(length));
            let (dh_tensor, dh) = tensor(h_type, &draw.normal(length));
            let mut h = kernels.empty_of(h_type, &shape).unwrap();
            kernels.gated_activation(function, &gate_tensor, &up_tensor, &mut h).unwrap();
            kernels
                .gated_activation_backward(function, &mut gate_tensor, &mut up_tensor, &dh_tensor)
                .unwrap();

            let (gate, up, dh) = (widen(&gate), widen(&up), widen(&dh));
            let mut truth = vec![f64::NAN; length];
            gated_activation::naive::forward(function, &gate, &up, &mut truth);
            let (mut dgate, mut dup) = (gate.clone(), up.clone());
            gated_activation::naive::backward(function, &mut dgate, &mut dup, &dh);
            let size = |of: &dyn Fn(usize) -> f64| (0..length).map(of).collect::<Vec<f64>>();
            let check = |what, tensor: &Tensor, truth: &[f64], size: Vec<f64>| {
                let case = format!("{function:?} of {shape:?}, {gate_type}, {up_type}, {h_type}: {what}");
                close_in(tensor.dtype(), &case, &kernels.to_f32(tensor).unwrap(), truth, EPS, &size);
            };
            check("h", &h, &truth, size(&|i| sizes(function, gate[i]).0 * up[i].abs()));
            check("dup", &up_tensor, &dup, size(&|i| sizes(function, gate[i]).0 * dh[i].abs()));
            check(
                "dgate",
                &gate_tensor,
                &dgate,
                size(&|i| sizes(function, gate[i]).1 * (dh[i] * up[i]).abs()),
            );
        }
    }
}

#[test]
fn activations_keep_nan() {
    for kernels in devices() {
        for function in ACTIVATIONS {
            for place in [0, 15, 16] {
                let mut values = [0.5; 17];
                values[place] = f32::NAN;
                let (mut x, ones) =
                    (kernels.from_f32(&values, &[17]).unwrap(), kernels.from_f32(&[1.0; 17], &[17]));
                let mut y = kernels.empty(&[17]).unwrap();
                kernels.activation(function, &x, &mut y).unwrap();
                kernels.activation_backward(function, &mut x, &ones.unwrap()).unwrap();
                for found in [&x, &y].map(|tensor| kernels.to_f32(tensor).unwrap()) {
                    let nan: Vec<usize> = (0..17).filter(|&i| found[i].is_nan()).collect();
                    assert_eq!(nan, [place], "{function:?}");
                }
            }
        }
    }
}
