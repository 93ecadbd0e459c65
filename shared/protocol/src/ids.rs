//! Ids: UUIDv7 for what is created once, derived ids for messages that may be sent again.

use crate::bytes::Hash32;
use uuid::{Builder, Uuid};

/// The id of the `n`-th message of `kind` about a request. The same inputs give the same id, so
/// that a message sent again after a crash is recognised by every inbox.
pub fn message_id(kind: &str, request_id: Uuid, n: u64) -> Uuid {
    let mut hasher = blake3::Hasher::new_derive_key("infera 2026 message id");
    hasher.update(request_id.as_bytes());
    hasher.update(&n.to_be_bytes());
    hasher.update(kind.as_bytes());
    let mut bytes = [0; 16];
    hasher.finalize_xof().fill(&mut bytes);
    Builder::from_custom_bytes(bytes).into_uuid()
}

/// A UUIDv7 of the moment of `other`, which is one, with these random bits.
pub fn id_beside(other: Uuid, random: &Hash32) -> Uuid {
    id_at(time_ms(other), random)
}

/// The moment of a UUIDv7, ms. Of any other id it is a number that means nothing.
pub fn time_ms(id: Uuid) -> u64 {
    let mut ms = [0; 8];
    ms[2..].copy_from_slice(&id.as_bytes()[..6]);
    u64::from_be_bytes(ms)
}

/// A UUIDv7 of this time, ms, with these random bits.
pub fn id_at(ms: u64, random: &Hash32) -> Uuid {
    let bits = std::array::from_fn(|i| random.0[i]);
    Builder::from_unix_timestamp_millis(ms, &bits).into_uuid()
}

/// The id of the answer with this index, where several are asked for at once: the first one's is `first`. A UUIDv7 of
/// the same moment.
pub fn choice_id(first: Uuid, index: u32) -> Uuid {
    if index == 0 {
        return first;
    }
    let mut bytes = message_id("choice", first, index.into()).into_bytes();
    bytes[..6].copy_from_slice(&first.as_bytes()[..6]);
    bytes[6] = 0x70 | bytes[6] & 0x0F;
    bytes[8] = 0x80 | bytes[8] & 0x3F;
    Uuid::from_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_have_ids_of_their_own_and_one_moment() {
        let first = Uuid::parse_str("019aabcd-1234-7abc-8def-0123456789ab").unwrap();
        let ids: std::collections::BTreeSet<Uuid> = (0..8).map(|i| choice_id(first, i)).collect();
        assert_eq!((ids.len(), choice_id(first, 0)), (8, first));
        for id in ids {
            assert_eq!((id.get_version_num(), id.get_variant()), (7, uuid::Variant::RFC4122));
            assert_eq!(id.as_bytes()[..6], first.as_bytes()[..6]);
        }
        assert_eq!(choice_id(first, 3), choice_id(first, 3));
    }

    #[test]
    fn ids_are_made_for_a_moment() {
        let other = Uuid::parse_str("019aabcd-1234-7abc-8def-0123456789ab").unwrap();
        let (one, two) = (id_beside(other, &Hash32([1; 32])), id_beside(other, &Hash32([2; 32])));
        assert_ne!(one, two);
        for id in [one, two] {
            assert_eq!((id.get_version_num(), id.get_variant()), (7, uuid::Variant::RFC4122));
            assert_eq!(id.as_bytes()[..6], other.as_bytes()[..6]);
        }
        assert_eq!((id_at(0x019a_abcd_1234, &Hash32([1; 32])), time_ms(other)), (one, 0x019a_abcd_1234));
    }

    #[test]
    fn same_inputs_same_id_other_inputs_other_id() {
        let request = Uuid::from_u128(7);
        assert_eq!(message_id("verdict", request, 1), message_id("verdict", request, 1));
        assert_ne!(message_id("verdict", request, 1), message_id("verdict", request, 2));
        assert_ne!(message_id("verdict", request, 1), message_id("receipt", request, 1));
    }
}
