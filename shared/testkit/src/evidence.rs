//! Synthetic requests, answered and signed with real keys: what a dispatcher would have collected.
//!
//! ```text
//! Network -> Case::new(&network).answers([..]) -> collected() -> evidence() -> verified(), receipt()
//! ```

use ed25519_dalek::SigningKey;
use infera_protocol::agreement::Decision;
use infera_protocol::assignment::{
    self, Eligible, assign_message, beta, draw, eligible_root, of_class, order_nodes, post_message,
};
use infera_protocol::bytes::{Address, Hash32, NodeId};
use infera_protocol::commitment::{Slot, commitment, decline_digest};
use infera_protocol::evidence::{
    Evidence, RefereeEvidence, RefereeOutcome, SlotOutcome, SubjectReport, Terms,
};
use infera_protocol::fingerprint::{Entry, Fingerprint};
use infera_protocol::hash::keccak;
use infera_protocol::identity::{node_id, sign};
use infera_protocol::judgement::is_planted;
use infera_protocol::receipt::Receipt;
use infera_protocol::referee::{Report, TokenScore, report_digest};
use infera_protocol::request::{Finish, Output, Request};
use infera_protocol::sampling::SamplingParams;
use infera_wire::{convert, v1};
use uuid::Uuid;

mod network;

pub use network::{DISPATCHER_SEED, END_TOKEN, Network, calibration, model, weights};

/// Log-probability -0.5 as f16 bits, for candidates that are tied.
const TIED: u16 = 0xb800;
const SUBMITTED_AT_MS: i64 = 1_790_000_000_000;

/// An output with a fingerprint of two tied candidates for every token: the token and the next id.
pub fn output(tokens: &[u32], finish: Finish) -> Output {
    let fingerprints = tokens.iter().flat_map(|token| fingerprint(&[*token, token ^ 1])).collect();
    Output { tokens: tokens.to_vec(), fingerprints, finish }
}

/// An encoded fingerprint whose candidates are all tied.
pub fn fingerprint(tokens: &[u32]) -> Vec<u8> {
    let entries = tokens.iter().map(|token| Entry { token: *token, logprob: TIED }).collect();
    Fingerprint::new(entries).expect("1 to 8 distinct candidates").encode()
}

/// What a drawn node did.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// Committed and revealed this.
    Output(Output),
    NoCommit,
    /// Committed to this, never revealed.
    NoReveal(Output),
    /// Committed to the first, revealed the second.
    Mismatch(Output, Output),
    Declined,
    Disconnected,
}

impl Answer {
    /// These tokens, ended by an end token of [`model`].
    pub fn tokens(tokens: &[u32]) -> Self {
        Self::Output(output(tokens, Finish::Eos))
    }
}

/// What a drawn referee did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Referee {
    /// Confirms all answers but those with these tokens, and notices a planted defect.
    Denies(Vec<Vec<u32>>),
    /// Confirms everything without a look.
    Lazy,
    Silent,
}

impl Referee {
    /// Confirms all answers.
    pub fn confirms() -> Self {
        Self::Denies(Vec::new())
    }
}

/// One request and what the drawn nodes answered. Change the fields at will before
/// [`Case::collected`] signs everything.
#[derive(Clone)]
pub struct Case {
    pub network: Network,
    pub request: Request,
    pub account: String,
    pub model: String,
    pub k: u32,
    pub reply_to: String,
    pub salt: Hash32,
    pub submitted_at_ms: i64,
    pub attempt: u32,
    pub round: u32,
    pub epoch: u64,
    pub class: String,
    /// Nodes of the eligible set, each of its own operator.
    pub nodes: u8,
    /// In the order of the draw.
    pub answers: Vec<Answer>,
    /// How often equal answers are audited, of every operator.
    pub audit_ppm: u32,
    /// Slots that the post draw covers: those of the first round. `None`: all.
    pub post_slots: Option<u32>,
    /// In the order of their draw.
    pub referees: Vec<Referee>,
    pub exhausted: bool,
}

