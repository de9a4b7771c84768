//! Loops that are compiled once per instruction set and chosen on the processor at hand.
//!
//! A body is plain Rust over slices; [`vectorised!`] compiles it for AVX-512, for AVX2 with FMA and for the
//! target's baseline, and calls the best one the processor has. Sums run over [`LANES`] partial sums that are
//! combined in one fixed order, so a result depends on the instruction set but on nothing else.
//!
//! [`lanes`] holds the bodies themselves, to be used inside other bodies without choosing again.

pub(crate) mod lanes;

#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

use half::bf16;

/// Partial sums of a reduction: one AVX-512 register of `f32`.
pub(crate) const LANES: usize = 16;

/// An instruction set, as a body sees it.
pub(crate) trait Level {
    /// Whether `f32::mul_add` is an instruction. Where it is not, it is a slow call into the C library.
    const FUSED: bool;
}

/// AVX2 or AVX-512, both with fused multiply-add.
#[cfg(target_arch = "x86_64")]
pub(crate) struct Fused;

/// The target's baseline; aarch64 has fused multiply-add in it.
pub(crate) struct Baseline;

#[cfg(target_arch = "x86_64")]
impl Level for Fused {
    const FUSED: bool = true;
}

impl Level for Baseline {
    const FUSED: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));
}

/// What this processor has.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Simd {
    Avx512,
    Avx2,
    Baseline,
}

/// The best instruction set of this processor that [`vectorised!`] compiles for.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn simd() -> Simd {
    static FOUND: OnceLock<Simd> = OnceLock::new();
    *FOUND.get_or_init(|| {
        let fma = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        match (fma, avx512) {
            (true, true) => Simd::Avx512,
            (true, false) => Simd::Avx2,
            (false, _) => Simd::Baseline,
        }
    })
}

/// Compiles a function's body once per instruction set; the function takes the best one at run time.
///
/// The body sees its [`Level`] as the first type parameter named in angle brackets; others may follow, each with a
/// bound. What it calls is compiled for the same instruction set only where it is inlined: such functions are
/// `#[inline(always)]`.
macro_rules! vectorised {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<$level:ident $(, $generic:ident: $bound:path)*>(
        $($arg:ident: $type:ty),* $(,)?
    ) $(-> $result:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(unsafe_code, reason = "calls code for instructions that the processor was asked for")]
        $vis fn $name<$($generic: $bound),*>($($arg: $type),*) $(-> $result)? {
            #[inline(always)]
            fn body<$level: $crate::cpu::vector::Level $(, $generic: $bound)*>(
                $($arg: $type),*
            ) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            {
                use $crate::cpu::vector::{Fused, Simd, simd};

                #[target_feature(enable = "avx2,avx512f,avx512bw,avx512dq,avx512vl,fma")]
                fn avx512<$($generic: $bound),*>($($arg: $type),*) $(-> $result)? {
                    body::<Fused $(, $generic)*>($($arg),*)
                }

                #[target_feature(enable = "avx2,fma")]
                fn avx2<$($generic: $bound),*>($($arg: $type),*) $(-> $result)? {
                    body::<Fused $(, $generic)*>($($arg),*)
                }

                match simd() {
                    // SAFETY: simd() found every feature of this function on this processor.
                    Simd::Avx512 => return unsafe { avx512::<$($generic),*>($($arg),*) },
                    // SAFETY: as above.
                    Simd::Avx2 => return unsafe { avx2::<$($generic),*>($($arg),*) },
                    Simd::Baseline => {}
                }
            }
            body::<$crate::cpu::vector::Baseline $(, $generic)*>($($arg),*)
        }
    };
}
pub(crate) use vectorised;

vectorised! {
    /// The dot product of two slices of one length.
    pub(crate) fn dot<L>(x: &[f32], y: &[f32]) -> f32 {
        lanes::dot::<L>(x, y)
    }
}

vectorised! {
    /// The largest element; NaN if one is NaN, negative infinity if there are none.
    pub(crate) fn max<L>(x: &[f32]) -> f32 {
        lanes::max::<L>(x)
    }
}

vectorised! {
    /// `y = x`, exact; one length.
    pub(crate) fn widen<L>(x: &[bf16], y: &mut [f32]) {
        lanes::widen::<L>(x, y);
    }
}

