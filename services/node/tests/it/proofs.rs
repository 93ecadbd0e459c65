//! Ranges of the weights file, proved before and after the welcome.

use std::fs;

use infera_protocol::admission::{AdmissionError, ranges, verify_slice};
use infera_runtime::clock;
use infera_wire::v1;

use crate::dispatcher::{Dispatcher, Heard, Say, Session, request};
use crate::{ONE_AT_A_TIME, gemma_path, model_path};

fn challenge(nonce: u8, ranges: &[(u64, u32)]) -> v1::RangeChallenge {
    v1::RangeChallenge {
        nonce: vec![nonce; 16],
        ranges: ranges
            .iter()
            .map(|(offset, length)| v1::Range { offset: *offset, length: *length })
            .collect(),
        deadline_ms: clock::now_ms() + 10_000,
    }
}

async fn proved(session: &mut Session) -> v1::RangeProof {
    loop {
        match session.hear().await {
            Heard::RangeProof(proof) => return proof,
            Heard::Deltas(_) => {}
            other => panic!("unexpected {other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ranges_are_proved_before_the_welcome_and_beside_work() {
    let _one = ONE_AT_A_TIME.lock().await;
    let file = fs::read(model_path()).unwrap();
    let size = file.len() as u64;
    let dispatcher = Dispatcher::new().await;
    let node = dispatcher.node(&["--slots", "1", "--max-context", "512"]);
    let mut session = dispatcher.greet().await;
    let root = session.hello.claims.weights_root;
    let check = |proof: &v1::RangeProof, nonce: u8, drawn: &[(u64, u32)]| {
        assert_eq!((proof.nonce.as_slice(), proof.slices.len()), ([nonce; 16].as_slice(), drawn.len()));
        for (slice, (offset, length)) in proof.slices.iter().zip(drawn) {
            let bytes = verify_slice(&root, size, (*offset, *length), slice).unwrap();
            assert_eq!(bytes, file[*offset as usize..][..*length as usize]);
        }
    };
    let drawn = ranges(&[1; 32], size, 8);
    session.say(Say::RangeChallenge(challenge(1, &drawn))).await;
    check(&proved(&mut session).await, 1, &drawn);
    session.say(Say::Welcome(v1::Welcome { session: vec![1; 16], heartbeat_secs: 30 })).await;
    let long = request("Write a long story about a river and the people who live beside it.", 200);
    session.lease(&long, 1).await;
    assert!(matches!(session.hear().await, Heard::Deltas(_)));
    let edges = [(0, 1), (size - 1, 1), (16_383, 2), (size - 16_384, 16_384)];
    session.say(Say::RangeChallenge(challenge(2, &edges))).await;
    check(&proved(&mut session).await, 2, &edges);
    // What is no range of the file is not answered, and the session goes on.
    session.say(Say::RangeChallenge(challenge(3, &[(size, 1)]))).await;
    session.say(Say::RangeChallenge(challenge(4, &[(0, 1); 9]))).await;
    session.say(Say::RangeChallenge(challenge(5, &edges[..1]))).await;
    check(&proved(&mut session).await, 5, &edges[..1]);
    drop(session);
    node.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_was_changed_proves_nothing() {
    let _one = ONE_AT_A_TIME.lock().await;
    let dispatcher = Dispatcher::new().await;
    let copy = dispatcher.data().join("model.gguf");
    fs::copy(model_path(), &copy).unwrap();
    let node = dispatcher.node(&["--model", copy.to_str().unwrap()]);
    let mut session = dispatcher.open().await;
    let mut bytes = fs::read(&copy).unwrap();
    let size = bytes.len() as u64;
    bytes[1_000] ^= 1;
    fs::write(&copy, bytes).unwrap();
    session.say(Say::RangeChallenge(challenge(1, &[(900, 200)]))).await;
    session.say(Say::RangeChallenge(challenge(2, &[(50_000_000, 200)]))).await;
    let proof = proved(&mut session).await;
    assert_eq!(proof.nonce, [2; 16], "the first one is not answered");
    let root = session.hello.claims.weights_root;
    assert!(verify_slice(&root, size, (50_000_000, 200), &proof.slices[0]).is_ok());
    drop(session);
    node.end().await;
}

/// The right name on the wrong file: nothing that it has leads to the root.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_weights_cannot_be_proved() {
    let _one = ONE_AT_A_TIME.lock().await;
    let dispatcher = Dispatcher::new().await;
    let other = gemma_path();
    let node = dispatcher.node(&["--fault", "wrong-weights", "--fault-model", other.to_str().unwrap()]);
    let mut session = dispatcher.greet().await;
    let root = session.hello.claims.weights_root;
    assert_eq!(root, infera_node::weights_root(&model_path()).unwrap());
    let size = fs::metadata(model_path()).unwrap().len();
    let drawn = ranges(&[2; 32], size, 4);
    session.say(Say::RangeChallenge(challenge(1, &drawn))).await;
    let proof = proved(&mut session).await;
    for (slice, range) in proof.slices.iter().zip(drawn) {
        let error = verify_slice(&root, size, range, slice).unwrap_err();
        assert!(matches!(error, AdmissionError::Length { .. } | AdmissionError::Root), "{error}");
    }
    drop(session);
    node.end().await;
}
