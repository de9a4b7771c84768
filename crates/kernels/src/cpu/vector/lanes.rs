//! The bodies, to be used inside other bodies of [`vectorised!`](super::vectorised).

use half::bf16;

use super::{LANES, Level};

/// Independent chains of additions, enough to hide the latency of one.
const CHAINS: usize = 4;

/// `a b + c`, rounded once where that is an instruction.
#[inline(always)]
pub(crate) fn fma<L: Level>(a: f32, b: f32, c: f32) -> f32 {
    if L::FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// Combines partial results pairwise: halves, quarters, and so on.
#[inline(always)]
pub(crate) fn combine<T: Copy, const N: usize>(mut parts: [T; N], join: impl Fn(T, T) -> T) -> T {
    let mut width = N;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            parts[lane] = join(parts[lane], parts[lane + width]);
        }
    }
    parts[0]
}

/// The dot product of two slices of one length.
#[inline(always)]
pub(crate) fn dot<L: Level>(x: &[f32], y: &[f32]) -> f32 {
    dot_of::<L, f32, f32>(x, y)
}

/// The dot product of two slices of one length, widened as they are read.
#[inline(always)]
pub(crate) fn dot_of<L: Level, A: Element, B: Element>(x: &[A], y: &[B]) -> f32 {
    assert_eq!(x.len(), y.len());
    let mut chains = [[0.0f32; LANES]; CHAINS];
    let (x_wide, x) = x.as_chunks::<{ LANES * CHAINS }>();
    let (y_wide, y) = y.as_chunks::<{ LANES * CHAINS }>();
    for (x, y) in x_wide.iter().zip(y_wide) {
        for (chain, parts) in chains.iter_mut().enumerate() {
            for (lane, part) in parts.iter_mut().enumerate() {
                let at = chain * LANES + lane;
                *part = fma::<L>(x[at].wide(), y[at].wide(), *part);
            }
        }
    }
    let [mut first, second, third, fourth] = chains;
    for lane in 0..LANES {
        first[lane] = (first[lane] + second[lane]) + (third[lane] + fourth[lane]);
    }
    let (x_chunks, x) = x.as_chunks::<LANES>();
    let (y_chunks, y) = y.as_chunks::<LANES>();
    for (x, y) in x_chunks.iter().zip(y_chunks) {
        for lane in 0..LANES {
            first[lane] = fma::<L>(x[lane].wide(), y[lane].wide(), first[lane]);
        }
    }
    for (part, (&x, &y)) in first.iter_mut().zip(x.iter().zip(y)) {
        *part = fma::<L>(x.wide(), y.wide(), *part);
    }
    combine(first, |a, b| a + b)
}

/// The sum of `term` over slices of one length. One chain of additions: with several the compiler no longer keeps
/// the parts in registers where there is one slice.
#[inline(always)]
pub(crate) fn sum<L: Level, const N: usize>(slices: [&[f32]; N], term: impl Fn([f32; N]) -> f32) -> f32 {
    let length = slices[0].len();
    let mut parts = [0.0f32; LANES];
    let whole = length - length % LANES;
    for start in (0..whole).step_by(LANES) {
        let chunks = slices.map(|slice| &slice[start..start + LANES]);
        for (lane, part) in parts.iter_mut().enumerate() {
            *part += term(chunks.map(|chunk| chunk[lane]));
        }
    }
    for (part, place) in parts.iter_mut().zip(whole..length) {
        *part += term(slices.map(|slice| slice[place]));
    }
    combine(parts, |a, b| a + b)
}

/// The same number.
#[inline(always)]
pub(crate) fn wide(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// The nearest `bf16`, of two the even one; NaN of NaN.
#[inline(always)]
pub(crate) fn round(x: f32) -> bf16 {
    let bits = x.to_bits();
    // Adds just below half a unit, and the last bit kept: a tie is carried up only onto an even number. A quiet
    // NaN is set by hand, as the carry could turn a NaN into something else.
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1))) >> 16;
    let quiet = (bits >> 16) | 0x40;
    bf16::from_bits(if x.is_nan() { quiet } else { rounded } as u16)
}

/// A type that elements are stored in: loops that are generic over it convert in registers.
pub(crate) trait Element: Copy {
    fn wide(self) -> f32;
    fn round(x: f32) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }

    #[inline(always)]
    fn round(x: f32) -> f32 {
        x
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn wide(self) -> f32 {
        wide(self)
    }

    #[inline(always)]
    fn round(x: f32) -> bf16 {
        round(x)
    }
}

/// `y = x`; one length.
#[inline(always)]
pub(crate) fn widen<L: Level>(x: &[bf16], y: &mut [f32]) {
    assert_eq!(x.len(), y.len());
    y.iter_mut().zip(x).for_each(|(y, &x)| *y = wide(x));
}

