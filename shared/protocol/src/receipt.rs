//! Receipts (protocol section 10): the public record of a verified request.
//!
//! A receipt is a pure function of the evidence: whoever holds the evidence recomputes every
//! field. Its leaf is the double keccak of the ABI-encoded fields, as a contract would compute it.

use crate::{
    agreement::{Decision, FULL_SIMILARITY_MILLIONTHS},
    assignment::{eligible_root, order_nodes},
    bytes::{Address, Hash32, NodeId, VrfKey, VrfProof},
    evidence::{Evidence, EvidenceError, RefereeOutcome, SlotOutcome},
    hash::{Encoder, keccak},
    money::cost_micro,
    request::Output,
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The public fields, all in the leaf.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    /// The request's id.
    pub id: Uuid,
    pub chain_id: u64,
    pub contract: Address,
    pub request_hash: Hash32,
    /// Salted hash of the account.
    pub account_hash: Hash32,
    pub epoch: u64,
    pub attempt: u32,
    pub model_root: Hash32,
    pub class: String,
    pub calibration_hash: Hash32,
    /// Salted hash of the prompt's tokens.
    pub prompt_hash: Hash32,
    /// Salted hash of the delivered output.
    pub output_hash: Hash32,
    /// Replicas that were asked for; the dispatcher signed it with the assignment.
    pub asked_k: u32,
    /// Replicas that counted for the quorum: those asked for, or as many as revealed a result.
    pub k: u32,
    /// The verified set in beta2 order; the first one's result was delivered.
    pub verified: Vec<VerifiedNode>,
    /// Drawn but not paid, with the reason.
    pub unpaid: Vec<Unpaid>,
    /// Those who reported, in the order of their draw.
    pub referees: Vec<NodeId>,
    pub lowest_similarity_millionths: u32,
    pub prompt_tokens: u32,
    pub output_tokens: u32,
    /// Per token and replica.
    pub price_micro: u64,
    pub charged_micro: u64,
    pub payments: Vec<Payment>,
    pub dispatcher: VrfKey,
    pub eligible_root: Hash32,
    pub commitments_root: Hash32,
    pub evidence_root: Hash32,
    pub assign_proof: VrfProof,
    pub post_proof: VrfProof,
    pub submitted_at_ms: i64,
    pub decided_at_ms: i64,
}

/// A member of the verified set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VerifiedNode {
    pub node: NodeId,
    pub operator: Address,
    /// Salted hash of this node's output.
    pub output_hash: Hash32,
}

/// Why a drawn node earns nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UnpaidReason {
    /// Revealed a result that is not in the verified set.
    Outlier,
    NoCommit,
    NoReveal,
    Mismatch,
    Declined,
    Disconnected,
    Busy,
    Refereed,
}

/// A drawn node that earns nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unpaid {
    pub node: NodeId,
    pub operator: Address,
    pub reason: UnpaidReason,
}

/// What an operator earns by this request, 10^-6 INFER.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Payment {
    pub operator: Address,
    pub amount_micro: u64,
}

/// Evidence from which no receipt follows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReceiptError {
    #[error(transparent)]
    Evidence(#[from] EvidenceError),
    #[error("the results have no quorum")]
    NoQuorum,
    #[error("the price overflows")]
    Price,
}

