use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::window::Slots;
use super::*;

const MODEL: Hash32 = Hash32([1; 32]);
const OTHER: Hash32 = Hash32([2; 32]);
const DEADLINE_MS: i64 = 100_000;

fn rules() -> Rules {
    Rules { max_requests: 50, unheld_ms: 1_000, close_repeat_ms: 5_000 }
}

fn id(n: u128) -> Uuid {
    Uuid::from_u128(n)
}

/// The n-th request, submitted at n ms.
fn entry(n: u128, account: &str, k: u32) -> Box<Entry> {
    Box::new(Entry {
        request: id(n),
        account: account.to_owned(),
        model_root: MODEL,
        model: "m".to_owned(),
        k,
        bid_micro: 0,
        submitted_at_ms: i64::try_from(n).unwrap(),
        deadline_ms: DEADLINE_MS,
        stage: Stage::Pending,
    })
}

fn report(at: i64, free: u32, held: &[u128]) -> Command {
    let slots = Slots { operators: 5, free, held: held.iter().copied().map(id).collect() };
    Command::Report(Report {
        replica: "d".to_owned(),
        reported_at_ms: at,
        ttl_ms: 5_000,
        models: BTreeMap::from([(MODEL, slots)]),
    })
}

fn offers(effects: Vec<Effect>) -> Vec<u128> {
    let offer = |effect| match effect {
        Effect::Offer { requests } => requests,
        Effect::Close { .. } => vec![],
    };
    effects.into_iter().flat_map(offer).map(|request| request.as_u128()).collect()
}

fn run(state: &mut State, command: Command, now: i64) -> Vec<u128> {
    offers(state.apply(command, now).unwrap())
}

#[test]
fn nothing_is_offered_without_slots_and_never_more_than_there_are() {
    let mut state = State::new(rules());
    for n in 1..=5 {
        assert_eq!(run(&mut state, Command::Admitted(entry(n, "a", 3)), 0), []);
    }
    assert_eq!(run(&mut state, report(1, 8, &[]), 10), [1, 2], "8 slots are two requests of three");
    assert_eq!(run(&mut state, report(2, 8, &[]), 20), [], "under way, and not reported as held yet");
    state.apply(Command::OffersStored { requests: vec![id(1), id(2)] }, 30).unwrap();
    assert_eq!(run(&mut state, report(3, 5, &[1]), 40), [], "one is held, the other takes what is left");
    assert_eq!(run(&mut state, report(4, 2, &[1, 2]), 50), []);
    assert_eq!(run(&mut state, report(5, 6, &[2]), 60), [3], "1 is done, its verdict is on its way");
    assert_eq!(run(&mut state, Command::Closed { request: id(1) }, 70), [4]);
    // The same report said again, or an older one, changes nothing: nothing is counted up.
    assert_eq!(run(&mut state, report(5, 6, &[2]), 80), []);
    assert_eq!(run(&mut state, report(4, 100, &[]), 90), []);
    assert_eq!(run(&mut state, Command::Tick, 5_090), [], "the report has expired");
    assert_eq!(state.summaries()[0].window, 0);
}

#[test]
fn an_offer_is_never_made_again_but_is_noticed() {
    let mut state = State::new(rules());
    state.apply(Command::Admitted(entry(1, "a", 3)), 0).unwrap();
    assert_eq!(run(&mut state, report(1, 3, &[]), 10), [1]);
    state.apply(Command::OffersStored { requests: vec![id(1)] }, 20).unwrap();
    assert!(state.unheld(1_019).is_empty());
    assert_eq!(state.unheld(1_020), [id(1)]);
    assert_eq!(run(&mut state, report(2, 9, &[]), 2_000), [], "the bus has it");
    assert_eq!(run(&mut state, report(3, 9, &[1]), 2_010), []);
    assert!(state.unheld(2_020).is_empty());
    // Nor after a restart.
    let mut restarted = State::new(rules());
    restarted.load(vec![Entry { stage: Stage::Offered { at_ms: 20 }, ..*entry(1, "a", 3) }]);
    assert_eq!(run(&mut restarted, report(4, 9, &[]), 2_030), []);
}

