//! The seeded draw: which token follows, given the logits, the parameters and the seed.
//!
//! Section 5 of the protocol. Token `t` is the argmax over the candidates of `z / T + g(seed, t, token)`, where `g` is
//! Gumbel noise from a counter-based generator. Two honest nodes that compute the same logits draw the same token, so
//! that sampled answers can be compared token by token.
//!
//! Everything here is `f64` or `f32` arithmetic in a fixed order, with logarithms of the pure Rust `libm`: the result
//! does not depend on the platform's C library. `tests/golden/sampling.json` pins it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::logits::{Scan, View, log_sum_exp, scan};
use crate::mask::Mask;

/// Most candidates that a draw may consider.
pub const MAX_TOP_K: u32 = 64;
/// Most tokens that a request may give a bias to.
pub const MAX_LOGIT_BIAS: usize = 300;

/// How often each token occurs in the text generated so far (the prompt does not count).
pub type Counts = BTreeMap<u32, u32>;

/// The parameters of the draw. Build it with [`SamplingParams::new`] or call [`SamplingParams::validate`] on what came
/// from elsewhere.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamplingParams {
    /// 0 to 2; 0 is the argmax.
    pub temperature: f32,
    /// Above 0, at most 1: the smallest set of candidates that holds this share of the probability.
    pub top_p: f32,
    /// 1 to [`MAX_TOP_K`].
    pub top_k: u32,
    /// 0 to 1: candidates less likely than this share of the likeliest are left out.
    pub min_p: f32,
    /// -2 to 2: taken off a token's logit for each time that it was emitted.
    pub frequency_penalty: f32,
    /// -2 to 2: taken off a token's logit once if it was emitted at all.
    pub presence_penalty: f32,
    /// By token, -100 to 100: added to its logit before the penalties. At most [`MAX_LOGIT_BIAS`]; tokens outside the
    /// vocabulary change nothing.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub logit_bias: BTreeMap<u32, f32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: MAX_TOP_K,
            min_p: 0.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: BTreeMap::new(),
        }
    }
}

/// A parameter outside its range; the text names the field and the range.
#[derive(Debug, Clone, PartialEq, Error)]
#[error("{field} must be {range}, got {got}")]
pub struct ParamError {
    /// The field's name as in the API.
    pub field: &'static str,
    /// The accepted range in words.
    pub range: &'static str,
    /// What was given.
    pub got: String,
}

/// Why a draw is impossible.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum SampleError {
    /// The model produced a number that is no number: its weights or its arithmetic are broken.
    #[error("logit of token {token} is {value}, not a finite number")]
    NonFinite {
        /// The token.
        token: u32,
        /// The logit as text.
        value: String,
    },
    /// No logits at all, or more than a token id can name.
    #[error("{0} logits: the vocabulary must have 1 to 2^32 tokens")]
    Vocabulary(usize),
    /// No candidates to choose from.
    #[error("no candidates to choose from: the mask allows no token")]
    NoCandidates,
    /// A parameter is out of range.
    #[error(transparent)]
    Param(#[from] ParamError),
}

fn in_range(field: &'static str, range: &'static str, got: f32, ok: bool) -> Result<(), ParamError> {
    if ok && got.is_finite() {
        return Ok(());
    }
    Err(ParamError { field, range, got: got.to_string() })
}

impl SamplingParams {
    /// Checked parameters, without a bias.
    ///
    /// # Errors
    /// Names the first field that is out of range.
    pub fn new(
        temperature: f32,
        top_p: f32,
        top_k: u32,
        min_p: f32,
        frequency_penalty: f32,
        presence_penalty: f32,
    ) -> Result<Self, ParamError> {
        let logit_bias = BTreeMap::new();
        let params =
            Self { temperature, top_p, top_k, min_p, frequency_penalty, presence_penalty, logit_bias };
        params.validate()?;
        Ok(params)
    }

