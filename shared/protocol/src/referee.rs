//! Referees (protocol section 8): a node outside the k scores every token of an answer by one forward pass, knowing the
//! seed. A token that the model would not have drawn shows by how far it falls behind the one that it would.

use crate::{
    bytes::{Hash32, NodeId},
    calibration::Bounds,
    fingerprint::{Fingerprint, FingerprintError},
    hash::{Encoder, keccak},
    identity::Domain,
};
use serde::{Deserialize, Serialize};

/// Bytes of a score before its fingerprint.
const MARGIN_BYTES: usize = 4;

/// What a referee saw where an answer has a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenScore {
    /// The referee's best z + T g minus the token's, 10^-6 logits, rounded up: 0 where the referee draws the same
    /// token. `u32::MAX` stands for it and everything above, a token that the grammar forbids included.
    pub margin_micro: u32,
    /// The referee's own top 8.
    pub fingerprint: Fingerprint,
}

impl TokenScore {
    /// A margin in logits as it is reported.
    #[must_use]
    pub fn margin_micro(margin: f64) -> u32 {
        // A cast of a float saturates; NaN is as bad as it gets.
        if margin.is_nan() { u32::MAX } else { (margin * 1e6).ceil() as u32 }
    }
}

/// A referee's scores of one answer, in the order of its tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    pub scores: Vec<TokenScore>,
}

/// Bytes that are no report.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    #[error("the report ends within a score")]
    Cut,
    #[error(transparent)]
    Fingerprint(#[from] FingerprintError),
}

impl Report {
    /// Canonical bytes: per token the margin (u32, big endian) and the encoded fingerprint.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.scores.len() * (MARGIN_BYTES + 49));
        for score in &self.scores {
            bytes.extend_from_slice(&score.margin_micro.to_be_bytes());
            bytes.extend(score.fingerprint.encode());
        }
        bytes
    }

    /// Reads what [`Report::encode`] wrote, and nothing else.
    ///
    /// # Errors
    /// [`ReportError`]; trailing bytes are an error.
    pub fn decode(mut bytes: &[u8]) -> Result<Self, ReportError> {
        let mut scores = Vec::new();
        while !bytes.is_empty() {
            let (margin, rest) = bytes.split_first_chunk::<MARGIN_BYTES>().ok_or(ReportError::Cut)?;
            let (fingerprint, rest) = Fingerprint::decode_first(rest)?;
            scores.push(TokenScore { margin_micro: u32::from_be_bytes(*margin), fingerprint });
            bytes = rest;
        }
        Ok(Self { scores })
    }

    /// Mean of the margins, each clipped, 10^-6 logits a token, rounded up; 0 without tokens.
    pub fn clipped_mean_micro(&self, clip_milli: u32) -> u32 {
        let clip = u64::from(clip_milli) * 1_000;
        let sum: u64 = self.scores.iter().map(|score| u64::from(score.margin_micro).min(clip)).sum();
        let mean = sum.div_ceil((self.scores.len() as u64).max(1));
        u32::try_from(mean).unwrap_or(u32::MAX)
    }
}

/// Why an answer is not the model's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// A report about another answer: it says nothing.
    #[error("{scores} scores for {tokens} tokens")]
    Length { scores: u32, tokens: u32 },
    /// A token falls behind the referee's choice by the hard limit or more.
    #[error("token {position} falls {margin_micro} millionths of a logit behind")]
    Margin { position: u32, margin_micro: u32 },
    /// No token alone is beyond the limit, all together are.
    #[error("tokens fall {mean_micro} millionths of a logit behind on average")]
    Mean { mean_micro: u32 },
}

/// Judges an answer of `tokens` tokens by one referee's report.
///
/// # Errors
/// [`Fault`]: the answer is not confirmed.
pub fn judge(tokens: usize, report: &Report, bounds: &Bounds) -> Result<(), Fault> {
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    if report.scores.len() != tokens {
        return Err(Fault::Length { scores: count(report.scores.len()), tokens: count(tokens) });
    }
    let limit = u64::from(bounds.margin_milli) * 1_000;
    let beyond = |score: &TokenScore| u64::from(score.margin_micro) >= limit;
    if let Some((position, score)) = report.scores.iter().enumerate().find(|(_, score)| beyond(score)) {
        return Err(Fault::Margin { position: count(position), margin_micro: score.margin_micro });
    }
    let mean_micro = report.clipped_mean_micro(bounds.clip_milli);
    if mean_micro > bounds.mean_micro { Err(Fault::Mean { mean_micro }) } else { Ok(()) }
}

