//! The passes over a whole vocabulary that a draw needs: written so that compilers use vector instructions, and so
//! that every platform computes the same bits.
//!
//! Only `+`, `-`, `*` and comparisons of `f32` and `f64` in a fixed order, never fused: each of them is exactly rounded
//! by IEEE 754, so that neither the width of the vectors nor the platform can change a bit. Rust contracts nothing.

use crate::mask::Mask;
use std::cmp::Ordering;

/// Tokens of a chunk: those of one word of a [`Mask`].
const CHUNK: usize = 64;
/// Up to so many of a chunk are picked out one by one; of more, the others are struck out.
const FEW: u32 = 32;
/// Partial sums side by side.
const LANES: usize = 16;
/// Elements that are summed in `f32` before they go into the `f64` total.
const BLOCK: usize = 256;

/// Best first, ties by token id.
pub(crate) fn by_logit(a: &(f32, u32), b: &(f32, u32)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// What one pass over the logits finds.
pub(crate) struct Scan {
    /// The largest of each [`CHUNK`].
    tops: Vec<f32>,
    /// The largest of all.
    pub max: f32,
}

/// The larger one; unlike `f32::max` one instruction, because NaN was excluded.
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

fn top_of(values: &[f32]) -> f32 {
    values.iter().fold(f32::NEG_INFINITY, |a, b| larger(a, *b))
}

/// The same for a whole chunk, in lanes.
fn top_of_chunk(values: &[f32; CHUNK]) -> f32 {
    let mut top = [f32::NEG_INFINITY; 8];
    for row in values.as_chunks::<8>().0 {
        for lane in 0..8 {
            top[lane] = larger(top[lane], row[lane]);
        }
    }
    top_of(&top)
}

/// Largest logits; `Err` is the first token whose logit is not finite.
pub(crate) fn scan(logits: &[f32]) -> Result<Scan, usize> {
    const EXPONENT: u32 = 0x7F80_0000;
    let mut tops = Vec::with_capacity(logits.len().div_ceil(CHUNK));
    for chunk in logits.chunks(CHUNK) {
        let (rows, rest) = chunk.as_chunks::<8>();
        let mut top = [f32::NEG_INFINITY; 8];
        // NaN and the infinities have all bits of the exponent set.
        let mut largest_exponent = [0_u32; 8];
        for row in rows {
            for lane in 0..8 {
                top[lane] = larger(top[lane], row[lane]);
                let exponent = row[lane].to_bits() & EXPONENT;
                largest_exponent[lane] = largest_exponent[lane].max(exponent);
            }
        }
        if largest_exponent.contains(&EXPONENT) || rest.iter().any(|z| !z.is_finite()) {
            break;
        }
        tops.push(larger(top_of(&top), top_of(rest)));
    }
    match logits.iter().skip(tops.len() * CHUNK).position(|z| !z.is_finite()) {
        Some(at) => Err(tops.len() * CHUNK + at),
        None => Ok(Scan { max: top_of(&tops), tops }),
    }
}

/// `e^x` for x <= 0: the relative error is at most 2^-22 down to -87, below which the result stays that of -87 (1.6e-38).
///
/// Cephes' `expf` (Moshier, 1989): `x = n ln 2 + r`, a polynomial in r, times 2^n. Adding 1.5 * 2^23 rounds to the
/// nearest integer and leaves it in the low bits.
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = larger(-87.0, x);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.987_569_2e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    p = (p * (r * r) + r) + 1.0;
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3F80_0000))
}

/// `max + ln(sum(exp(z - max)))` of finite logits, with an error of at most 4e-6.
///
/// The sum: element i of each 256 goes into lane i mod 16 in `f32`, then the lanes of the 256 in order into an `f64`.
pub(crate) fn log_sum_exp(logits: &[f32], max: f32) -> f64 {
    let mut total = 0.0_f64;
    for block in logits.chunks(BLOCK) {
        let mut lanes = [0.0_f32; LANES];
        let (rows, rest) = block.as_chunks::<LANES>();
        for row in rows {
            for lane in 0..LANES {
                lanes[lane] += exp(row[lane] - max);
            }
        }
        for (lane, z) in lanes.iter_mut().zip(rest) {
            *lane += exp(z - max);
        }
        for lane in lanes {
            total += f64::from(lane);
        }
    }
    f64::from(max) + libm::log(total)
}

/// The logits as the draw sees them: some changed, some not to be chosen.
pub(crate) struct View<'a> {
    pub logits: &'a [f32],
    /// Changed logits, ascending by token.
    pub changed: &'a [(u32, f32)],
    pub mask: Option<&'a Mask>,
}

