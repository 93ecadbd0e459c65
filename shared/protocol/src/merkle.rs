//! The Merkle tree of OpenZeppelin's standard: leaves are double keccak, pairs are hashed in
//! sorted order, so that a proof needs no positions.
//!
//! Source: `MerkleProof.sol` of OpenZeppelin contracts 5 and @openzeppelin/merkle-tree; a tree is
//! an array of 2n-1 hashes with the leaves, sorted, at its end in reverse.

use crate::{bytes::Hash32, hash::keccak};

fn pair(a: &Hash32, b: &Hash32) -> Hash32 {
    let (low, high) = if a <= b { (a, b) } else { (b, a) };
    keccak(&[&low.0, &high.0])
}

/// A tree over leaf hashes.
#[derive(Debug, Clone)]
pub struct MerkleTree {
    nodes: Vec<Hash32>,
    /// `places[i]` is where the i-th leaf given to [`MerkleTree::new`] stands in `nodes`.
    places: Vec<usize>,
}

impl MerkleTree {
    /// None for no leaves.
    pub fn new(leaves: &[Hash32]) -> Option<Self> {
        if leaves.is_empty() {
            return None;
        }
        let mut order: Vec<usize> = (0..leaves.len()).collect();
        order.sort_by_key(|&i| leaves[i]);
        let size = 2 * leaves.len() - 1;
        let mut nodes = vec![Hash32::ZERO; size];
        let mut places = vec![0; leaves.len()];
        for (rank, &leaf) in order.iter().enumerate() {
            nodes[size - 1 - rank] = leaves[leaf];
            places[leaf] = size - 1 - rank;
        }
        for i in (0..leaves.len() - 1).rev() {
            nodes[i] = pair(&nodes[2 * i + 1], &nodes[2 * i + 2]);
        }
        Some(Self { nodes, places })
    }

    pub fn root(&self) -> Hash32 {
        self.nodes[0]
    }

    /// The siblings from the i-th leaf to the root; None if there is no such leaf.
    pub fn proof(&self, leaf: usize) -> Option<Vec<Hash32>> {
        let mut place = *self.places.get(leaf)?;
        let mut proof = Vec::new();
        while place > 0 {
            let sibling = if place % 2 == 1 { place + 1 } else { place - 1 };
            proof.push(self.nodes[sibling]);
            place = (place - 1) / 2;
        }
        Some(proof)
    }
}

/// The root that `proof` leads to from `leaf`.
pub fn root_of(leaf: &Hash32, proof: &[Hash32]) -> Hash32 {
    proof.iter().fold(*leaf, |hash, sibling| pair(&hash, sibling))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_leaf_proves_itself_and_nothing_else(count in 1_usize..70, stranger in any::<[u8; 32]>()) {
            let leaves: Vec<_> = (0..count).map(|i| keccak(&[&i.to_be_bytes()])).collect();
            let tree = MerkleTree::new(&leaves).unwrap();
            for (i, leaf) in leaves.iter().enumerate() {
                let proof = tree.proof(i).unwrap();
                prop_assert_eq!(root_of(leaf, &proof), tree.root());
                prop_assert_ne!(root_of(&Hash32(stranger), &proof), tree.root());
            }
            prop_assert!(tree.proof(count).is_none());
        }
    }

    #[test]
    fn no_leaves_no_tree() {
        assert!(MerkleTree::new(&[]).is_none());
    }
}