impl Receipt {
    /// Builds the receipt that follows from the evidence. Checks nothing that
    /// [`Evidence::check_slots`] and its siblings check.
    ///
    /// # Errors
    /// No quorum in the evidence, or a price that overflows.
    pub fn build(evidence: &Evidence) -> Result<Self, ReceiptError> {
        let Decision::Verified { members } = evidence.decide(true) else {
            return Err(ReceiptError::NoQuorum);
        };
        let ordered = order_nodes(&evidence.beta2(), &members);
        let verified: Vec<(VerifiedNode, &Output)> = ordered
            .iter()
            .filter_map(|node| {
                let (slot, output) = evidence.revealed().find(|(slot, _)| slot.node == *node)?;
                let output_hash = output_hash(&evidence.salt, output);
                Some((VerifiedNode { node: *node, operator: slot.operator, output_hash }, output))
            })
            .collect();
        let (first, delivered) = verified.first().ok_or(ReceiptError::NoQuorum)?;
        let prompt_tokens = count(evidence.request.prompt.len());
        let output_tokens = count(delivered.tokens.len());
        let tokens = u64::from(prompt_tokens) + u64::from(output_tokens);
        let each = cost_micro(evidence.price_micro, tokens, 1).ok_or(ReceiptError::Price)?;
        let charged_micro =
            cost_micro(each, 1, u64::from(count(verified.len()))).ok_or(ReceiptError::Price)?;
        Ok(Self {
            id: evidence.request.id,
            chain_id: evidence.domain.chain_id,
            contract: evidence.domain.contract,
            request_hash: evidence.request_hash(),
            account_hash: account_hash(&evidence.salt, &evidence.account),
            epoch: evidence.epoch,
            attempt: evidence.attempt,
            model_root: evidence.request.model_root,
            class: evidence.class.clone(),
            calibration_hash: evidence.terms.calibration.hash(),
            prompt_hash: prompt_hash(&evidence.salt, &evidence.request.prompt),
            output_hash: first.output_hash,
            asked_k: evidence.k,
            k: evidence.k.max(count(evidence.revealed().count())),
            payments: verified
                .iter()
                .map(|(v, _)| Payment { operator: v.operator, amount_micro: each })
                .collect(),
            unpaid: unpaid(evidence, &members),
            verified: verified.into_iter().map(|(v, _)| v).collect(),
            referees: evidence
                .referees
                .iter()
                .filter(|r| r.outcome == RefereeOutcome::Reported)
                .map(|r| r.node)
                .collect(),
            lowest_similarity_millionths: lowest_similarity(evidence, &members),
            prompt_tokens,
            output_tokens,
            price_micro: evidence.price_micro,
            charged_micro,
            dispatcher: evidence.dispatcher,
            eligible_root: eligible_root(&evidence.eligible),
            commitments_root: evidence.commitments_root(),
            evidence_root: evidence.root()?,
            assign_proof: evidence.assign_proof,
            post_proof: evidence.post_proof,
            submitted_at_ms: evidence.submitted_at_ms,
            decided_at_ms: evidence.decided_at_ms,
        })
    }

    /// The leaf of the batch's Merkle tree: keccak(keccak(abi.encode(fields in order))).
    pub fn leaf(&self) -> Hash32 {
        keccak(&[&keccak(&[&self.abi_encode()]).0])
    }

    /// `abi.encode` of the fields in their order: integers as uint256, hashes as bytes32, ids
    /// left-aligned as bytes16, class as string, proofs as bytes, lists as arrays of tuples.
    pub fn abi_encode(&self) -> Vec<u8> {
        let verified = self.verified.iter().map(|v| vec![v.node.0, address(&v.operator), v.output_hash.0]);
        let unpaid = self
            .unpaid
            .iter()
            .map(|u| vec![u.node.0, address(&u.operator), uint(u64::from(u.reason.code()))]);
        let payments = self.payments.iter().map(|p| vec![address(&p.operator), uint(p.amount_micro)]);
        let mut id = [0; 32];
        id[..16].copy_from_slice(self.id.as_bytes());
        let mut abi = Abi::default();
        abi.word(id);
        abi.word(uint(self.chain_id));
        abi.word(address(&self.contract));
        abi.word(self.request_hash.0);
        abi.word(self.account_hash.0);
        abi.word(uint(self.epoch));
        abi.word(uint(u64::from(self.attempt)));
        abi.word(self.model_root.0);
        abi.bytes(self.class.as_bytes());
        abi.word(self.calibration_hash.0);
        abi.word(self.prompt_hash.0);
        abi.word(self.output_hash.0);
        abi.word(uint(u64::from(self.asked_k)));
        abi.word(uint(u64::from(self.k)));
        abi.tuples(verified);
        abi.tuples(unpaid);
        abi.tuples(self.referees.iter().map(|r| vec![r.0]));
        abi.word(uint(u64::from(self.lowest_similarity_millionths)));
        abi.word(uint(u64::from(self.prompt_tokens)));
        abi.word(uint(u64::from(self.output_tokens)));
        abi.word(uint(self.price_micro));
        abi.word(uint(self.charged_micro));
        abi.tuples(payments);
        abi.word(self.dispatcher.0);
        abi.word(self.eligible_root.0);
        abi.word(self.commitments_root.0);
        abi.word(self.evidence_root.0);
        abi.bytes(&self.assign_proof.0);
        abi.bytes(&self.post_proof.0);
        abi.word(uint(u64::try_from(self.submitted_at_ms).unwrap_or(0)));
        abi.word(uint(u64::try_from(self.decided_at_ms).unwrap_or(0)));
        abi.encode()
    }
}

