//! A bench that carries effects out at once, and checks what must always hold.

mod entries;
mod interleavings;
mod referees;
mod tables;
mod trials;

use std::collections::{BTreeMap, BTreeSet};

use ed25519_dalek::SigningKey;
use infera_protocol::bytes::{Address, EvmSignature, Hash32, NodeId};
use infera_protocol::commitment::{Slot, commitment, decline_digest};
use infera_protocol::evidence::{Evidence, Reveal, SignedCommitment, SignedDecline, SlotOutcome};
use infera_protocol::identity::{Domain, NodeBinding, evm_address, node_id, sign};
use infera_protocol::registry::Registry;
use infera_protocol::request::{Finish, Output, Request};
use infera_protocol::sampling::SamplingParams;
use infera_protocol::slashing::{Contradiction, SignedBinding};
use infera_protocol::typed;
use infera_protocol::vrf::VrfSecret;
use infera_testkit::evidence::END_TOKEN;
use infera_wire::convert::{self, Funded, Submitted, funded_to_wire};
use infera_wire::v1::from_dispatcher::Message;
use k256::ecdsa::SigningKey as EvmKey;

use super::*;

const DOMAIN: Domain = Domain { chain_id: 1, contract: Address([1; 20]) };
const MODEL: Hash32 = Hash32([2; 32]);
const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const DEADLINE_MS: i64 = 1_000_000;

fn registry() -> Registry {
    infera_testkit::evidence::Network::serving(vec![infera_testkit::evidence::model("m", MODEL)]).registry
}

fn rules() -> Rules {
    Rules {
        domain: DOMAIN,
        key: VrfSecret::from_seed(&[3; 32]).unwrap(),
        registry: registry().into(),
        lease_ms: 1_000,
        reveal_ms: 500,
        referee_ms: 700,
        verdict_ms: 2_000,
        max_tries: 3,
        close_grace_ms: 10_000,
        hand_back_ms: 2_000,
        max_requests: 3,
        canary_ppm: 0,
        entry_trials: false,
    }
}

fn key(n: u8) -> SigningKey {
    SigningKey::from_bytes(&[100 + n; 32])
}

/// Nodes 4 and 5 belong to one operator.
fn connected(n: u8, session: u128) -> Connected {
    Connected {
        node: node_id(&key(n)),
        operator: Address([n.min(4); 20]),
        session: Uuid::from_u128(session),
        model_root: MODEL,
        class: "exact".into(),
        slots: 2,
        release_hash: Hash32::ZERO,
        bound: bound(n),
        version: "test".into(),
        connected_at_ms: 0,
    }
}

fn offer(id: u128) -> Offer {
    let funded = Funded {
        submitted: Submitted {
            request: Request {
                id: Uuid::from_u128(id),
                model_root: MODEL,
                prompt: vec![1],
                sampling: SamplingParams::default(),
                max_tokens: 4,
                stop: vec![],
                seed: 1,
                grammar: None,
            },
            account: "a".into(),
            model: "m".into(),
            k: 3,
            reply_to: "g".into(),
            stream: true,
            submitted_at_ms: 0,
            deadline_ms: DEADLINE_MS,
            salt: Hash32::ZERO,
            bid_micro: 0,
        },
        held_micro: 1,
        price_micro: 1,
        funded_at_ms: 0,
    };
    let wire = funded_to_wire(&funded);
    Offer::new(funded, wire, &DOMAIN)
}

fn slot(n: u8, request: u128, attempt: u32) -> Slot {
    Slot { request_hash: offer(request).request_hash, attempt, node: node_id(&key(n)) }
}

/// The node's answer in one of three versions; version 0 is everybody's, version 2 breaks a limit.
fn answer(n: u8, version: u8) -> Reveal {
    let token = if version == 0 { 9 } else { 10 + u32::from(n) };
    // Version 2 claims to have been cut at max_tokens, which it has not reached.
    let finish = if version == 2 { Finish::Length } else { Finish::Eos };
    let output = infera_testkit::evidence::output(&[token, END_TOKEN], finish);
    Reveal { output, salt: Hash32([n; 32]) }
}

/// The node's signer, and its operator's key.
fn evm(n: u8, is_operator: bool) -> EvmKey {
    let mut secret = [100 + n; 32];
    secret[0] = 1 + u8::from(is_operator);
    EvmKey::from_slice(&secret).unwrap()
}

/// By what node n's signer is its operator's.
fn bound(n: u8) -> SignedBinding {
    let binding = NodeBinding { node: node_id(&key(n)), signer: evm_address(&evm(n, false)), expiry_ms: 1 };
    SignedBinding { binding, signature: binding.sign(&DOMAIN, &evm(n, true)).unwrap() }
}

