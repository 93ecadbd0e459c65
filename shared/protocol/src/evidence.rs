//! Everything that a verdict rests on, as the verifier keeps it: what was asked, who was drawn and
//! why, what each node signed and revealed. Private to the account that asked, because it holds
//! the prompt and the answers; its hash stands in the public receipt.

use crate::{
    assignment::{self, Eligible, draw, draw_referees, eligible_root, of_class},
    bytes::{Address, Hash32, NodeId, Signature, VrfKey, VrfProof, hex_bytes},
    calibration::Calibration,
    commitment::{Slot, commitment, commitments_root, decline_digest},
    hash::keccak,
    identity::{Domain, verify},
    referee::report_digest,
    registry::{Model, Registry},
    request::{MAX_REPLICAS, MIN_REPLICAS, Output, Request, check_output},
    vrf,
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
    /// Numerics class of all slots, or [`assignment::MIXED_CLASS`].
    pub class: String,
    pub price_micro: u64,
    pub terms: Terms,
    pub eligible: Vec<Eligible>,
    pub dispatcher: VrfKey,
    pub assign_proof: VrfProof,
    /// Over the commitments of the first `post_slots` slots: those that had been drawn when results were first
    /// complete.
    pub post_proof: VrfProof,
    pub post_slots: u32,
    /// In the order of the draw, skipped ones included.
    pub slots: Vec<SlotEvidence>,
    /// In the order of their draw, those who did not report included.
    pub referees: Vec<RefereeEvidence>,
    /// Nodes whose results break the request's grammar or stop strings: the verifier's finding, which anybody with the
    /// model's tokenizer can repeat.
    pub unfit: Vec<NodeId>,
    /// How alike the texts of unequal results are: the verifier's finding, which anybody with the tokenizer and the
    /// embedding model can repeat.
    pub similarities: Vec<Similarity>,
}

/// What the registry in force says that a verdict depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Terms {
    pub calibration: Calibration,
    /// The model's.
    pub similarity_threshold_millionths: u32,
    /// The model's.
    pub vocab_size: u32,
    /// The model's: what ends an answer, and stands nowhere else in it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub end_tokens: Vec<u32>,
}

impl Terms {
    /// Those of a model under this version of the registry.
    pub fn of(registry: &Registry, model: &Model) -> Self {
        Self {
            calibration: registry.calibration.clone(),
            similarity_threshold_millionths: model.similarity_threshold_millionths,
            vocab_size: model.vocab_size,
            end_tokens: model.end_tokens.clone(),
        }
    }
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
    /// Had no free place when it was drawn, says the dispatcher.
    Busy,
    /// Had refereed this attempt before it was drawn.
    Refereed,
}

impl SlotOutcome {
    /// Its code in [`commitments_root`].
    pub fn code(self) -> u8 {
        match self {
            Self::Revealed => 1,
            Self::NoCommit => 2,
            Self::NoReveal => 3,
            Self::Mismatch => 4,
            Self::Declined => 5,
            Self::Disconnected => 6,
            Self::Busy => 7,
            Self::Refereed => 8,
        }
    }

    /// Whether only the dispatcher's word stands for it; everything else the node signed.
    pub fn is_unproven(self) -> bool {
        matches!(self, Self::NoCommit | Self::Disconnected | Self::Busy)
    }

    /// Whether the operator has seen the request as a replica and so can't referee it.
    fn bars_from_refereeing(self) -> bool {
        !matches!(self, Self::Busy | Self::Refereed)
    }
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
    pub decline: Option<SignedDecline>,
}

/// A decline and the node's signature over it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignedDecline {
    pub reason: String,
    pub signature: Signature,
}

/// How a referee's work ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefereeOutcome {
    Reported,
    /// Too late, malformed or not at all.
    NoReport,
    Declined,
    Disconnected,
}

/// What one referee did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RefereeEvidence {
    pub node: NodeId,
    pub operator: Address,
    pub outcome: RefereeOutcome,
    pub reports: Vec<SubjectReport>,
}

/// What a referee signed about one answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SubjectReport {
    /// [`Output::hash`] of the answer.
    pub subject: Hash32,
    /// [`crate::referee::Report`], encoded.
    #[serde(with = "hex_bytes")]
    pub scores: Vec<u8>,
    /// Over [`report_digest`].
    pub signature: Signature,
}

