//! Arrays: what the other instruction sets must equal.

use half::{bf16, f16};

use super::{LANES, Simd};

#[derive(Clone, Copy)]
pub(crate) struct Portable;

type F = [f32; LANES];

#[inline(always)]
fn map2(a: F, b: F, f: impl Fn(f32, f32) -> f32) -> F {
    std::array::from_fn(|i| f(a[i], b[i]))
}

// SAFETY of every block: the trait's callers promise the pointers.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Portable {
    type F = F;
    type Q = [u32; LANES];
    type I = [i32; LANES];

    #[inline(always)]
    unsafe fn splat(x: f32) -> F {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> F {
        unsafe { p.cast::<F>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: F) {
        unsafe { p.cast::<F>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn load_half(p: *const u16) -> F {
        unsafe { p.cast::<[u16; LANES]>().read_unaligned() }.map(|h| f16::from_bits(h).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> F {
        unsafe { p.cast::<[u16; LANES]>().read_unaligned() }.map(|h| bf16::from_bits(h).to_f32())
    }
    #[inline(always)]
    unsafe fn add(a: F, b: F) -> F {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: F, b: F) -> F {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: F, b: F) -> F {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: F, b: F) -> F {
        map2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn fma(a: F, b: F, c: F) -> F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn max(a: F, b: F) -> F {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn abs(a: F) -> F {
        a.map(f32::abs)
    }
    #[inline(always)]
    unsafe fn round(a: F) -> F {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    unsafe fn scale(a: F, n: F) -> F {
        map2(a, n, |a, n| f32::from_bits(a.to_bits().wrapping_add(((n as i32) << 23) as u32)))
    }
    #[inline(always)]
    unsafe fn between(a: F, from: usize, to: usize, fill: f32) -> F {
        std::array::from_fn(|i| if (from..to).contains(&i) { a[i] } else { fill })
    }
    #[inline(always)]
    unsafe fn zero_below(a: F, x: F, low: f32) -> F {
        map2(a, x, |a, x| if x >= low { a } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn sum(a: F) -> f32 {
        let mut a = a;
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                a[i] += a[i + half];
            }
        }
        a[0]
    }
    #[inline(always)]
    unsafe fn largest(a: F) -> f32 {
        a.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn load_q(p: *const u8) -> [u32; LANES] {
        unsafe { p.cast::<[u32; LANES]>().read_unaligned() }.map(u32::from_le)
    }
    #[inline(always)]
    unsafe fn nibble(q: [u32; LANES], shift: u32) -> F {
        q.map(|q| (q >> shift & 15) as f32)
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> F {
        unsafe { p.cast::<[i8; LANES]>().read_unaligned() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, x: F) {
        unsafe { p.cast::<[i8; LANES]>().write_unaligned(x.map(|x| x as i8)) }
    }
    #[inline(always)]
    unsafe fn halves(q: [u32; LANES]) -> ([u32; LANES], [u32; LANES]) {
        (q.map(|q| q & 0x0f0f_0f0f), q.map(|q| q >> 4 & 0x0f0f_0f0f))
    }
    #[inline(always)]
    unsafe fn zero_i() -> [i32; LANES] {
        [0; LANES]
    }
    #[inline(always)]
    unsafe fn dot(acc: [i32; LANES], w: [u32; LANES], x: i32) -> [i32; LANES] {
        let x = x.to_le_bytes().map(|b| i32::from(b as i8));
        std::array::from_fn(|i| {
            let w = w[i].to_le_bytes();
            acc[i] + (0..4).map(|j| i32::from(w[j]) * x[j]).sum::<i32>()
        })
    }
    #[inline(always)]
    unsafe fn times_128(i: [i32; LANES]) -> [i32; LANES] {
        i.map(|i| i << 7)
    }
    #[inline(always)]
    unsafe fn to_f(i: [i32; LANES]) -> F {
        i.map(|i| i as f32)
    }
}
