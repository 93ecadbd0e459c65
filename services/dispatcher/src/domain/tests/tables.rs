use infera_protocol::bytes::Signature;

use super::*;
use crate::domain::peers::PeerReport;

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
    let forge = |commit: SignedCommitment, signer: u8| Command::Committed {
        node: node_id(&key(drawn[0])),
        request: Uuid::from_u128(1),
        attempt: 1,
        statement: says(signer, &slot(drawn[0], 1, 1), &commit.digest),
        commit,
    };
    let forged = SignedCommitment { digest: Hash32([9; 32]), signature: Signature([0; 64]) };
    for (command, expected) in [
        (commit(drawn[0], 1, 2, 0), Rejection::Stale),
        (commit(drawn[0], 2, 1, 0), Rejection::Stale),
        (commit(outsider, 1, 1, 0), Rejection::NotLeased),
        (reveal(outsider, 1, 1, 0), Rejection::NotLeased),
        (decline(outsider, 1, 1), Rejection::NotLeased),
        (forge(forged, drawn[0]), Rejection::BadSignature),
        (forge(signed(drawn[0], 1, 1, 0), drawn[1]), Rejection::BadSignature),
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

/// Otherwise two statements would be bound to two operators, of whom neither has contradicted itself.
#[test]
fn nobody_speaks_for_a_slot_under_another_operator() {
    let mut bench = Bench::offered(&[1, 2, 3]);
    let drawn = bench.drawn();
    let back = |bench: &mut Bench, session, operator| {
        let other = Connected { operator, ..connected(drawn[0], session) };
        bench.run(Command::NodeJoined(other)).unwrap();
    };
    let own = connected(drawn[0], 1).operator;
    bench.run(commit(drawn[0], 1, 1, 0)).unwrap();
    back(&mut bench, 2, Address([9; 20]));
    for version in [0, 1] {
        assert_eq!(bench.run(commit(drawn[0], 1, 1, version)), Err(Rejection::NotLeased));
    }
    back(&mut bench, 3, own);
    assert_eq!(bench.run(commit(drawn[0], 1, 1, 1)), Err(Rejection::Equivocation));
    for n in &drawn[1..] {
        bench.run(commit(*n, 1, 1, 0)).unwrap();
    }
    back(&mut bench, 4, Address([9; 20]));
    for version in [0, 1] {
        assert_eq!(bench.run(reveal(drawn[0], 1, 1, version)), Err(Rejection::NotLeased));
    }
    assert_eq!((bench.equivocations, bench.false_reveals), (1, 0));
    back(&mut bench, 5, own);
    bench.run(reveal(drawn[0], 1, 1, 0)).unwrap();
}

#[test]
fn a_reveal_that_breaks_the_limits_is_replaced() {
    let mut bench = Bench::offered(&[1, 2, 3, 4]);
    let drawn = bench.drawn();
    for (i, n) in drawn.iter().enumerate() {
        bench.run(commit(*n, 1, 1, if i == 0 { 2 } else { 0 })).unwrap();
    }
    bench.run(reveal(drawn[0], 1, 1, 2)).unwrap();
    assert_eq!(
        bench.outcomes()[0],
        Some(SlotOutcome::Mismatch),
        "it opens its commitment and does not count"
    );
    assert_eq!(bench.drawn().len(), 4, "the fourth took its place");
    let last = bench.drawn()[3];
    bench.run(commit(last, 1, 1, 0)).unwrap();
    for n in [drawn[1], drawn[2], last] {
        bench.run(reveal(n, 1, 1, 0)).unwrap();
    }
    // The bench checks the evidence as the verifier does.
    assert_eq!(bench.collected.len(), 1);
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

/// An offer that was delivered again is a newer attempt, while the verifier may still speak about the older one.
#[test]
fn what_is_said_about_an_older_attempt_does_not_move_a_newer_one() {
    let request = Uuid::from_u128(1);
    let mut bench = Bench::with_nodes(&[1, 2, 3, 4]);
    bench.attempts.insert(request, 1);
    bench.run(Command::Offered(Box::new(offer(1)))).unwrap();
    assert_eq!(bench.state.attempt(request).map(|attempt| attempt.number), Some(2));
    let drawn = bench.drawn();
    assert_eq!(bench.run(commit(drawn[0], 1, 1, 0)), Err(Rejection::Stale), "of the older attempt");
    for n in &drawn {
        bench.run(commit(*n, 1, 2, 1)).unwrap();
    }
    for n in &drawn {
        bench.run(reveal(*n, 1, 2, 1)).unwrap();
    }
    assert!(bench.collected.contains(&(request, 2, 1)));
    let more = |attempt| Command::MoreNodes { request, attempt, round: 1, count: 2 };
    assert_eq!(bench.run(more(1)), Err(Rejection::Stale));
    assert_eq!(bench.drawn(), drawn, "nobody was drawn for the older attempt's verdict");
    bench.run(more(2)).unwrap();
    assert_eq!(bench.drawn().len(), 4);
    // A closing verdict counts, whichever attempt it was reached in: the newer one ends.
    bench.run(Command::Closed { request }).unwrap();
    assert!(bench.closed.contains(&request));
    assert_eq!((bench.state.request_count(), bench.busy()), (0, 0));
}

#[test]
fn a_deadline_without_a_verdict_asks_for_it() {
    let mut bench = Bench::offered(&[1, 2]);
    bench.tick(DEADLINE_MS);
    assert_eq!(bench.asked_close, 0);
    bench.tick(10_000);
    bench.tick(9_999);
    assert_eq!(bench.asked_close, 1);
    bench.tick(10_000);
    assert_eq!(bench.asked_close, 1, "each wait is twice the last one");
    bench.tick(1);
    assert_eq!(bench.asked_close, 2);
    for _ in 0..10 {
        bench.tick(300_000);
    }
    assert!(bench.asked_close >= 10, "and none is longer than 5 minutes: {}", bench.asked_close);
    bench.run(Command::NodeJoined(connected(3, 1))).unwrap();
    assert!(bench.state.attempt(Uuid::from_u128(1)).is_none(), "nothing begins after the deadline");
}

#[test]
fn slots_that_waiting_requests_will_take_are_not_free() {
    let mut bench = Bench::with_nodes(&[1, 2, 3]);
    assert_eq!(bench.state.model_slots(&MODEL).0.free, 6);
    let mut wide = offer(1);
    wide.funded.submitted.k = 5;
    bench.run(Command::Offered(Box::new(wide))).unwrap();
    let (slots, held) = bench.state.model_slots(&MODEL);
    assert_eq!((slots.operators, slots.free, slots.total, held.len()), (3, 1, 6, 1));
}

#[test]
fn offers_wait_for_operators() {
    let mut bench = Bench::with_nodes(&[1, 2]);
    assert_eq!(bench.state.model_slots(&MODEL).0.free, 0, "no request can be served by two operators");
    bench.run(Command::Offered(Box::new(offer(1)))).unwrap();
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
fn what_waits_goes_to_a_replica_that_has_room() {
    let mut bench = Bench::offered(&[1, 2]);
    bench.run(Command::Offered(Box::new(offer(2)))).unwrap();
    bench.tick(2_000);
    assert_eq!(bench.handed_back, 0, "nobody else is there");
    let peer = |operators, free| Command::Peer {
        replica: "other".into(),
        report: PeerReport { ttl_ms: 500, models: BTreeMap::from([(MODEL, (operators, free))]) },
    };
    bench.run(peer(2, 64)).unwrap();
    bench.tick(100);
    assert_eq!(bench.handed_back, 0, "it has too few operators itself");
    bench.run(peer(3, 5)).unwrap();
    bench.tick(500);
    assert_eq!(bench.handed_back, 0, "its report has expired");
    bench.run(peer(3, 5)).unwrap();
    bench.tick(100);
    assert_eq!((bench.handed_back, bench.state.request_count()), (1, 1), "it has room for one");
    bench.tick(100);
    assert_eq!(bench.handed_back, 1);
    bench.run(Command::NodeJoined(connected(3, 1))).unwrap();
    bench.run(peer(3, 64)).unwrap();
    bench.tick(100);
    assert_eq!(bench.handed_back, 1, "what is computed here stays");
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
}

/// What a crashed dispatcher's nodes answer until they notice: they are full, and that is no failed try.
#[test]
fn full_nodes_are_waited_for_until_the_deadline() {
    let mut bench = Bench::offered(&[1, 2, 3]);
    let request = Uuid::from_u128(1);
    for attempt in 1..=20 {
        for n in bench.drawn() {
            bench.run(decline(n, 1, attempt)).unwrap();
        }
        assert!(bench.state.attempt(request).is_none(), "attempt {attempt} is over");
        bench.tick(2_000);
        assert_eq!(bench.state.attempt(request).map(|a| a.number), Some(attempt + 1), "within 2 s");
    }
    assert!(bench.collected.is_empty());
    for n in bench.drawn() {
        bench.run(commit(n, 1, 21, 0)).unwrap();
    }
    for n in bench.drawn() {
        bench.run(reveal(n, 1, 21, 0)).unwrap();
    }
    assert!(bench.collected.contains(&(request, 21, 1)));
}

/// Nodes that had their chance are failed tries, however many others are full.
#[test]
fn silent_nodes_use_tries_up() {
    let mut bench = Bench::offered(&[1, 2, 3]);
    for attempt in 1..=3 {
        let drawn = bench.drawn();
        bench.run(decline(drawn[0], 1, attempt)).unwrap();
        bench.run(decline(drawn[1], 1, attempt)).unwrap();
        bench.tick(1_000);
        bench.tick(1_500);
    }
    assert!(bench.collected.contains(&(Uuid::from_u128(1), 3, 1)));
}

#[test]
fn a_lost_node_that_was_replaced_is_told_to_stop() {
    let mut bench = Bench::offered(&[1, 2, 3, 4]);
    let n = bench.drawn()[0];
    bench.run(Command::NodeLeft { node: node_id(&key(n)), session: Uuid::from_u128(1) }).unwrap();
    let mut out = Vec::new();
    bench.state.apply(Command::NodeJoined(connected(n, 2)), 0, &mut out).unwrap();
    let cancelled = out.iter().any(|effect| match effect {
        Effect::Send { node, frame } => {
            *node == node_id(&key(n)) && matches!(frame.message, Some(Message::Cancel(_)))
        }
        _ => false,
    });
    assert!(cancelled, "{out:?}");
}

#[test]
fn results_without_a_verdict_are_repeated_ever_more_rarely() {
    let mut bench = Bench::offered(&[1, 2, 3]);
    for n in bench.drawn() {
        bench.run(commit(n, 1, 1, 0)).unwrap();
    }
    for n in bench.drawn() {
        bench.run(reveal(n, 1, 1, 0)).unwrap();
    }
    for wait in [2_000, 4_000, 8_000, 16_000, 32_000, 64_000, 128_000, 256_000, 300_000, 300_000] {
        bench.tick(wait - 1);
        let before = bench.published;
        bench.tick(1);
        assert_eq!(bench.published, before + 1, "after {wait} ms");
    }
    assert_eq!(bench.published, 11);
}

#[test]
fn slots_count_as_far_as_a_node_keeps_up() {
    let mut nodes = Nodes::default();
    let info = Connected { slots: 7, ..connected(1, 1) };
    let node = info.node;
    nodes.join(info);
    let weight = |nodes: &Nodes| nodes.eligible(&MODEL, &Ledger::default())[0].weight;
    let newcomer = weight(&nodes);
    let mut held = Vec::new();
    let fill = |nodes: &mut Nodes, held: &mut Vec<Uuid>, next: &mut u128| {
        while nodes.is_free(&node) {
            *next += 1;
            held.push(Uuid::from_u128(*next));
            nodes.lease(&node, Uuid::from_u128(*next));
        }
        held.len()
    };
    let mut next = 0;
    assert_eq!(fill(&mut nodes, &mut held, &mut next), 4, "more than it has shown");
    // One more for each commitment while all were taken, up to what it declares.
    for expected in [5, 6, 7, 7, 7] {
        nodes.kept_up(&node, held.pop().unwrap());
        assert_eq!(fill(&mut nodes, &mut held, &mut next), expected);
    }
    assert!(weight(&nodes) > newcomer);
    // Commitments show nothing while others are free, nor twice.
    nodes.fell_behind(&node, held.pop().unwrap());
    assert_eq!(nodes.views()[0].shown, 3);
    for request in std::mem::take(&mut held) {
        nodes.release(&node, request);
    }
    assert_eq!(fill(&mut nodes, &mut held, &mut next), 3);
    let (first, second) = (held.pop().unwrap(), held.pop().unwrap());
    for (request, shown) in [(first, 4), (first, 4), (second, 4)] {
        nodes.kept_up(&node, request);
        assert_eq!(nodes.views()[0].shown, shown);
    }
    for _ in 0..5 {
        nodes.fell_behind(&node, Uuid::from_u128(1));
    }
    held.iter().for_each(|request| nodes.release(&node, *request));
    held.clear();
    assert_eq!(fill(&mut nodes, &mut held, &mut next), 1, "one always counts");
    assert!(weight(&nodes) < newcomer);
}
