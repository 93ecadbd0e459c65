//! Two registers of 256 bits.

use std::arch::x86_64::*;

use super::Simd;

#[derive(Clone, Copy)]
pub(crate) struct Avx2;

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

/// Lane `i` and `i + 4`, `i + 2`, `i + 1`.
#[inline(always)]
pub(super) unsafe fn sum8(a: __m256) -> f32 {
    // SAFETY: the caller has AVX2.
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
}

/// All bits of the lanes `from..to`.
#[inline(always)]
unsafe fn mask(from: usize, to: usize, first: i32) -> __m256 {
    // SAFETY: the caller has AVX2.
    unsafe {
        let lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(first));
        let above = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(from as i32 - 1));
        let below = _mm256_cmpgt_epi32(_mm256_set1_epi32(to.min(16) as i32), lane);
        _mm256_castsi256_ps(_mm256_and_si256(above, below))
    }
}

type Two = (__m256, __m256);

macro_rules! both {
    ($f:ident($($a:expr),*)) => { unsafe { ($f($($a.0),*), $f($($a.1),*)) } };
}

// SAFETY of every block: the trait's callers promise the instruction set and the pointers.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx2 {
    type F = Two;
    type Q = (__m256i, __m256i);
    type I = (__m256i, __m256i);

    #[inline(always)]
    unsafe fn splat(x: f32) -> Two {
        unsafe { (_mm256_set1_ps(x), _mm256_set1_ps(x)) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Two {
        unsafe { (_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: Two) {
        unsafe {
            _mm256_storeu_ps(p, x.0);
            _mm256_storeu_ps(p.add(8), x.1);
        }
    }
    #[inline(always)]
    unsafe fn load_half(p: *const u16) -> Two {
        unsafe {
            (_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast())))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> Two {
        unsafe {
            let a = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            let b = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(8).cast()));
            (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(a)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b)))
        }
    }
    #[inline(always)]
    unsafe fn add(a: Two, b: Two) -> Two {
        both!(_mm256_add_ps(a, b))
    }
    #[inline(always)]
    unsafe fn sub(a: Two, b: Two) -> Two {
        both!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    unsafe fn mul(a: Two, b: Two) -> Two {
        both!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    unsafe fn div(a: Two, b: Two) -> Two {
        both!(_mm256_div_ps(a, b))
    }
    #[inline(always)]
    unsafe fn fma(a: Two, b: Two, c: Two) -> Two {
        both!(_mm256_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    unsafe fn max(a: Two, b: Two) -> Two {
        both!(_mm256_max_ps(a, b))
    }
    #[inline(always)]
    unsafe fn abs(a: Two) -> Two {
        let sign = unsafe { Self::splat(-0.0) };
        both!(_mm256_andnot_ps(sign, a))
    }
    #[inline(always)]
    unsafe fn round(a: Two) -> Two {
        unsafe { (_mm256_round_ps::<NEAREST>(a.0), _mm256_round_ps::<NEAREST>(a.1)) }
    }
    #[inline(always)]
    unsafe fn scale(a: Two, n: Two) -> Two {
        unsafe {
            let one = |a: __m256, n: __m256| {
                let shift = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(n));
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), shift))
            };
            (one(a.0, n.0), one(a.1, n.1))
        }
    }
    #[inline(always)]
    unsafe fn between(a: Two, from: usize, to: usize, fill: f32) -> Two {
        unsafe {
            let fill = _mm256_set1_ps(fill);
            (_mm256_blendv_ps(fill, a.0, mask(from, to, 0)), _mm256_blendv_ps(fill, a.1, mask(from, to, 8)))
        }
    }
    #[inline(always)]
    unsafe fn zero_below(a: Two, x: Two, low: f32) -> Two {
        unsafe {
            let low = _mm256_set1_ps(low);
            (
                _mm256_and_ps(a.0, _mm256_cmp_ps::<_CMP_GE_OQ>(x.0, low)),
                _mm256_and_ps(a.1, _mm256_cmp_ps::<_CMP_GE_OQ>(x.1, low)),
            )
        }
    }
    #[inline(always)]
    unsafe fn sum(a: Two) -> f32 {
        unsafe { sum8(_mm256_add_ps(a.0, a.1)) }
    }
    #[inline(always)]
    unsafe fn largest(a: Two) -> f32 {
        unsafe {
            let eight = _mm256_max_ps(a.0, a.1);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    unsafe fn load_q(p: *const u8) -> (__m256i, __m256i) {
        unsafe { (_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())) }
    }
    #[inline(always)]
    unsafe fn nibble(q: (__m256i, __m256i), shift: u32) -> Two {
        unsafe {
            let (low, by) = (_mm256_set1_epi32(15), _mm256_set1_epi32(shift as i32));
            (
                _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srlv_epi32(q.0, by), low)),
                _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srlv_epi32(q.1, by), low)),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Two {
        unsafe {
            (
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.add(8).cast()))),
            )
        }
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, x: Two) {
        unsafe {
            let (a, b) = (_mm256_cvtps_epi32(x.0), _mm256_cvtps_epi32(x.1));
            let pack =
                |v: __m256i| _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
            _mm_storeu_si128(p.cast(), _mm_packs_epi16(pack(a), pack(b)));
        }
    }
    #[inline(always)]
    unsafe fn halves(q: (__m256i, __m256i)) -> ((__m256i, __m256i), (__m256i, __m256i)) {
        unsafe {
            let low = _mm256_set1_epi8(15);
            let high = |v| _mm256_and_si256(_mm256_srli_epi16::<4>(v), low);
            ((_mm256_and_si256(q.0, low), _mm256_and_si256(q.1, low)), (high(q.0), high(q.1)))
        }
    }
    #[inline(always)]
    unsafe fn zero_i() -> (__m256i, __m256i) {
        unsafe { (_mm256_setzero_si256(), _mm256_setzero_si256()) }
    }
    #[inline(always)]
    unsafe fn dot(acc: (__m256i, __m256i), w: (__m256i, __m256i), x: i32) -> (__m256i, __m256i) {
        unsafe {
            let (x, ones) = (_mm256_set1_epi32(x), _mm256_set1_epi16(1));
            // Two products of at most 15 * 128 each fit into 16 bits.
            let one = |acc, w| _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones));
            (one(acc.0, w.0), one(acc.1, w.1))
        }
    }
    #[inline(always)]
    unsafe fn times_128(i: (__m256i, __m256i)) -> (__m256i, __m256i) {
        unsafe { (_mm256_slli_epi32::<7>(i.0), _mm256_slli_epi32::<7>(i.1)) }
    }
    #[inline(always)]
    unsafe fn to_f(i: (__m256i, __m256i)) -> Two {
        unsafe { (_mm256_cvtepi32_ps(i.0), _mm256_cvtepi32_ps(i.1)) }
    }
}