#[test]
fn deadlines_and_cancels_close() {
    let mut state = State::new(rules());
    state.apply(Command::Admitted(entry(1, "a", 3)), 0).unwrap();
    state.apply(Command::Admitted(entry(2, "b", 3)), 0).unwrap();
    state.apply(Command::Admitted(entry(3, "c", 3)), 0).unwrap();
    assert_eq!(run(&mut state, report(1, 3, &[]), 10), [1]);
    state.apply(Command::CloseAsked { request: id(2), reason: CloseReason::Cancelled }, 20).unwrap();
    assert_eq!(run(&mut state, report(2, 6, &[1]), 30), [3], "a cancelled one is passed over");
    let close = |requests: &[u128], reason| {
        let requests = requests.iter().copied().map(id).collect();
        Effect::Close { requests, reason }
    };
    let again = close(&[2], CloseReason::Cancelled);
    assert_eq!(state.apply(Command::Tick, DEADLINE_MS - 95_000), Ok(vec![]));
    assert_eq!(state.apply(Command::Tick, 5_020), Ok(vec![again.clone()]), "asked again, no verdict came");
    assert_eq!(
        state.apply(Command::Tick, DEADLINE_MS),
        Ok(vec![close(&[1, 3], CloseReason::Deadline), again]),
        "each for its own reason"
    );
    assert_eq!(state.apply(Command::Tick, DEADLINE_MS + 1), Ok(vec![]));
    for n in 1..=3 {
        state.apply(Command::Closed { request: id(n) }, DEADLINE_MS + 2).unwrap();
    }
    assert!(state.is_empty());
    assert_eq!(state.apply(Command::Closed { request: id(1) }, 0), Err(Rejection::Unknown));
    assert_eq!(
        state.apply(Command::CloseAsked { request: id(1), reason: CloseReason::Cancelled }, 0),
        Err(Rejection::Unknown)
    );
}

#[test]
fn one_too_many_is_closed() {
    let mut state = State::new(Rules { max_requests: 1, ..rules() });
    state.apply(Command::Admitted(entry(1, "a", 3)), 0).unwrap();
    assert_eq!(state.apply(Command::Admitted(entry(1, "a", 3)), 0), Err(Rejection::Duplicate));
    let closed = Effect::Close { requests: vec![id(2)], reason: CloseReason::Overloaded };
    assert_eq!(state.apply(Command::Admitted(entry(2, "a", 3)), 0), Ok(vec![closed]));
    assert_eq!(run(&mut state, report(1, 9, &[]), 10), [1]);
    // Neither a cancel nor its deadline changes what its close is asked for.
    state.apply(Command::CloseAsked { request: id(2), reason: CloseReason::Cancelled }, 20).unwrap();
    let repeated = Effect::Close { requests: vec![id(2)], reason: CloseReason::Overloaded };
    assert_eq!(state.apply(Command::Tick, 5_020), Ok(vec![repeated]));
}

#[test]
fn who_asks_for_more_than_there_is_holds_up_nobody() {
    let mut state = State::new(rules());
    state.apply(Command::Admitted(entry(1, "a", 7)), 0).unwrap();
    state.apply(Command::Admitted(entry(2, "a", 3)), 0).unwrap();
    let mut elsewhere = entry(3, "b", 3);
    elsewhere.model_root = OTHER;
    elsewhere.model = "o".to_owned();
    state.apply(Command::Admitted(elsewhere), 0).unwrap();
    assert_eq!(run(&mut state, report(1, 64, &[]), 10), [2], "five operators: 7 is not possible now");
    let summaries = state.summaries();
    assert_eq!(summaries.len(), 2);
    assert_eq!((summaries[0].pending, summaries[0].offered, summaries[0].oldest_ms), (1, 1, Some(1)));
    assert_eq!((summaries[1].pending, summaries[1].window), (1, 0));
}

/// Something that may happen at any time.
#[derive(Debug, Clone)]
enum Event {
    Submit {
        account: u8,
        k: u32,
        bid: u64,
    },
    /// The dispatcher takes what was offered, and frees these many slots.
    Report {
        free: u32,
        takes: bool,
    },
    Verdict(u8),
    Cancel(u8),
    Wait(i64),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (0_u8..4, prop_oneof![9 => Just(3_u32), 1 => Just(7)], 0_u64..3)
            .prop_map(|(account, k, bid)| Event::Submit { account, k, bid }),
        4 => (0_u32..12, any::<bool>()).prop_map(|(free, takes)| Event::Report { free, takes }),
        3 => any::<u8>().prop_map(Event::Verdict),
        1 => any::<u8>().prop_map(Event::Cancel),
        2 => (1_i64..3_000).prop_map(Event::Wait),
    ]
}