/// How alike the texts of two answers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Similarity {
    /// [`Output::hash`] of each, the lower one first.
    pub answers: [Hash32; 2],
    /// Cosine of their embeddings.
    pub millionths: u32,
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
    #[error("the dispatcher's proof of the assignment does not hold: {0}")]
    AssignProof(vrf::VrfError),
    #[error("the dispatcher's proof of the post draw does not hold: {0}")]
    PostProof(vrf::VrfError),
    #[error("the post draw covers {actual} slots of {slots}")]
    PostSlots { actual: u32, slots: usize },
    #[error("the eligible set is not in canonical order")]
    EligibleOrder,
    #[error("class {0} is not one that this eligible set allows")]
    Class(String),
    #[error("{what} {index} is {actual}, but the draw gives {expected}")]
    Draw { what: &'static str, index: usize, expected: String, actual: NodeId },
    #[error("slot of {node}: {reason}")]
    Slot { node: NodeId, reason: &'static str },
    #[error("referee {node}: {reason}")]
    Referee { node: NodeId, reason: &'static str },
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

    /// What came of the slots that the post draw covers, in the order of the draw.
    pub fn commitments_root(&self) -> Hash32 {
        let covered = self.slots.iter().take(self.post_slots as usize);
        let all: Vec<_> = covered
            .map(|s| (s.node, s.outcome.code(), s.commitment.map_or(Hash32::ZERO, |c| c.digest)))
            .collect();
        commitments_root(&all)
    }

    /// The randomness of the second draw: who referees, who is audited, whose result is delivered.
    pub fn beta2(&self) -> Hash32 {
        vrf::beta(&self.post_proof)
    }

    /// The class of a node of the eligible set.
    pub fn class_of(&self, node: &NodeId) -> Option<&str> {
        let at = self.eligible.binary_search_by_key(node, |e| e.node).ok()?;
        Some(&self.eligible[at].class)
    }

    /// The results that count: revealed, signed and opened as committed.
    pub fn revealed(&self) -> impl Iterator<Item = (&SlotEvidence, &Output)> {
        self.slots
            .iter()
            .filter(|s| s.outcome == SlotOutcome::Revealed)
            .filter_map(|s| s.reveal.as_ref().map(|r| (s, &r.output)))
    }

    /// All operators that may referee, in the order in which they are asked.
    pub fn referee_order(&self) -> Vec<&Eligible> {
        draw_referees(&self.beta2(), &self.eligible, |operator| {
            self.slots.iter().any(|slot| slot.operator == *operator && slot.outcome.bars_from_refereeing())
        })
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

    /// Checks the assignment: proved by the dispatcher, slots are the first of the draw.
    ///
    /// # Errors
    /// The first thing that doesn't hold.
    pub fn check_assignment(&self) -> Result<(), EvidenceError> {
        if !self.eligible.is_sorted_by(|a, b| a.node < b.node) {
            return Err(EvidenceError::EligibleOrder);
        }
        if !assignment::class_allowed(&self.eligible, &self.class, self.k) {
            return Err(EvidenceError::Class(self.class.clone()));
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
        vrf::verify(&self.dispatcher, &message, &self.assign_proof).map_err(EvidenceError::AssignProof)?;
        let drawn = draw(&vrf::beta(&self.assign_proof), of_class(&self.eligible, &self.class));
        let slots = self.slots.iter().map(|slot| (slot.node, slot.operator));
        first_of("slot", slots, &drawn)
    }

    /// Checks that the post draw was made over exactly these commitments.
    ///
    /// # Errors
    /// [`EvidenceError::PostProof`], [`EvidenceError::PostSlots`].
    pub fn check_post(&self) -> Result<(), EvidenceError> {
        if self.post_slots as usize > self.slots.len() {
            return Err(EvidenceError::PostSlots { actual: self.post_slots, slots: self.slots.len() });
        }
        let message = assignment::post_message(
            &self.domain,
            &self.request_hash(),
            self.attempt,
            &self.commitments_root(),
        );
        vrf::verify(&self.dispatcher, &message, &self.post_proof).map_err(EvidenceError::PostProof)
    }

    /// Checks every slot: commitments and declines are signed, reveals open commitments, outcomes say what is there.
    /// A result counts only if it keeps to [`check_output`]; one that does not is a mismatch.
    ///
    /// # Errors
    /// The first slot that doesn't hold.
    pub fn check_slots(&self) -> Result<(), EvidenceError> {
        let request_hash = self.request_hash();
        self.slots.iter().try_for_each(|slot| {
            self.check_slot(slot, request_hash)
                .map_err(|reason| EvidenceError::Slot { node: slot.node, reason })
        })
    }

    fn check_slot(&self, slot: &SlotEvidence, request_hash: Hash32) -> Result<(), &'static str> {
        let place = Slot { request_hash, attempt: self.attempt, node: slot.node };
        if let Some(signed) = &slot.commitment {
            verify(&slot.node, &signed.digest, &signed.signature)
                .map_err(|_| "the commitment is not signed by the node")?;
        }
        if let Some(decline) = &slot.decline {
            verify(&slot.node, &decline_digest(&self.domain, &place, &decline.reason), &decline.signature)
                .map_err(|_| "the decline is not signed by the node")?;
        }
        let opened = match (&slot.commitment, &slot.reveal) {
            (Some(signed), Some(reveal)) => {
                commitment(&self.domain, &place, &reveal.output, &reveal.salt) == signed.digest
            }
            _ => false,
        };
        let output =
            slot.reveal.as_ref().map(|r| check_output(&self.request, &r.output, &self.terms.end_tokens));
        if slot.outcome == SlotOutcome::Revealed && opened {
            output.unwrap_or(Ok(()))?;
        }
        let counts = opened && output == Some(Ok(()));
        let untouched = slot.commitment.is_none() && slot.reveal.is_none();
        let holds = match slot.outcome {
            SlotOutcome::Revealed => counts,
            SlotOutcome::Mismatch => slot.commitment.is_some() && slot.reveal.is_some() && !counts,
            SlotOutcome::NoReveal => slot.commitment.is_some() && slot.reveal.is_none(),
            SlotOutcome::Refereed => untouched && self.referees.iter().any(|r| r.operator == slot.operator),
            _ => untouched,
        };
        let declined = slot.outcome == SlotOutcome::Declined;
        if holds && declined == slot.decline.is_some() {
            Ok(())
        } else {
            Err("commitment, reveal, decline and outcome do not fit together")
        }
    }

    /// Checks the referees: the first of their draw, and every report signed.
    ///
    /// # Errors
    /// The first thing that doesn't hold.
    pub fn check_referees(&self) -> Result<(), EvidenceError> {
        let order = self.referee_order();
        first_of("referee", self.referees.iter().map(|r| (r.node, r.operator)), &order)?;
        let request_hash = self.request_hash();
        for referee in &self.referees {
            let wrong = |reason| EvidenceError::Referee { node: referee.node, reason };
            if (referee.outcome == RefereeOutcome::Reported) == referee.reports.is_empty() {
                return Err(wrong("reports and outcome do not fit together"));
            }
            for (at, report) in referee.reports.iter().enumerate() {
                if referee.reports[..at].iter().any(|earlier| earlier.subject == report.subject) {
                    return Err(wrong("two reports about one answer"));
                }
                let (node, subject) = (&referee.node, &report.subject);
                let digest =
                    report_digest(&self.domain, &request_hash, self.attempt, node, subject, &report.scores);
                verify(node, &digest, &report.signature)
                    .map_err(|_| wrong("a report is not signed by the node"))?;
            }
        }
        Ok(())
    }
}

/// Whether these are the first of a draw.
fn first_of(
    what: &'static str,
    actual: impl Iterator<Item = (NodeId, Address)>,
    drawn: &[&Eligible],
) -> Result<(), EvidenceError> {
    for (index, (node, operator)) in actual.enumerate() {
        let expected = drawn.get(index);
        if expected.is_none_or(|e| e.node != node || e.operator != operator) {
            let expected = expected.map_or_else(|| "nobody".into(), |e| e.node.to_string());
            return Err(EvidenceError::Draw { what, index, expected, actual: node });
        }
    }
    Ok(())
}
