//! Referees: who is asked, and what becomes of an attempt whatever they do.

use infera_protocol::commitment::{Slot, decline_digest};
use infera_protocol::evidence::RefereeOutcome;
use infera_protocol::fingerprint::{Entry, Fingerprint};
use infera_protocol::referee::{Report, TokenScore, report_digest};

use super::*;

/// Request 1 collected from three nodes of five operators; the verifier wants referees for its answers.
fn asked(count: u32) -> Bench {
    let mut bench = Bench::new();
    for n in 1..=5 {
        let operator = Address([20 + n; 20]);
        bench.run(Command::NodeJoined(Connected { operator, ..connected(n, 1) })).unwrap();
    }
    bench.run(Command::Offered(Box::new(offer(1)))).unwrap();
    for n in bench.drawn() {
        bench.run(commit(n, 1, 1, 0)).unwrap();
    }
    for n in bench.drawn() {
        bench.run(reveal(n, 1, 1, 0)).unwrap();
    }
    let answers = bench.evidence.as_ref().unwrap().answers().iter().map(|(hash, ..)| *hash).collect();
    let request = Uuid::from_u128(1);
    bench.run(Command::MoreReferees { request, attempt: 1, round: 1, count, answers }).unwrap();
    bench
}

pub(super) fn key_of(node: NodeId) -> SigningKey {
    (1..=9).map(key).find(|key| node_id(key) == node).unwrap()
}

/// The report that a job asks for; `change` may spoil the signed scores.
pub(super) fn report(
    (node, lease): &(NodeId, v1::RefereeLease),
    change: impl Fn(&mut SignedScores),
) -> Command {
    let request = convert::request(lease.request.as_ref().unwrap()).unwrap();
    let fingerprint = Fingerprint::new(vec![Entry { token: 9, logprob: 0 }]).unwrap();
    let score = TokenScore { margin_micro: 0, fingerprint };
    let reports = lease.subjects.iter().map(|subject| {
        let finish = convert::finish("finish", subject.finish).unwrap();
        let output = Output { tokens: subject.tokens.clone(), fingerprints: Vec::new(), finish };
        let scores = Report { scores: vec![score.clone(); output.tokens.len()] }.encode();
        let digest =
            report_digest(&DOMAIN, &request.hash(&DOMAIN), lease.attempt, node, &output.hash(), &scores);
        let mut signed = SignedScores { signature: sign(&key_of(*node), &digest), scores };
        change(&mut signed);
        signed
    });
    Command::Refereed { node: *node, request: request.id, attempt: lease.attempt, reports: reports.collect() }
}

fn outcomes(bench: &Bench) -> Vec<RefereeOutcome> {
    bench.evidence.as_ref().unwrap().referees.iter().map(|referee| referee.outcome).collect()
}

fn collected(bench: &Bench, round: u32) -> bool {
    bench.collected.contains(&(Uuid::from_u128(1), 1, round))
}

#[test]
fn a_referee_is_from_outside_and_its_report_is_collected() {
    let mut bench = asked(1);
    assert_eq!(bench.jobs.len(), 1);
    let (node, lease) = bench.jobs[0].clone();
    assert!(bench.drawn().iter().all(|n| node_id(&key(*n)) != node), "it is no replica");
    assert!(lease.subjects.iter().any(|subject| subject.tokens == [9, END_TOKEN]));
    assert!(!collected(&bench, 2), "the report is waited for");
    bench.run(report(&(node, lease), |_| ())).unwrap();
    assert!(collected(&bench, 2));
    assert_eq!(outcomes(&bench), [RefereeOutcome::Reported]);
}

#[test]
fn referees_that_fail_are_replaced_until_nobody_is_left() {
    let mut bench = asked(1);
    let (first, lease) = bench.jobs[0].clone();
    let place = Slot { request_hash: offer(1).request_hash, attempt: 1, node: first };
    let signature = sign(&key_of(first), &decline_digest(&DOMAIN, &place, "full"));
    let decline = SignedDecline { reason: "full".into(), signature };
    let request = Uuid::from_u128(1);
    bench.run(Command::Declined { node: first, request, attempt: 1, decline }).unwrap();
    assert_eq!(bench.jobs.len(), 2);
    assert!(!collected(&bench, 2));
    bench.tick(699);
    assert!(!collected(&bench, 2));
    bench.tick(1);
    assert!(collected(&bench, 2));
    assert_eq!(outcomes(&bench), [RefereeOutcome::Declined, RefereeOutcome::NoReport]);
    assert_eq!(bench.run(report(&(first, lease), |_| ())), Err(Rejection::Late));
}

#[test]
fn a_referee_that_leaves_is_replaced() {
    let mut bench = asked(1);
    let node = bench.jobs[0].0;
    bench.run(Command::NodeLeft { node, session: Uuid::from_u128(1) }).unwrap();
    assert_eq!(bench.jobs.len(), 2);
    let second = bench.jobs[1].clone();
    bench.run(report(&second, |_| ())).unwrap();
    assert_eq!(outcomes(&bench), [RefereeOutcome::Disconnected, RefereeOutcome::Reported]);
}

#[test]
fn what_is_no_report_does_not_count() {
    let mut bench = asked(2);
    let jobs = bench.jobs.clone();
    assert_eq!(jobs.len(), 2);
    let forged = report(&jobs[0], |signed| signed.scores[3] ^= 1);
    assert_eq!(bench.run(forged), Err(Rejection::BadSignature));
    let stranger = (node_id(&key(bench.drawn()[0])), jobs[0].1.clone());
    assert_eq!(bench.run(report(&stranger, |_| ())), Err(Rejection::NotLeased));
    let Command::Refereed { node, request, attempt, mut reports } = report(&jobs[0], |_| ()) else {
        panic!("a report")
    };
    reports.pop();
    bench.run(Command::Refereed { node, request, attempt, reports }).unwrap();
    bench.run(report(&jobs[1], |_| ())).unwrap();
    assert!(collected(&bench, 2));
    assert_eq!(outcomes(&bench), [RefereeOutcome::NoReport, RefereeOutcome::Reported]);
}

#[test]
fn who_refereed_is_no_replica_any_more() {
    let mut bench = asked(1);
    let job = bench.jobs[0].clone();
    bench.run(report(&job, |_| ())).unwrap();
    bench.run(Command::MoreNodes { request: Uuid::from_u128(1), attempt: 1, round: 2, count: 2 }).unwrap();
    let refereed = bench.outcomes().iter().filter(|o| **o == Some(SlotOutcome::Refereed)).count();
    assert_eq!((refereed, bench.outcomes().len()), (1, 5));
    // The other one of the two that were left computes.
    let last = bench.drawn().into_iter().find(|n| {
        let attempt = bench.state.attempt(Uuid::from_u128(1)).unwrap();
        attempt.slots().iter().any(|slot| slot.is_leased() && slot.who.node == node_id(&key(*n)))
    });
    bench.run(commit(last.unwrap(), 1, 1, 0)).unwrap();
    bench.run(reveal(last.unwrap(), 1, 1, 0)).unwrap();
    assert!(collected(&bench, 3));
}

#[test]
fn a_verdict_about_an_earlier_round_asks_nobody() {
    let mut bench = asked(1);
    let job = bench.jobs[0].clone();
    bench.run(report(&job, |_| ())).unwrap();
    let again = Command::MoreReferees {
        request: Uuid::from_u128(1),
        attempt: 1,
        round: 1,
        count: 1,
        answers: vec![Hash32::ZERO],
    };
    assert_eq!(bench.run(again), Err(Rejection::Stale));
    assert_eq!(bench.jobs.len(), 1);
}
