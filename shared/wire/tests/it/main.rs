//! What nodes and queues may send: messages that were valid before somebody changed them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use infera_protocol::{
    bytes::Address,
    evidence::Terms,
    fingerprint::{Entry, Fingerprint},
    identity::Domain,
};
use infera_wire::{Message, convert, v1};
use proptest::prelude::*;

const DOMAIN: Domain = Domain { chain_id: 1, contract: Address([3; 20]) };

fn hello() -> v1::Hello {
    v1::Hello {
        node: vec![1; 32],
        operator: vec![2; 20],
        signer: vec![3; 20],
        binding_expiry_ms: 1_790_000_000_000,
        binding_signature: vec![27; 65],
        release_hash: vec![4; 32],
        weights_root: vec![5; 32],
        class: "exact".into(),
        slots: 4,
        version: "0.1.0".into(),
        signature: vec![6; 64],
    }
}

fn reveal() -> v1::Reveal {
    let print = |token| {
        let entries = vec![Entry { token, logprob: 0xb800 }, Entry { token: token ^ 1, logprob: 0xb900 }];
        Fingerprint::new(entries).unwrap().encode()
    };
    v1::Reveal {
        request_id: vec![7; 16],
        attempt: 1,
        tokens: vec![504, 2],
        fingerprints: [print(504), print(2)].concat(),
        finish: v1::Finish::Eos.into(),
        salt: vec![8; 32],
        statement: vec![],
    }
}

fn submitted() -> v1::RequestSubmitted {
    let sampling =
        v1::Sampling { temperature: 0.7, top_p: 0.9, top_k: 40, min_p: 0.05, ..Default::default() };
    v1::RequestSubmitted {
        request: Some(v1::Request {
            id: vec![7; 16],
            model_root: vec![5; 32],
            prompt: vec![1, 4093, 198],
            sampling: Some(sampling),
            max_tokens: 16,
            stop: vec!["END".into()],
            seed: 7,
            ..Default::default()
        }),
        account: "alice".into(),
        model: "synthetic".into(),
        k: 3,
        reply_to: "gw-1".into(),
        stream: true,
        submitted_at_ms: 1_790_000_000_000,
        deadline_ms: 1_790_000_120_000,
        salt: vec![9; 32],
        bid_micro: 0,
    }
}

fn collected() -> v1::ResultsCollected {
    let slot = |n: u8, outcome: v1::SlotOutcome| v1::SlotResult {
        node: vec![n; 32],
        operator: vec![n; 20],
        outcome: outcome.into(),
        commit: (outcome == v1::SlotOutcome::Revealed).then(|| v1::Commit {
            request_id: vec![7; 16],
            attempt: 1,
            commitment: vec![n; 32],
            signature: vec![n; 64],
            statement: vec![],
        }),
        reveal: (outcome == v1::SlotOutcome::Revealed).then(reveal),
        decline: (outcome == v1::SlotOutcome::Declined).then(|| v1::Decline {
            request_id: vec![7; 16],
            attempt: 1,
            reason: "full".into(),
            signature: vec![n; 64],
        }),
        detail: String::new(),
    };
    v1::ResultsCollected {
        funded: Some(v1::RequestFunded {
            submitted: Some(submitted()),
            held_micro: 120,
            price_micro: 2,
            funded_at_ms: 1_790_000_000_005,
        }),
        attempt: 1,
        round: 1,
        epoch: 179_000_000,
        class: "exact".into(),
        eligible: (1..=4)
            .map(|n| v1::Eligible {
                node: vec![n; 32],
                operator: vec![n; 20],
                weight: 1,
                class: "exact".into(),
                audit_ppm: 50_000,
                trusted: true,
            })
            .collect(),
        dispatcher: vec![0xd; 32],
        assign_proof: vec![0xa; 80],
        post_proof: vec![0xb; 80],
        post_slots: 3,
        slots: vec![
            slot(1, v1::SlotOutcome::Revealed),
            slot(2, v1::SlotOutcome::Declined),
            slot(3, v1::SlotOutcome::Revealed),
            slot(4, v1::SlotOutcome::Revealed),
        ],
        collected_at_ms: 1_790_000_000_900,
        exhausted: false,
        referees: vec![referee()],
    }
}

