//! The bounds between two classes, by a rule, from what honest nodes of both answered.

use infera_protocol::{
    calibration::Bounds,
    fingerprint::Fingerprint,
    referee,
    sampling::{gumbel, noise_bits},
};
use serde::{Deserialize, Serialize};

use crate::record::{Answer, Setup};

/// A bound is this many times the largest value measured.
pub const SAFETY: f64 = 2.0;
/// No bound is below this, in its own unit: what is equal bit for bit measures 0.
pub const FLOOR: u32 = 1;
/// Tokens of a short answer: a word and the end.
const LEAST_TOKENS: f64 = 2.0;
/// Candidates this close behind the best may change places: only their distances count.
const CONTENDERS: f64 = 1.0;
/// Orders in which the honest answers are added up.
const ORDERS: u32 = 20;
const ANSWERS: u32 = 10_000;

/// What was measured between two classes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    pub classes: [String; 2],
    /// Requests that both answered, and how many answers part.
    pub requests: usize,
    pub parted: usize,
    /// Positions with a common prefix, at which both saw the same context.
    pub positions: usize,
    /// Largest change, from one class to the other, of the distance in z + T g between two contenders; where answers
    /// part, the distance itself. Logits.
    pub gap_max: f64,
    /// Largest difference of a shared candidate's log-probability.
    pub fingerprint_max: f64,
    /// Largest margin that a referee of the one class gave to a token of the other, in answers to texts and to
    /// meaningless prompts. Logits.
    pub margin_max: f64,
    /// Largest clipped mean of an answer, cut at any length. 10^-6 logits a token.
    pub prefix_mean_max_micro: f64,
    /// Mean of the answers' clipped means.
    pub mean_micro: f64,
    /// Largest sum (CUSUM) over 20 random orders of 10,000 of these answers.
    pub drift_max_micro: f64,
}

fn milli(value: f64) -> u32 {
    ((SAFETY * value * 1e3).ceil() as u32).max(FLOOR)
}

fn micro(value: f64) -> u32 {
    ((SAFETY * value).ceil() as u32).max(FLOOR)
}

impl Measured {
    /// The rule: twice the largest value measured, at least 1. Margins are clipped at the largest itself. Where classes
    /// part at all, an honest answer may be short and part as widely as any: its mean is forgiven down to
    /// [`LEAST_TOKENS`], and two such answers are no drift.
    pub fn bounds(&self) -> Bounds {
        let widest = self.gap_max.max(self.margin_max);
        let once = widest * 1e6 / LEAST_TOKENS;
        Bounds {
            near_tie_milli: milli(self.gap_max),
            fingerprint_milli: milli(self.fingerprint_max),
            margin_milli: milli(widest),
            clip_milli: ((widest * 1e3).ceil() as u32).max(FLOOR),
            mean_micro: micro(self.prefix_mean_max_micro.max(once / SAFETY)),
            drift_micro: micro(self.mean_micro),
            drift_limit_micro: micro(self.drift_max_micro.max(once)),
        }
    }
}

/// Two honest answers to one request, and the margins that each gets from a referee of the other's class, logits.
pub struct Pair<'a> {
    pub a: &'a Answer,
    pub b: &'a Answer,
    pub temperature: f32,
    pub seed: u64,
    pub margins: [Vec<f64>; 2],
}

