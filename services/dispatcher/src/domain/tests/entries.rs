//! Entry trials.

use infera_protocol::judgement::Finding;
use infera_protocol::trust::{Alarm, Event, Reason, Record};

use super::referees::key_of;
use super::trials::{answer_trial, ended, findings, newcomer, number, say};
use super::*;
use crate::domain::trials::{Kind, Outcome};

/// Three nodes, so many of trusted operators, which were tried once they could be; 4 has just joined.
pub(super) fn entering(trusted: u8) -> Bench {
    let mut bench = founded(3, trusted);
    for tried in 0..4 {
        bench.tick(1);
        assert_eq!(bench.leases.len(), if trusted > 1 { 3.min(tried + 1) } else { 0 }, "one after the other");
        if !on_trial(&bench) {
            break;
        }
        let (node, asked) = bench.leases[tried].clone();
        answer_trial(&mut bench, node, &asked, 5);
        say(&mut bench, true);
        assert!(!on_trial(&bench));
    }
    (bench.leases, bench.jobs, bench.tried) = Default::default();
    bench.run(Command::NodeJoined(newcomer(4))).unwrap();
    bench
}

/// Nodes that joined while nobody was trusted; then so many of their operators were.
fn founded(nodes: u8, trusted: u8) -> Bench {
    let mut bench = Bench::new();
    bench.state = State::new(Rules { entry_trials: true, canary_ppm: 500_000, ..rules() });
    let rules = infera_protocol::trust::Rules::default();
    let records = (1..=trusted).map(|n| {
        let mut record = Record::default();
        for _ in 0..1_000 {
            [Event::Offered, Event::Completed, Event::Verified]
                .into_iter()
                .for_each(|event| record.apply(&rules, 0, event));
        }
        (Address([20 + n; 20]), record)
    });
    for n in 1..=nodes {
        bench.run(Command::NodeJoined(newcomer(n))).unwrap();
    }
    let ledger = Ledger::new(&rules, &Alarm::default(), &records.collect(), 0);
    bench.run(Command::Trust(Box::new(ledger))).unwrap();
    assert!(!on_trial(&bench) && bench.leases.is_empty());
    bench
}

pub(super) fn on_trial(bench: &Bench) -> bool {
    bench.state.nodes().iter().any(|view| view.on_trial)
}

/// The node of this lease, a trial's, is full.
fn decline_trial(bench: &mut Bench, lease: usize) {
    let (node, asked) = bench.leases[lease].clone();
    let digest =
        decline_digest(&DOMAIN, &Slot { request_hash: asked.hash(&DOMAIN), attempt: 1, node }, "full");
    let decline = SignedDecline { reason: "full".into(), signature: sign(&key_of(node), &digest) };
    bench.run(Command::Declined { node, request: asked.id, attempt: 1, decline }).unwrap();
}

#[test]
fn a_newcomer_is_tried_before_it_is_drawn() {
    for (is_good, refused) in [(true, false), (false, true)] {
        let mut bench = entering(3);
        assert!(on_trial(&bench) && bench.state.model_slots(&MODEL).0.free == 6);
        let (node, asked) = bench.leases[0].clone();
        assert_eq!((number(node), asked.prompt.len(), asked.id.get_version_num()), (4, 24, 7));
        answer_trial(&mut bench, node, &asked, 5);
        let votes = if is_good { 1 } else { 2 };
        (0..votes).for_each(|_| say(&mut bench, is_good));
        assert_eq!(ended(&bench).kind, Kind::Entry);
        assert_eq!(bench.refused.iter().any(|(who, code)| *who == node && code == "trial_failed"), refused);
        assert_eq!(on_trial(&bench), refused);
        let first = if refused { Finding::Bad(Reason::Challenge) } else { Finding::Completed };
        assert_eq!(findings(ended(&bench))[0], first);
    }
}

#[test]
fn without_a_trusted_operator_newcomers_are_let_in() {
    let mut bench = entering(0);
    bench.tick(10_000);
    assert!(!on_trial(&bench) && bench.leases.is_empty());
}

#[test]
fn who_was_let_in_while_nobody_could_judge_is_tried_later() {
    let mut bench = founded(4, 1);
    bench.tick(1);
    let (node, asked) = bench.leases[0].clone();
    assert_eq!(bench.leases.len(), 1, "one after the other");
    answer_trial(&mut bench, node, &asked, 5);
    say(&mut bench, true);
    bench.tick(1);
    let silent = bench.leases[1].0;
    bench.tick(1_000);
    assert_eq!(bench.refused, [(silent, "trial_failed".to_owned())]);
    bench.run(Command::NodeLeft { node: silent, session: Uuid::from_u128(1) }).unwrap();
    bench.tick(1);
    let mut tried: Vec<u8> = bench.leases.iter().map(|(node, _)| number(*node)).collect();
    tried.sort_unstable();
    assert_eq!(tried, [2, 3, 4], "not the only judge");
}

#[test]
fn of_those_that_are_tried_later_one_with_a_free_place_comes_first() {
    for free in 2..=4 {
        let mut bench = founded(4, 1);
        for full in (2..=4).filter(|n| *n != free) {
            for lease in 0..2 {
                bench.state.nodes.lease(&node_id(&key(full)), Uuid::from_u128(lease));
            }
        }
        bench.tick(1);
        assert_eq!(number(bench.leases[0].0), free);
    }
}

