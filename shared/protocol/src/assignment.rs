//! Assignment (protocol section 4): at random, and anyone can recompute it.
//!
//! Every epoch the dispatcher freezes the set of nodes that may be drawn. Its proof over [`assign_message`] gives
//! [`beta`], which orders them; there is one proof for one message ([`crate::vrf`]), so that nothing can be tried out.
//! Reasons for this form: decision 0016.

use crate::{
    bytes::{Address, Hash32, NodeId},
    hash::{Encoder, keccak},
    identity::Domain,
    merkle::MerkleTree,
};
use serde::{Deserialize, Serialize};
use std::{cmp::Ordering, collections::BTreeSet};
use uuid::Uuid;

pub use crate::vrf::beta;

/// Length of an epoch (section 4), seconds.
pub const EPOCH_SECS: u64 = 10;
/// Most nodes of an eligible set that one attempt may carry.
pub const MAX_ELIGIBLE: usize = 4_096;
/// What stands for the class of an attempt whose nodes are of several, because none has enough operators.
pub const MIXED_CLASS: &str = "mixed";
/// A probability of one, in parts per million.
pub const ALWAYS_PPM: u32 = 1_000_000;

/// The epoch of a time.
pub fn epoch_of(now_ms: i64) -> u64 {
    u64::try_from(now_ms).unwrap_or(0) / (EPOCH_SECS * 1_000)
}

/// A node of the frozen set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Eligible {
    pub node: NodeId,
    pub operator: Address,
    /// Numerics class.
    pub class: String,
    /// Demonstrated slots x trust, at least 1.
    pub weight: u32,
    /// How often an answer that this operator helped to verify is refereed, parts per million (section 8).
    pub audit_ppm: u32,
    /// Its operator is trusted: it referees before those that are not (section 8).
    pub trusted: bool,
}

/// Sorts by node id, which is the canonical order of an eligible set.
pub fn freeze(mut set: Vec<Eligible>) -> Vec<Eligible> {
    set.sort_by_key(|e| e.node);
    set.dedup_by_key(|e| e.node);
    set
}

/// Merkle root over a frozen set; zero for an empty one. A leaf is the double keccak of a member's fields.
pub fn eligible_root(set: &[Eligible]) -> Hash32 {
    let leaves: Vec<Hash32> = set
        .iter()
        .map(|e| {
            let inner = Encoder::new("infera.eligible.v2")
                .fixed(&e.node.0)
                .fixed(&e.operator.0)
                .bytes(e.class.as_bytes())
                .u32(e.weight)
                .u32(e.audit_ppm)
                .u8(u8::from(e.trusted))
                .keccak();
            keccak(&[&inner.0])
        })
        .collect();
    MerkleTree::new(&leaves).map_or(Hash32::ZERO, |tree| tree.root())
}

/// The members of a frozen set that an attempt of this class draws from: those of the class, or all where it is
/// [`MIXED_CLASS`].
pub fn of_class<'a>(set: &'a [Eligible], class: &'a str) -> impl Iterator<Item = &'a Eligible> {
    set.iter().filter(move |e| class == MIXED_CLASS || e.class == class)
}

/// How many different operators there are.
pub fn operators<'a>(set: impl IntoIterator<Item = &'a Eligible>) -> usize {
    set.into_iter().map(|e| e.operator).collect::<BTreeSet<_>>().len()
}

/// Whether an attempt for `k` results may be of `class`: enough operators have it, or none of the classes has enough.
pub fn class_allowed(set: &[Eligible], class: &str, k: u32) -> bool {
    let enough = |class: &str| operators(of_class(set, class)) >= k as usize;
    if class == MIXED_CLASS { !set.iter().any(|e| enough(&e.class)) } else { enough(class) }
}

/// The input of the draw; `k` is what was asked for.
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
        .encode(Encoder::new("infera.assign.v2"))
        .fixed(request_id.as_bytes())
        .fixed(&request_hash.0)
        .u32(k)
        .u32(attempt)
        .u64(epoch)
        .fixed(&eligible_root.0)
        .keccak()
}