/// What the signer says along with a commitment.
fn says(n: u8, slot: &Slot, commitment: &Hash32) -> EvmSignature {
    typed::sign(&typed::slot_commitment_digest(&DOMAIN, slot, commitment), &evm(n, false)).unwrap()
}

fn says_of(n: u8, slot: &Slot, reveal: &Reveal) -> EvmSignature {
    let digest = typed::slot_reveal_digest(&DOMAIN, slot, &reveal.output, &reveal.salt);
    typed::sign(&digest, &evm(n, false)).unwrap()
}

fn signed(n: u8, request: u128, attempt: u32, version: u8) -> SignedCommitment {
    let reveal = answer(n, version);
    let digest = commitment(&DOMAIN, &slot(n, request, attempt), &reveal.output, &reveal.salt);
    SignedCommitment { digest, signature: sign(&key(n), &digest) }
}

fn commit(n: u8, request: u128, attempt: u32, version: u8) -> Command {
    let commit = signed(n, request, attempt, version);
    Command::Committed {
        node: node_id(&key(n)),
        request: Uuid::from_u128(request),
        attempt,
        statement: says(n, &slot(n, request, attempt), &commit.digest),
        commit,
    }
}

fn reveal(n: u8, request: u128, attempt: u32, version: u8) -> Command {
    let reveal = Box::new(answer(n, version));
    let statement = says_of(n, &slot(n, request, attempt), &reveal);
    Command::Revealed {
        node: node_id(&key(n)),
        request: Uuid::from_u128(request),
        attempt,
        reveal,
        statement,
    }
}

fn decline(n: u8, request: u128, attempt: u32) -> Command {
    let digest = decline_digest(&DOMAIN, &slot(n, request, attempt), "full");
    Command::Declined {
        node: node_id(&key(n)),
        request: Uuid::from_u128(request),
        attempt,
        decline: SignedDecline { reason: "full".into(), signature: sign(&key(n), &digest) },
    }
}

/// A dispatcher whose database and bus answer at once, and what it did.
struct Bench {
    state: State,
    now: i64,
    attempts: BTreeMap<Uuid, u32>,
    /// The node that each operator was leased as, per attempt.
    leased: BTreeMap<(Uuid, u32, Address), NodeId>,
    /// Who was asked for a reveal.
    asked: BTreeSet<(Uuid, u32, NodeId)>,
    collected: BTreeSet<(Uuid, u32, u32)>,
    /// Collected messages, with repeats.
    published: usize,
    closed: BTreeSet<Uuid>,
    equivocations: usize,
    false_reveals: usize,
    deltas: usize,
    asked_close: usize,
    handed_back: usize,
    /// The last one that was collected.
    evidence: Option<Evidence>,
    /// Referees' jobs, in the order in which they were sent.
    jobs: Vec<(NodeId, v1::RefereeLease)>,
    /// Trials that ended.
    tried: Vec<super::trials::Ended>,
    leases: Vec<(NodeId, Request)>,
    reveal_requests: Vec<NodeId>,
    refused: Vec<(NodeId, String)>,
}

impl Bench {
    fn new() -> Self {
        Self {
            state: State::new(rules()),
            now: 0,
            attempts: BTreeMap::new(),
            leased: BTreeMap::new(),
            asked: BTreeSet::new(),
            collected: BTreeSet::new(),
            published: 0,
            closed: BTreeSet::new(),
            equivocations: 0,
            false_reveals: 0,
            deltas: 0,
            asked_close: 0,
            handed_back: 0,
            evidence: None,
            jobs: Vec::new(),
            tried: Vec::new(),
            leases: Vec::new(),
            reveal_requests: Vec::new(),
            refused: Vec::new(),
        }
    }

    fn with_nodes(nodes: &[u8]) -> Self {
        let mut bench = Self::new();
        for n in nodes {
            bench.run(Command::NodeJoined(connected(*n, 1))).unwrap();
        }
        bench
    }

    fn offered(nodes: &[u8]) -> Self {
        let mut bench = Self::with_nodes(nodes);
        bench.run(Command::Offered(Box::new(offer(1)))).unwrap();
        bench
    }

    fn run(&mut self, command: Command) -> Result<(), Rejection> {
        let mut out = Vec::new();
        let result = self.state.apply(command, self.now, &mut out);
        for effect in out {
            self.check(effect);
        }
        result
    }

    fn tick(&mut self, ms: i64) {
        self.now += ms;
        self.run(Command::Tick).unwrap();
    }

