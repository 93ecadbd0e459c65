//! A small network's keys, and requests, evidence and verdicts made with them.

use ed25519_dalek::SigningKey;
use infera_protocol::{
    assignment::{Eligible, assign_message, draw, eligible_root, freeze, post_message},
    assignment::{beta, order_nodes},
    bytes::{Address, Hash32},
    commitment::{Slot, commitment},
    evidence::{
        Evidence, RefereeEvidence, RefereeOutcome, Reveal, SignedCommitment, SlotEvidence, SlotOutcome,
        SubjectReport, Terms,
    },
    fingerprint::{Entry, Fingerprint},
    identity::{Domain, node_id, sign},
    ids::message_id,
    judgement::is_planted,
    referee::{Report, TokenScore, report_digest},
    registry::{Manifest, Model, Registry},
    request::{Finish, Output, Request},
    sampling::SamplingParams,
    vrf::VrfSecret,
};
use infera_wire::{
    Message,
    convert::{Submitted, finish_to_wire, submitted_to_wire},
    v1,
};
use uuid::Uuid;

pub const PRICE: u64 = 2;
pub const MODEL: &str = "test-model";

pub struct Network {
    pub manifest: Manifest,
    pub registry: Registry,
    dispatcher: VrfSecret,
    nodes: Vec<SigningKey>,
}

impl Network {
    /// A network of seven nodes of seven operators.
    pub fn new(domain: Domain, rpc_url: &str) -> Self {
        let registry = Registry {
            models: vec![Model {
                id: MODEL.into(),
                weights_root: Hash32([7; 32]),
                weights_bytes: 1 << 20,
                tokenizer_hash: Hash32([8; 32]),
                template_hash: Hash32([9; 32]),
                end_tokens: vec![0],
                vocab_size: 1_000,
                context_length: 2_048,
                similarity_threshold_millionths: 800_000,
                price_micro: PRICE,
                created_secs: 1,
            }],
            releases: Vec::new(),
            calibration: infera_testkit::evidence::calibration(),
            replaces: None,
        };
        let dispatcher = VrfSecret::from_seed(&[0xd; 32]).unwrap();
        let manifest = Manifest {
            network: "test".into(),
            domain,
            rpc_url: rpc_url.into(),
            dispatchers: vec![dispatcher.key()],
            registry_hash: registry.hash().unwrap(),
        };
        let nodes = (1..=7).map(|n| SigningKey::from_bytes(&[n; 32])).collect();
        Self { manifest, registry, dispatcher, nodes }
    }

    /// A network whose chain is not there.
    pub fn offline() -> Self {
        Self::new(Domain { chain_id: 31_337, contract: Address([0xc; 20]) }, "http://127.0.0.1:9")
    }

    pub fn operator(node: usize) -> Address {
        Address([u8::try_from(node).unwrap() + 1; 20])
    }

    /// A request of `account`: 10 tokens of prompt, at most 90 more, k = 3. Its hold is 600.
    pub fn submitted(&self, account: &str) -> Submitted {
        let id = Uuid::now_v7();
        Submitted {
            request: Request {
                id,
                model_root: self.registry.models[0].weights_root,
                prompt: (1..=10).collect(),
                sampling: SamplingParams::default(),
                max_tokens: 90,
                stop: vec![],
                seed: 4,
                grammar: None,
            },
            account: account.into(),
            model: MODEL.into(),
            k: 3,
            reply_to: "gw-1".into(),
            stream: false,
            submitted_at_ms: 1_000,
            deadline_ms: 100_000,
            salt: Hash32([5; 32]),
            bid_micro: 0,
        }
    }

    /// The evidence of an attempt with `honest` equal answers of 20 tokens and `wrong` others. At least one of the referees
    /// (there are none for equal answers) speaks of the honest one: a planted defect, which 1 in 20 jobs holds, takes its place.
    pub fn evidence(&self, submitted: &Submitted, honest: usize, wrong: usize) -> Evidence {
        let mut made = (0..8).map(|blind| self.blinded(submitted, honest, wrong, blind));
        let speaks = |evidence: &Evidence| {
            let beta2 = evidence.beta2();
            let mut referees = evidence.referees.iter();
            evidence.referees.is_empty() || referees.any(|referee| !is_planted(&beta2, &referee.node))
        };
        made.find(speaks).unwrap()
    }