/// The input of the second draw, made once all commitments are in (section 8).
pub fn post_message(
    domain: &Domain,
    request_hash: &Hash32,
    attempt: u32,
    commitments_root: &Hash32,
) -> Hash32 {
    domain
        .encode(Encoder::new("infera.post.v2"))
        .fixed(&request_hash.0)
        .u32(attempt)
        .fixed(&commitments_root.0)
        .keccak()
}

/// The members in the order of the draw: score -ln(u)/w ascending, one node per operator. A weight of 0 is never
/// drawn. The first k are leased; the next ones replace who falls away.
pub fn draw<'a>(beta: &Hash32, set: impl IntoIterator<Item = &'a Eligible>) -> Vec<&'a Eligible> {
    let mut scored: Vec<(f64, &Eligible)> = set
        .into_iter()
        .filter(|e| e.weight > 0)
        .map(|e| (-libm::log(uniform(beta, &e.node.0)) / f64::from(e.weight), e))
        .collect();
    scored.sort_by(|a, b| a.0.partial_cmp(&b.0).unwrap_or(Ordering::Equal).then(a.1.node.cmp(&b.1.node)));
    let mut operators = BTreeSet::new();
    scored.into_iter().map(|(_, e)| e).filter(|e| operators.insert(e.operator)).collect()
}

/// The order in which referees are asked (section 8): drawn by `beta2` from all classes, without the operators that
/// `excluded` names. Trusted operators come first: drawn from all, a ring that comes back under ever new addresses outvotes
/// honest referees (`make bench-sim`). Weights do not count: a referee's word must not be easier to get for who has more
/// slots.
pub fn draw_referees<'a>(
    beta2: &Hash32,
    set: &'a [Eligible],
    excluded: impl Fn(&Address) -> bool,
) -> Vec<&'a Eligible> {
    let beta = keccak(&[b"infera.referees.v1", &beta2.0]);
    let mut scored: Vec<(bool, [u8; 8], &Eligible)> = set
        .iter()
        .filter(|e| e.weight > 0 && !excluded(&e.operator))
        .map(|e| (!e.trusted, expand(&beta, &e.node.0), e))
        .collect();
    scored.sort_by_key(|(newcomer, score, eligible)| (*newcomer, *score, eligible.node));
    let mut operators = BTreeSet::new();
    scored.into_iter().map(|(.., e)| e).filter(|e| operators.insert(e.operator)).collect()
}

/// Whether an event of `ppm` parts per million happens by `beta2`; `what` names it.
pub fn happens(beta2: &Hash32, what: &str, ppm: u32) -> bool {
    // 2^64 / 10^6 steps of a millionth; a bias below 2^-44.
    u64::from_be_bytes(expand(beta2, what.as_bytes())) % u64::from(ALWAYS_PPM) < u64::from(ppm)
}

/// `nodes` in the order that `beta` gives them, lowest score first.
pub fn order_nodes(beta: &Hash32, nodes: &[NodeId]) -> Vec<NodeId> {
    let mut scored: Vec<([u8; 8], NodeId)> = nodes.iter().map(|n| (expand(beta, &n.0), *n)).collect();
    scored.sort();
    scored.into_iter().map(|(_, node)| node).collect()
}

/// A number below `below` by `beta`; 0 where that is 0.
pub(crate) fn number(beta: &Hash32, what: &[u8], below: u64) -> u64 {
    u64::from_be_bytes(expand(beta, what)).checked_rem(below).unwrap_or(0)
}