impl View<'_> {
    /// The `k` highest, best first; fewer if fewer may be chosen.
    ///
    /// The k-th highest of the chunks' tops is no higher than the k-th highest logit: only chunks that reach it are
    /// looked into.
    pub fn top(&self, scan: &Scan, k: usize) -> Vec<(f32, u32)> {
        let mut tops = scan.tops.clone();
        let mut changed = self.changed;
        for (at, top) in tops.iter_mut().enumerate() {
            let here = self.changed_in(at, &mut changed);
            if self.mask.is_some_and(|mask| mask.word(at) == 0) {
                *top = f32::NEG_INFINITY;
            } else if !here.is_empty() || self.masked(at) {
                *top = top_of_chunk(&self.chunk(at, here));
            }
        }
        let floor = kth(&tops, k);
        let mut found: Vec<(f32, u32)> = Vec::with_capacity(4 * k);
        let mut changed = self.changed;
        for (at, top) in tops.iter().enumerate() {
            let here = self.changed_in(at, &mut changed);
            if *top < floor || *top == f32::NEG_INFINITY {
                continue;
            }
            for (i, z) in self.chunk(at, here).iter().enumerate() {
                if *z >= floor && *z > f32::NEG_INFINITY {
                    // Adding zero turns -0 into 0: they are equal logits and must tie.
                    found.push((*z + 0.0, (at * CHUNK + i) as u32));
                }
            }
        }
        if found.len() > k {
            found.select_nth_unstable_by(k - 1, by_logit);
            found.truncate(k);
        }
        found.sort_unstable_by(by_logit);
        found
    }

    /// The changed logits of a chunk, taken off the front of those that are left.
    fn changed_in<'b>(&self, at: usize, left: &mut &'b [(u32, f32)]) -> &'b [(u32, f32)] {
        let end = left.iter().take_while(|(token, _)| (*token as usize) < (at + 1) * CHUNK).count();
        let (here, rest) = left.split_at(end);
        *left = rest;
        here
    }

    fn masked(&self, at: usize) -> bool {
        self.mask.is_some_and(|mask| mask.word(at) != u64::MAX)
    }

    /// One chunk as the draw sees it; what may not be chosen is minus infinity.
    fn chunk(&self, at: usize, changed: &[(u32, f32)]) -> [f32; CHUNK] {
        let start = at * CHUNK;
        let mut values = [f32::NEG_INFINITY; CHUNK];
        let source = self.logits.get(start..).unwrap_or_default();
        let source = source.get(..CHUNK).unwrap_or(source);
        let allowed = self.mask.map_or(u64::MAX, |mask| mask.word(at));
        if allowed.count_ones() > FEW {
            values[..source.len()].copy_from_slice(source);
            bits(!allowed, |i| values[i] = f32::NEG_INFINITY);
        } else {
            bits(allowed, |i| values[i] = source.get(i).copied().unwrap_or(f32::NEG_INFINITY));
        }
        for (token, z) in changed {
            let i = (*token as usize).wrapping_sub(start);
            if i < CHUNK && allowed >> i & 1 == 1 {
                values[i] = *z;
            }
        }
        values
    }
}

/// The bits that are set, from the lowest.
fn bits(mut word: u64, mut each: impl FnMut(usize)) {
    while word != 0 {
        each(word.trailing_zeros() as usize);
        word &= word - 1;
    }
}

/// The k-th highest; minus infinity if there are fewer.
fn kth(values: &[f32], k: usize) -> f32 {
    if values.len() < k || k == 0 {
        return f32::NEG_INFINITY;
    }
    let mut values = values.to_vec();
    *values.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_exponential_keeps_its_bound() {
        let mut worst = 0.0_f64;
        for i in 0..=2_000_000_u32 {
            let x = -(i as f32) * (87.0 / 2_000_000.0);
            let expected = libm::exp(f64::from(x));
            worst = worst.max((f64::from(exp(x)) / expected - 1.0).abs());
        }
        assert!(worst <= 1.0 / 4_194_304.0, "{worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-1e30).to_bits(), exp(-87.0).to_bits());
    }

    #[test]
    fn what_is_not_finite_is_found_wherever_it_stands() {
        for n in [1_usize, 7, 64, 65, 200] {
            for at in 0..n {
                for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut logits = vec![1.0; n];
                    logits[at] = bad;
                    assert_eq!(scan(&logits).err(), Some(at), "{n}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn the_sum_keeps_its_bound(logits in prop::collection::vec(-60.0_f32..60.0, 1..3000)) {
            let max = scan(&logits).unwrap().max;
            prop_assert_eq!(max, logits.iter().copied().fold(f32::MIN, f32::max));
            let exact: f64 = logits.iter().map(|z| libm::exp(f64::from(*z) - f64::from(max))).sum();
            let error = log_sum_exp(&logits, max) - (f64::from(max) + libm::log(exact));
            prop_assert!(error.abs() <= 4e-6, "{:e}", error);
        }

        /// Against the plain way: change, forbid, sort all, cut.
        #[test]
        fn the_top_is_that_of_a_full_sort(
            logits in prop::collection::vec((-8_i32..8).prop_map(|z| z as f32 / 2.0), 1..700),
            changed in prop::collection::btree_map(0_u32..800, -9.0_f32..9.0, 0..20),
            allowed in prop::option::of(prop::collection::vec(any::<u32>(), 0..24)),
            k in 1_usize..65,
        ) {
            let changed: Vec<_> = changed.into_iter().filter(|(t, _)| (*t as usize) < logits.len()).collect();
            let mask = allowed.map(|words| Mask::from_u32_words(&words, logits.len()));
            let view = View { logits: &logits, changed: &changed, mask: mask.as_ref() };
            let mut expected: Vec<(f32, u32)> = logits.iter().enumerate().map(|(t, z)| {
                let t = t as u32;
                (changed.iter().find(|c| c.0 == t).map_or(*z, |c| c.1) + 0.0, t)
            }).filter(|(_, t)| mask.as_ref().is_none_or(|m| m.allows(*t))).collect();
            expected.sort_by(by_logit);
            expected.truncate(k);
            prop_assert_eq!(view.top(&scan(&logits).unwrap(), k), expected);
        }
    }
}
