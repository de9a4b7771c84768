//! The activations on the CPU.
//!
//! An activation's formula for one element is a [`Curve`], which the gated activation shares.

use super::{Activate, Activation, check};
use crate::buffer::{Floats, FloatsMut};
use crate::cpu::blocks::{BLOCK, Room, TILE};
use crate::cpu::vector::lanes::{self, Element};
use crate::cpu::vector::{Level, vectorised};
use crate::{Cpu, Result, Tensor};

impl Activate for Cpu {
    fn activation(&self, activation: Activation, x: &Tensor, y: &mut Tensor) -> Result<()> {
        let op = "activation";
        check(op, x, "y", y)?;
        let (x, y) = (x.floats(op, "x")?, y.floats_mut(op, "y")?);
        self.each(x.len(), x.chunks(BLOCK).zip(y.chunks(BLOCK)), |(x, y)| match (x, y) {
            (Floats::Bf16(x), FloatsMut::Bf16(y)) => forward(activation, x, y),
            (x, y) => {
                let [mut x_room, mut y_room] = <[Room; 2]>::default();
                for (x, y) in x.chunks(TILE).zip(y.chunks(TILE)) {
                    let x = x_room.read(x);
                    y_room.replace(y, |y| forward(activation, x, y));
                }
            }
        });
        Ok(())
    }

    fn activation_backward(&self, activation: Activation, x: &mut Tensor, dy: &Tensor) -> Result<()> {
        let op = "activation_backward";
        check(op, x, "dy", dy)?;
        let (x, dy) = (x.floats_mut(op, "x")?, dy.floats(op, "dy")?);
        self.each(dy.len(), x.chunks(BLOCK).zip(dy.chunks(BLOCK)), |(x, dy)| match (x, dy) {
            (FloatsMut::Bf16(x), Floats::Bf16(dy)) => backward(activation, x, dy),
            (x, dy) => {
                let [mut x_room, mut dy_room] = <[Room; 2]>::default();
                for (x, dy) in x.chunks(TILE).zip(dy.chunks(TILE)) {
                    let dy = dy_room.read(dy);
                    x_room.update(x, |x| backward(activation, x, dy));
                }
            }
        });
        Ok(())
    }
}

vectorised! {
    /// `y = f(x)`.
    fn forward<L, E: Element>(activation: Activation, x: &[E], y: &mut [E]) {
        match activation {
            Activation::Silu => values::<L, Silu, E>(x, y),
            Activation::Gelu => values::<L, Gelu, E>(x, y),
            Activation::GeluTanh => values::<L, GeluTanh, E>(x, y),
            Activation::Tanh => values::<L, Tanh, E>(x, y),
        }
    }
}

vectorised! {
    /// `dx = dy f'(x)` over `x`.
    fn backward<L, E: Element>(activation: Activation, x: &mut [E], dy: &[E]) {
        match activation {
            Activation::Silu => slopes::<L, Silu, E>(x, dy),
            Activation::Gelu => slopes::<L, Gelu, E>(x, dy),
            Activation::GeluTanh => slopes::<L, GeluTanh, E>(x, dy),
            Activation::Tanh => slopes::<L, Tanh, E>(x, dy),
        }
    }
}

#[inline(always)]
fn values<L: Level, C: Curve, E: Element>(x: &[E], y: &mut [E]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = E::round(C::value_and_slope::<L>(x.wide()).0);
    }
}

#[inline(always)]
fn slopes<L: Level, C: Curve, E: Element>(x: &mut [E], dy: &[E]) {
    for (x, &dy) in x.iter_mut().zip(dy) {
        *x = E::round(dy.wide() * C::value_and_slope::<L>(x.wide()).1);
    }
}

/// An activation's formula for one element, to be inlined into the bodies of [`vectorised!`].
pub(crate) trait Curve {
    /// `f(z)` and `f'(z)`; what is not used is not computed.
    fn value_and_slope<L: Level>(z: f32) -> (f32, f32);
}

/// [`Activation::Silu`].
pub(crate) struct Silu;

/// [`Activation::Gelu`].
pub(crate) struct Gelu;

/// [`Activation::GeluTanh`].
pub(crate) struct GeluTanh;

/// [`Activation::Tanh`].
pub(crate) struct Tanh;

impl Curve for Silu {
    #[inline(always)]
    fn value_and_slope<L: Level>(z: f32) -> (f32, f32) {
        let s = 1.0 / (1.0 + lanes::exp::<L>(-z));
        (z * s, s * (1.0 + z * (1.0 - s)))
    }
}

impl Curve for Gelu {
    #[inline(always)]
    fn value_and_slope<L: Level>(z: f32) -> (f32, f32) {
        const INVERSE_SQRT_2_PI: f32 = 0.398_942_3;
        let (tail, bell) = normal_tail::<L>(z.abs());
        let phi = if z < 0.0 { tail } else { 1.0 - tail };
        (z * phi, lanes::fma::<L>(z * INVERSE_SQRT_2_PI, bell, phi))
    }
}

/// The upper tail of the normal distribution, `erfc(a / sqrt 2) / 2`, for `a >= 0`, and `exp(-a^2 / 2)`.
#[inline(always)]
fn normal_tail<L: Level>(a: f32) -> (f32, f32) {
    let bell = lanes::exp::<L>(-0.5 * a * a);
    (bell * normal_tail_ratio::<L>(a), bell)
}

