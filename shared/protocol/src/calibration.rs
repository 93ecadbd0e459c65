//! How far honest results of two numerics classes may be apart (protocol sections 7 and 8): measured, published, and
//! named by its hash in every receipt.

use crate::{bytes::Hash32, hash::Encoder};
use serde::{Deserialize, Serialize};

/// The bounds between a result of one class and a result, or a referee's score, of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bounds {
    /// Where two results part: largest difference of z + T g between the two tokens, 10^-3 logits.
    pub near_tie_milli: u32,
    /// Where two results part: largest difference of the two log-probabilities of a shared token, 10^-3.
    pub fingerprint_milli: u32,
    /// A referee's hard limit: a token that falls this far behind the referee's own choice is not the model's,
    /// 10^-3 logits.
    pub margin_milli: u32,
    /// For the mean below, a token's margin counts at most this much, 10^-3 logits.
    pub clip_milli: u32,
    /// A referee's limit for the mean of an answer's clipped margins, 10^-6 logits a token.
    pub mean_micro: u32,
    /// What an honest operator's clipped mean is expected to stay below, 10^-6 logits a token: only what exceeds it
    /// adds up (CUSUM).
    pub drift_micro: u32,
    /// Where what adds up over an operator's answers becomes a fault, 10^-6 logits a token times answers.
    pub drift_limit_micro: u32,
}

/// [`Bounds`] between two classes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pair {
    /// In alphabetical order; twice the same for results of one class.
    pub classes: [String; 2],
    pub bounds: Bounds,
}

/// The bounds of every pair of classes that the network knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    pub pairs: Vec<Pair>,
}

impl Calibration {
    /// The bounds between two classes, in any order. `None`: their results can't be compared.
    pub fn bounds(&self, a: &str, b: &str) -> Option<&Bounds> {
        let (low, high) = if a <= b { (a, b) } else { (b, a) };
        self.pairs.iter().find(|pair| pair.classes[0] == low && pair.classes[1] == high).map(|p| &p.bounds)
    }

    pub fn hash(&self) -> Hash32 {
        let mut encoder = Encoder::new("infera.calibration.v2");
        for Pair { classes: [a, b], bounds } in &self.pairs {
            encoder = encoder
                .bytes(a.as_bytes())
                .bytes(b.as_bytes())
                .u32(bounds.near_tie_milli)
                .u32(bounds.fingerprint_milli)
                .u32(bounds.margin_milli)
                .u32(bounds.clip_milli)
                .u32(bounds.mean_micro)
                .u32(bounds.drift_micro)
                .u32(bounds.drift_limit_micro);
        }
        encoder.keccak()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const BOUNDS: Bounds = Bounds {
        near_tie_milli: 300,
        fingerprint_milli: 100,
        margin_milli: 500,
        clip_milli: 200,
        mean_micro: 50_000,
        drift_micro: 10_000,
        drift_limit_micro: 100_000,
    };

    fn pair(a: &str, b: &str, near_tie_milli: u32) -> Pair {
        let bounds = Bounds {
            near_tie_milli,
            fingerprint_milli: 1,
            margin_milli: 2,
            clip_milli: 3,
            mean_micro: 4,
            drift_micro: 5,
            drift_limit_micro: 6,
        };
        Pair { classes: [a.into(), b.into()], bounds }
    }

    #[test]
    fn bounds_are_found_in_any_order() {
        let calibration = Calibration { pairs: vec![pair("exact", "exact", 1), pair("exact", "fast", 2)] };
        let found = |a, b| calibration.bounds(a, b).map(|bounds| bounds.near_tie_milli);
        assert_eq!(found("exact", "exact"), Some(1));
        assert_eq!((found("exact", "fast"), found("fast", "exact")), (Some(2), Some(2)));
        assert_eq!(found("fast", "fast"), None);
    }

    #[test]
    fn every_field_changes_the_hash() {
        let base = Calibration { pairs: vec![pair("a", "b", 1)] };
        let changes: [fn(&mut Pair); 9] = [
            |p| p.classes[0] = "c".into(),
            |p| p.classes[1] = "c".into(),
            |p| p.bounds.near_tie_milli = 99,
            |p| p.bounds.fingerprint_milli = 99,
            |p| p.bounds.margin_milli = 99,
            |p| p.bounds.clip_milli = 99,
            |p| p.bounds.mean_micro = 99,
            |p| p.bounds.drift_micro = 99,
            |p| p.bounds.drift_limit_micro = 99,
        ];
        for change in changes {
            let mut other = base.clone();
            change(&mut other.pairs[0]);
            assert_ne!(other.hash(), base.hash(), "{other:?}");
        }
    }
}