vectorised! {
    /// `y = x`, rounded to nearest with ties to even; one length.
    pub(crate) fn narrow<L>(x: &[f32], y: &mut [bf16]) {
        lanes::narrow::<L>(x, y);
    }
}

vectorised! {
    /// True where no element is infinite or NaN.
    pub(crate) fn all_finite<L>(x: &[f32]) -> bool {
        x.iter().fold(true, |all, x| all & x.is_finite())
    }
}

vectorised! {
    /// `x = exp(x - shift)`; returns the sum of the results.
    pub(crate) fn exp_in_place_minus<L>(x: &mut [f32], shift: f32) -> f32 {
        lanes::exp_in_place_minus::<L>(x, shift)
    }
}

vectorised! {
    /// `x = a x`.
    pub(crate) fn scale<L>(x: &mut [f32], a: f32) {
        lanes::scale::<L>(x, a);
    }
}

vectorised! {
    /// `y += a x`; one length.
    pub(crate) fn axpy<L>(a: f32, x: &[f32], y: &mut [f32]) {
        lanes::axpy::<L>(a, x, y);
    }
}

vectorised! {
    /// `x = cap tanh(x / cap)`.
    pub(crate) fn soft_cap<L>(x: &mut [f32], cap: f32) {
        lanes::soft_cap::<L>(x, cap);
    }
}