    /// Greedy parameters: temperature 0, nothing else changed.
    #[must_use]
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// Names the first field that is out of range.
    pub fn validate(&self) -> Result<(), ParamError> {
        let t = self.temperature;
        in_range("temperature", "from 0 to 2", t, (0.0..=2.0).contains(&t))?;
        let p = self.top_p;
        in_range("top_p", "above 0 and at most 1", p, p > 0.0 && p <= 1.0)?;
        if !(1..=MAX_TOP_K).contains(&self.top_k) {
            let got = self.top_k.to_string();
            return Err(ParamError { field: "top_k", range: "from 1 to 64", got });
        }
        let m = self.min_p;
        in_range("min_p", "from 0 to 1", m, (0.0..=1.0).contains(&m))?;
        let f = self.frequency_penalty;
        in_range("frequency_penalty", "from -2 to 2", f, (-2.0..=2.0).contains(&f))?;
        let q = self.presence_penalty;
        in_range("presence_penalty", "from -2 to 2", q, (-2.0..=2.0).contains(&q))?;
        if self.logit_bias.len() > MAX_LOGIT_BIAS {
            let got = format!("{} tokens", self.logit_bias.len());
            return Err(ParamError { field: "logit_bias", range: "at most 300 tokens", got });
        }
        let bias = |bias: &f32| {
            in_range("logit_bias", "from -100 to 100 for each token", *bias, (-100.0..=100.0).contains(bias))
        };
        self.logit_bias.values().try_for_each(bias)
    }

    /// A logit as the draw sees it: with the token's bias, and the penalties for having been emitted `times` before.
    #[must_use]
    pub fn adjust(&self, token: u32, logit: f32, times: u32) -> f32 {
        let biased = self.logit_bias.get(&token).map_or(logit, |bias| logit + bias);
        if times == 0 {
            return biased;
        }
        biased - (times as f32) * self.frequency_penalty - self.presence_penalty
    }
}

/// One token that may be drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// Token id.
    pub token: u32,
    /// The logit after penalties.
    pub logit: f32,
    /// Log-softmax of the model's logits, before penalties and masks: never above 0.
    pub raw_logprob: f32,
}

/// A candidate with its score.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scored {
    /// Token id.
    pub token: u32,
    /// `z + T g`, in logits.
    pub score: f64,
    /// See [`Candidate::raw_logprob`].
    pub raw_logprob: f32,
}

/// The outcome of a draw.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The token drawn.
    pub token: u32,
    /// Best score minus the second best, in logits; infinite if there was one candidate.
    pub margin: f64,
    /// All candidates, best first; ties by token id.
    pub scores: Vec<Scored>,
}

const GOLDEN_GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014; variant 13 of Stafford's mixers).
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// 64 random bits for (seed, position, token): output number `position * 2^32 + token` of a SplitMix64 whose state is
/// the mixed seed. Any output is reached without the ones before it.
#[must_use]
pub fn noise_bits(seed: u64, position: u32, token: u32) -> u64 {
    let counter = (u64::from(position) << 32) | u64::from(token);
    let state = mix(seed.wrapping_add(GOLDEN_GAMMA));
    mix(state.wrapping_add(counter.wrapping_mul(GOLDEN_GAMMA)))
}

/// Gumbel noise `-ln(-ln u)` with `u` uniform in (0, 1): always finite.
#[must_use]
pub fn gumbel(seed: u64, position: u32, token: u32) -> f64 {
    // 52 bits and a half: exact in f64, never 0 and never 1.
    let u = ((noise_bits(seed, position, token) >> 12) as f64 + 0.5) / 4_503_599_627_370_496.0;
    -libm::log(-libm::log(u))
}

/// The candidates of a draw: the `top_k` highest logits, after bias and penalties, of the tokens that `mask` allows (all
/// without one), cut by `top_p` and `min_p`, ordered by (logit descending, token id ascending). At least one.
///
/// `top_p` and `min_p` look at the softmax over the `top_k`, at temperature 1. The raw log-probabilities are the model's
/// own: log-softmax over the whole vocabulary before bias, penalties and mask. Takes some 50 us for 49,152 logits.
///
/// # Errors
/// Parameters out of range, no logits, a logit that is not finite, or a mask that allows no token.
pub fn candidates(
    logits: &[f32],
    params: &SamplingParams,
    emitted: &Counts,
    mask: Option<&Mask>,
) -> Result<Vec<Candidate>, SampleError> {
    let scan = checked(logits, params)?;
    let changed = changed(logits, params, emitted);
    let top = View { logits, changed: &changed, mask }.top(&scan, params.top_k as usize);
    if top.is_empty() {
        return Err(SampleError::NoCandidates);
    }
    let lse = log_sum_exp(logits, scan.max);
    let keep = nucleus(&top, params);
    Ok(top
        .iter()
        .take(keep)
        .map(|&(logit, token)| {
            let raw = (f64::from(logits[token as usize]) - lse) as f32;
            Candidate { token, logit, raw_logprob: raw.min(0.0) }
        })
        .collect())
}