impl Case {
    /// A fresh request for the network's first model, three equal answers of 5 eligible nodes.
    pub fn new(network: &Network) -> Self {
        let model = network.registry.models.first().expect("the network serves a model");
        let id = Uuid::now_v7();
        Self {
            network: network.clone(),
            request: Request {
                id,
                model_root: model.weights_root,
                prompt: vec![1, 4093, 198, 57],
                sampling: SamplingParams::greedy(),
                max_tokens: 16,
                stop: Vec::new(),
                seed: 7,
                grammar: None,
            },
            account: "alice".to_owned(),
            model: model.id.clone(),
            k: 3,
            reply_to: "gw-1".to_owned(),
            salt: keccak(&[id.as_bytes()]),
            submitted_at_ms: SUBMITTED_AT_MS,
            attempt: 1,
            round: 1,
            epoch: 179_000_000,
            class: "exact".to_owned(),
            nodes: 5,
            answers: vec![Answer::tokens(&[504, 2]); 3],
            audit_ppm: 0,
            post_slots: None,
            referees: Vec::new(),
            exhausted: false,
        }
    }

    /// With these answers, in the order of the draw.
    #[must_use]
    pub fn answers(mut self, answers: impl Into<Vec<Answer>>) -> Self {
        self.answers = answers.into();
        self
    }

    /// What the gateway published.
    pub fn submitted(&self) -> v1::RequestSubmitted {
        v1::RequestSubmitted {
            request: Some(convert::request_to_wire(&self.request)),
            account: self.account.clone(),
            model: self.model.clone(),
            k: self.k,
            reply_to: self.reply_to.clone(),
            stream: false,
            submitted_at_ms: self.submitted_at_ms,
            deadline_ms: self.submitted_at_ms + 120_000,
            salt: self.salt.to_vec(),
            bid_micro: 0,
        }
    }

    /// What settlement published.
    pub fn funded(&self) -> v1::RequestFunded {
        let price_micro =
            self.network.registry.by_id(&self.model).expect("the registry lists the model").price_micro;
        v1::RequestFunded {
            submitted: Some(self.submitted()),
            held_micro: 1_000_000,
            price_micro,
            funded_at_ms: self.submitted_at_ms + 5,
        }
    }

    /// The frozen set.
    pub fn eligible(&self) -> Vec<Eligible> {
        let nodes = (1..=self.nodes).map(|n| Eligible {
            node: node_id(&key(n)),
            operator: operator(n),
            class: self.class.clone(),
            weight: u32::from(n % 3) + 1,
            audit_ppm: self.audit_ppm,
            trusted: false,
        });
        assignment::freeze(nodes.collect())
    }

    /// With these referees, in the order of their draw.
    #[must_use]
    pub fn referees(mut self, referees: impl Into<Vec<Referee>>) -> Self {
        self.referees = referees.into();
        self
    }

    /// What the dispatcher publishes, signed by it and by the nodes. No referee's job holds a planted defect: whether one
    /// does is drawn, and salts are tried until none is.
    pub fn collected(&self) -> v1::ResultsCollected {
        let tries = (0..1_000_u32).map(|blind| self.blinded(blind));
        let fit = |(_, evidence): &(_, Evidence)| {
            let order = evidence.referee_order();
            let asked = order.iter().take(self.referees.len());
            asked.map(|e| e.node).all(|node| !is_planted(&evidence.beta2(), &node))
        };
        let (mut collected, evidence) = tries.into_iter().find(fit).expect("most jobs hold no defect");
        let order: Vec<Eligible> = evidence.referee_order().into_iter().cloned().collect();
        for (referee, node) in self.referees.iter().zip(&order) {
            let did = self.refereed(&evidence, node, referee);
            collected.referees.push(convert::referee_to_wire(&did, ""));
        }
        assert_eq!(collected.referees.len(), self.referees.len(), "more referees than nodes: raise `nodes`");
        collected
    }

