//! Commit, then reveal (protocol section 6): nobody copies.

use serde::{Deserialize, Serialize};

use crate::{
    bytes::{Hash32, NodeId},
    hash::Encoder,
    identity::Domain,
    request::Output,
};

/// A slot: the place in which one node answers one attempt of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slot {
    pub request_hash: Hash32,
    pub attempt: u32,
    pub node: NodeId,
}

/// The commitment C that a node signs before it reveals `output`; `salt` keeps peers from
/// guessing short answers.
pub fn commitment(domain: &Domain, slot: &Slot, output: &Output, salt: &Hash32) -> Hash32 {
    let roots = [&output.tokens_root(), &output.fingerprint_root()];
    commitment_of(domain, slot, roots, output.finish.code(), salt)
}

/// The same of an output of which only the roots are known: of its tokens and of its fingerprints.
pub(crate) fn commitment_of(
    domain: &Domain,
    slot: &Slot,
    [tokens_root, fingerprint_root]: [&Hash32; 2],
    finish: u8,
    salt: &Hash32,
) -> Hash32 {
    domain
        .encode(Encoder::new("infera.commitment.v1"))
        .fixed(&slot.request_hash.0)
        .u32(slot.attempt)
        .fixed(&slot.node.0)
        .fixed(&tokens_root.0)
        .fixed(&fingerprint_root.0)
        .u8(finish)
        .fixed(&salt.0)
        .keccak()
}

/// What a node signs when it declines a slot.
pub fn decline_digest(domain: &Domain, slot: &Slot, reason: &str) -> Hash32 {
    domain
        .encode(Encoder::new("infera.decline.v1"))
        .fixed(&slot.request_hash.0)
        .u32(slot.attempt)
        .fixed(&slot.node.0)
        .bytes(reason.as_bytes())
        .keccak()
}

/// Root over what came of an attempt's slots in the order of the draw, as (node, code of the outcome, commitment or
/// zero); the post draw depends on it, so that nobody knows who is delivered or audited before everybody has committed.
pub fn commitments_root(slots: &[(NodeId, u8, Hash32)]) -> Hash32 {
    let mut encoder = Encoder::new("infera.commitments.v2");
    for (node, outcome, commitment) in slots {
        encoder = encoder.fixed(&node.0).u8(*outcome).fixed(&commitment.0);
    }
    encoder.keccak()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{bytes::Address, request::Finish};

    #[test]
    fn a_commitment_binds_slot_output_and_salt() {
        let domain = Domain { chain_id: 1, contract: Address([1; 20]) };
        let slot = Slot { request_hash: Hash32([1; 32]), attempt: 1, node: NodeId([2; 32]) };
        let output = Output { tokens: vec![5, 6], fingerprints: vec![0, 0], finish: Finish::Eos };
        let salt = Hash32([3; 32]);
        let base = commitment(&domain, &slot, &output, &salt);
        let others = [
            commitment(&domain, &Slot { attempt: 2, ..slot }, &output, &salt),
            commitment(&domain, &Slot { node: NodeId([4; 32]), ..slot }, &output, &salt),
            commitment(&domain, &slot, &Output { tokens: vec![5], ..output.clone() }, &salt),
            commitment(&domain, &slot, &Output { fingerprints: vec![0], ..output.clone() }, &salt),
            commitment(&domain, &slot, &Output { finish: Finish::Length, ..output.clone() }, &salt),
            commitment(&domain, &slot, &output, &Hash32([4; 32])),
        ];
        for other in others {
            assert_ne!(other, base);
        }
    }
}