/// The first pass over the logits of a draw that can be made.
pub(crate) fn checked(logits: &[f32], params: &SamplingParams) -> Result<Scan, SampleError> {
    params.validate()?;
    if logits.is_empty() || u32::try_from(logits.len() - 1).is_err() {
        return Err(SampleError::Vocabulary(logits.len()));
    }
    scan(logits)
        .map_err(|token| SampleError::NonFinite { token: token as u32, value: logits[token].to_string() })
}

/// The logits that bias and penalties change, ascending by token.
pub(crate) fn changed(logits: &[f32], params: &SamplingParams, emitted: &Counts) -> Vec<(u32, f32)> {
    let penalties = params.frequency_penalty != 0.0 || params.presence_penalty != 0.0;
    let mut tokens: Vec<u32> = params.logit_bias.keys().copied().collect();
    if penalties {
        tokens.extend(emitted.iter().filter(|(_, times)| **times > 0).map(|(token, _)| *token));
        tokens.sort_unstable();
        tokens.dedup();
    }
    let times = |token| if penalties { emitted.get(&token).copied().unwrap_or(0) } else { 0 };
    tokens
        .into_iter()
        .filter_map(|token| {
            let logit = *logits.get(token as usize)?;
            Some((token, params.adjust(token, logit, times(token))))
        })
        .collect()
}

/// How many of the ordered candidates `top_p` and `min_p` leave: at least one.
pub(crate) fn nucleus(top: &[(f32, u32)], params: &SamplingParams) -> usize {
    let Some(&(max, _)) = top.first() else {
        return 0;
    };
    if params.top_p >= 1.0 && params.min_p <= 0.0 {
        return top.len();
    }
    let weights: Vec<f64> = top.iter().map(|(z, _)| libm::exp(f64::from(*z) - f64::from(max))).collect();
    let mut keep = top.len();
    if params.top_p < 1.0 {
        let wanted = f64::from(params.top_p) * weights.iter().sum::<f64>();
        let mut sum = 0.0;
        let inside = weights.iter().position(|w| {
            sum += w;
            sum >= wanted
        });
        keep = inside.map_or(keep, |last| last + 1);
    }
    if params.min_p > 0.0 {
        // The likeliest has weight 1, so that min_p is compared with the weights themselves.
        let likely = weights.iter().take_while(|w| **w >= f64::from(params.min_p)).count();
        keep = keep.min(likely);
    }
    keep.max(1)
}

/// Draws the token at `position` of the generated text (the first generated token has position 0).
///
/// # Errors
/// No candidates, or a candidate with a logit that is not finite.
pub fn choose(
    candidates: &[Candidate],
    temperature: f32,
    seed: u64,
    position: u32,
) -> Result<Choice, SampleError> {
    let t = f64::from(temperature);
    let mut scored: Vec<(f64, Scored)> = Vec::with_capacity(candidates.len());
    for c in candidates {
        if !c.logit.is_finite() {
            return Err(SampleError::NonFinite { token: c.token, value: c.logit.to_string() });
        }
        let z = f64::from(c.logit) + 0.0;
        let (order, score) = if t > 0.0 {
            let s = z / t + gumbel(seed, position, c.token);
            (s, s * t)
        } else {
            (z, z)
        };
        scored.push((order, Scored { token: c.token, score, raw_logprob: c.raw_logprob }));
    }
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.token.cmp(&b.1.token)));
    let scores: Vec<Scored> = scored.into_iter().map(|(_, s)| s).collect();
    let first = scores.first().ok_or(SampleError::NoCandidates)?;
    let margin = scores.get(1).map_or(f64::INFINITY, |second| first.score - second.score);
    Ok(Choice { token: first.token, margin, scores })
}

#[cfg(test)]
#[path = "sampling_tests.rs"]
mod tests;