    /// Without referees; `blind` changes the nodes' salts.
    fn blinded(&self, blind: u32) -> (v1::ResultsCollected, Evidence) {
        let domain = self.network.manifest.domain;
        let request_hash = self.request.hash(&domain);
        let eligible = self.eligible();
        let root = eligible_root(&eligible);
        let assign =
            assign_message(&domain, self.request.id, &request_hash, self.k, self.attempt, self.epoch, &root);
        let assign_proof = self.network.dispatcher.prove(&assign);
        let drawn = draw(&beta(&assign_proof), of_class(&eligible, &self.class));
        assert!(self.answers.len() <= drawn.len(), "more answers than nodes: raise `nodes`");
        let slots: Vec<v1::SlotResult> =
            self.answers.iter().zip(&drawn).map(|(answer, node)| self.slot(node, answer, blind)).collect();
        let mut collected = v1::ResultsCollected {
            funded: Some(self.funded()),
            attempt: self.attempt,
            round: self.round,
            epoch: self.epoch,
            class: self.class.clone(),
            eligible: eligible.iter().map(convert::eligible_to_wire).collect(),
            dispatcher: self.network.dispatcher.key().to_vec(),
            assign_proof: assign_proof.to_vec(),
            post_proof: vec![0; 80],
            post_slots: self.post_slots.unwrap_or(u32::try_from(slots.len()).expect("few slots")),
            slots,
            collected_at_ms: self.submitted_at_ms + 900,
            exhausted: self.exhausted,
            referees: Vec::new(),
        };
        let mut evidence = self.read(&collected);
        let post = post_message(&domain, &request_hash, self.attempt, &evidence.commitments_root());
        evidence.post_proof = self.network.dispatcher.prove(&post);
        collected.post_proof = evidence.post_proof.to_vec();
        (collected, evidence)
    }

    fn terms(&self) -> Terms {
        let model = self.network.registry.by_id(&self.model).expect("the registry lists the model");
        Terms::of(&self.network.registry, model)
    }

    fn read(&self, collected: &v1::ResultsCollected) -> Evidence {
        let domain = self.network.manifest.domain;
        convert::evidence(collected, domain, self.terms(), self.submitted_at_ms + 1_000)
            .expect("a case is well formed")
    }

    fn refereed(&self, evidence: &Evidence, node: &Eligible, referee: &Referee) -> RefereeEvidence {
        let key = self.key_of(&node.node);
        let answers = evidence.answers();
        let asked: Vec<Hash32> = answers.iter().map(|(hash, ..)| *hash).collect();
        let margin_micro = |output: &Output| match referee {
            Referee::Denies(denied) => {
                let known = asked.contains(&output.hash());
                if !known || denied.contains(&output.tokens) { u32::MAX } else { 0 }
            }
            Referee::Lazy | Referee::Silent => 0,
        };
        let report = |output: Output| {
            let fingerprint =
                Fingerprint::new(vec![Entry { token: 0, logprob: TIED }]).expect("one candidate");
            let score =
                |_| TokenScore { margin_micro: margin_micro(&output), fingerprint: fingerprint.clone() };
            let scores = Report { scores: (0..output.tokens.len()).map(score).collect() }.encode();
            let (subject, hash) = (output.hash(), evidence.request_hash());
            let digest = report_digest(&evidence.domain, &hash, self.attempt, &node.node, &subject, &scores);
            SubjectReport { subject, scores, signature: sign(&key, &digest) }
        };
        let silent = *referee == Referee::Silent;
        let subjects = if silent { Vec::new() } else { evidence.subjects(&node.node, &asked) };
        RefereeEvidence {
            node: node.node,
            operator: node.operator,
            outcome: if silent { RefereeOutcome::NoReport } else { RefereeOutcome::Reported },
            reports: subjects.into_iter().map(report).collect(),
        }
    }

    fn key_of(&self, node: &NodeId) -> SigningKey {
        (1..=self.nodes).map(key).find(|key| node_id(key) == *node).expect("a node of ours")
    }

