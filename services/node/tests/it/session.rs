//! The node's network side with the real engine, against a dispatcher that is a test.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use infera_prompt::Prompt;
use infera_protocol::bytes::{Address, Hash32, Signature};
use infera_protocol::commitment::{Slot, commitment, decline_digest};
use infera_protocol::identity::{Domain, verify};
use infera_protocol::ids;
use infera_protocol::request::Request;
use infera_wire::{Message as _, convert, v1};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::dispatcher::{DOMAIN, Dispatcher, Heard, Say, Session, challenge, hear, request, say};
use crate::{ONE_AT_A_TIME, model_path};

const QUESTION: &str = "What is the capital of France?";

fn slot(session: &Session, request: &Request, attempt: u32) -> Slot {
    Slot { request_hash: request.hash(&DOMAIN), attempt, node: session.hello.claims.node }
}

pub fn check_commitment(session: &Session, request: &Request, commit: &v1::Commit, reveal: &v1::Reveal) {
    let (signed, opened) = (convert::commitment(commit).unwrap(), convert::reveal(reveal).unwrap());
    verify(&session.hello.claims.node, &signed.digest, &signed.signature).unwrap();
    let place = slot(session, request, commit.attempt);
    assert_eq!(commitment(&DOMAIN, &place, &opened.output, &opened.salt), signed.digest);
}

pub async fn expect_decline(session: &mut Session, request: &Request, reason: &str) {
    let decline = session.declined().await;
    check_decline(session, request, &decline, reason);
}

pub fn check_decline(session: &Session, request: &Request, decline: &v1::Decline, reason: &str) {
    assert_eq!(decline.reason, reason);
    let digest = decline_digest(&DOMAIN, &slot(session, request, decline.attempt), reason);
    let signature = Signature::try_from(decline.signature.as_slice()).unwrap();
    verify(&session.hello.claims.node, &digest, &signature).unwrap();
}