/// `Q(a) / exp(-a^2 / 2)` for `a >= 0`, where Q is the normal distribution's upper tail `erfc(a / sqrt 2) / 2`;
/// within 8 units of 2^-24, relatively.
///
/// The ratio falls as `1 / (a sqrt(2 pi))`, so it is `t` times a polynomial in `t = 1 / (1 + 11 a / 32)`, fitted
/// for the least relative error (2.7e-8) on `0..14.6`; beyond, the exponential function is 0 in `f32`. The tail
/// has the exponential function's error besides: `5 + a^2 / 2` units, mostly from the rounding of its argument.
#[inline(always)]
fn normal_tail_ratio<L: Level>(a: f32) -> f32 {
    let t = 1.0 / lanes::fma::<L>(a, 0.343_75, 1.0);
    let mut p = lanes::fma::<L>(t, -0.027_538_534, 0.142_602_83);
    p = lanes::fma::<L>(p, t, -0.269_289_05);
    p = lanes::fma::<L>(p, t, 0.188_324_1);
    p = lanes::fma::<L>(p, t, -0.037_638_683);
    p = lanes::fma::<L>(p, t, 0.112_001_65);
    p = lanes::fma::<L>(p, t, 0.116_894_33);
    p = lanes::fma::<L>(p, t, 0.137_522_67);
    p = lanes::fma::<L>(p, t, 0.137_120_71);
    p * t
}

impl Curve for GeluTanh {
    /// With `(1 + tanh u) / 2 = sigmoid(2 u)`. The exponential function is taken of the negative side, so it
    /// does not overflow, and `s (1 - s)` comes from it without a difference.
    #[inline(always)]
    fn value_and_slope<L: Level>(z: f32) -> (f32, f32) {
        /// `2 sqrt(2 / pi)`, and the same times 0.044715.
        const LINEAR: f32 = 1.595_769;
        const CUBIC: f32 = 0.071_354_82;
        let square = z * z;
        let twice_u = z * lanes::fma::<L>(square, CUBIC, LINEAR);
        let e = lanes::exp::<L>(-twice_u.abs());
        let large = 1.0 / (1.0 + e);
        let s = if twice_u < 0.0 { e * large } else { large };
        let slope = e * large * large * lanes::fma::<L>(square, 3.0 * CUBIC, LINEAR);
        (z * s, lanes::fma::<L>(z, slope, s))
    }
}

impl Curve for Tanh {
    #[inline(always)]
    fn value_and_slope<L: Level>(z: f32) -> (f32, f32) {
        let y = lanes::tanh::<L>(z);
        (y, lanes::fma::<L>(-y, y, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::vector::Baseline;

    vectorised! {
        /// `x = Q(x)`, Q the normal distribution's upper tail.
        fn normal_tails<L>(x: &mut [f32]) {
            x.iter_mut().for_each(|x| *x = normal_tail::<L>(*x).0);
        }
    }

    #[test]
    fn the_normal_tail_has_the_stated_error() {
        let inputs: Vec<f32> = (0..=13_100).map(|step| step as f32 / 1000.0).collect();
        let baseline: Vec<f32> = inputs.iter().map(|&a| normal_tail::<Baseline>(a).0).collect();
        let mut chosen = inputs.clone();
        normal_tails(&mut chosen);
        for found in [chosen, baseline] {
            for (&a, &found) in inputs.iter().zip(&found) {
                let a = f64::from(a);
                let truth = 0.5 * libm::erfc(a * std::f64::consts::FRAC_1_SQRT_2);
                let allowed = (13.0 + a * a / 2.0) * f64::from(f32::EPSILON / 2.0) * truth;
                let error = (f64::from(found) - truth).abs();
                assert!(error <= allowed.max(f64::from(f32::MIN_POSITIVE)), "Q({a}) = {truth}: {found}");
            }
        }
    }

    #[test]
    fn the_baseline_agrees_with_the_chosen_instructions() {
        let inputs: Vec<f32> = (-15_000..=15_000).map(|step| step as f32 / 1000.0).collect();
        fn baseline<C: Curve>(x: &[f32]) -> (Vec<f32>, Vec<f32>) {
            x.iter().map(|&x| C::value_and_slope::<Baseline>(x)).unzip()
        }
        for (activation, (values, slopes)) in [
            (Activation::Silu, baseline::<Silu>(&inputs)),
            (Activation::Gelu, baseline::<Gelu>(&inputs)),
            (Activation::GeluTanh, baseline::<GeluTanh>(&inputs)),
            (Activation::Tanh, baseline::<Tanh>(&inputs)),
        ] {
            let mut y = vec![f32::NAN; inputs.len()];
            forward(activation, &inputs, &mut y);
            let mut dx = inputs.clone();
            backward(activation, &mut dx, &vec![1.0; inputs.len()]);
            for (found, other, which) in [(y, values, "value"), (dx, slopes, "slope")] {
                for ((&z, found), other) in inputs.iter().zip(found).zip(other) {
                    let allowed = 32.0 * f32::EPSILON * (found.abs() + (-z.abs()).exp());
                    assert!(
                        (found - other).abs() <= allowed,
                        "{activation:?}, {which} at {z}: {found}, {other}"
                    );
                }
            }
        }
    }
}
