//! Everything that a verdict rests on, as the verifier keeps it: what was asked, who was drawn and
//! why, what each node signed and revealed. Private to the account that asked, because it holds
//! the prompt and the answers; its hash stands in the public receipt.

use crate::{
    assignment::{self, Eligible, draw, eligible_root},
    bytes::{Address, Hash32, NodeId, Signature},
    commitment::{Slot, commitment, commitments_root},
    hash::keccak,
    identity::{Domain, verify},
    request::{MAX_REPLICAS, MIN_REPLICAS, Output, Request, check_output},
};
use serde::{Deserialize, Serialize};

/// One verdict's evidence. Canonical form: this structure as compact JSON, fields in this order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evidence {
    pub domain: Domain,
    pub request: Request,
    pub account: String,
    pub model: String,
    /// Blinds account, prompt and output in the public receipt.
    pub salt: Hash32,
    /// Replicas asked for.
    pub k: u32,
    pub submitted_at_ms: i64,
    pub decided_at_ms: i64,
    pub attempt: u32,
    pub epoch: u64,
    /// Numerics class of all slots.
    pub class: String,
    pub price_micro: u64,
    pub calibration_hash: Hash32,
    pub eligible: Vec<Eligible>,
    pub dispatcher: NodeId,
    pub assign_signature: Signature,
    pub post_signature: Signature,
    /// In the order of the draw, skipped ones included.
    pub slots: Vec<SlotEvidence>,
}

/// How a slot ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SlotOutcome {
    Revealed,
    NoCommit,
    NoReveal,
    Mismatch,
    Declined,
    Disconnected,
}

/// What one drawn node did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlotEvidence {
    pub node: NodeId,
    pub operator: Address,
    pub outcome: SlotOutcome,
    pub commitment: Option<SignedCommitment>,
    pub reveal: Option<Reveal>,
}

/// A commitment and the node's signature over it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignedCommitment {
    pub digest: Hash32,
    pub signature: Signature,
}

/// What opens a commitment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reveal {
    pub output: Output,
    pub salt: Hash32,
}

/// Evidence that doesn't hold together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EvidenceError {
    #[error("the dispatcher's signature over the assignment does not match")]
    AssignSignature,
    #[error("the dispatcher's signature over the post draw does not match")]
    PostSignature,
    #[error("the eligible set is not in canonical order")]
    EligibleOrder,
    #[error("slot {index} is {actual}, but the draw gives {expected}")]
    Draw { index: usize, expected: String, actual: NodeId },
    #[error("slot of {node}: {reason}")]
    Slot { node: NodeId, reason: &'static str },
    #[error("{0}")]
    Request(String),
    #[error("the evidence can't be written as JSON")]
    Json,
}

impl Evidence {
    /// The bytes that are hashed, stored and served.
    ///
    /// # Errors
    /// Only if a number can't be written as JSON (NaN).
    pub fn canonical(&self) -> Result<Vec<u8>, EvidenceError> {
        serde_json::to_vec(self).map_err(|_| EvidenceError::Json)
    }

    /// keccak-256 of [`Evidence::canonical`].
    ///
    /// # Errors
    /// As there.
    pub fn root(&self) -> Result<Hash32, EvidenceError> {
        Ok(keccak(&[&self.canonical()?]))
    }

    pub fn request_hash(&self) -> Hash32 {
        self.request.hash(&self.domain)
    }

    /// All commitments in the order of the draw.
    pub fn commitments_root(&self) -> Hash32 {
        let all: Vec<_> =
            self.slots.iter().filter_map(|s| s.commitment.map(|c| (s.node, c.digest))).collect();
        commitments_root(&all)
    }

    /// The results that count: revealed, signed and opened as committed.
    pub fn revealed(&self) -> impl Iterator<Item = (&SlotEvidence, &Output)> {
        self.slots
            .iter()
            .filter(|s| s.outcome == SlotOutcome::Revealed)
            .filter_map(|s| s.reveal.as_ref().map(|r| (s, &r.output)))
    }

    /// The revealed results as [`crate::agreement::decide`] takes them.
    pub fn results(&self) -> Vec<(NodeId, Hash32)> {
        self.revealed().map(|(slot, output)| (slot.node, output.hash())).collect()
    }