pub fn key(request: &Request) -> Vec<u8> {
    request.id.as_bytes().to_vec()
}

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "not in 30 s: {what}");
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promise_outlives_the_connection_and_the_process() {
    let _one = ONE_AT_A_TIME.lock().await;
    let dispatcher = Dispatcher::new().await;
    let node = dispatcher.node(&[]);
    let mut session = dispatcher.open().await;
    assert_eq!(session.hello.claims.weights_root, infera_node::measure(&model_path()).unwrap().0);
    assert_eq!((session.hello.claims.class.as_str(), session.hello.claims.slots), ("fast", 4));
    let asked = request(QUESTION, 32);
    session.lease(&asked, 1).await;
    let (streamed, commit) = session.committed().await;
    let file = dispatcher.data().join("node/slots").join(format!("{}-1", asked.id));
    assert!(file.exists(), "the promise is on disk before it is sent");
    let reveal = session.revealed(&asked, 1).await;
    check_commitment(&session, &asked, &commit, &reveal);
    assert_eq!(reveal.tokens, streamed);
    let text = Prompt::load(&model_path()).unwrap().decode(&reveal.tokens);
    assert!(text.contains("Paris"), "{text}");
    // The same lease again, a new connection, a new process: the same bytes.
    session.lease(&asked, 1).await;
    assert_eq!(session.hear().await, Heard::Commit(commit.clone()));
    let bound = session.hello.claims.binding.expiry_ms;
    drop(session);
    let mut session = dispatcher.open().await;
    assert!(session.hello.claims.binding.expiry_ms > bound, "the node is bound anew for each session");
    assert_eq!(session.hear().await, Heard::Commit(commit.clone()));
    let id = session.hello.claims.node;
    drop(session);
    node.end().await;
    let node = dispatcher.node(&[]);
    let mut session = dispatcher.open().await;
    assert_eq!(session.hello.claims.node, id, "the key is kept");
    assert_eq!(session.hear().await, Heard::Commit(commit.clone()));
    assert_eq!(session.revealed(&asked, 1).await, reveal);
    session.say(Say::Released(v1::Released { request_id: key(&asked), attempt: 1 })).await;
    until("the promise is closed", || !file.exists()).await;
    // A closed slot is never answered again, nor one whose promise may be forgotten.
    session.lease(&asked, 1).await;
    expect_decline(&mut session, &asked, "closed").await;
    drop(session);
    node.end().await;
    // Nor is a promise of a version without statements sent, which would end the session.
    let mut bytes = v1::Commit { statement: Vec::new(), ..commit }.encode_length_delimited_to_vec();
    bytes.extend(v1::Reveal::default().encode_length_delimited_to_vec());
    std::fs::write(&file, bytes).unwrap();
    let node = dispatcher.node(&[]);
    let mut session = dispatcher.open().await;
    session.lease(&asked, 1).await;
    expect_decline(&mut session, &asked, "closed").await;
    let two_days_ago = ids::time_ms(asked.id) - 48 * 3_600_000;
    let old = Request { id: ids::id_at(two_days_ago, &Hash32([1; 32])), ..asked.clone() };
    session.lease(&old, 1).await;
    expect_decline(&mut session, &old, "stale").await;
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_served_is_declined_and_signed() {
    let _one = ONE_AT_A_TIME.lock().await;
    let dispatcher = Dispatcher::new().await;
    let node = dispatcher.node(&["--slots", "1", "--max-context", "512"]);
    let mut session = dispatcher.open().await;
    let long = request("Write a long story about a river and the people who live beside it.", 400);
    session.lease(&long, 1).await;
    assert!(matches!(session.hear().await, Heard::Deltas(_)), "the first token comes at once");
    let second = request(QUESTION, 8);
    session.lease(&second, 1).await;
    expect_decline(&mut session, &second, "full").await;
    let other = Request { model_root: Hash32([3; 32]), ..request(QUESTION, 8) };
    session.lease(&other, 1).await;
    expect_decline(&mut session, &other, "model").await;
    let large = request(QUESTION, 600);
    session.lease(&large, 1).await;
    expect_decline(&mut session, &large, "engine").await;
    // A cancelled slot is free again, under the next attempt's number.
    session
        .say(Say::Cancel(v1::Cancel { request_id: key(&long), attempt: 1, reason: "closed".into() }))
        .await;
    let (tokens, attempt) = loop {
        let again = Request { id: Uuid::now_v7(), ..second.clone() };
        session.lease(&again, 2).await;
        match next_but_deltas_of(&mut session, &long).await {
            Heard::Decline(decline) => check_decline(&session, &again, &decline, "full"),
            Heard::Deltas(first) => {
                let (rest, commit) = rest_of(&mut session, first.tokens).await;
                break (rest, commit.attempt);
            }
            Heard::Commit(commit) => break (Vec::new(), commit.attempt),
            other => panic!("unexpected {other:?}"),
        }
    };
    assert_eq!((tokens.len(), attempt), (8, 2));
    node.stop.cancel();
    assert_eq!(session.hear().await, Heard::Draining(v1::Draining {}));
    let late = request(QUESTION, 8);
    session.lease(&late, 1).await;
    expect_decline(&mut session, &late, "draining").await;
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_node_declines_what_it_computes_reveals_what_it_promised_and_comes_back() {
    let _one = ONE_AT_A_TIME.lock().await;
    let dispatcher = Dispatcher::new().await;
    let node = dispatcher.node(&["--slots", "2", "--max-context", "512"]);
    let mut session = dispatcher.open().await;
    let short = request(QUESTION, 8);
    session.lease(&short, 1).await;
    let commit = loop {
        if let Heard::Commit(commit) = session.hear().await {
            break commit;
        }
    };
    let long = request("Write a long story about a river and the people who live beside it.", 400);
    session.lease(&long, 1).await;
    assert!(matches!(session.hear().await, Heard::Deltas(_)));
    node.pause.send_replace(true);
    let mut seen = Vec::new();
    while seen.len() < 2 {
        match next_but_deltas_of(&mut session, &long).await {
            Heard::Decline(decline) => {
                check_decline(&session, &long, &decline, "preempted");
                seen.push("decline");
            }
            Heard::Draining(_) => seen.push("draining"),
            other => panic!("unexpected {other:?}"),
        }
    }
    session
        .say(Say::RevealRequest(v1::RevealRequest {
            request_id: key(&short),
            attempt: 1,
            reveal_deadline_ms: i64::MAX,
        }))
        .await;
    let Heard::Reveal(reveal) = session.hear().await else { panic!("no reveal") };
    check_commitment(&session, &short, &commit, &reveal);
    session.say(Say::Released(v1::Released { request_id: key(&short), attempt: 1 })).await;
    node.pause.send_replace(false);
    let mut session = dispatcher.open().await;
    session.lease(&request(QUESTION, 8), 1).await;
    while !matches!(session.hear().await, Heard::Commit(_)) {}
    node.pause.send_replace(true);
    node.end().await;
}

/// The owner may still use the device when the pause ends: the node waits for it, and goes on listening.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_cannot_load_its_model_after_a_pause_waits_and_hears_its_owner() {
    let _one = ONE_AT_A_TIME.lock().await;
    let dispatcher = Dispatcher::new().await;
    let (model, away) = (dispatcher.data().join("model.gguf"), dispatcher.data().join("away.gguf"));
    std::os::unix::fs::symlink(crate::model_path(), &model).unwrap();
    let line = ["--slots", "1", "--max-context", "512", "--model", model.to_str().unwrap()];
    let node = dispatcher.node(&line);
    let mut session = dispatcher.open().await;
    for comes_back in [true, false] {
        node.pause.send_replace(true);
        while !session.closed().await {}
        std::fs::rename(&model, &away).unwrap();
        node.pause.send_replace(false);
        if comes_back {
            std::fs::rename(&away, &model).unwrap();
            session = dispatcher.open().await;
            session.lease(&request(QUESTION, 8), 1).await;
            while !matches!(session.hear().await, Heard::Commit(_)) {}
        }
    }
    node.end().await;
}

#[test]
fn a_pause_needs_a_node() {
    let folder = tempfile::tempdir().unwrap();
    for outcome in [infera_node::pause(folder.path()), infera_node::resume(folder.path())] {
        let text = outcome.unwrap_err().to_string();
        assert!(text.contains("no node runs in") && text.contains("--data"), "{text}");
    }
    // Nobody holds the lock: the number in it may be anybody's by now.
    std::fs::write(folder.path().join("node.lock"), std::process::id().to_string()).unwrap();
    assert!(infera_node::pause(folder.path()).is_err());
}

/// The commitment of a slot is the same whatever was lost, and a slot whose record is damaged is not computed again.
#[tokio::test(flavor = "multi_thread")]
async fn no_loss_makes_a_node_equivocate() {
    let _one = ONE_AT_A_TIME.lock().await;
    let dispatcher = Dispatcher::new().await;
    let node = dispatcher.node(&[]);
    let mut session = dispatcher.open().await;
    let asked = request(QUESTION, 8);
    session.lease(&asked, 1).await;
    let (_, commit) = session.committed().await;
    let second = dispatcher.node(&[]);
    let error = second.fails().await.to_string();
    assert!(error.contains("in use by another node"), "{error}");
    drop(session);
    node.end().await;
    // The journal is lost: the same answer makes the same bytes.
    let file = dispatcher.data().join("node/slots").join(format!("{}-1", asked.id));
    std::fs::remove_file(&file).unwrap();
    let node = dispatcher.node(&[]);
    let mut session = dispatcher.open().await;
    session.lease(&asked, 1).await;
    assert_eq!(session.committed().await.1, commit);
    drop(session);
    node.end().await;
    // Its record is damaged: nobody can tell what it promised.
    std::fs::write(&file, b"\xff\xff").unwrap();
    let node = dispatcher.node(&[]);
    let mut session = dispatcher.open().await;
    session.lease(&asked, 1).await;
    expect_decline(&mut session, &asked, "journal").await;
    node.end().await;
    // It can't be listed: nothing is answered at all.
    let slots = dispatcher.data().join("node/slots");
    std::fs::remove_dir_all(&slots).unwrap();
    std::fs::write(&slots, b"").unwrap();
    assert!(dispatcher.node(&[]).fails().await.to_string().contains("journal"));
}

/// A node with one slot that works for a dispatcher which died: the new attempt takes the place of the old one.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_attempt_takes_the_place_of_the_old_one() {
    let _one = ONE_AT_A_TIME.lock().await;
    let dispatcher = Dispatcher::new().await;
    let node = dispatcher.node(&["--slots", "1"]);
    let mut session = dispatcher.open().await;
    let long = request("Write a long story about a river and the people who live beside it.", 200);
    session.lease(&long, 1).await;
    assert!(matches!(session.hear().await, Heard::Deltas(_)));
    drop(session);
    let mut session = dispatcher.open().await;
    session.lease(&long, 2).await;
    loop {
        match session.hear().await {
            Heard::Deltas(deltas) if deltas.attempt == 2 => break,
            Heard::Deltas(_) => {}
            other => panic!("unexpected {other:?}"),
        }
    }
    session
        .say(Say::Cancel(v1::Cancel { request_id: key(&long), attempt: 2, reason: "closed".into() }))
        .await;
    node.end().await;
}

