//! Possession of the weights (protocol section 2): random ranges of the file, proved against the root that the node
//! declares, before its session is open and at random while it is.

use infera_protocol::admission::{Range, ranges, verify_slice};
use infera_protocol::bytes::Hash32;
use infera_wire::v1;
use uuid::Uuid;

/// Ranges of one challenge: who lacks a hundredth of the file fails one in 33 of them, and so does not last.
const RANGES: usize = 3;

/// What was asked of a node, and not answered yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Challenge {
    nonce: [u8; 16],
    ranges: Vec<Range>,
    weights_root: Hash32,
    weights_bytes: u64,
}

impl Challenge {
    /// Of a file of this size, with ranges that nobody could know before.
    pub fn new(weights_root: Hash32, weights_bytes: u64) -> Self {
        let ranges = ranges(&rand::random(), weights_bytes, RANGES);
        Self { nonce: Uuid::now_v7().into_bytes(), ranges, weights_root, weights_bytes }
    }

    pub fn to_wire(&self, deadline_ms: i64) -> v1::RangeChallenge {
        let range = |(offset, length): &Range| v1::Range { offset: *offset, length: *length };
        v1::RangeChallenge {
            nonce: self.nonce.to_vec(),
            ranges: self.ranges.iter().map(range).collect(),
            deadline_ms,
        }
    }

    /// Checks the answer.
    ///
    /// # Errors
    /// Why it proves nothing, for the node's operator.
    pub fn check(&self, proof: &v1::RangeProof) -> Result<(), String> {
        if proof.nonce != self.nonce {
            return Err("the proof is about another challenge".to_owned());
        }
        if proof.slices.len() != self.ranges.len() {
            return Err(format!("{} slices for {} ranges", proof.slices.len(), self.ranges.len()));
        }
        for (range, slice) in self.ranges.iter().zip(&proof.slices) {
            verify_slice(&self.weights_root, self.weights_bytes, *range, slice)
                .map_err(|error| format!("bytes {} and following: {error}", range.0))?;
        }
        Ok(())
    }
}
