//! What a node saw when it drew a token: the top candidates with the model's own log-probabilities.
//!
//! Section 5 of the protocol: the top 8 candidates by `z + T g` with their raw log-probabilities, stored as f16. Where
//! two answers part, both fingerprints describe the same distribution and can be compared.

use half::f16;
use thiserror::Error;

use crate::sampling::Choice;

/// Most candidates in a fingerprint.
pub const MAX_ENTRIES: usize = 8;
const ENTRY_BYTES: usize = 6;

/// One candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Entry {
    /// Token id.
    pub token: u32,
    /// Raw log-probability (log-softmax before temperature, penalties and masks) as f16 bits: finite, at most 0.
    pub logprob: u16,
}

impl Entry {
    /// The log-probability as a number.
    #[must_use]
    pub fn logprob(&self) -> f32 {
        f16::from_bits(self.logprob).to_f32()
    }
}

/// The fingerprint of one token: 1 to 8 candidates, the drawn token first.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Fingerprint {
    entries: Vec<Entry>,
}

/// Why bytes are no fingerprint.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FingerprintError {
    /// Not 1 to 8 candidates.
    #[error("fingerprint has {0} candidates, expected 1 to 8")]
    Count(usize),
    /// More or fewer bytes than the count says.
    #[error("fingerprint has {got} bytes, expected {expected}")]
    Length {
        /// By the count.
        expected: usize,
        /// Found.
        got: usize,
    },
    /// A token twice.
    #[error("fingerprint names token {0} twice")]
    Duplicate(u32),
    /// A log-probability that none can be.
    #[error("log-probability of token {token} has the bits {bits:#06x}, expected a finite f16 of at most 0")]
    Logprob {
        /// The token.
        token: u32,
        /// Its bits.
        bits: u16,
    },
}

fn to_bits(logprob: f32) -> u16 {
    // Below f16's range is as good as impossible: the least finite value keeps the encoding free of infinities. NaN
    // cannot come out of finite logits; it is stored as the same value. Zero has one form, without a sign.
    let least = f16::MIN.to_f32();
    let clamped = if logprob.is_nan() { least } else { logprob.clamp(least, 0.0) };
    let half = f16::from_f32(clamped);
    if half == f16::ZERO { 0 } else { half.to_bits() }
}

impl Fingerprint {
    /// The top 8 of a draw.
    #[must_use]
    pub fn of(choice: &Choice) -> Self {
        let entries = choice
            .scores
            .iter()
            .take(MAX_ENTRIES)
            .map(|s| Entry { token: s.token, logprob: to_bits(s.raw_logprob) })
            .collect();
        Self { entries }
    }

    /// A fingerprint from its candidates.
    ///
    /// # Errors
    /// Not 1 to 8 candidates, one named twice, or a log-probability that is not finite or above 0.
    pub fn new(entries: Vec<Entry>) -> Result<Self, FingerprintError> {
        if entries.is_empty() || entries.len() > MAX_ENTRIES {
            return Err(FingerprintError::Count(entries.len()));
        }
        for (i, entry) in entries.iter().enumerate() {
            if entries.iter().take(i).any(|other| other.token == entry.token) {
                return Err(FingerprintError::Duplicate(entry.token));
            }
            let value = f16::from_bits(entry.logprob);
            if !value.is_finite() || value > f16::ZERO || entry.logprob == f16::NEG_ZERO.to_bits() {
                return Err(FingerprintError::Logprob { token: entry.token, bits: entry.logprob });
            }
        }
        Ok(Self { entries })
    }