    /// Carries an effect out, and checks what must always hold.
    fn check(&mut self, effect: Effect) {
        match effect {
            Effect::StoreAttempt { request } => {
                let attempt = self.attempts.entry(request).or_insert(0);
                *attempt += 1;
                let attempt = *attempt;
                let stored = Command::AttemptStored { request, attempt, traceparent: TRACEPARENT.to_owned() };
                // Closed meanwhile: nothing to begin.
                let _ = self.run(stored);
            }
            Effect::Send { node, frame } => self.check_frame(node, frame),
            Effect::Publish { request, attempt, round, repeat, message } => {
                self.published += 1;
                let first = self.collected.insert((request, attempt, round));
                assert_eq!(first, repeat == 0, "one collected message a round, whose repeats say so");
                let evidence =
                    convert::evidence(&message, DOMAIN, rules().terms(&MODEL).unwrap(), 0).unwrap();
                evidence.check_assignment().unwrap();
                evidence.check_post().unwrap();
                evidence.check_slots().unwrap();
                evidence.check_referees().unwrap();
                self.evidence = Some(evidence);
                self.run(Command::Confirmed { request, attempt, round }).unwrap();
            }
            Effect::Closed { request } => assert!(self.closed.insert(request), "closed once"),
            Effect::Contradicted { evidence, .. } => {
                let n = (1..=9).find(|n| node_id(&key(*n)) == evidence.slot().node).unwrap();
                assert_eq!(evidence.operator(&DOMAIN), Ok(evm_address(&evm(n, true))));
                match *evidence {
                    Contradiction::TwoCommitments { .. } => self.equivocations += 1,
                    _ => self.false_reveals += 1,
                }
            }
            Effect::HandBack { request } => {
                assert!(self.state.attempt(request).is_none());
                self.handed_back += 1;
            }
            Effect::Delta { .. } => self.deltas += 1,
            Effect::AskClose { .. } => self.asked_close += 1,
            Effect::Tried(ended) => self.tried.push(*ended),
            Effect::SlotsChanged => {}
        }
    }

    fn check_frame(&mut self, node: NodeId, frame: v1::FromDispatcher) {
        match frame.message.unwrap() {
            Message::Lease(lease) => {
                let asked = convert::request(lease.request.as_ref().unwrap()).unwrap();
                let request = asked.id;
                self.leases.push((node, asked));
                if self.state.nodes().iter().any(|view| view.info.node == node && view.on_trial) {
                    return;
                }
                assert_eq!(Some(&lease.attempt), self.attempts.get(&request), "stored before it is leased");
                let operator =
                    self.state.nodes().iter().find(|view| view.info.node == node).map(|v| v.info.operator);
                let place = (request, lease.attempt, operator.unwrap());
                let holder = *self.leased.entry(place).or_insert(node);
                assert_eq!(holder, node, "no operator has two nodes in one attempt");
            }
            Message::RefereeLease(lease) => self.jobs.push((node, lease)),
            Message::Refused(refused) => self.refused.push((node, refused.code)),
            Message::RevealRequest(asked) => {
                let request = Uuid::from_slice(&asked.request_id).unwrap();
                self.reveal_requests.push(node);
                if !self.asked.insert((request, asked.attempt, node)) {
                    // Repeated for a node that reconnected.
                    return;
                }
                let slot_of = |attempt: &Attempt| attempt.slots().iter().any(|slot| slot.who.node == node);
                let Some(attempt) = self.state.attempt(request).filter(|attempt| slot_of(attempt)) else {
                    // A trial.
                    assert!(self.leases.iter().any(|(who, asked)| *who == node && asked.id == request));
                    return;
                };
                assert!(!attempt.slots().iter().any(slot::Slot::is_leased), "somebody still computes");
            }
            _ => {}
        }
    }

    fn outcomes(&self) -> Vec<Option<SlotOutcome>> {
        let attempt = self.state.attempt(Uuid::from_u128(1)).unwrap();
        attempt.slots().iter().map(slot::Slot::outcome).collect()
    }

    /// Numbers of the nodes that are drawn, in the order of the draw.
    fn drawn(&self) -> Vec<u8> {
        let attempt = self.state.attempt(Uuid::from_u128(1)).unwrap();
        let number = |node| (1..=9).find(|n| node_id(&key(*n)) == node).unwrap();
        attempt.slots().iter().map(|slot| number(slot.who.node)).collect()
    }

    fn busy(&self) -> u32 {
        self.state.nodes().iter().map(|view| view.busy).sum()
    }
}
