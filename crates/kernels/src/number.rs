//! The two precisions of the specifications.

use std::fmt::Debug;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

/// `f32` or `f64`: what the naive specifications are generic over, so that one text is checked by finite
/// differences in `f64` and compared with the fast version in `f32`.
pub trait Number:
    Copy
    + Debug
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + Sum
{
    /// The nearest representable value.
    fn of(value: f64) -> Self;
    /// Widened.
    fn f64(self) -> f64;
    /// e to the power of the value.
    fn exp(self) -> Self;
    /// The natural logarithm.
    fn ln(self) -> Self;
    /// The square root.
    fn sqrt(self) -> Self;
    /// The hyperbolic tangent.
    fn tanh(self) -> Self;
    /// The complementary error function, `2 / sqrt(pi)` times the integral of `exp(-t^2)` from here on.
    fn erfc(self) -> Self;
}

macro_rules! number {
    ($type:ty, $erfc:path) => {
        impl Number for $type {
            fn of(value: f64) -> Self {
                value as $type
            }
            fn f64(self) -> f64 {
                f64::from(self)
            }
            fn exp(self) -> Self {
                self.exp()
            }
            fn ln(self) -> Self {
                self.ln()
            }
            fn sqrt(self) -> Self {
                self.sqrt()
            }
            fn tanh(self) -> Self {
                self.tanh()
            }
            fn erfc(self) -> Self {
                $erfc(self)
            }
        }
    };
}

number!(f32, libm::erfcf);
number!(f64, libm::erfc);