#[test]
fn who_declines_its_late_trial_keeps_the_next_one_waiting_but_not_for_ever() {
    for tells in [true, false] {
        let mut bench = founded(4, 4);
        bench.tick(1);
        let first = bench.leases[0].0;
        decline_trial(&mut bench, 0);
        for _ in 0..20 {
            bench.tick(100);
        }
        assert_eq!(
            bench.state.nodes().iter().filter(|view| view.on_trial).count(),
            1,
            "all others are drawn"
        );
        bench.tick(3_000);
        assert_eq!((bench.leases.len(), bench.leases[1].0), (2, first), "tried again");
        if tells {
            let asked = bench.leases[1].1.clone();
            answer_trial(&mut bench, first, &asked, 5);
            say(&mut bench, true);
            bench.tick(1);
            assert!(bench.leases[2].0 != first, "the next one");
            continue;
        }
        let until = bench.now + 20_000;
        while bench.leases.last().unwrap().0 == first {
            let leases = bench.leases.len();
            decline_trial(&mut bench, leases - 1);
            while bench.leases.len() == leases {
                assert!(bench.now < until, "nobody else is tried");
                bench.tick(100);
            }
        }
    }
}

/// Nobody is asked for ranges of a model that was withdrawn, nor for answers: its nodes keep nobody from being tried.
#[test]
fn nodes_of_a_model_that_is_not_listed_are_not_tried() {
    let mut bench = founded(9, 9);
    for n in 1..=6 {
        bench.run(Command::NodeLeft { node: node_id(&key(n)), session: Uuid::from_u128(1) }).unwrap();
        let model_root = Hash32([9; 32]);
        bench.run(Command::NodeJoined(Connected { model_root, ..newcomer(n) })).unwrap();
    }
    for tried in 1..=3 {
        bench.tick(1);
        let (node, asked) = bench.leases.last().unwrap().clone();
        answer_trial(&mut bench, node, &asked, 5);
        // A referee may have been given a defect.
        while bench.tried.len() < tried {
            say(&mut bench, true);
        }
    }
    let mut tried: Vec<u8> = bench.leases.iter().map(|(node, _)| number(*node)).collect();
    tried.sort_unstable();
    assert_eq!((tried, on_trial(&bench)), (vec![7, 8, 9], false));
}

#[test]
fn silent_newcomers_let_nobody_in_untried_and_leave_room_for_canaries() {
    let mut bench = founded(6, 6);
    for n in 10..=80 {
        bench.run(Command::NodeJoined(newcomer(n))).unwrap();
    }
    // A second node of an operator that is tried.
    bench.run(Command::NodeJoined(Connected { operator: Address([30; 20]), ..connected(81, 1) })).unwrap();
    let waiting = bench.state.nodes().iter().filter(|view| view.on_trial).count();
    assert_eq!((bench.leases.len(), waiting), (48, 72));
    assert!(bench.leases.iter().all(|(node, _)| *node != node_id(&key(81))));
    bench.run(Command::Offered(Box::new(offer(1)))).unwrap();
    let of_request = bench.leases.iter().filter(|(_, asked)| asked.id == Uuid::from_u128(1)).count();
    assert_eq!(of_request, 4, "three and a canary");
    bench.tick(1_000);
    assert_eq!(bench.refused.len(), 48);
    for (node, _) in bench.refused.clone() {
        bench.run(Command::NodeLeft { node, session: Uuid::from_u128(1) }).unwrap();
    }
    bench.tick(4_000);
    let tried = |n: u8| bench.leases.iter().any(|(node, _)| *node == node_id(&key(n)));
    assert!((10..=81).all(tried), "the others have waited for their turn");
}

#[test]
fn whom_nobody_judged_is_not_let_in() {
    let mut bench = entering(2);
    let (node, asked) = bench.leases[0].clone();
    answer_trial(&mut bench, node, &asked, 5);
    for _ in 0..2 {
        let referee = bench.jobs.last().unwrap().0;
        bench.run(Command::NodeLeft { node: referee, session: Uuid::from_u128(1) }).unwrap();
    }
    assert_eq!((ended(&bench).outcome, on_trial(&bench)), (Outcome::Void, true));
    for n in 1..=2 {
        bench.run(Command::NodeJoined(newcomer(n))).unwrap();
    }
    let before = bench.leases.len();
    bench.tick(5_000);
    assert!(bench.leases[before..].iter().any(|(who, _)| *who == node), "it is tried again");
}

#[test]
fn who_declines_is_tried_again_and_who_is_silent_is_refused() {
    let mut bench = entering(3);
    let (node, asked) = bench.leases[0].clone();
    decline_trial(&mut bench, 0);
    assert!(on_trial(&bench) && bench.refused.is_empty());
    bench.tick(4_900);
    assert_eq!(bench.leases.len(), 1);
    bench.tick(100);
    assert_eq!(bench.leases.len(), 2);
    assert_ne!(bench.leases[1].1.prompt, asked.prompt, "another prompt each time");
    bench.tick(1_000);
    assert_eq!(bench.refused, [(node, "trial_failed".to_owned())]);
    assert!(bench.tried.iter().all(|ended| ended.conduct.is_empty()), "nothing is held against it");
}

#[test]
fn a_newcomer_that_lost_its_connection_passes_its_trial() {
    let mut bench = entering(3);
    let (node, asked) = bench.leases[0].clone();
    bench.run(Command::NodeLeft { node, session: Uuid::from_u128(1) }).unwrap();
    let again = Connected { session: Uuid::from_u128(2), ..newcomer(4) };
    bench.run(Command::NodeJoined(again)).unwrap();
    assert_eq!(bench.leases, [(node, asked.clone()), (node, asked.clone())]);
    answer_trial(&mut bench, node, &asked, 5);
    say(&mut bench, true);
    assert_eq!((ended(&bench).outcome, on_trial(&bench)), (Outcome::Passed, false));
}