/// Measures two classes by the honest answers to the same requests. `widest`: the largest margin of other honest answers.
pub fn measure(classes: [&str; 2], pairs: &[Pair<'_>], widest: f64) -> Measured {
    let mut m = Measured {
        classes: classes.map(str::to_owned),
        requests: pairs.len(),
        margin_max: widest,
        ..Measured::default()
    };
    for pair in pairs {
        distances(&mut m, pair);
        let all = pair.margins.iter().flatten();
        m.margin_max = all.fold(m.margin_max, |most, margin| most.max(*margin));
    }
    // Clipping needs the largest margin.
    let clip = m.bounds().clip_milli;
    let clipped = |margin: &f64| (margin * 1e6).min(f64::from(clip) * 1e3);
    let mut means = Vec::new();
    for margins in pairs.iter().flat_map(|pair| &pair.margins) {
        let mut sum = 0.0;
        for (i, margin) in margins.iter().enumerate() {
            sum += clipped(margin);
            m.prefix_mean_max_micro = m.prefix_mean_max_micro.max(sum / (i + 1) as f64);
        }
        means.push(sum / margins.len().max(1) as f64);
    }
    m.mean_micro = means.iter().sum::<f64>() / means.len().max(1) as f64;
    m.drift_max_micro = excursion(&means, &m.bounds());
    m
}

fn excursion(means: &[f64], bounds: &Bounds) -> f64 {
    let mut most = 0;
    for order in 0..ORDERS {
        let mut sum = 0;
        for i in 0..ANSWERS {
            let mean = means[(noise_bits(u64::from(order), i, 0) % means.len().max(1) as u64) as usize];
            sum = referee::drift(sum, mean.ceil() as u32, bounds);
            most = most.max(sum);
        }
    }
    most as f64
}

fn distances(m: &mut Measured, pair: &Pair<'_>) {
    let parting = Setup::parting(&pair.a.tokens, &pair.b.tokens);
    let same = pair.a.tokens == pair.b.tokens && pair.a.finish == pair.b.finish;
    m.parted += usize::from(!same);
    for (at, (x, y)) in pair.a.prints.iter().zip(&pair.b.prints).enumerate().take(parting + 1) {
        m.positions += 1;
        let noise =
            |token| f64::from(pair.temperature) * gumbel(pair.seed, u32::try_from(at).unwrap_or(0), token);
        position(m, x, y, &noise);
    }
}

/// The two fingerprints of one context.
fn position(m: &mut Measured, x: &Fingerprint, y: &Fingerprint, noise: &dyn Fn(u32) -> f64) {
    let best = x.entries().first().map_or(0.0, |e| f64::from(e.logprob()) + noise(e.token));
    let mut contenders = Vec::new();
    for e in x.entries() {
        let Some(f) = y.entries().iter().find(|f| f.token == e.token) else { continue };
        let change = f64::from(e.logprob()) - f64::from(f.logprob());
        m.fingerprint_max = m.fingerprint_max.max(change.abs());
        if best - (f64::from(e.logprob()) + noise(e.token)) < CONTENDERS {
            contenders.push(change);
        }
    }
    let most = contenders.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let least = contenders.iter().copied().fold(f64::INFINITY, f64::min);
    if most > least {
        m.gap_max = m.gap_max.max(most - least);
    }
    // Where they part: each side's own choice before the other's, as `agreement::compare` computes it.
    let first = |print: &Fingerprint| print.entries().first().map(|e| e.token);
    let (Some(own), Some(other)) = (first(x), first(y)) else { return };
    if own != other {
        for (print, own, other) in [(x, own, other), (y, other, own)] {
            let score = |token| {
                let entry = print.entries().iter().find(|e| e.token == token)?;
                Some(f64::from(entry.logprob()) + noise(token))
            };
            let cut = print.entries().iter().filter_map(|e| score(e.token)).fold(f64::INFINITY, f64::min);
            let gap = score(own).unwrap_or(cut) - score(other).unwrap_or(cut);
            m.gap_max = m.gap_max.max(gap);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_answers_give_the_least_bounds_and_larger_distances_wider_ones() {
        let least = Measured::default().bounds();
        assert_eq!((least.near_tie_milli, least.margin_milli, least.drift_limit_micro), (1, 1, 1));
        let wide = Measured {
            gap_max: 0.0151,
            margin_max: 0.02,
            prefix_mean_max_micro: 70.2,
            ..Measured::default()
        };
        let bounds = wide.bounds();
        assert_eq!(
            (bounds.near_tie_milli, bounds.margin_milli, bounds.clip_milli, bounds.mean_micro),
            (31, 40, 20, 10_000)
        );
    }
}
