//! Ids: UUIDv7 for what is created once, derived ids for messages that may be sent again.

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_inputs_same_id_other_inputs_other_id() {
        let request = Uuid::from_u128(7);
        assert_eq!(message_id("verdict", request, 1), message_id("verdict", request, 1));
        assert_ne!(message_id("verdict", request, 1), message_id("verdict", request, 2));
        assert_ne!(message_id("verdict", request, 1), message_id("receipt", request, 1));
    }
}
