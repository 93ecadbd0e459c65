//! The two hashes of the network and the one canonical byte encoding that is hashed.
//!
//! keccak-256 for everything that a contract may have to check, BLAKE3 for files and for
//! expanding randomness. What is signed, and what a root covers, starts with its own domain string,
//! so that bytes of one kind never pass as another.

use crate::bytes::Hash32;
use tiny_keccak::{Hasher, Keccak};

/// keccak-256 of the concatenation of `parts`.
pub fn keccak(parts: &[&[u8]]) -> Hash32 {
    let mut hasher = Keccak::v256();
    for part in parts {
        hasher.update(part);
    }
    let mut out = [0; 32];
    hasher.finalize(&mut out);
    Hash32(out)
}

/// Writes fields as big-endian integers and length-prefixed bytes (u32), then hashes.
pub struct Encoder(Vec<u8>);

impl Encoder {
    /// `domain` names the structure and its version, such as `infera.request.v1`.
    pub fn new(domain: &str) -> Self {
        Self(Vec::with_capacity(256)).bytes(domain.as_bytes())
    }

    pub fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    pub fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_be_bytes());
        self
    }

    pub fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_be_bytes());
        self
    }

    /// Fixed-size bytes, without a length.
    pub fn fixed<const N: usize>(mut self, value: &[u8; N]) -> Self {
        self.0.extend_from_slice(value);
        self
    }

    /// Bytes behind their u32 length.
    pub fn bytes(mut self, value: &[u8]) -> Self {
        let len = u32::try_from(value.len()).unwrap_or(u32::MAX);
        self.0.extend_from_slice(&len.to_be_bytes());
        self.0.extend_from_slice(value);
        self
    }

    /// Token ids behind their u32 count.
    pub fn tokens(mut self, tokens: &[u32]) -> Self {
        let len = u32::try_from(tokens.len()).unwrap_or(u32::MAX);
        self.0.extend_from_slice(&len.to_be_bytes());
        for token in tokens {
            self.0.extend_from_slice(&token.to_be_bytes());
        }
        self
    }

    pub fn keccak(&self) -> Hash32 {
        keccak(&[&self.0])
    }

    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keccak_is_ethereums() {
        assert_eq!(
            keccak(&[b""]).to_string(),
            "0xc5d2460186f7233c927e7db2dcc703c0e500b653ca82273b7bfad8045d85a470"
        );
    }

    #[test]
    fn fields_do_not_run_together() {
        let a = Encoder::new("t").bytes(b"ab").bytes(b"c").keccak();
        let b = Encoder::new("t").bytes(b"a").bytes(b"bc").keccak();
        assert_ne!(a, b);
    }
}
