use proptest::prelude::*;

use super::*;

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
                prop_assert!(bench.state.tries(request) <= 3);
            }
            let _ = bench.run(Command::Closed { request });
        }
        prop_assert_eq!(bench.state.request_count(), 0);
        prop_assert_eq!(bench.busy(), 0);
    }
}