    /// Checks what was asked: request, sampling and k within their limits, an epoch between
    /// submission and verdict.
    ///
    /// # Errors
    /// [`EvidenceError::Request`], naming the field.
    pub fn check_request(&self) -> Result<(), EvidenceError> {
        let wrong = |reason: String| Err(EvidenceError::Request(reason));
        if let Err(error) = self.request.validate() {
            return wrong(error.to_string());
        }
        if let Err(error) = self.request.sampling.validate() {
            return wrong(error.to_string());
        }
        if !(MIN_REPLICAS..=MAX_REPLICAS).contains(&self.k) {
            return wrong(format!("k is {}; allowed are {MIN_REPLICAS} to {MAX_REPLICAS}", self.k));
        }
        let (first, last) =
            (assignment::epoch_of(self.submitted_at_ms), assignment::epoch_of(self.decided_at_ms));
        if !(first..=last).contains(&self.epoch) {
            return wrong(format!("epoch is {}; submission and verdict allow {first} to {last}", self.epoch));
        }
        Ok(())
    }

    /// Checks the assignment: signed by the dispatcher, slots are the first of the draw.
    ///
    /// # Errors
    /// The first thing that doesn't hold.
    pub fn check_assignment(&self) -> Result<(), EvidenceError> {
        if assignment::freeze(self.eligible.clone()) != self.eligible {
            return Err(EvidenceError::EligibleOrder);
        }
        let message = assignment::assign_message(
            &self.domain,
            self.request.id,
            &self.request_hash(),
            self.k,
            self.attempt,
            self.epoch,
            &eligible_root(&self.eligible),
        );
        verify(&self.dispatcher, &message, &self.assign_signature)
            .map_err(|_| EvidenceError::AssignSignature)?;
        let drawn = draw(&assignment::beta(&self.assign_signature), &self.eligible);
        for (index, slot) in self.slots.iter().enumerate() {
            let expected = drawn.get(index);
            if expected.is_none_or(|e| e.node != slot.node || e.operator != slot.operator) {
                return Err(EvidenceError::Draw {
                    index,
                    expected: expected.map_or_else(|| "nobody".into(), |e| e.node.to_string()),
                    actual: slot.node,
                });
            }
        }
        Ok(())
    }

    /// Checks that the post draw was signed over exactly these commitments.
    ///
    /// # Errors
    /// [`EvidenceError::PostSignature`].
    pub fn check_post(&self) -> Result<(), EvidenceError> {
        let message = assignment::post_message(
            &self.domain,
            &self.request_hash(),
            self.attempt,
            &self.commitments_root(),
        );
        verify(&self.dispatcher, &message, &self.post_signature).map_err(|_| EvidenceError::PostSignature)
    }

    /// Checks every slot: commitments are signed, reveals open them, outcomes say what is there.
    /// A result counts only if it keeps to [`check_output`]; one that does not is a mismatch.
    ///
    /// # Errors
    /// The first slot that doesn't hold.
    pub fn check_slots(&self) -> Result<(), EvidenceError> {
        let request_hash = self.request_hash();
        for slot in &self.slots {
            let wrong = |reason| EvidenceError::Slot { node: slot.node, reason };
            if let Some(signed) = &slot.commitment {
                verify(&slot.node, &signed.digest, &signed.signature)
                    .map_err(|_| wrong("the commitment is not signed by the node"))?;
            }
            let place = Slot { request_hash, attempt: self.attempt, node: slot.node };
            let opened = match (&slot.commitment, &slot.reveal) {
                (Some(signed), Some(reveal)) => {
                    commitment(&self.domain, &place, &reveal.output, &reveal.salt) == signed.digest
                }
                _ => false,
            };
            let output = slot.reveal.as_ref().map(|r| check_output(&self.request, &r.output));
            if slot.outcome == SlotOutcome::Revealed && opened {
                output.unwrap_or(Ok(())).map_err(wrong)?;
            }
            let counts = opened && output == Some(Ok(()));
            let holds = match slot.outcome {
                SlotOutcome::Revealed => counts,
                SlotOutcome::Mismatch => slot.commitment.is_some() && slot.reveal.is_some() && !counts,
                SlotOutcome::NoReveal => slot.commitment.is_some() && slot.reveal.is_none(),
                SlotOutcome::NoCommit | SlotOutcome::Declined | SlotOutcome::Disconnected => {
                    slot.commitment.is_none() && slot.reveal.is_none()
                }
            };
            if !holds {
                return Err(wrong("commitment, reveal and outcome do not fit together"));
            }
        }
        Ok(())
    }
}
