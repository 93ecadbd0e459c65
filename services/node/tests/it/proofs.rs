//! Ranges of the model, proved before and after the welcome.

use std::fs;
use std::path::{Path, PathBuf};

use infera_protocol::admission::{AdmissionError, ranges, verify_slice};
use infera_protocol::request::Request;
use infera_runtime::clock;
use infera_wire::v1;
use serde_json::json;

use crate::dispatcher::{Dispatcher, Heard, Say, Session, request};
use crate::session::check_commitment;
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
    assert_eq!(root, infera_node::measure(&model_path()).unwrap().0);
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

/// A model as transformers writes it, with words of one letter.
fn folder(dispatcher: &Dispatcher) -> PathBuf {
    let folder = dispatcher.data().join("model");
    fs::create_dir(&folder).unwrap();
    for name in ["config.json", "model.safetensors"] {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama").join(name);
        fs::copy(fixture, folder.join(name)).unwrap();
    }
    let words = json!({
        "added_tokens": [{ "id": 2, "content": "</s>", "special": true }],
        "normalizer": null,
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "use_regex": true },
        "model": { "type": "BPE", "vocab": { "a": 0, "b": 1 }, "merges": [] },
    });
    fs::write(folder.join("tokenizer.json"), words.to_string()).unwrap();
    fs::write(folder.join("tokenizer_config.json"), r#"{"eos_token": "</s>"}"#).unwrap();
    fs::write(folder.join("chat_template.jinja"), "{{ messages[0].content }}").unwrap();
    folder
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_of_safetensors_answers_and_all_of_it_is_proved() {
    let _one = ONE_AT_A_TIME.lock().await;
    let dispatcher = Dispatcher::new().await;
    let folder = folder(&dispatcher);
    let line = ["--model", folder.to_str().unwrap(), "--slots", "1", "--max-context", "64"];
    let node = dispatcher.node(&line);
    let mut session = dispatcher.open().await;
    let (root, size) = infera_node::measure(&folder).unwrap();
    assert_eq!(session.hello.claims.weights_root, root);

    let asked = Request { model_root: root, prompt: vec![0, 1, 1, 0], ..request("", 8) };
    session.lease(&asked, 1).await;
    let (tokens, commit) = session.committed().await;
    let reveal = session.revealed(&asked, 1).await;
    check_commitment(&session, &asked, &commit, &reveal);
    assert_eq!((reveal.tokens.clone(), tokens.is_empty()), (tokens, false));

    let whole: Vec<(u64, u32)> =
        (0..size).step_by(16_384).map(|at| (at, u32::try_from((size - at).min(16_384)).unwrap())).collect();
    let mut bytes = Vec::new();
    for ranges in whole.chunks(8) {
        session.say(Say::RangeChallenge(challenge(1, ranges))).await;
        for (slice, range) in proved(&mut session).await.slices.iter().zip(ranges) {
            bytes.extend(verify_slice(&root, size, *range, slice).unwrap());
        }
    }
    let has = |name: &str| {
        let file = fs::read(folder.join(name)).unwrap();
        bytes.windows(file.len()).any(|part| part == file)
    };
    for name in
        ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    {
        assert!(has(name), "{name}");
    }

    // The same weights with another epsilon are another model.
    let config = fs::read_to_string(folder.join("config.json")).unwrap();
    fs::write(folder.join("config.json"), config.replace("1e-05", "1e-06")).unwrap();
    assert_ne!(infera_node::measure(&folder).unwrap().0, root);
    session.say(Say::RangeChallenge(challenge(2, &whole[..1]))).await;
    session.say(Say::RangeChallenge(challenge(3, &whole[1..2]))).await;
    assert_eq!(proved(&mut session).await.nonce, [3; 16], "the config is proved no more");
    drop(session);
    node.end().await;
}