    /// The candidates, best score first.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Canonical bytes: count (u8), then per candidate the token (u32, big endian) and the f16 bits (u16, big endian).
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(1 + self.entries.len() * ENTRY_BYTES);
        out.push(self.entries.len() as u8);
        for entry in &self.entries {
            out.extend_from_slice(&entry.token.to_be_bytes());
            out.extend_from_slice(&entry.logprob.to_be_bytes());
        }
        out
    }

    /// Reads what [`Fingerprint::encode`] wrote, and nothing else.
    ///
    /// # Errors
    /// See [`FingerprintError`]; trailing bytes are an error.
    pub fn decode(bytes: &[u8]) -> Result<Self, FingerprintError> {
        let (&count, body) = bytes.split_first().ok_or(FingerprintError::Length { expected: 1, got: 0 })?;
        let count = usize::from(count);
        if count == 0 || count > MAX_ENTRIES {
            return Err(FingerprintError::Count(count));
        }
        let expected = 1 + count * ENTRY_BYTES;
        if bytes.len() != expected {
            return Err(FingerprintError::Length { expected, got: bytes.len() });
        }
        let entries = body
            .chunks_exact(ENTRY_BYTES)
            .map(|c| Entry {
                token: u32::from_be_bytes([c[0], c[1], c[2], c[3]]),
                logprob: u16::from_be_bytes([c[4], c[5]]),
            })
            .collect();
        Self::new(entries)
    }

    /// Reads the fingerprint at the beginning of `bytes`; also returns what follows it.
    ///
    /// # Errors
    /// See [`FingerprintError`].
    pub fn decode_first(bytes: &[u8]) -> Result<(Self, &[u8]), FingerprintError> {
        let &count = bytes.first().ok_or(FingerprintError::Length { expected: 1, got: 0 })?;
        let length = 1 + usize::from(count) * ENTRY_BYTES;
        let (one, rest) = bytes
            .split_at_checked(length)
            .ok_or(FingerprintError::Length { expected: length, got: bytes.len() })?;
        Ok((Self::decode(one)?, rest))
    }

    /// Reads fingerprints that were concatenated, one per token.
    ///
    /// # Errors
    /// See [`FingerprintError`].
    pub fn decode_all(mut bytes: &[u8]) -> Result<Vec<Self>, FingerprintError> {
        let mut all = Vec::new();
        while !bytes.is_empty() {
            let (one, rest) = Self::decode_first(bytes)?;
            all.push(one);
            bytes = rest;
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampling::Scored;
    use proptest::prelude::*;

    #[test]
    fn known_bytes() {
        let choice = Choice {
            token: 7,
            margin: 1.0,
            scores: vec![
                Scored { token: 7, score: 2.0, raw_logprob: -0.5 },
                Scored { token: 0x0102_0304, score: 1.0, raw_logprob: -1e30 },
                Scored { token: 1, score: 0.0, raw_logprob: -0.0 },
            ],
        };
        let f = Fingerprint::of(&choice);
        assert_eq!(
            hex::encode(f.encode()),
            "03".to_owned() + "00000007b800" + "01020304fbff" + "000000010000"
        );
        assert_eq!(Fingerprint::decode(&f.encode()), Ok(f));
    }

    #[test]
    fn refuses_what_is_not_canonical() {
        use FingerprintError as E;
        let decode = |s: &str| Fingerprint::decode(&hex::decode(s).unwrap()).unwrap_err();
        assert_eq!(decode(""), E::Length { expected: 1, got: 0 });
        assert_eq!(decode("00"), E::Count(0));
        assert_eq!(decode("09"), E::Count(9));
        assert_eq!(decode("0100000007b8"), E::Length { expected: 7, got: 6 });
        assert_eq!(decode("0100000007b80000"), E::Length { expected: 7, got: 8 });
        assert_eq!(decode("0200000007b80000000007b800"), E::Duplicate(7));
        for bits in ["7e00", "fc00", "7c00", "3c00", "8000"] {
            let got = decode(&format!("0100000007{bits}"));
            assert_eq!(got, E::Logprob { token: 7, bits: u16::from_str_radix(bits, 16).unwrap() });
        }
    }

    proptest! {
        #[test]
        fn anything_decodes_to_itself_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            if let Ok(f) = Fingerprint::decode(&bytes) {
                prop_assert_eq!(f.encode(), bytes);
            }
        }

        #[test]
        fn every_draw_round_trips(logprobs in prop::collection::vec(any::<f32>(), 1..12)) {
            let scores: Vec<_> = logprobs.iter().enumerate()
                .map(|(i, l)| Scored { token: i as u32, score: 0.0, raw_logprob: *l }).collect();
            let f = Fingerprint::of(&Choice { token: 0, margin: 0.0, scores });
            prop_assert_eq!(f.entries().len(), logprobs.len().min(MAX_ENTRIES));
            prop_assert_eq!(Fingerprint::decode(&f.encode()), Ok(f.clone()));
            let two = [f.encode(), f.encode()].concat();
            prop_assert_eq!(Fingerprint::decode_all(&two), Ok(vec![f.clone(), f]));
            prop_assert!(Fingerprint::decode_all(&two[..two.len() - 1]).is_err());
        }
    }
}