/// What an operator's refereed answers add up to, 10^-6 logits a token times answers (CUSUM): `sum` after an answer
/// with this clipped mean. Beyond [`Bounds::drift_limit_micro`] it is a fault, and starts again at 0.
pub fn drift(sum: u64, mean_micro: u32, bounds: &Bounds) -> u64 {
    (sum + u64::from(mean_micro)).saturating_sub(u64::from(bounds.drift_micro))
}

/// What a referee signs: its report about one answer, named by [`crate::request::Output::hash`], of one attempt.
pub fn report_digest(
    domain: &Domain,
    request_hash: &Hash32,
    attempt: u32,
    referee: &NodeId,
    subject: &Hash32,
    report: &[u8],
) -> Hash32 {
    domain
        .encode(Encoder::new("infera.report.v1"))
        .fixed(&request_hash.0)
        .u32(attempt)
        .fixed(&referee.0)
        .fixed(&subject.0)
        .fixed(&keccak(&[report]).0)
        .keccak()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{calibration::tests::BOUNDS, fingerprint::Entry};
    use proptest::prelude::*;

    fn report(margins: &[u32]) -> Report {
        let fingerprint = Fingerprint::new(vec![Entry { token: 1, logprob: 0 }]).unwrap();
        let score = |margin: &u32| TokenScore { margin_micro: *margin, fingerprint: fingerprint.clone() };
        Report { scores: margins.iter().map(score).collect() }
    }

    #[test]
    fn margins_are_rounded_against_the_answer() {
        for (margin, expected) in [
            (0.0, 0),
            (-0.5, 0),
            (1e-9, 1),
            (0.25, 250_000),
            (f64::INFINITY, u32::MAX),
            (f64::NAN, u32::MAX),
            (1e9, u32::MAX),
        ] {
            assert_eq!(TokenScore::margin_micro(margin), expected, "{margin}");
        }
    }

    #[test]
    fn one_token_or_all_together_are_a_fault() {
        let table = [
            (vec![0, 0, 0], Ok(())),
            (vec![0, 499_999, 0, 0, 0, 0], Ok(())),
            (vec![0, 500_000, 0, 0, 0, 0], Err(Fault::Margin { position: 1, margin_micro: 500_000 })),
            (vec![u32::MAX, 0, 0], Err(Fault::Margin { position: 0, margin_micro: u32::MAX })),
            // Clipped to 200,000 each.
            (vec![400_000, 0, 0, 0], Ok(())),
            (vec![400_000, 400_000, 0, 0], Err(Fault::Mean { mean_micro: 100_000 })),
        ];
        for (margins, expected) in table {
            assert_eq!(judge(margins.len(), &report(&margins), &BOUNDS), expected, "{margins:?}");
        }
        assert_eq!(judge(2, &report(&[0]), &BOUNDS), Err(Fault::Length { scores: 1, tokens: 2 }));
    }

    #[test]
    fn what_is_expected_adds_nothing_up() {
        let mut sum = 0;
        for _ in 0..1_000 {
            sum = drift(sum, 9_000, &BOUNDS);
        }
        assert_eq!(sum, 0);
        for _ in 0..11 {
            sum = drift(sum, 20_000, &BOUNDS);
        }
        assert!(sum > u64::from(BOUNDS.drift_limit_micro), "{sum}");
    }

    proptest! {
        #[test]
        fn reports_round_trip_and_a_cut_is_seen(margins in prop::collection::vec(any::<u32>(), 1..20)) {
            let one = report(&margins);
            let bytes = one.encode();
            prop_assert_eq!(Report::decode(&bytes), Ok(one));
            prop_assert!(Report::decode(&bytes[..bytes.len() - 1]).is_err());
        }

        #[test]
        fn anything_decodes_to_itself_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            if let Ok(report) = Report::decode(&bytes) {
                prop_assert_eq!(report.encode(), bytes);
            }
        }
    }
}