fn expand(beta: &Hash32, what: &[u8]) -> [u8; 8] {
    let mut hasher = blake3::Hasher::new_keyed(&beta.0);
    hasher.update(what);
    let mut bytes = [0; 8];
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

/// Uniform in (0, 1): 53 bits, never 0 and never 1.
fn uniform(beta: &Hash32, what: &[u8]) -> f64 {
    let bits = u64::from_be_bytes(expand(beta, what)) >> 11;
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
        Eligible {
            node: NodeId([n; 32]),
            operator: Address([operator; 20]),
            class: if n.is_multiple_of(2) { "exact" } else { "fast" }.into(),
            weight,
            audit_ppm: 50_000,
            trusted: true,
        }
    }

    #[test]
    fn weights_decide_how_often_a_node_is_first() {
        let set = [node(1, 1, 1), node(2, 2, 3)];
        let first = (0..4_000_u32)
            .filter(|i| draw(&keccak(&[&i.to_be_bytes()]), &set)[0].node == NodeId([2; 32]))
            .count();
        // Expected 3,000; 5 standard deviations are 137.
        assert!((2_863..=3_137).contains(&first), "{first}");
    }

    #[test]
    fn weights_do_not_decide_who_referees() {
        let set = [node(1, 1, 1), node(2, 2, 1_000)];
        let first = |i: u32| draw_referees(&keccak(&[&i.to_be_bytes()]), &set, |_| false)[0].node;
        let second = (0..4_000).filter(|i| first(*i) == NodeId([2; 32])).count();
        // Expected 2,000; 5 standard deviations are 158.
        assert!((1_842..=2_158).contains(&second), "{second}");
        // Who is not trusted comes last.
        let newcomer = [Eligible { trusted: false, ..node(1, 1, 1) }, node(2, 2, 1), node(3, 3, 1)];
        for i in 0..100_u32 {
            let order = draw_referees(&keccak(&[&i.to_be_bytes()]), &newcomer, |_| false);
            assert_eq!(order.last(), Some(&&newcomer[0]));
        }
        let without = draw_referees(&Hash32::ZERO, &set, |operator| *operator == Address([2; 20]));
        assert_eq!(without, [&set[0]]);
    }

    #[test]
    fn chances_are_kept() {
        let happened =
            (0..40_000_u32).filter(|i| happens(&keccak(&[&i.to_be_bytes()]), "audit", 50_000)).count();
        // Expected 2,000; 5 standard deviations are 218.
        assert!((1_782..=2_218).contains(&happened), "{happened}");
        assert!((0..100_u32).all(|i| happens(&keccak(&[&i.to_be_bytes()]), "audit", ALWAYS_PPM)));
        assert!(!(0..100_u32).any(|i| happens(&keccak(&[&i.to_be_bytes()]), "audit", 0)));
    }

    #[test]
    fn classes_are_mixed_only_where_none_has_enough_operators() {
        let set = [node(1, 1, 1), node(2, 2, 1), node(4, 4, 1), node(6, 6, 1)];
        for (class, k, allowed) in [
            ("exact", 3, true),
            ("exact", 4, false),
            ("fast", 1, true),
            ("fast", 3, false),
            (MIXED_CLASS, 3, false),
            (MIXED_CLASS, 4, true),
        ] {
            assert_eq!(class_allowed(&set, class, k), allowed, "{class} {k}");
        }
        assert_eq!((of_class(&set, "fast").count(), of_class(&set, MIXED_CLASS).count()), (1, 4));
    }

    #[test]
    fn every_field_of_a_member_is_in_the_root() {
        let set = [node(1, 1, 1), node(2, 2, 1)];
        let root = eligible_root(&set);
        let changes: [fn(&mut Eligible); 6] = [
            |e| e.node.0[0] ^= 1,
            |e| e.operator.0[0] ^= 1,
            |e| e.class.push('x'),
            |e| e.weight += 1,
            |e| e.audit_ppm += 1,
            |e| e.trusted = !e.trusted,
        ];
        for change in changes {
            let mut other = set.clone();
            change(&mut other[1]);
            assert_ne!(eligible_root(&other), root, "{other:?}");
        }
        assert_eq!(eligible_root(&[]), Hash32::ZERO);
    }

    proptest! {
        #[test]
        fn a_draw_has_one_node_per_operator_and_ignores_the_order_of_the_set(
            seed in any::<[u8; 32]>(),
            members in proptest::collection::vec((any::<u8>(), 0_u8..6, 0_u32..5), 1..40),
        ) {
            let set: Vec<_> = members.iter().map(|(n, o, w)| node(*n, *o, *w)).collect();
            let frozen = freeze(set);
            let mut reversed = frozen.clone();
            reversed.reverse();
            let beta = Hash32(seed);
            prop_assert_eq!(draw(&beta, &frozen), draw(&beta, &reversed));
            let all = |_: &Address| false;
            prop_assert_eq!(draw_referees(&beta, &frozen, all), draw_referees(&beta, &reversed, all));
            for drawn in [draw(&beta, &frozen), draw_referees(&beta, &frozen, all)] {
                prop_assert_eq!(operators(drawn.iter().copied()), drawn.len());
            }
        }
    }
}
