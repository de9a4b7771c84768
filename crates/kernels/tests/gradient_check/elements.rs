//! Operations on each element alone.

use lora_sb_kernels::Activation;
use lora_sb_kernels::op::{activation, gated_activation};

use crate::common::Draw;
use crate::{check, replaced};

const ACTIVATIONS: [Activation; 4] =
    [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Tanh];

/// Around 0, in the tails, and where the function is flat or the identity.
fn arguments() -> Vec<f64> {
    let mut z = Draw::new(4).normal_f64(13);
    z.extend([0.0, 30.0, -30.0, 5.0, -5.0]);
    z
}

#[test]
fn activations() {
    for function in ACTIVATIONS {
        let forward = |i: &[Vec<f64>]| replaced(18, |y| activation::naive::forward(function, &i[0], y));
        check(&format!("{function:?}"), &[arguments()], &forward, &|i, dy| {
            let mut x = i[0].clone();
            activation::naive::backward(function, &mut x, dy);
            vec![x]
        });
    }
}

#[test]
fn gated_activations() {
    for function in ACTIVATIONS {
        let inputs = [arguments(), Draw::new(5).normal_f64(18)];
        let forward =
            |i: &[Vec<f64>]| replaced(18, |h| gated_activation::naive::forward(function, &i[0], &i[1], h));
        check(&format!("gated {function:?}"), &inputs, &forward, &|i, dh| {
            let (mut gate, mut up) = (i[0].clone(), i[1].clone());
            gated_activation::naive::backward(function, &mut gate, &mut up, dh);
            vec![gate, up]
        });
    }
}

/// Values and slopes of PyTorch in `f64`: a specification may be wrong together with its derivative.
#[test]
fn activations_at_given_points() {
    for (function, z, value, slope) in GIVEN {
        let (found_value, found_slope) = activation::naive::value_and_slope(function, z);
        assert!(
            (found_value - value).abs() <= 1e-15 * (1.0 + value.abs()),
            "{function:?}({z}) = {found_value}"
        );
        assert!(
            (found_slope - slope).abs() <= 1e-15 * (1.0 + slope.abs()),
            "{function:?}'({z}) = {found_slope}"
        );
    }
}

const GIVEN: [(Activation, f64, f64, f64); 16] = [
    (Activation::Silu, -3.5, -0.10259280762974712, -0.07027335282771814),
    (Activation::Silu, -0.75, -0.24061597561845527, 0.1574000555032465),
    (Activation::Silu, 0.25, 0.14054412522144952, 0.6237100215701977),
    (Activation::Silu, 2.0, 1.7615941559557646, 1.0907842487848955),
    (Activation::Gelu, -3.5, -0.0008142017766243903, -0.0028217603536246205),
    (Activation::Gelu, -0.75, -0.16997051428265111, 0.0007742782607648158),
    (Activation::Gelu, 0.25, 0.14967658142073093, 0.695373354883636),
    (Activation::Gelu, 2.0, 1.9544997361036416, 1.085231801078197),
    (Activation::GeluTanh, -3.5, -0.0006161976553737403, -0.0024226437601167334),
    (Activation::GeluTanh, -0.75, -0.17003944483437966, 0.001061743862585618),
    (Activation::GeluTanh, 0.25, 0.149675350701685, 0.6953540951510604),
    (Activation::GeluTanh, 2.0, 1.954597694087775, 1.0860992566236183),
    (Activation::Tanh, -3.5, -0.9981778976111987, 0.0036408847204873578),
    (Activation::Tanh, -0.75, -0.6351489523872873, 0.5965858082813315),
    (Activation::Tanh, 0.25, 0.24491866240370913, 0.940014848806378),
    (Activation::Tanh, 2.0, 0.9640275800758169, 0.07065082485316443),
];