    /// Other salts of the commitments make another second draw.
    fn blinded(&self, submitted: &Submitted, honest: usize, wrong: usize, blind: u8) -> Evidence {
        let domain = self.manifest.domain;
        let eligible = freeze(
            self.nodes
                .iter()
                .enumerate()
                .map(|(i, key)| Eligible {
                    node: node_id(key),
                    operator: Self::operator(i),
                    class: "exact".into(),
                    weight: 4,
                    audit_ppm: 0,
                    trusted: false,
                })
                .collect(),
        );
        let request_hash = submitted.request.hash(&domain);
        let root = eligible_root(&eligible);
        let message = assign_message(&domain, submitted.request.id, &request_hash, submitted.k, 1, 0, &root);
        let assign_proof = self.dispatcher.prove(&message);
        let slots = draw(&beta(&assign_proof), &eligible)
            .into_iter()
            .take(honest + wrong)
            .enumerate()
            .map(|(i, drawn)| {
                let tokens =
                    if i < honest { self.honest() } else { self.ended([u32::try_from(i).unwrap() + 500]) };
                let output = infera_testkit::evidence::output(&tokens, Finish::Eos);
                let key = self.nodes.iter().find(|key| node_id(key) == drawn.node).unwrap();
                let salt = Hash32([u8::try_from(i).unwrap() + 16 * blind; 32]);
                let digest =
                    commitment(&domain, &Slot { request_hash, attempt: 1, node: drawn.node }, &output, &salt);
                SlotEvidence {
                    node: drawn.node,
                    operator: drawn.operator,
                    outcome: SlotOutcome::Revealed,
                    commitment: Some(SignedCommitment { digest, signature: sign(key, &digest) }),
                    reveal: Some(Reveal { output, salt }),
                    decline: None,
                }
            })
            .collect();
        let mut evidence = Evidence {
            domain,
            request: submitted.request.clone(),
            account: submitted.account.clone(),
            model: submitted.model.clone(),
            salt: submitted.salt,
            k: submitted.k,
            submitted_at_ms: submitted.submitted_at_ms,
            decided_at_ms: 3_000,
            attempt: 1,
            epoch: 0,
            class: "exact".into(),
            price_micro: PRICE,
            terms: Terms::of(&self.registry, &self.registry.models[0]),
            eligible,
            dispatcher: self.dispatcher.key(),
            assign_proof,
            post_proof: assign_proof,
            post_slots: u32::try_from(honest + wrong).unwrap(),
            slots,
            referees: vec![],
            unfit: vec![],
            similarities: vec![],
        };
        let post = post_message(&domain, &request_hash, 1, &evidence.commitments_root());
        evidence.post_proof = self.dispatcher.prove(&post);
        if wrong > 0 {
            let order: Vec<Eligible> = evidence.referee_order().into_iter().take(3).cloned().collect();
            evidence.referees = order.iter().map(|next| self.referee(&evidence, next)).collect();
        }
        evidence
    }

    fn honest(&self) -> Vec<u32> {
        self.ended(100..119)
    }

    fn ended(&self, tokens: impl IntoIterator<Item = u32>) -> Vec<u32> {
        tokens.into_iter().chain(self.registry.models[0].end_tokens.iter().copied()).collect()
    }

    /// Confirms the honest answer and denies all others.
    fn referee(&self, evidence: &Evidence, next: &Eligible) -> RefereeEvidence {
        let key = self.nodes.iter().find(|key| node_id(key) == next.node).unwrap();
        let asked: Vec<Hash32> = evidence.answers().iter().map(|(hash, ..)| *hash).collect();
        let print = Fingerprint::new(vec![Entry { token: 1, logprob: 0 }]).unwrap();
        let report = |output: Output| {
            let honest = output.tokens == self.honest();
            let margin_micro = if honest { 0 } else { u32::MAX };
            let score = TokenScore { margin_micro, fingerprint: print.clone() };
            let scores = Report { scores: vec![score; output.tokens.len()] }.encode();
            let (subject, hash) = (output.hash(), evidence.request_hash());
            let digest = report_digest(&evidence.domain, &hash, 1, &next.node, &subject, &scores);
            SubjectReport { subject, scores, signature: sign(key, &digest) }
        };
        RefereeEvidence {
            node: next.node,
            operator: next.operator,
            outcome: RefereeOutcome::Reported,
            reports: evidence.subjects(&next.node, &asked).into_iter().map(report).collect(),
        }
    }

    /// The verdict that follows from evidence.
    pub fn verified(&self, evidence: &Evidence) -> v1::Verdict {
        let members: Vec<_> = evidence.revealed().map(|(slot, _)| slot.node).collect();
        let (_, delivered) = evidence.revealed().next().unwrap();
        verdict(
            &evidence.request.id,
            &evidence.account,
            v1::verdict::Outcome::Verified(v1::Verified {
                evidence: evidence.canonical().unwrap(),
                tokens: delivered.tokens.clone(),
                finish: finish_to_wire(delivered.finish) as i32,
                nodes: order_nodes(&evidence.beta2(), &members).iter().map(|node| node.to_vec()).collect(),
                lowest_similarity_millionths: 1_000_000,
                prompt_tokens: 10,
            }),
        )
    }

    pub fn failed(&self, submitted: &Submitted) -> v1::Verdict {
        let failed = v1::Failed { code: "no_quorum".into(), reason: "the answers differ".into() };
        verdict(&submitted.request.id, &submitted.account, v1::verdict::Outcome::Failed(failed))
    }

    pub fn more_nodes(&self, submitted: &Submitted) -> v1::Verdict {
        let more = v1::MoreNodes { count: 2 };
        verdict(&submitted.request.id, &submitted.account, v1::verdict::Outcome::MoreNodes(more))
    }
}

fn verdict(id: &Uuid, account: &str, outcome: v1::verdict::Outcome) -> v1::Verdict {
    v1::Verdict {
        request_id: id.as_bytes().to_vec(),
        reply_to: "gw-1".into(),
        attempt: 1,
        round: 1,
        account: account.into(),
        decided_at_ms: 3_000,
        outcome: Some(outcome),
        conduct: Vec::new(),
        overturned: false,
    }
}

pub fn submitted_bytes(submitted: &Submitted) -> (Uuid, Vec<u8>) {
    let id = message_id("request.submitted", submitted.request.id, 0);
    (id, submitted_to_wire(submitted).encode_to_vec())
}

pub fn verdict_bytes(verdict: &v1::Verdict) -> (Uuid, Vec<u8>) {
    let id = Uuid::from_slice(&verdict.request_id).unwrap();
    (message_id("verdict", id, verdict.round.into()), verdict.encode_to_vec())
}
