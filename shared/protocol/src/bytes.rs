//! Fixed-size byte values with one text form: lowercase hex, `0x` first.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use std::{fmt, str::FromStr};

/// Text or bytes that are not the value they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BytesError {
    #[error("expected {expected} bytes, got {actual}")]
    Length { expected: usize, actual: usize },
    #[error("not lowercase hex with 0x in front")]
    Hex,
}

fn parse_hex(text: &str) -> Result<Vec<u8>, BytesError> {
    let digits = text.strip_prefix("0x").ok_or(BytesError::Hex)?;
    if digits.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err(BytesError::Hex);
    }
    hex::decode(digits).map_err(|_| BytesError::Hex)
}

macro_rules! fixed_bytes {
    ($(#[$doc:meta])* $name:ident, $len:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $len]);

        impl $name {
            pub const LEN: usize = $len;
            pub const ZERO: Self = Self([0; $len]);

            pub fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }

            pub fn to_vec(self) -> Vec<u8> {
                self.0.to_vec()
            }
        }

        impl TryFrom<&[u8]> for $name {
            type Error = BytesError;
            fn try_from(bytes: &[u8]) -> Result<Self, BytesError> {
                <[u8; $len]>::try_from(bytes).map(Self).map_err(|_| BytesError::Length {
                    expected: $len,
                    actual: bytes.len(),
                })
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "0x{}", hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = BytesError;
            fn from_str(text: &str) -> Result<Self, BytesError> {
                Self::try_from(parse_hex(text)?.as_slice())
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(D::Error::custom)
            }
        }
    };
}

fixed_bytes!(
    /// A keccak-256 or BLAKE3 hash.
    Hash32,
    32
);
fixed_bytes!(
    /// A node: its Ed25519 verification key.
    NodeId,
    32
);
fixed_bytes!(
    /// An EVM address: an operator, a contract, or an account that has a wallet.
    Address,
    20
);
fixed_bytes!(
    /// An Ed25519 signature.
    Signature,
    64
);
fixed_bytes!(
    /// A secp256k1 signature as r || s || v, v = 27 or 28.
    EvmSignature,
    65
);

fixed_bytes!(
    /// A dispatcher: the key by which its draws are verified, a ristretto255 point.
    VrfKey,
    32
);
fixed_bytes!(
    /// The proof of a draw (RFC 9381).
    VrfProof,
    80
);

/// Variable-length bytes as hex text, for serde's `with`.
pub mod hex_bytes {
    use super::{Deserialize, Deserializer, Serializer, parse_hex};
    use serde::de::Error as _;

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("0x{}", hex::encode(bytes)))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        parse_hex(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_has_one_form() {
        let address: Address = "0x00000000000000000000000000000000000000ab".parse().unwrap();
        assert_eq!(address.to_string(), "0x00000000000000000000000000000000000000ab");
        for bad in [
            "00000000000000000000000000000000000000ab",
            "0x00000000000000000000000000000000000000AB",
            "0xab",
            "0xzz000000000000000000000000000000000000ab",
        ] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }
}
