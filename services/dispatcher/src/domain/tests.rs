use std::collections::{BTreeMap, BTreeSet};

use infera_protocol::assignment::Eligible;
use infera_protocol::bytes::{Address, Hash32, NodeId, Signature};
use infera_protocol::commitment::{Slot, commitment, decline_digest};
use infera_protocol::evidence::SlotOutcome;
use infera_protocol::identity::{node_id, sign};
use infera_protocol::request::{Finish, Output, Request};
use infera_protocol::sampling::SamplingParams;
use infera_wire::convert::{self, Submitted, funded_to_wire};
use infera_wire::v1::from_dispatcher::Message;
use proptest::prelude::*;

use super::*;

const DOMAIN: Domain = Domain { chain_id: 1, contract: Address([1; 20]) };
const MODEL: Hash32 = Hash32([2; 32]);
const DEADLINE_MS: i64 = 1_000_000;

fn rules() -> Rules {
    Rules {
        domain: DOMAIN,
        key: SigningKey::from_bytes(&[3; 32]),
        lease_ms: 1_000,
        reveal_ms: 500,
        verdict_ms: 2_000,
        max_tries: 3,
        close_grace_ms: 10_000,
        max_requests: 3,
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

/// The node's answer in one of two versions; version 0 is everybody's.
fn answer(n: u8, version: u8) -> Reveal {
    // One candidate: the token, and a log-probability of 0.
    let fingerprints = vec![1, 0, 0, 0, 9, 0, 0];
    let token = if version == 0 { 9 } else { 10 + u32::from(n) };
    let output = Output { tokens: vec![token], fingerprints, finish: Finish::Eos };
    Reveal { output, salt: Hash32([n; 32]) }
}

fn signed(n: u8, request: u128, attempt: u32, version: u8) -> SignedCommitment {
    let reveal = answer(n, version);
    let digest = commitment(&DOMAIN, &slot(n, request, attempt), &reveal.output, &reveal.salt);
    SignedCommitment { digest, signature: sign(&key(n), &digest) }
}

fn commit(n: u8, request: u128, attempt: u32, version: u8) -> Command {
    Command::Committed {
        node: node_id(&key(n)),
        request: Uuid::from_u128(request),
        attempt,
        commit: signed(n, request, attempt, version),
    }
}

fn reveal(n: u8, request: u128, attempt: u32, version: u8) -> Command {
    let reveal = Box::new(answer(n, version));
    Command::Revealed { node: node_id(&key(n)), request: Uuid::from_u128(request), attempt, reveal }
}

fn decline(n: u8, request: u128, attempt: u32) -> Command {
    let digest = decline_digest(&DOMAIN, &slot(n, request, attempt), "full");
    Command::Declined {
        node: node_id(&key(n)),
        request: Uuid::from_u128(request),
        attempt,
        reason: "full".into(),
        signature: sign(&key(n), &digest),
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
    closed: BTreeSet<Uuid>,
    equivocations: usize,
    deltas: usize,
    asked_close: usize,
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
            closed: BTreeSet::new(),
            equivocations: 0,
            deltas: 0,
            asked_close: 0,
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
                let stored = Command::AttemptStored { request, attempt, traceparent: String::new() };
                // Closed meanwhile: nothing to begin.
                let _ = self.run(stored);
            }
            Effect::Send { node, frame } => self.check_frame(node, frame),
            Effect::Publish { request, attempt, round, repeat, message } => {
                let first = self.collected.insert((request, attempt, round));
                assert_eq!(first, repeat == 0, "one collected message a round, whose repeats say so");
                let evidence = convert::evidence(&message, DOMAIN, Hash32::ZERO, 0).unwrap();
                evidence.check_assignment().unwrap();
                evidence.check_post().unwrap();
                evidence.check_slots().unwrap();
                self.run(Command::Confirmed { request, attempt, round }).unwrap();
            }
            Effect::Closed { request } => assert!(self.closed.insert(request), "closed once"),
            Effect::Equivocated { first, second, .. } => {
                assert_ne!(first.digest, second.digest);
                self.equivocations += 1;
            }
            Effect::Delta { .. } => self.deltas += 1,
            Effect::AskClose { .. } => self.asked_close += 1,
            Effect::SlotsChanged => {}
        }
    }

    fn check_frame(&mut self, node: NodeId, frame: v1::FromDispatcher) {
        match frame.message.unwrap() {
            Message::Lease(lease) => {
                let request = convert::request(&lease.request.unwrap()).unwrap().id;
                assert_eq!(Some(&lease.attempt), self.attempts.get(&request), "stored before it is leased");
                let operator = (1..=5).find(|n| node_id(&key(*n)) == node).map(|n| connected(n, 0).operator);
                let place = (request, lease.attempt, operator.unwrap());
                let holder = *self.leased.entry(place).or_insert(node);
                assert_eq!(holder, node, "no operator has two nodes in one attempt");
            }
            Message::RevealRequest(asked) => {
                let request = Uuid::from_slice(&asked.request_id).unwrap();
                if !self.asked.insert((request, asked.attempt, node)) {
                    // Repeated for a node that reconnected.
                    return;
                }
                let attempt = self.state.attempt(request).unwrap();
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
        let number = |node| (1..=5).find(|n| node_id(&key(*n)) == node).unwrap();
        attempt.slots().iter().map(|slot| number(slot.who.node)).collect()
    }

    fn busy(&self) -> u32 {
        self.state.nodes().iter().map(|view| view.busy).sum()
    }
}

#[test]
fn a_plain_request_goes_through() {
    let mut bench = Bench::offered(&[1, 2, 3, 4]);
    let drawn = bench.drawn();
    assert_eq!((drawn.len(), bench.busy()), (3, 3));
    let deltas = |n: u8, offset, tokens| Command::Deltas {
        node: node_id(&key(n)),
        request: Uuid::from_u128(1),
        attempt: 1,
        offset,
        tokens,
    };
    bench.run(deltas(drawn[0], 0, vec![1, 2])).unwrap();
    assert_eq!(bench.run(deltas(drawn[0], 3, vec![1, 2])), Err(Rejection::BadDeltas), "beyond max_tokens");
    assert_eq!(bench.run(deltas(drawn[0], u32::MAX, vec![1])), Err(Rejection::BadDeltas));
    assert_eq!(bench.run(deltas(drawn[0], 0, vec![])), Err(Rejection::BadDeltas));
    assert_eq!(bench.deltas, 1);
    for n in &drawn {
        assert_eq!(bench.run(reveal(*n, 1, 1, 0)), Err(Rejection::NotAsked));
        bench.run(commit(*n, 1, 1, 0)).unwrap();
        bench.run(commit(*n, 1, 1, 0)).unwrap();
    }
    assert_eq!(bench.busy(), 0);
    for n in &drawn {
        bench.run(reveal(*n, 1, 1, 0)).unwrap();
        bench.run(reveal(*n, 1, 1, 0)).unwrap();
    }
    assert_eq!(bench.outcomes(), [Some(SlotOutcome::Revealed); 3]);
    bench.tick(1_999);
    assert_eq!(bench.collected.len(), 1);
    bench.run(Command::Closed { request: Uuid::from_u128(1) }).unwrap();
    assert_eq!(bench.run(Command::Closed { request: Uuid::from_u128(1) }), Err(Rejection::Stale));
    assert_eq!((bench.state.request_count(), bench.busy()), (0, 0));
}

#[test]
fn stale_foreign_late_and_forged_frames_change_nothing() {
    let mut bench = Bench::offered(&[1, 2, 3, 4]);
    let drawn = bench.drawn();
    let outsider = (1..=4).find(|n| !drawn.contains(n)).unwrap();
    let forged = Command::Committed {
        node: node_id(&key(drawn[0])),
        request: Uuid::from_u128(1),
        attempt: 1,
        commit: SignedCommitment { digest: Hash32([9; 32]), signature: Signature([0; 64]) },
    };
    for (command, expected) in [
        (commit(drawn[0], 1, 2, 0), Rejection::Stale),
        (commit(drawn[0], 2, 1, 0), Rejection::Stale),
        (commit(outsider, 1, 1, 0), Rejection::NotLeased),
        (reveal(outsider, 1, 1, 0), Rejection::NotLeased),
        (decline(outsider, 1, 1), Rejection::NotLeased),
        (forged, Rejection::BadSignature),
    ] {
        assert_eq!(bench.run(command), Err(expected));
    }
    bench.now = 1_000;
    assert_eq!(bench.run(commit(drawn[0], 1, 1, 0)), Err(Rejection::Late), "the lease has expired");
    assert_eq!(bench.outcomes(), [None; 3]);
}

#[test]
fn the_first_of_two_commitments_counts() {
    let mut bench = Bench::offered(&[1, 2, 3]);
    let n = bench.drawn()[0];
    bench.run(commit(n, 1, 1, 0)).unwrap();
    assert_eq!(bench.run(commit(n, 1, 1, 1)), Err(Rejection::Equivocation));
    assert_eq!(bench.run(decline(n, 1, 1)), Err(Rejection::Late), "no way back after the commitment");
    assert_eq!(bench.equivocations, 1);
    let attempt = bench.state.attempt(Uuid::from_u128(1)).unwrap();
    assert_eq!(attempt.slots()[0].commitment(), Some(&signed(n, 1, 1, 0)));
}

#[test]
fn a_lost_node_that_was_replaced_stays_out() {
    let mut bench = Bench::offered(&[1, 2, 3, 4]);
    let n = bench.drawn()[0];
    bench.run(Command::NodeLeft { node: node_id(&key(n)), session: Uuid::from_u128(9) }).unwrap();
    assert_eq!(bench.outcomes()[0], None, "another session of that node, which is gone already");
    bench.run(Command::NodeLeft { node: node_id(&key(n)), session: Uuid::from_u128(1) }).unwrap();
    assert_eq!(bench.drawn().len(), 4, "the fourth took its place");
    bench.run(Command::NodeJoined(connected(n, 2))).unwrap();
    assert_eq!(bench.run(commit(n, 1, 1, 0)), Err(Rejection::Late));
    assert_eq!(bench.outcomes()[0], Some(SlotOutcome::Disconnected));
}

#[test]
fn a_newer_session_takes_over_the_leases() {
    let mut bench = Bench::offered(&[1, 2, 3]);
    let busy = bench.busy();
    bench.run(Command::NodeJoined(connected(1, 2))).unwrap();
    assert_eq!(bench.busy(), busy);
    bench.run(Command::NodeLeft { node: node_id(&key(1)), session: Uuid::from_u128(1) }).unwrap();
    assert_eq!(bench.outcomes(), [None; 3], "the end of the older session means nothing");
    // The same key with another model is another node.
    bench.run(Command::NodeJoined(Connected { class: "fast".into(), ..connected(1, 3) })).unwrap();
    let place = bench.drawn().iter().position(|n| *n == 1).unwrap();
    assert_eq!(bench.outcomes()[place], Some(SlotOutcome::Disconnected));
}

#[test]
fn verdicts_about_other_rounds_are_stale() {
    let mut bench = Bench::offered(&[1, 2, 3, 4]);
    let request = Uuid::from_u128(1);
    let more = |attempt, round, count| Command::MoreNodes { request, attempt, round, count };
    assert_eq!(bench.run(more(1, 1, 2)), Err(Rejection::Stale), "nothing was collected yet");
    for n in bench.drawn() {
        bench.run(commit(n, 1, 1, 1)).unwrap();
    }
    for n in bench.drawn() {
        bench.run(reveal(n, 1, 1, 1)).unwrap();
    }
    for stale in [more(2, 1, 2), more(1, 2, 2), more(1, 1, 0)] {
        assert_eq!(bench.run(stale), Err(Rejection::Stale));
    }
    bench.run(more(1, 1, 2)).unwrap();
    assert_eq!(bench.run(more(1, 1, 2)), Err(Rejection::Stale), "said twice");
    let n = bench.drawn()[3];
    bench.run(commit(n, 1, 1, 1)).unwrap();
    bench.run(reveal(n, 1, 1, 1)).unwrap();
    assert!(bench.collected.contains(&(request, 1, 2)));
}

#[test]
fn a_deadline_without_a_verdict_asks_for_it() {
    let mut bench = Bench::offered(&[1, 2]);
    bench.tick(DEADLINE_MS);
    assert_eq!(bench.asked_close, 0);
    bench.tick(10_000);
    bench.tick(9_999);
    assert_eq!(bench.asked_close, 1);
    bench.tick(1);
    assert_eq!(bench.asked_close, 2);
    bench.run(Command::NodeJoined(connected(3, 1))).unwrap();
    assert!(bench.state.attempt(Uuid::from_u128(1)).is_none(), "nothing begins after the deadline");
}

#[test]
fn slots_that_waiting_requests_will_take_are_not_free() {
    let mut bench = Bench::with_nodes(&[1, 2]);
    assert_eq!(bench.state.model_slots(&MODEL).0.free, 4);
    bench.run(Command::Offered(Box::new(offer(1)))).unwrap();
    let (slots, held) = bench.state.model_slots(&MODEL);
    assert_eq!((slots.operators, slots.free, slots.total, held.len()), (2, 1, 4, 1));
    assert_eq!(bench.run(Command::Offered(Box::new(offer(1)))), Err(Rejection::AlreadyHeld));
    bench.run(Command::Offered(Box::new(offer(2)))).unwrap();
    bench.run(Command::Offered(Box::new(offer(3)))).unwrap();
    assert_eq!(bench.run(Command::Offered(Box::new(offer(4)))), Err(Rejection::Full));
    bench.run(Command::NodeDraining { node: node_id(&key(1)), session: Uuid::from_u128(1) }).unwrap();
    bench.run(Command::NodeJoined(connected(3, 1))).unwrap();
    bench.run(Command::NodeJoined(connected(4, 1))).unwrap();
    assert_eq!(bench.drawn().len(), 3, "the one that came first, without the node that drains");
    assert!(!bench.drawn().contains(&1));
}

#[test]
fn the_class_with_most_operators_is_drawn_from() {
    let mut bench = Bench::with_nodes(&[1, 2, 3]);
    for n in [4, 5] {
        let operator = Address([40 + n; 20]);
        bench
            .run(Command::NodeJoined(Connected { class: "fast".into(), operator, ..connected(n, 1) }))
            .unwrap();
    }
    bench.run(Command::Offered(Box::new(offer(1)))).unwrap();
    assert_eq!(bench.state.attempt(Uuid::from_u128(1)).unwrap().class(), "exact");
    let set = vec![
        Eligible { node: NodeId([1; 32]), operator: Address([1; 20]), weight: 1 },
        Eligible { node: NodeId([2; 32]), operator: Address([1; 20]), weight: 1 },
    ];
    assert_eq!(distinct_operators(&set), 1);
}

/// Something that may happen at any time, in any order.
#[derive(Debug, Clone)]
enum Event {
    Join(u8),
    Leave(u8),
    Drain(u8),
    Offer(u128),
    Commit { n: u8, request: u128, attempt: u32, version: u8 },
    Reveal { n: u8, request: u128, attempt: u32, version: u8 },
    Decline { n: u8, request: u128, attempt: u32 },
    More { request: u128, attempt: u32, round: u32 },
    Close(u128),
    Wait(i64),
}

fn event() -> impl Strategy<Value = Event> {
    let n = || 1_u8..=5;
    let request = || 1_u128..=3;
    let attempt = || 1_u32..=3;
    // Version 1 is rare: mismatches and equivocation.
    let version = || prop_oneof![6 => Just(0_u8), 1 => Just(1)];
    prop_oneof![
        3 => n().prop_map(Event::Join),
        1 => n().prop_map(Event::Leave),
        1 => n().prop_map(Event::Drain),
        2 => request().prop_map(Event::Offer),
        12 => (n(), request(), attempt(), version())
            .prop_map(|(n, request, attempt, version)| Event::Commit { n, request, attempt, version }),
        12 => (n(), request(), attempt(), version())
            .prop_map(|(n, request, attempt, version)| Event::Reveal { n, request, attempt, version }),
        2 => (n(), request(), attempt())
            .prop_map(|(n, request, attempt)| Event::Decline { n, request, attempt }),
        2 => (request(), attempt(), 1_u32..=3)
            .prop_map(|(request, attempt, round)| Event::More { request, attempt, round }),
        1 => request().prop_map(Event::Close),
        3 => (1_i64..1_500).prop_map(Event::Wait),
    ]
}

fn happen(bench: &mut Bench, event: Event, sessions: &mut u128) {
    // What does not fit the moment is rejected; the bench checks what follows from the rest.
    let _ = match event {
        Event::Join(n) => {
            *sessions += 1;
            bench.run(Command::NodeJoined(connected(n, *sessions)))
        }
        Event::Leave(n) | Event::Drain(n) => {
            let node = node_id(&key(n));
            let view = bench.state.nodes().into_iter().find(|view| view.info.node == node);
            let Some(session) = view.map(|view| view.info.session) else { return };
            bench.run(match event {
                Event::Leave(_) => Command::NodeLeft { node, session },
                _ => Command::NodeDraining { node, session },
            })
        }
        // Ids are not used again: a closed request is not offered by the bus.
        Event::Offer(id) if bench.closed.contains(&Uuid::from_u128(id)) => Ok(()),
        Event::Offer(id) => bench.run(Command::Offered(Box::new(offer(id)))),
        Event::Commit { n, request, attempt, version } => bench.run(commit(n, request, attempt, version)),
        Event::Reveal { n, request, attempt, version } => bench.run(reveal(n, request, attempt, version)),
        Event::Decline { n, request, attempt } => bench.run(decline(n, request, attempt)),
        Event::More { request, attempt, round } => {
            let request = Uuid::from_u128(request);
            bench.run(Command::MoreNodes { request, attempt, round, count: 2 })
        }
        Event::Close(id) => bench.run(Command::Closed { request: Uuid::from_u128(id) }),
        Event::Wait(ms) => {
            bench.tick(ms);
            Ok(())
        }
    };
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Whatever happens in whatever order: the bench's checks hold, and once nothing more happens
    /// every request that began reaches the verifier, and leaves nothing behind when it is closed.
    #[test]
    fn any_interleaving_is_safe_and_ends(events in proptest::collection::vec(event(), 0..160)) {
        let mut bench = Bench::new();
        let mut sessions = 0;
        for n in 1..=5 {
            happen(&mut bench, Event::Join(n), &mut sessions);
        }
        happen(&mut bench, Event::Offer(1), &mut sessions);
        for event in events {
            happen(&mut bench, event, &mut sessions);
        }
        // Silence: each of 3 tries has at most 4 leases of 1 s, reveals of 0.5 s, and a pause.
        for _ in 0..200 {
            bench.tick(250);
        }
        for id in 1..=3 {
            let request = Uuid::from_u128(id);
            if let Some(attempt) = bench.state.attempt(request) {
                prop_assert!(attempt.is_collected(), "request {id} waits for nobody: {attempt:?}");
                prop_assert!(attempt.number <= 3);
            }
            let _ = bench.run(Command::Closed { request });
        }
        prop_assert_eq!(bench.state.request_count(), 0);
        prop_assert_eq!(bench.busy(), 0);
    }
}