impl UnpaidReason {
    fn code(self) -> u8 {
        match self {
            Self::Outlier => 1,
            Self::NoCommit => 2,
            Self::NoReveal => 3,
            Self::Mismatch => 4,
            Self::Declined => 5,
            Self::Disconnected => 6,
            Self::Busy => 7,
            Self::Refereed => 8,
        }
    }
}

/// Of the verified results, the two that are least alike.
pub fn lowest_similarity(evidence: &Evidence, members: &[NodeId]) -> u32 {
    let mut answers: Vec<Hash32> = evidence
        .ballots()
        .iter()
        .filter(|ballot| members.contains(&ballot.node))
        .map(|ballot| ballot.answer)
        .collect();
    answers.sort();
    answers.dedup();
    let pairs = answers.iter().enumerate().flat_map(|(i, a)| answers[..i].iter().map(move |b| (a, b)));
    pairs.filter_map(|(a, b)| evidence.similarity(a, b)).min().unwrap_or(FULL_SIMILARITY_MILLIONTHS)
}

fn unpaid(evidence: &Evidence, verified: &[NodeId]) -> Vec<Unpaid> {
    evidence
        .slots
        .iter()
        .filter(|slot| !verified.contains(&slot.node))
        .map(|slot| Unpaid {
            node: slot.node,
            operator: slot.operator,
            reason: match slot.outcome {
                SlotOutcome::Revealed => UnpaidReason::Outlier,
                SlotOutcome::NoCommit => UnpaidReason::NoCommit,
                SlotOutcome::NoReveal => UnpaidReason::NoReveal,
                SlotOutcome::Mismatch => UnpaidReason::Mismatch,
                SlotOutcome::Declined => UnpaidReason::Declined,
                SlotOutcome::Disconnected => UnpaidReason::Disconnected,
                SlotOutcome::Busy => UnpaidReason::Busy,
                SlotOutcome::Refereed => UnpaidReason::Refereed,
            },
        })
        .collect()
}

/// Salted hash of an account's name.
pub fn account_hash(salt: &Hash32, account: &str) -> Hash32 {
    Encoder::new("infera.account.v1").fixed(&salt.0).bytes(account.as_bytes()).keccak()
}

/// Salted hash of a prompt.
pub fn prompt_hash(salt: &Hash32, tokens: &[u32]) -> Hash32 {
    Encoder::new("infera.prompt.v1").fixed(&salt.0).tokens(tokens).keccak()
}

/// Salted hash of an output.
pub fn output_hash(salt: &Hash32, output: &Output) -> Hash32 {
    Encoder::new("infera.salted-output.v1").fixed(&salt.0).fixed(&output.hash().0).keccak()
}

fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

fn uint(value: u64) -> [u8; 32] {
    let mut word = [0; 32];
    word[24..].copy_from_slice(&value.to_be_bytes());
    word
}

fn address(value: &Address) -> [u8; 32] {
    let mut word = [0; 32];
    word[12..].copy_from_slice(&value.0);
    word
}

/// The part of Solidity's ABI that receipts need: words, bytes, arrays of static tuples.
#[derive(Default)]
struct Abi {
    head: Vec<Head>,
}

enum Head {
    Word([u8; 32]),
    Tail(Vec<u8>),
}

impl Abi {
    fn word(&mut self, word: [u8; 32]) {
        self.head.push(Head::Word(word));
    }

    fn bytes(&mut self, bytes: &[u8]) {
        let mut tail = uint(bytes.len() as u64).to_vec();
        tail.extend_from_slice(bytes);
        tail.resize(tail.len().next_multiple_of(32), 0);
        self.head.push(Head::Tail(tail));
    }

    fn tuples(&mut self, rows: impl ExactSizeIterator<Item = Vec<[u8; 32]>>) {
        let mut tail = uint(rows.len() as u64).to_vec();
        for row in rows {
            for word in row {
                tail.extend_from_slice(&word);
            }
        }
        self.head.push(Head::Tail(tail));
    }

    fn encode(self) -> Vec<u8> {
        let mut offset = self.head.len() * 32;
        let mut head = Vec::with_capacity(offset);
        let mut tails = Vec::new();
        for entry in self.head {
            match entry {
                Head::Word(word) => head.extend_from_slice(&word),
                Head::Tail(tail) => {
                    head.extend_from_slice(&uint(offset as u64));
                    offset += tail.len();
                    tails.extend(tail);
                }
            }
        }
        head.extend(tails);
        head
    }
}