async fn next_but_deltas_of(session: &mut Session, request: &Request) -> Heard {
    loop {
        match session.hear().await {
            Heard::Deltas(deltas) if deltas.request_id == key(request) => {}
            other => return other,
        }
    }
}

async fn rest_of(session: &mut Session, mut tokens: Vec<u32>) -> (Vec<u32>, v1::Commit) {
    loop {
        match session.hear().await {
            Heard::Deltas(deltas) => tokens.extend(deltas.tokens),
            Heard::Commit(commit) => return (tokens, commit),
            other => panic!("unexpected {other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_dispatcher_ends_the_session_and_not_the_node() {
    let _one = ONE_AT_A_TIME.lock().await;
    let dispatcher = Dispatcher::new().await;
    let node = dispatcher.node(&[]);
    let mut elsewhere = dispatcher.accept().await;
    say(&mut elsewhere, challenge([1; 32], Domain { contract: Address([8; 20]), ..DOMAIN })).await;
    assert!(hear(&mut elsewhere).await.is_none(), "nothing is signed for another network");
    let mut rude = dispatcher.accept().await;
    say(&mut rude, Say::Welcome(v1::Welcome { session: vec![], heartbeat_secs: 0 })).await;
    assert!(hear(&mut rude).await.is_none());
    let mut session = dispatcher.open().await;
    session.bytes(b"\xff\xff\xff\xff").await;
    assert!(session.closed().await);
    let mut session = dispatcher.open().await;
    // A lease that is no lease is not answered; the session goes on.
    session.say(Say::Lease(v1::Lease { attempt: 1, ..v1::Lease::default() })).await;
    session
        .say(Say::RevealRequest(v1::RevealRequest {
            request_id: vec![0; 16],
            attempt: 1,
            reveal_deadline_ms: 0,
        }))
        .await;
    let asked = request(QUESTION, 2);
    session.lease(&asked, 1).await;
    let (tokens, _) = session.committed().await;
    assert_eq!(tokens.len(), 2);
    for file in ["node.key", "signer.key", "operator.key"] {
        let mode = std::fs::metadata(dispatcher.data().join("node").join(file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
    session.say(Say::Refused(v1::Refused { code: "slashed".into(), reason: "no stake".into() })).await;
    assert!(session.closed().await);
    dispatcher.open().await;
    node.end().await;
}