/// `y = x`, rounded; one length.
#[inline(always)]
pub(crate) fn narrow<L: Level>(x: &[f32], y: &mut [bf16]) {
    assert_eq!(x.len(), y.len());
    y.iter_mut().zip(x).for_each(|(y, &x)| *y = round(x));
}

/// The larger of two numbers; NaN if one is NaN.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a || b.is_nan() { b } else { a }
}

/// The largest element; NaN if one is NaN, negative infinity if there are none.
#[inline(always)]
pub(crate) fn max<L: Level>(x: &[f32]) -> f32 {
    let mut parts = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for x in chunks {
        for (part, &x) in parts.iter_mut().zip(x) {
            *part = larger(*part, x);
        }
    }
    for (part, &x) in parts.iter_mut().zip(rest) {
        *part = larger(*part, x);
    }
    combine(parts, larger)
}

/// e to the power of `x`, within 2 units in the last place; exact at 0 and at the infinities, NaN of NaN.
///
/// `exp(x) = 2^n exp(r)` with `n = round(x / ln 2)` and `|r| <= ln 2 / 2`; the polynomial for `exp(r)` is
/// that of the Cephes library's `expf`.
#[inline(always)]
pub(crate) fn exp<L: Level>(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts; the first has so few bits that its products with n are exact.
    const LN_2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);
    // Beyond these the result is infinite or 0; comparing this way round keeps a NaN.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -105.0 { -105.0 } else { x };
    let shifted = fma::<L>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<L>(n, -LN_2.1, fma::<L>(n, -LN_2.0, x));
    let mut p = fma::<L>(r, 1.987_569_1e-4, 1.398_199_9e-3);
    p = fma::<L>(p, r, 8.333_452e-3);
    p = fma::<L>(p, r, 4.166_579_6e-2);
    p = fma::<L>(p, r, 1.666_666_5e-1);
    p = fma::<L>(p, r, 0.5);
    p = fma::<L>(p * r, r, r) + 1.0;
    // 2^n as a product of two powers, since n reaches beyond the exponents of normal numbers.
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = n >> 1;
    p * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

/// 2^n for n in -126..=127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// The hyperbolic tangent, within 2 units in the last place; exact at 0 and at the infinities, NaN of NaN.
///
/// The polynomial near 0 and the border to `1 - 2 / (exp(2 |x|) + 1)` are those of the Cephes library's
/// `tanhf`.
#[inline(always)]
pub(crate) fn tanh<L: Level>(x: f32) -> f32 {
    let (size, square) = (x.abs(), x * x);
    let mut p = fma::<L>(square, -5.704_988_7e-3, 2.063_909e-2);
    p = fma::<L>(p, square, -5.373_971_6e-2);
    p = fma::<L>(p, square, 1.333_144_2e-1);
    p = fma::<L>(p, square, -3.333_328e-1);
    let near = fma::<L>(p * square, size, size);
    let far = 1.0 - 2.0 / (exp::<L>(2.0 * size) + 1.0);
    (if size < 0.625 { near } else { far }).copysign(x)
}

/// `x = exp(x - shift)`; returns the sum of the results.
#[inline(always)]
pub(crate) fn exp_in_place_minus<L: Level>(x: &mut [f32], shift: f32) -> f32 {
    let mut parts = [0.0f32; LANES];
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    for x in chunks {
        for (part, x) in parts.iter_mut().zip(x) {
            *x = exp::<L>(*x - shift);
            *part += *x;
        }
    }
    for (part, x) in parts.iter_mut().zip(rest) {
        *x = exp::<L>(*x - shift);
        *part += *x;
    }
    combine(parts, |a, b| a + b)
}

/// `x = a x`.
#[inline(always)]
pub(crate) fn scale<L: Level>(x: &mut [f32], a: f32) {
    x.iter_mut().for_each(|x| *x *= a);
}

/// `x = cap tanh(x / cap)`.
#[inline(always)]
pub(crate) fn soft_cap<L: Level>(x: &mut [f32], cap: f32) {
    let inverse = cap.recip();
    x.iter_mut().for_each(|x| *x = cap * tanh::<L>(*x * inverse));
}

/// `y += a x`; one length.
#[inline(always)]
pub(crate) fn axpy<L: Level>(a: f32, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len());
    y.iter_mut().zip(x).for_each(|(y, &x)| *y = fma::<L>(a, x, *y));
}

/// The sum of the squares, each exact, added in `f64`.
#[inline(always)]
pub(crate) fn sum_of_squares<L: Level>(x: &[f32]) -> f64 {
    let mut parts = [0.0f64; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for x in chunks {
        for (part, &x) in parts.iter_mut().zip(x) {
            *part += f64::from(x) * f64::from(x);
        }
    }
    for (part, &x) in parts.iter_mut().zip(rest) {
        *part += f64::from(x) * f64::from(x);
    }
    combine(parts, |a, b| a + b)
}