proptest! {
    /// Whatever happens: nothing is offered twice or after its close, no more slots are promised than
    /// were reported, an account's equal requests go in order, and no account is served twice while
    /// another waits for its turn.
    #[test]
    fn offers_are_fair_and_bounded(events in proptest::collection::vec(event(), 1..120)) {
        let mut state = State::new(rules());
        let (mut now, mut next) = (0_i64, 0_u128);
        let mut offered = BTreeSet::<u128>::new();
        let mut held = BTreeSet::<u128>::new();
        let mut free = 0;
        for event in events {
            now += 1;
            let command = match event {
                Event::Submit { account, k, bid } => {
                    next += 1;
                    let mut entry = entry(next, &account.to_string(), k);
                    entry.bid_micro = bid;
                    Command::Admitted(entry)
                }
                Event::Report { free: slots, takes } => {
                    if takes {
                        held.extend(offered.iter().filter(|n| state.get(&id(**n)).is_some()));
                    }
                    free = slots;
                    report(now, slots, &held.iter().copied().collect::<Vec<_>>())
                }
                Event::Verdict(n) | Event::Cancel(n) if next > 0 => {
                    let request = u128::from(n) % next + 1;
                    if matches!(event, Event::Cancel(_)) {
                        Command::CloseAsked { request: id(request), reason: CloseReason::Cancelled }
                    } else {
                        // The dispatcher lets go of it with the same verdict; its next report says so.
                        held.remove(&request);
                        Command::Closed { request: id(request) }
                    }
                }
                Event::Wait(ms) => {
                    now += ms;
                    Command::Tick
                }
                Event::Verdict(_) | Event::Cancel(_) => Command::Tick,
            };
            let waiting = pending(&state);
            let Ok(effects) = state.apply(command, now) else { continue };
            let mut served = BTreeMap::<String, u32>::new();
            for n in offers(effects) {
                prop_assert!(offered.insert(n), "{n} was offered before");
                let entry = state.get(&id(n)).unwrap();
                prop_assert_eq!(entry.stage, Stage::Offering);
                let earlier = waiting.iter().find(|e| {
                    e.account == entry.account && e.k == entry.k && e.submitted_at_ms < entry.submitted_at_ms
                        && !offered.contains(&e.request.as_u128())
                        && state.get(&e.request).is_some_and(|e| e.stage == Stage::Pending)
                });
                prop_assert!(earlier.is_none(), "{n} passed {earlier:?}");
                *served.entry(entry.account.clone()).or_default() += 1;
            }
            // Who waited with k = 3 before and after was passed by each other account at most twice: once
            // in the round under way, once in the next.
            for left in pending(&state).iter().filter(|e| e.k == 3 && waiting.contains(e)) {
                let own = served.get(&left.account).copied().unwrap_or(0);
                for (account, count) in &served {
                    prop_assert!(*count <= own + 2, "{account} was served {count} times, {} {own}", left.account);
                }
            }
            let under_way: u32 = state
                .entries
                .values()
                .filter(|e| matches!(e.stage, Stage::Offering | Stage::Offered { .. }))
                .filter(|e| !state.reports.holds(&MODEL, &e.request))
                .map(|e| e.k)
                .sum();
            let new: u32 = served.values().sum();
            prop_assert!(new == 0 || under_way <= free, "{under_way} slots promised, {free} free");
            state.apply(Command::OffersStored { requests: offered.iter().copied().map(id).collect() }, now).unwrap();
        }
        // At the end all deadlines pass: everything is asked to be closed, and leaves.
        let mut asked = BTreeSet::new();
        for step in 0..4 {
            for effect in state.apply(Command::Tick, DEADLINE_MS + now + step).unwrap() {
                if let Effect::Close { requests, .. } = effect {
                    asked.extend(requests);
                }
            }
        }
        let open: BTreeSet<Uuid> = state.entries.keys().copied().collect();
        prop_assert!(open.is_subset(&asked));
        for request in open {
            state.apply(Command::Closed { request }, now).unwrap();
        }
        prop_assert!(state.is_empty() && state.lanes.is_empty() && state.under_way.is_empty());
    }
}

fn pending(state: &State) -> Vec<Entry> {
    state.entries.values().filter(|entry| entry.stage == Stage::Pending).cloned().collect()
}
