//! Assignment (protocol section 4): at random, and anyone can recompute it.
//!
//! The dispatcher's Ed25519 signature over [`assign_message`] is expanded to `beta`, which orders
//! the eligible nodes. Ed25519 signatures are deterministic for an honest signer but not unique for
//! a cheating one: a dispatcher could try several. The decision record 0003 says why this is
//! the first form and what replaces it.

use crate::{
    bytes::{Address, Hash32, NodeId, Signature},
    hash::{Encoder, keccak},
    identity::Domain,
};
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;
use uuid::Uuid;

/// Length of an epoch (section 4), seconds.
pub const EPOCH_SECS: u64 = 10;
/// Most nodes of an eligible set that one attempt may carry.
pub const MAX_ELIGIBLE: usize = 4_096;

/// The epoch of a time.
pub fn epoch_of(now_ms: i64) -> u64 {
    u64::try_from(now_ms).unwrap_or(0) / (EPOCH_SECS * 1_000)
}

/// A node of the frozen set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Eligible {
    pub node: NodeId,
    pub operator: Address,
    /// Demonstrated slots x trust, at least 1.
    pub weight: u32,
}

/// Sorts by node id, which is the canonical order of an eligible set.
pub fn freeze(mut set: Vec<Eligible>) -> Vec<Eligible> {
    set.sort_by_key(|e| e.node);
    set.dedup_by_key(|e| e.node);
    set
}

/// Hash over a frozen set.
pub fn eligible_root(set: &[Eligible]) -> Hash32 {
    let mut encoder = Encoder::new("infera.eligible.v1");
    for e in set {
        encoder = encoder.fixed(&e.node.0).fixed(&e.operator.0).u32(e.weight);
    }
    encoder.keccak()
}

/// What the dispatcher signs before the draw; `k` is what was asked for.
pub fn assign_message(
    domain: &Domain,
    request_id: Uuid,
    request_hash: &Hash32,
    k: u32,
    attempt: u32,
    epoch: u64,
    eligible_root: &Hash32,
) -> Hash32 {
    domain
        .encode(Encoder::new("infera.assign.v1"))
        .fixed(request_id.as_bytes())
        .fixed(&request_hash.0)
        .u32(k)
        .u32(attempt)
        .u64(epoch)
        .fixed(&eligible_root.0)
        .keccak()
}

/// What the dispatcher signs once all commitments are in (section 8).
pub fn post_message(
    domain: &Domain,
    request_hash: &Hash32,
    attempt: u32,
    commitments_root: &Hash32,
) -> Hash32 {
    domain
        .encode(Encoder::new("infera.post.v1"))
        .fixed(&request_hash.0)
        .u32(attempt)
        .fixed(&commitments_root.0)
        .keccak()
}

/// The randomness of a signature.
pub fn beta(signature: &Signature) -> Hash32 {
    keccak(&[b"infera.beta.v1", &signature.0])
}

/// The whole frozen set in the order of the draw: score -ln(u)/w ascending, one node per operator.
/// A weight of 0 is never drawn. The first k are leased; the next ones replace who falls away.
pub fn draw(beta: &Hash32, set: &[Eligible]) -> Vec<Eligible> {
    let mut scored: Vec<(f64, &Eligible)> = set
        .iter()
        .filter(|e| e.weight > 0)
        .map(|e| (-libm::log(uniform(beta, &e.node)) / f64::from(e.weight), e))
        .collect();
    scored.sort_by(|a, b| a.0.partial_cmp(&b.0).unwrap_or(Ordering::Equal).then(a.1.node.cmp(&b.1.node)));
    let mut operators = Vec::new();
    let mut drawn = Vec::new();
    for (_, e) in scored {
        if !operators.contains(&e.operator) {
            operators.push(e.operator);
            drawn.push(*e);
        }
    }
    drawn
}

/// `items` in the order that `beta` gives them, lowest score first.
pub fn order_nodes(beta: &Hash32, nodes: &[NodeId]) -> Vec<NodeId> {
    let mut scored: Vec<([u8; 8], NodeId)> = nodes.iter().map(|n| (expand(beta, n), *n)).collect();
    scored.sort();
    scored.into_iter().map(|(_, node)| node).collect()
}

fn expand(beta: &Hash32, node: &NodeId) -> [u8; 8] {
    let mut hasher = blake3::Hasher::new_keyed(&beta.0);
    hasher.update(&node.0);
    let mut bytes = [0; 8];
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

/// Uniform in (0, 1): 53 bits, never 0 and never 1.
fn uniform(beta: &Hash32, node: &NodeId) -> f64 {
    let bits = u64::from_be_bytes(expand(beta, node)) >> 11;
    // 53 bits fit an f64 exactly.
    #[allow(clippy::cast_precision_loss)]
    let value = (bits as f64 + 0.5) / (1_u64 << 53) as f64;
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn node(n: u8, operator: u8, weight: u32) -> Eligible {
        Eligible { node: NodeId([n; 32]), operator: Address([operator; 20]), weight }
    }

    #[test]
    fn weights_decide_how_often_a_node_is_first() {
        let set = [node(1, 1, 1), node(2, 2, 3)];
        let first = (0..4_000_u32)
            .filter(|i| {
                let beta = keccak(&[&i.to_be_bytes()]);
                draw(&beta, &set)[0].node == NodeId([2; 32])
            })
            .count();
        // Expected 3,000; 5 standard deviations are 137.
        assert!((2_863..=3_137).contains(&first), "{first}");
    }

    proptest! {
        #[test]
        fn a_draw_has_one_node_per_operator_and_ignores_the_order_of_the_set(
            seed in any::<[u8; 32]>(),
            members in proptest::collection::vec((any::<u8>(), 0_u8..6, 0_u32..5), 1..40),
        ) {
            let set: Vec<_> = members.iter().map(|(n, o, w)| node(*n, *o, *w)).collect();
            let frozen = freeze(set.clone());
            let drawn = draw(&Hash32(seed), &frozen);
            let mut operators: Vec<_> = drawn.iter().map(|e| e.operator).collect();
            operators.sort();
            operators.dedup();
            prop_assert_eq!(operators.len(), drawn.len());
            let mut reversed = frozen.clone();
            reversed.reverse();
            prop_assert_eq!(drawn, draw(&Hash32(seed), &reversed));
        }
    }
}