    fn slot(&self, node: &Eligible, answer: &Answer, blind: u32) -> v1::SlotResult {
        let domain = self.network.manifest.domain;
        let place = Slot { request_hash: self.request.hash(&domain), attempt: self.attempt, node: node.node };
        let key = self.key_of(&node.node);
        let salt = keccak(&[b"slot salt", &node.node.0, &blind.to_be_bytes()]);
        let id = self.request.id.as_bytes().to_vec();
        let commit = |output: &Output| {
            let digest = commitment(&domain, &place, output, &salt);
            Some(v1::Commit {
                request_id: id.clone(),
                attempt: self.attempt,
                commitment: digest.to_vec(),
                signature: sign(&key, &digest).to_vec(),
                statement: Vec::new(),
            })
        };
        let reveal = |output: &Output| {
            Some(v1::Reveal {
                request_id: id.clone(),
                attempt: self.attempt,
                tokens: output.tokens.clone(),
                fingerprints: output.fingerprints.clone(),
                finish: convert::finish_to_wire(output.finish).into(),
                salt: salt.to_vec(),
                statement: Vec::new(),
            })
        };
        let (outcome, commit, reveal) = match answer {
            Answer::Output(output) => (SlotOutcome::Revealed, commit(output), reveal(output)),
            Answer::NoCommit => (SlotOutcome::NoCommit, None, None),
            Answer::NoReveal(output) => (SlotOutcome::NoReveal, commit(output), None),
            Answer::Mismatch(said, shown) => (SlotOutcome::Mismatch, commit(said), reveal(shown)),
            Answer::Declined => (SlotOutcome::Declined, None, None),
            Answer::Disconnected => (SlotOutcome::Disconnected, None, None),
        };
        let decline = (*answer == Answer::Declined).then(|| v1::Decline {
            request_id: id.clone(),
            attempt: self.attempt,
            reason: "full".to_owned(),
            signature: sign(&key, &decline_digest(&domain, &place, "full")).to_vec(),
        });
        v1::SlotResult {
            node: node.node.to_vec(),
            operator: node.operator.to_vec(),
            outcome: convert::outcome_to_wire(outcome).into(),
            commit,
            reveal,
            decline,
            detail: String::new(),
        }
    }

    /// The evidence of a verdict that falls one second after submission.
    pub fn evidence(&self) -> Evidence {
        self.read(&self.collected())
    }

    /// The closing verdict of a case whose answers have a quorum.
    pub fn verified(&self) -> v1::Verdict {
        let evidence = self.evidence();
        let decision = evidence.decide(true);
        let Decision::Verified { members } = &decision else {
            panic!("the answers have no quorum");
        };
        let nodes = order_nodes(&evidence.beta2(), members);
        let (_, delivered) =
            evidence.revealed().find(|(slot, _)| slot.node == nodes[0]).expect("a member revealed");
        v1::Verdict {
            request_id: self.request.id.as_bytes().to_vec(),
            reply_to: self.reply_to.clone(),
            attempt: self.attempt,
            round: self.round,
            account: self.account.clone(),
            decided_at_ms: evidence.decided_at_ms,
            outcome: Some(v1::verdict::Outcome::Verified(v1::Verified {
                evidence: evidence.canonical().expect("evidence is JSON"),
                tokens: delivered.tokens.clone(),
                finish: convert::finish_to_wire(delivered.finish).into(),
                nodes: nodes.iter().map(|node| node.to_vec()).collect(),
                lowest_similarity_millionths: 1_000_000,
                prompt_tokens: u32::try_from(self.request.prompt.len()).expect("a short prompt"),
            })),
            conduct: evidence.conduct(&decision).iter().map(convert::conduct_to_wire).collect(),
            overturned: evidence.is_overturned(),
        }
    }

    /// A closing verdict that fails the request.
    pub fn failed(&self, code: &str) -> v1::Verdict {
        v1::Verdict {
            request_id: self.request.id.as_bytes().to_vec(),
            reply_to: self.reply_to.clone(),
            attempt: self.attempt,
            round: self.round,
            account: self.account.clone(),
            decided_at_ms: self.submitted_at_ms + 1_000,
            outcome: Some(v1::verdict::Outcome::Failed(v1::Failed {
                code: code.to_owned(),
                reason: "synthetic".to_owned(),
            })),
            conduct: Vec::new(),
            overturned: false,
        }
    }

    /// The receipt that follows from the evidence.
    pub fn receipt(&self) -> Receipt {
        Receipt::build(&self.evidence()).expect("the answers have a quorum")
    }

    /// What settlement tells the explorer.
    pub fn receipt_issued(&self) -> v1::ReceiptIssued {
        let receipt = serde_json::to_vec(&self.receipt()).expect("a receipt is JSON");
        v1::ReceiptIssued { receipt, model: self.model.clone() }
    }
}

/// The key of the n-th node.
pub fn key(n: u8) -> SigningKey {
    SigningKey::from_bytes(&keccak(&[b"synthetic node", &[n]]).0)
}

/// The operator of the n-th node.
pub fn operator(n: u8) -> Address {
    let mut bytes = [0xa0; 20];
    bytes[19] = n;
    Address(bytes)
}
