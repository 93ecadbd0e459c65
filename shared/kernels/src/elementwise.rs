//! What happens to rows between the products.

use crate::simd::{Isa, LANES, Simd, kernel};

/// What the gate of a feed-forward block goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// `x * sigmoid(x)`.
    Silu,
    /// `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`.
    GeluTanh,
}

/// `exp`, at most 2 units in the last place off (`tests/it`); below -87 it is 0, above 88 it is `exp(88)`.
///
/// `x = n ln 2 + r` with `|r| <= ln 2 / 2`, and the Taylor polynomial of degree 7 in `r`.
#[inline(always)]
pub(crate) unsafe fn exp_lanes<S: Simd>(x: S::F) -> S::F {
    // SAFETY: the caller's promise.
    unsafe {
        let top = S::splat(88.0);
        // `max` of the negatives is the minimum.
        let limited = S::sub(S::splat(0.0), S::max(S::sub(S::splat(0.0), x), S::sub(S::splat(0.0), top)));
        let n = S::round(S::mul(limited, S::splat(std::f32::consts::LOG2_E)));
        // ln 2 in two parts (Cody and Waite): the first has 15 bits, so that n times it is exact.
        let r = S::fma(n, S::splat(-0.693_359_4), limited);
        let r = S::fma(n, S::splat(2.121_944_4e-4), r);
        let mut p = S::splat(1.0 / 5040.0);
        for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = S::fma(p, r, S::splat(c));
        }
        S::zero_below(S::scale(p, n), x, -87.0)
    }
}

#[inline(always)]
unsafe fn exp_body<S: Simd>(x: *mut f32, n: usize) {
    // SAFETY: the caller promises `n` numbers.
    unsafe {
        for i in (0..n).step_by(LANES) {
            let e = exp_lanes::<S>(S::load_part(x.add(i), n - i));
            S::store_part(x.add(i), e, n - i);
        }
    }
}
kernel! { unsafe fn exp_kernel(x: *mut f32, n: usize) = exp_body; }

/// Replaces each number by its exponential.
pub fn exp(isa: Isa, x: &mut [f32]) {
    // SAFETY: the slice has that length.
    unsafe { exp_kernel(isa, x.as_mut_ptr(), x.len()) }
}

#[inline(always)]
unsafe fn norm_body<S: Simd>(x: *const f32, weight: *const f32, eps: f32, out: *mut f32, n: usize) {
    // SAFETY: the caller promises `n` numbers in all three.
    unsafe {
        let mut squares = S::splat(0.0);
        for i in (0..n).step_by(LANES) {
            let v = S::load_part(x.add(i), n - i);
            squares = S::fma(v, v, squares);
        }
        let scale = 1.0 / (S::sum(squares) / n as f32 + eps).sqrt();
        let scale = S::splat(scale);
        for i in (0..n).step_by(LANES) {
            let v = S::mul(S::load_part(x.add(i), n - i), scale);
            S::store_part(out.add(i), S::mul(v, S::load_part(weight.add(i), n - i)), n - i);
        }
    }
}
kernel! { unsafe fn norm_kernel(x: *const f32, weight: *const f32, eps: f32, out: *mut f32, n: usize) = norm_body; }

/// Root-mean-square norm of one row: `x / sqrt(mean(x^2) + eps) * weight`.
///
/// # Panics
/// If the lengths differ.
pub fn norm(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == out.len(), "norm of different lengths");
    // SAFETY: the lengths are equal.
    unsafe { norm_kernel(isa, x.as_ptr(), weight.as_ptr(), eps, out.as_mut_ptr(), x.len()) }
}

#[inline(always)]
unsafe fn gate_body<S: Simd>(kind: Gate, both: *const f32, out: *mut f32, n: usize) {
    // SAFETY: the caller promises `2 n` numbers and room for `n`.
    unsafe {
        for i in (0..n).step_by(LANES) {
            let (x, up) = (S::load_part(both.add(i), n - i), S::load_part(both.add(n + i), n - i));
            let exponent = match kind {
                Gate::Silu => S::sub(S::splat(0.0), x),
                Gate::GeluTanh => {
                    // 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u))
                    let cube = S::mul(S::mul(x, x), S::mul(x, S::splat(0.044_715)));
                    S::mul(S::add(x, cube), S::splat(-1.595_769))
                }
            };
            let sigmoid = S::add(S::splat(1.0), exp_lanes::<S>(exponent));
            S::store_part(out.add(i), S::mul(S::div(x, sigmoid), up), n - i);
        }
    }
}
kernel! { unsafe fn gate_kernel(kind: Gate, both: *const f32, out: *mut f32, n: usize) = gate_body; }

/// One row of a feed-forward block: the first half of `both` through the gate, times the second half.
///
/// # Panics
/// If `both` is not twice as long as `out`.
pub fn gate(isa: Isa, kind: Gate, both: &[f32], out: &mut [f32]) {
    assert!(both.len() == 2 * out.len(), "gate of different lengths");
    // SAFETY: the lengths fit.
    unsafe { gate_kernel(isa, kind, both.as_ptr(), out.as_mut_ptr(), out.len()) }
}

#[inline(always)]
unsafe fn rotate_body<S: Simd>(x: *mut f32, cos: *const f32, sin: *const f32, scale: f32, half: usize) {
    // SAFETY: the caller promises `2 half` numbers at `x` and `half` in the tables.
    unsafe {
        let scale = S::splat(scale);
        for i in (0..half).step_by(LANES) {
            let n = half - i;
            let (a, b) = (S::load_part(x.add(i), n), S::load_part(x.add(half + i), n));
            let (c, s) = (S::load_part(cos.add(i), n), S::load_part(sin.add(i), n));
            let first = S::fma(S::sub(S::splat(0.0), b), s, S::mul(a, c));
            let second = S::fma(a, s, S::mul(b, c));
            S::store_part(x.add(i), S::mul(first, scale), n);
            S::store_part(x.add(half + i), S::mul(second, scale), n);
        }
    }
}
kernel! { unsafe fn rotate_kernel(x: *mut f32, cos: *const f32, sin: *const f32, scale: f32, half: usize) = rotate_body; }

/// Turns one head by its position: the first half against the second, then times `scale`.
///
/// # Panics
/// If `x` is not twice as long as the tables.
pub fn rotate(isa: Isa, x: &mut [f32], cos: &[f32], sin: &[f32], scale: f32) {
    let half = cos.len();
    assert!(x.len() == 2 * half && sin.len() == half, "rotation of different lengths");
    // SAFETY: the lengths fit.
    unsafe { rotate_kernel(isa, x.as_mut_ptr(), cos.as_ptr(), sin.as_ptr(), scale, half) }
}