fn referee() -> v1::RefereeResult {
    let scores = [&[0, 0, 0, 9][..], &reveal().fingerprints].concat();
    let report = v1::SubjectReport { scores, signature: vec![8; 64] };
    v1::RefereeResult {
        node: vec![5; 32],
        operator: vec![5; 20],
        outcome: v1::RefereeOutcome::Reported.into(),
        findings: vec![v1::RefereeFinding { subject: vec![6; 32], report: Some(report) }],
        detail: String::new(),
    }
}

/// Everything that a reader does with the message; whether it took it.
fn read_hello(bytes: &[u8]) -> bool {
    v1::Hello::decode(bytes).is_ok_and(|wire| convert::hello(&wire).is_ok())
}

fn read_reveal(bytes: &[u8]) -> bool {
    v1::Reveal::decode(bytes).is_ok_and(|wire| convert::reveal(&wire).is_ok())
}

fn read_submitted(bytes: &[u8]) -> bool {
    v1::RequestSubmitted::decode(bytes).is_ok_and(|wire| {
        convert::submitted(&wire).is_ok_and(|submitted| {
            // What is taken can be said again and means the same.
            let again = convert::submitted_to_wire(&submitted);
            convert::submitted(&again).is_ok_and(|same| same == submitted)
        })
    })
}

fn read_collected(bytes: &[u8]) -> bool {
    let Ok(wire) = v1::ResultsCollected::decode(bytes) else { return false };
    let terms = Terms {
        calibration: infera_protocol::calibration::Calibration { pairs: Vec::new() },
        similarity_threshold_millionths: 600_000,
        vocab_size: 100,
        end_tokens: vec![2],
    };
    let Ok(evidence) = convert::evidence(&wire, DOMAIN, terms, 1_790_000_001_000) else {
        return false;
    };
    // The signatures are not real, so these say no; they must say it.
    let _ = evidence.conduct(&evidence.decide(true));
    let checks = [
        evidence.check_request(),
        evidence.check_assignment(),
        evidence.check_slots(),
        evidence.check_post(),
        evidence.check_referees(),
    ];
    let _ = (evidence.canonical(), evidence.root(), evidence.commitments_root());
    checks.iter().any(Result::is_ok) || checks.iter().all(Result::is_err)
}

#[test]
fn what_is_changed_below_was_valid() {
    assert!(read_hello(&hello().encode_to_vec()));
    assert!(read_reveal(&reveal().encode_to_vec()));
    assert!(read_submitted(&submitted().encode_to_vec()));
    assert!(read_collected(&collected().encode_to_vec()));
}

/// One change of a message's bytes.
#[derive(Debug, Clone)]
enum Change {
    Set(prop::sample::Index, u8),
    Insert(prop::sample::Index, u8),
    Remove(prop::sample::Index),
    Cut(prop::sample::Index),
    /// A part of the message once more.
    Repeat(prop::sample::Index, usize),
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        let length = bytes.len();
        match self {
            Self::Set(at, byte) => bytes[at.index(length)] = *byte,
            Self::Insert(at, byte) => bytes.insert(at.index(length), *byte),
            Self::Remove(at) => drop(bytes.remove(at.index(length))),
            Self::Cut(at) => bytes.truncate(at.index(length)),
            Self::Repeat(at, many) => {
                let start = at.index(length);
                let part = bytes[start..length.min(start + many)].to_vec();
                bytes.splice(start..start, part);
            }
        }
    }
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let at = || any::<prop::sample::Index>();
    let change = prop_oneof![
        6 => (at(), any::<u8>()).prop_map(|(at, byte)| Change::Set(at, byte)),
        2 => (at(), any::<u8>()).prop_map(|(at, byte)| Change::Insert(at, byte)),
        2 => at().prop_map(Change::Remove),
        1 => at().prop_map(Change::Cut),
        1 => (at(), 1_usize..80).prop_map(|(at, many)| Change::Repeat(at, many)),
    ];
    prop::collection::vec(change, 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn a_changed_message_never_panics(changes in changes()) {
        type Read = fn(&[u8]) -> bool;
        let messages: [(Vec<u8>, Read); 4] = [
            (hello().encode_to_vec(), read_hello),
            (reveal().encode_to_vec(), read_reveal),
            (submitted().encode_to_vec(), read_submitted),
            (collected().encode_to_vec(), read_collected),
        ];
        for (mut bytes, read) in messages {
            for change in &changes {
                change.apply(&mut bytes);
            }
            read(&bytes);
        }
    }
}