vectorised! {
    /// The sum of the squares, each exact, added in `f64`.
    pub(crate) fn sum_of_squares<L>(x: &[f32]) -> f64 {
        lanes::sum_of_squares::<L>(x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lengths around the lanes and the chains.
    const LENGTHS: [usize; 10] = [0, 1, 7, 15, 16, 17, 63, 64, 131, 1009];

    fn ramp(length: usize) -> Vec<f32> {
        (0..length).map(|i| ((i * 37 % 101) as f32 - 50.0) / 16.0).collect()
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let inputs: Vec<f32> = (-87_300..=88_700).map(|step| step as f32 / 1000.0).collect();
        let truth: Vec<f64> = inputs.iter().map(|&x| f64::from(x).exp()).collect();
        let (mut chosen, mut baseline) = (inputs.clone(), inputs);
        exp_in_place_minus(&mut chosen, 0.0);
        lanes::exp_in_place_minus::<Baseline>(&mut baseline, 0.0);
        for found in [chosen, baseline] {
            for (&found, &truth) in found.iter().zip(&truth) {
                let relative = (f64::from(found) - truth).abs() / truth;
                assert!(relative <= 2.0 * f64::from(f32::EPSILON), "{truth}: {found}");
            }
        }
    }

    #[test]
    fn exp_saturates_and_keeps_nan() {
        let mut x =
            [0.0, -0.0, f32::NEG_INFINITY, f32::INFINITY, 1e30, -1e30, 88.8, -104.0, -100.0, f32::NAN];
        exp_in_place_minus(&mut x, 0.0);
        assert_eq!(x[..8], [1.0, 1.0, 0.0, f32::INFINITY, f32::INFINITY, 0.0, f32::INFINITY, 0.0]);
        assert!(x[8] > 0.0 && (x[8] - (-100.0f32).exp()).abs() <= 2.8e-45, "subnormal: {}", x[8]);
        assert!(x[9].is_nan());
        assert!(exp_in_place_minus(&mut [f32::NAN; 40], 0.0).is_nan());
        // A fully masked row: the difference of infinities is NaN, as in the specification.
        assert!(exp_in_place_minus(&mut [f32::NEG_INFINITY; 3], f32::NEG_INFINITY).is_nan());
    }

    vectorised! {
        /// `x = tanh(x)`.
        fn tanh_in_place<L>(x: &mut [f32]) {
            x.iter_mut().for_each(|x| *x = lanes::tanh::<L>(*x));
        }
    }

    #[test]
    fn tanh_is_within_two_units_in_the_last_place() {
        let mut inputs: Vec<f32> = (-12_000..=12_000).map(|step| step as f32 / 1000.0).collect();
        inputs.extend([1e-30, -1e-30, 1e-6, 0.625, -0.625, 0.624_999_94, 50.0, -3e38]);
        let truth: Vec<f64> = inputs.iter().map(|&x| f64::from(x).tanh()).collect();
        let baseline: Vec<f32> = inputs.iter().map(|&x| lanes::tanh::<Baseline>(x)).collect();
        let mut chosen = inputs;
        tanh_in_place(&mut chosen);
        for found in [chosen, baseline] {
            for (&found, &truth) in found.iter().zip(&truth) {
                let error = (f64::from(found) - truth).abs();
                assert!(error <= 2.0 * f64::from(f32::EPSILON) * truth.abs(), "{truth}: {found}");
            }
        }
        let mut special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
        tanh_in_place(&mut special);
        assert_eq!(special[..4], [0.0, 0.0, 1.0, -1.0]);
        assert!(special[1].is_sign_negative() && special[4].is_nan());
    }

    #[test]
    fn reductions_match_f64_at_every_length() {
        for length in LENGTHS {
            let (x, y) = (ramp(length), ramp(length + 3)[3..].to_vec());
            let pairs = || x.iter().zip(&y).map(|(&x, &y)| f64::from(x) * f64::from(y));
            let bound = f64::from(f32::EPSILON) * length as f64 * pairs().map(f64::abs).sum::<f64>();
            assert!((f64::from(dot(&x, &y)) - pairs().sum::<f64>()).abs() <= bound, "dot of {length}");
            let squares: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            assert!((sum_of_squares(&x) - squares).abs() <= 1e-15 * length as f64 * squares, "{length}");
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let mut powers = x.clone();
            let sum = exp_in_place_minus(&mut powers, 1.5);
            let truth: f64 = x.iter().map(|&x| (f64::from(x) - 1.5).exp()).sum();
            assert!((f64::from(sum) - truth).abs() <= 4e-7 * length as f64 * truth, "exp of {length}");
        }
    }

    #[test]
    fn max_keeps_nan_wherever_it_stands() {
        for length in LENGTHS {
            for place in 0..length {
                let mut x = ramp(length);
                x[place] = f32::NAN;
                assert!(max(&x).is_nan(), "NaN at {place} of {length}");
            }
        }
    }

    #[test]
    fn one_infinite_element_is_found_wherever_it_stands() {
        for length in LENGTHS {
            assert!(all_finite(&ramp(length)), "{length}");
            for place in 0..length {
                let mut x = ramp(length);
                x[place] = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN][place % 3];
                assert!(!all_finite(&x), "{} at {place} of {length}", x[place]);
            }
        }
    }

    #[test]
    fn narrowing_rounds_as_the_type_does_and_widening_is_exact() {
        // Around ties, denormal, infinite and NaN, and a sweep of all exponents.
        let special =
            [0x3f80_7fff, 0x3f80_8000, 0x3f80_8001, 0x3f81_8000, 0x0000_8001, 0x7f7f_ffff, 0xff80_0000];
        let mut x: Vec<f32> = special.into_iter().map(f32::from_bits).collect();
        x.extend((0..9973u32).map(|i| f32::from_bits(i.wrapping_mul(430_679))));
        x.extend([f32::NAN, f32::from_bits(0x7f80_0001), f32::from_bits(0xffff_ffff)]);
        let (mut narrowed, mut widened) = (vec![bf16::ZERO; x.len()], vec![0.0; x.len()]);
        narrow(&x, &mut narrowed);
        widen(&narrowed, &mut widened);
        for ((&x, &found), &wide) in x.iter().zip(&narrowed).zip(&widened) {
            let truth = bf16::from_f32(x);
            assert!(found == truth || (found.is_nan() && x.is_nan()), "{x:e}: {found:e} for {truth:e}");
            assert_eq!(wide.to_bits(), found.to_f32().to_bits(), "{found:e}");
        }
    }

    #[test]
    fn scale_and_axpy_reach_every_element() {
        for length in LENGTHS {
            let x = ramp(length);
            let mut y = vec![1.0; length];
            axpy(2.0, &x, &mut y);
            scale(&mut y, 0.5);
            assert!(y.iter().zip(&x).all(|(&y, &x)| y == 0.5 + x), "{length}");
        }
    }
}
