//! A node as a referee, against a dispatcher that is a test.

use infera_protocol::bytes::Hash32;
use infera_protocol::fingerprint::Fingerprint;
use infera_protocol::grammar::{Grammar, GrammarKind};
use infera_protocol::request::Request;
use infera_protocol::sampling::SamplingParams;
use infera_wire::v1::{self, Finish};
use uuid::Uuid;

use crate::ONE_AT_A_TIME;
use crate::dispatcher::{Dispatcher, Heard, Say, Session, request};
use crate::session::{check_decline, expect_decline, key};

const QUESTION: &str = "What is the capital of France?";

/// The node's own answer: tokens, finish and fingerprints.
async fn answer(session: &mut Session, request: &Request) -> ((Vec<u32>, Finish), Vec<Fingerprint>) {
    session.lease(request, 1).await;
    session.committed().await;
    let reveal = session.revealed(request, 1).await;
    session.say(Say::Released(v1::Released { request_id: key(request), attempt: 1 })).await;
    let prints = Fingerprint::decode_all(&reveal.fingerprints).unwrap();
    ((reveal.tokens, Finish::try_from(reveal.finish).unwrap()), prints)
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_scored_beside_work_and_signed() {
    let _one = ONE_AT_A_TIME.lock().await;
    let dispatcher = Dispatcher::new().await;
    let node = dispatcher.node(&["--slots", "1", "--max-context", "512"]);
    let mut session = dispatcher.open().await;
    let warm = SamplingParams { temperature: 0.8, ..SamplingParams::default() };
    let asked = Request { sampling: warm, ..request(QUESTION, 24) };
    let (own, prints) = answer(&mut session, &asked).await;
    // Its only slot is taken.
    let long = request("Write a long story about a river and the people who live beside it.", 400);
    session.lease(&long, 1).await;
    assert!(matches!(session.hear().await, Heard::Deltas(_)));
    let mut planted = own.clone();
    planted.0[2] = 1_000;
    let mut foreign = own.clone();
    foreign.0[1] = u32::MAX;
    let subjects = [own.clone(), planted, foreign, (own.0.clone(), Finish::Length)];
    let reports = session.scored(&asked, 2, &subjects).await;
    for report in [&reports[0], &reports[3]] {
        assert!(report.scores.iter().all(|score| score.margin_micro == 0), "what it would have drawn itself");
        let seen: Vec<&Fingerprint> = report.scores.iter().map(|score| &score.fingerprint).collect();
        assert_eq!(seen, prints.iter().collect::<Vec<_>>());
    }
    let margins = |i: usize| reports[i].scores.iter().map(|score| score.margin_micro).collect::<Vec<_>>();
    assert_eq!(margins(1)[..2], [0, 0]);
    assert!(margins(1)[2] > 1_000_000, "{:?}", margins(1));
    assert_eq!(margins(2)[..2], [0, u32::MAX], "a token that the model does not have");
    // Sent again, on another connection too: the same bytes.
    assert_eq!(session.scored(&asked, 2, &subjects).await, reports);
    session.referee(&asked, 2, &subjects).await;
    drop(session);
    let mut session = dispatcher.open().await;
    assert_eq!(session.scored(&asked, 2, &subjects).await, reports);
    drop(session);
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grammar_binds_the_scorer_too() {
    let _one = ONE_AT_A_TIME.lock().await;
    let dispatcher = Dispatcher::new().await;
    let node = dispatcher.node(&["--max-context", "512"]);
    let mut session = dispatcher.open().await;
    let grammar = |text: &str| Some(Grammar { kind: GrammarKind::Regex, text: text.into() });
    let formed = Request { grammar: grammar("(yes|no)"), ..request("Is Paris in France?", 8) };
    let (own, _) = answer(&mut session, &formed).await;
    let unbound = Request { id: Uuid::now_v7(), grammar: None, ..formed.clone() };
    let (free, _) = answer(&mut session, &unbound).await;
    let reports = session.scored(&formed, 1, &[own, free]).await;
    assert!(reports[0].scores.iter().all(|score| score.margin_micro == 0));
    assert!(reports[1].scores.iter().any(|score| score.margin_micro == u32::MAX));
    let bad = Request { grammar: grammar("(yes|no"), ..formed };
    session.referee(&bad, 1, &[(vec![1], Finish::Eos)]).await;
    expect_decline(&mut session, &bad, "grammar").await;
    drop(session);
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_scored_is_declined_and_signed() {
    let _one = ONE_AT_A_TIME.lock().await;
    let dispatcher = Dispatcher::new().await;
    let node = dispatcher.node(&["--max-context", "256"]);
    let mut session = dispatcher.open().await;
    let asked = request(QUESTION, 8);
    let small = (vec![100; 4], Finish::Length);
    let other = Request { model_root: Hash32([3; 32]), ..asked.clone() };
    session.referee(&other, 1, std::slice::from_ref(&small)).await;
    expect_decline(&mut session, &other, "model").await;
    for impossible in [vec![(vec![100; 250], Finish::Length)], vec![(vec![], Finish::Eos)]] {
        session.referee(&asked, 1, &impossible).await;
        expect_decline(&mut session, &asked, "engine").await;
    }
    // A report that no frame holds.
    let large = vec![(vec![100; 3_000], Finish::Length); 8];
    session.referee(&asked, 1, &large).await;
    expect_decline(&mut session, &asked, "engine").await;
    // Malformed: not answered.
    session.referee(&asked, 1, &vec![small.clone(); 9]).await;
    session.referee(&asked, 1, &[]).await;
    session.say(Say::RefereeLease(v1::RefereeLease::default())).await;
    // More than may wait: each is answered, the last ones at once.
    let crowd: Vec<Request> = (0..40).map(|_| Request { id: Uuid::now_v7(), ..asked.clone() }).collect();
    let subjects = vec![(vec![100; 60], Finish::Length); 8];
    for request in &crowd {
        session.referee(request, 1, &subjects).await;
    }
    let (mut full, mut scored) = (0, 0);
    while full + scored < crowd.len() {
        match session.hear().await {
            Heard::RefereeReport(report) => {
                let request = crowd.iter().find(|request| key(request) == report.request_id).unwrap();
                session.check_report(request, &report, &subjects);
                scored += 1;
            }
            Heard::Decline(decline) => {
                let request = crowd.iter().find(|request| key(request) == decline.request_id).unwrap();
                check_decline(&session, request, &decline, "full");
                full += 1;
            }
            other => panic!("unexpected {other:?}"),
        }
    }
    assert!(scored >= 16 && full > 0, "{scored} scored, {full} declined");
    node.stop.cancel();
    assert_eq!(session.hear().await, Heard::Draining(v1::Draining {}));
    session.referee(&asked, 1, &[small]).await;
    expect_decline(&mut session, &asked, "draining").await;
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_and_a_cancel_end_the_scoring() {
    let _one = ONE_AT_A_TIME.lock().await;
    let dispatcher = Dispatcher::new().await;
    let node = dispatcher.node(&["--max-context", "1024"]);
    let mut session = dispatcher.open().await;
    let subjects = vec![(vec![100; 900], Finish::Length); 8];
    let (first, second) = (request(QUESTION, 900), request(QUESTION, 900));
    session.referee(&first, 1, &subjects).await;
    session
        .say(Say::Cancel(v1::Cancel { request_id: key(&first), attempt: 1, reason: "closed".into() }))
        .await;
    session.referee(&second, 1, &subjects).await;
    // The pings are answered once the lease was read.
    session.say(Say::RangeChallenge(v1::RangeChallenge::default())).await;
    assert!(matches!(session.hear().await, Heard::RangeProof(_)));
    node.pause.send_replace(true);
    let mut seen = Vec::new();
    while seen.len() < 2 {
        match session.hear().await {
            Heard::Decline(decline) => {
                check_decline(&session, &second, &decline, "preempted");
                seen.push("decline");
            }
            Heard::Draining(_) => seen.push("draining"),
            other => panic!("unexpected {other:?}"),
        }
    }
    node.end().await;
}
