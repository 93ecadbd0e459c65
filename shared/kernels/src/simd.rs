//! Sixteen lanes of f32 on three instruction sets, with the same bits from each.
//!
//! Only operations that IEEE 754 or integer arithmetic defines to the last bit are here; a horizontal sum is a fixed tree.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use portable::Portable;

/// Numbers in a register.
pub(crate) const LANES: usize = 16;

/// An instruction set. The results are the same; the time is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 with VNNI (Ice Lake, Zen 4 and later).
    Avx512,
    /// AVX2 with FMA and F16C (Haswell, Zen and later).
    Avx2,
    /// Plain Rust.
    Portable,
}

impl Isa {
    /// The best one that this processor has.
    #[must_use]
    pub fn detect() -> Self {
        Self::available().first().copied().unwrap_or(Self::Portable)
    }

    /// All that this processor has, best first.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx512f")
                && has!("avx512bw")
                && has!("avx512dq")
                && has!("avx512vl")
                && has!("avx512vnni")
            {
                all.push(Self::Avx512);
            }
            if has!("avx2") && has!("fma") && has!("f16c") {
                all.push(Self::Avx2);
            }
        }
        all.push(Self::Portable);
        all
    }

    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }
}

/// One instruction set. Pointers need no alignment; `load` and `store` touch 16 numbers.
///
/// # Safety
/// All functions need the instruction set, and valid pointers.
pub(crate) trait Simd: Copy {
    /// 16 f32.
    type F: Copy;
    /// 16 u32 or 64 bytes.
    type Q: Copy;
    /// 16 i32.
    type I: Copy;

    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn load(p: *const f32) -> Self::F;
    unsafe fn store(p: *mut f32, x: Self::F);
    /// 16 half-precision numbers.
    unsafe fn load_half(p: *const u16) -> Self::F;
    /// 16 bfloat16 numbers.
    unsafe fn load_bf16(p: *const u16) -> Self::F;
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn abs(a: Self::F) -> Self::F;
    /// To an integer, ties to even.
    unsafe fn round(a: Self::F) -> Self::F;
    /// `a * 2^n` for integers `n` from -126 to 127: adds to the exponent, for normal `a` and results.
    unsafe fn scale(a: Self::F, n: Self::F) -> Self::F;
    /// Lanes `from..to` of `a`, the others `fill`.
    unsafe fn between(a: Self::F, from: usize, to: usize, fill: f32) -> Self::F;
    /// `a` where `x >= low`, otherwise 0.
    unsafe fn zero_below(a: Self::F, x: Self::F, low: f32) -> Self::F;
    /// Lane `i` and lane `i + 8`, then `i + 4`, `i + 2`, `i + 1`.
    unsafe fn sum(a: Self::F) -> f32;
    unsafe fn largest(a: Self::F) -> f32;

    unsafe fn load_q(p: *const u8) -> Self::Q;
    /// Bits `shift..shift + 4` of each u32.
    unsafe fn nibble(q: Self::Q, shift: u32) -> Self::F;
    /// 16 signed bytes.
    unsafe fn load_i8(p: *const i8) -> Self::F;
    /// Integers from -128 to 127 as bytes.
    unsafe fn store_i8(p: *mut i8, x: Self::F);
    /// The low and the high nibble of each byte.
    unsafe fn halves(q: Self::Q) -> (Self::Q, Self::Q);
    unsafe fn zero_i() -> Self::I;
    /// Adds to each lane four products of the bytes of `w` (0 to 15) in it with those of `x`, signed, the same in all lanes.
    unsafe fn dot(acc: Self::I, w: Self::Q, x: i32) -> Self::I;
    unsafe fn times_128(i: Self::I) -> Self::I;
    unsafe fn to_f(i: Self::I) -> Self::F;

    /// The first `n` numbers at `p`, and zeros.
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> Self::F {
        // SAFETY: the caller promises `n` numbers; the array has 16.
        unsafe {
            if n >= LANES {
                return Self::load(p);
            }
            let mut part = [0f32; LANES];
            std::ptr::copy_nonoverlapping(p, part.as_mut_ptr(), n);
            Self::load(part.as_ptr())
        }
    }

    /// Writes the first `n` lanes.
    #[inline(always)]
    unsafe fn store_part(p: *mut f32, x: Self::F, n: usize) {
        // SAFETY: the caller promises room for `n` numbers; the array has 16.
        unsafe {
            if n >= LANES {
                return Self::store(p, x);
            }
            let mut part = [0f32; LANES];
            Self::store(part.as_mut_ptr(), x);
            std::ptr::copy_nonoverlapping(part.as_ptr(), p, n);
        }
    }
}

/// A kernel's entry: the generic body `$body` compiled for each instruction set.
macro_rules! kernel {
    ($(#[$meta:meta])* $vis:vis unsafe fn $name:ident($($arg:ident: $ty:ty),* $(,)?) = $body:ident;) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis unsafe fn $name(isa: $crate::simd::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
                unsafe fn wide($($arg: $ty),*) {
                    // SAFETY: the caller's promise.
                    unsafe { $body::<$crate::simd::Avx512>($($arg),*) }
                }
                #[target_feature(enable = "avx2,fma,f16c")]
                unsafe fn narrow($($arg: $ty),*) {
                    // SAFETY: the caller's promise.
                    unsafe { $body::<$crate::simd::Avx2>($($arg),*) }
                }
                match isa {
                    // SAFETY: an Isa comes from `available`, the rest is the caller's promise.
                    $crate::simd::Isa::Avx512 => return unsafe { wide($($arg),*) },
                    // SAFETY: as above.
                    $crate::simd::Isa::Avx2 => return unsafe { narrow($($arg),*) },
                    $crate::simd::Isa::Portable => {}
                }
            }
            let _ = isa;
            // SAFETY: the caller's promise.
            unsafe { $body::<$crate::simd::Portable>($($arg),*) }
        }
    };
}
pub(crate) use kernel;
