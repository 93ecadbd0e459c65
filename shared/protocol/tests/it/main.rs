//! A whole request's evidence, built with real keys, and everything that may be done to its receipt.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use ed25519_dalek::SigningKey;
mod attempts;
mod odd;
mod referees;
mod registry;
mod strangers;
mod vectors;

use infera_protocol::{
    assignment::{Eligible, assign_message, beta, draw, eligible_root, freeze, post_message},
    bytes::{Address, Hash32, NodeId, VrfProof},
    calibration::{Bounds, Calibration, Pair},
    commitment::{Slot, commitment},
    document::{Anchor, Document, Outcome, Status, check},
    evidence::{
        Evidence, RefereeEvidence, RefereeOutcome, Reveal, SignedCommitment, SlotEvidence, SlotOutcome,
        SubjectReport, Terms,
    },
    fingerprint::{Entry, Fingerprint},
    identity::{Domain, node_id, sign},
    merkle::MerkleTree,
    receipt::{Receipt, UnpaidReason},
    referee::{Report, TokenScore, report_digest},
    registry::{Manifest, Model, Registry},
    request::{Finish, Output, Request},
    sampling::SamplingParams,
    vrf::VrfSecret,
};
use uuid::Uuid;

const DOMAIN: Domain = Domain { chain_id: 31_337, contract: Address([0xc0; 20]) };

fn registry() -> Registry {
    Registry {
        models: vec![Model {
            id: "tiny".into(),
            weights_root: Hash32([7; 32]),
            weights_bytes: 1 << 20,
            tokenizer_hash: Hash32([8; 32]),
            template_hash: Hash32([9; 32]),
            end_tokens: vec![2],
            vocab_size: 100,
            context_length: 128,
            similarity_threshold_millionths: 500_000,
            price_micro: 3,
            created_secs: 0,
        }],
        releases: Vec::new(),
        calibration: Calibration {
            pairs: vec![Pair {
                classes: ["exact".into(), "exact".into()],
                bounds: Bounds {
                    near_tie_milli: 300,
                    fingerprint_milli: 100,
                    margin_milli: 500,
                    clip_milli: 200,
                    mean_micro: 50_000,
                    drift_micro: 10_000,
                    drift_limit_micro: 100_000,
                },
            }],
        },
        replaces: None,
    }
}

fn dispatcher() -> VrfSecret {
    VrfSecret::from_seed(&[77; 32]).unwrap()
}

fn manifest() -> Manifest {
    Manifest {
        network: "test".into(),
        domain: DOMAIN,
        rpc_url: "http://127.0.0.1:1".into(),
        dispatchers: vec![dispatcher().key()],
        registry_hash: registry().hash().unwrap(),
    }
}

fn output(tokens: &[u32]) -> Output {
    let fingerprints = tokens
        .iter()
        .flat_map(|&token| {
            let logprob = half::f16::from_f32(-0.25).to_bits();
            Fingerprint::new(vec![Entry { token, logprob }]).unwrap().encode()
        })
        .collect();
    Output { tokens: tokens.to_vec(), fingerprints, finish: Finish::Eos }
}

/// Three nodes answer; the node whose index in the draw is `outlier` answers something else.
fn evidence(outlier: Option<usize>) -> Evidence {
    evidence_of(3, 4, 8, outlier, 0)
}

/// As above, with what a dishonest dispatcher may sign.
fn evidence_of(k: u32, epoch: u64, max_tokens: u32, outlier: Option<usize>, audit_ppm: u32) -> Evidence {
    let keys = keys();
    let eligible = freeze(
        keys.iter()
            .enumerate()
            .map(|(i, key)| Eligible {
                node: node_id(key),
                operator: Address([u8::try_from(i + 1).unwrap(); 20]),
                class: "exact".into(),
                weight: 1,
                audit_ppm,
                trusted: false,
            })
            .collect(),
    );
    let registry = registry();
    let mut evidence = Evidence {
        domain: DOMAIN,
        request: Request {
            id: Uuid::from_u128(0x0192_0000_0000_7000_8000_0000_0000_0001),
            model_root: Hash32([7; 32]),
            prompt: vec![10, 11, 12],
            sampling: SamplingParams::default(),
            max_tokens,
            stop: vec![],
            seed: 5,
            grammar: None,
        },
        account: "alice".into(),
        model: "tiny".into(),
        salt: Hash32([5; 32]),
        k,
        submitted_at_ms: 41_000,
        decided_at_ms: 42_000,
        attempt: 1,
        epoch,
        class: "exact".into(),
        price_micro: 3,
        terms: Terms::of(&registry, &registry.models[0]),
        eligible,
        dispatcher: dispatcher().key(),
        assign_proof: VrfProof::ZERO,
        post_proof: VrfProof::ZERO,
        post_slots: 3,
        slots: vec![],
        referees: vec![],
        unfit: vec![],
        similarities: vec![],
    };
    let hash = evidence.request_hash();
    let root = eligible_root(&evidence.eligible);
    let assign = assign_message(&DOMAIN, evidence.request.id, &hash, k, 1, epoch, &root);
    evidence.assign_proof = dispatcher().prove(&assign);
    for (i, drawn) in draw(&beta(&evidence.assign_proof), &evidence.eligible).iter().take(3).enumerate() {
        let key = keys.iter().find(|k| node_id(k) == drawn.node).unwrap();
        let output = if outlier == Some(i) { output(&[60, 2]) } else { output(&[50, 51, 2]) };
        let salt = Hash32([u8::try_from(i).unwrap(); 32]);
        let place = Slot { request_hash: hash, attempt: 1, node: drawn.node };
        let digest = commitment(&DOMAIN, &place, &output, &salt);
        evidence.slots.push(SlotEvidence {
            node: drawn.node,
            operator: drawn.operator,
            outcome: SlotOutcome::Revealed,
            commitment: Some(SignedCommitment { digest, signature: sign(key, &digest) }),
            reveal: Some(Reveal { output, salt }),
            decline: None,
        });
    }
    let post = post_message(&DOMAIN, &hash, 1, &evidence.commitments_root());
    evidence.post_proof = dispatcher().prove(&post);
    if outlier.is_some() {
        // Inequality is refereed: the only node that is left finds `50 51 2` right and `60 2` wrong.
        evidence.referees = vec![referee(&evidence, |tokens| if tokens[0] == 50 { 0 } else { 9_000_000 })];
    }
    evidence
}

fn keys() -> Vec<SigningKey> {
    (1..=4).map(key).collect()
}

fn key(n: u8) -> SigningKey {
    SigningKey::from_bytes(&[n; 32])
}

fn key_of(node: NodeId) -> SigningKey {
    (1..=12).map(key).find(|key| node_id(key) == node).unwrap()
}

/// The next referee of the evidence, who finds `margin_micro` of every answer's tokens at its first one.
fn referee(evidence: &Evidence, margin_micro: impl Fn(&[u32]) -> u32) -> RefereeEvidence {
    let next = evidence.referee_order()[evidence.referees.len()].clone();
    let key = key_of(next.node);
    let asked: Vec<Hash32> = evidence.answers().iter().map(|(hash, ..)| *hash).collect();
    let fingerprint = Fingerprint::new(vec![Entry { token: 1, logprob: 0 }]).unwrap();
    let reports = evidence.subjects(&next.node, &asked).into_iter().map(|output| {
        let score = |i| TokenScore {
            margin_micro: if i == 0 { margin_micro(&output.tokens) } else { 0 },
            fingerprint: fingerprint.clone(),
        };
        let scores = Report { scores: (0..output.tokens.len()).map(score).collect() }.encode();
        let subject = output.hash();
        let digest = report_digest(&DOMAIN, &evidence.request_hash(), 1, &next.node, &subject, &scores);
        SubjectReport { subject, scores, signature: sign(&key, &digest) }
    });
    RefereeEvidence {
        node: next.node,
        operator: next.operator,
        outcome: RefereeOutcome::Reported,
        reports: reports.collect(),
    }
}

fn document(evidence: Evidence) -> Document {
    let receipt = Receipt::build(&evidence).unwrap();
    let leaves = [Hash32([1; 32]), receipt.leaf(), Hash32([200; 32])];
    let tree = MerkleTree::new(&leaves).unwrap();
    Document {
        receipt,
        status: Status::Anchored,
        anchor: Some(Anchor { sequence: 1, receipts_root: tree.root(), proof: tree.proof(1).unwrap() }),
        evidence: Some(evidence),
    }
}

fn failures(bytes: &[u8]) -> Vec<&'static str> {
    check(bytes, &manifest(), &registry().into())
        .checks
        .iter()
        .filter(|c| matches!(c.outcome, Outcome::Failed(_)))
        .map(|c| c.name)
        .collect()
}

#[test]
fn an_honest_document_passes_every_check() {
    let bytes = document(evidence(None)).canonical().unwrap();
    let report = check(&bytes, &manifest(), &registry().into());
    assert!(report.checks.iter().all(|c| c.outcome == Outcome::Passed), "{:?}", report.checks);
    assert_eq!(report.checks.len(), 21);
    assert!(report.complete());
}

#[test]
fn no_byte_can_be_changed() {
    let whole = document(evidence(None));
    let bytes = whole.canonical().unwrap();
    for document in [
        whole.clone(),
        // The leaf holds every field of the receipt, with evidence or without.
        Document { evidence: None, ..whole.clone() },
        Document { status: Status::Pending, anchor: None, ..whole.clone() },
    ] {
        let bytes = document.canonical().unwrap();
        // Only the batch's number is not in the leaf: what stands under it is compared on the chain.
        let sequence = find(&bytes, "\"sequence\":").map(|at| at + 11);
        flips_fail(&bytes, (0..bytes.len()).filter(|at| Some(*at) != sequence));
    }
    let mut longer = bytes.clone();
    longer.push(b'\n');
    assert_eq!(failures(&longer), ["encoding"]);
    assert_eq!(failures(&bytes[..bytes.len() - 1]), ["encoding"]);
}

fn find(bytes: &[u8], text: &str) -> Option<usize> {
    bytes.windows(text.len()).position(|window| window == text.as_bytes())
}

fn flips_fail(bytes: &[u8], places: impl Iterator<Item = usize>) {
    for at in places {
        for change in [1_u8, 2, 32] {
            let mut changed = bytes.to_vec();
            changed[at] ^= change;
            assert!(!failures(&changed).is_empty(), "byte {at} ({:?}) xor {change}", bytes[at] as char);
        }
    }
}

#[test]
fn without_evidence_and_anchor_the_covered_fields_hold() {
    let whole = document(evidence(Some(1)));
    let document = Document { status: Status::Pending, anchor: None, evidence: None, ..whole };
    let bytes = document.canonical().unwrap();
    let report = check(&bytes, &manifest(), &registry().into());
    assert!(!report.failed() && !report.complete(), "{:?}", report.checks);
    let fields = serde_json::to_value(&document.receipt).unwrap();
    for name in [
        "id",
        "chain_id",
        "contract",
        "request_hash",
        "epoch",
        "attempt",
        "model_root",
        "calibration_hash",
        "asked_k",
        "k",
        "prompt_tokens",
        "output_tokens",
        "price_micro",
        "charged_micro",
        "dispatcher",
        "eligible_root",
        "commitments_root",
        "assign_proof",
        "post_proof",
        "payments",
    ] {
        let start = find(&bytes, &format!("\"{name}\":")).unwrap();
        // Of `payments` the order of keys is not kept by a generic value, its length is.
        let end = start + name.len() + 3 + serde_json::to_string(&fields[name]).unwrap().len();
        flips_fail(&bytes, start..end);
    }
}

#[test]
fn a_receipt_alone_must_be_consistent() {
    type Change = fn(&mut Receipt);
    let changes: [Change; 8] = [
        |r| r.verified.truncate(1),
        |r| r.verified[1].node = r.verified[0].node,
        |r| r.unpaid[0].operator = r.verified[0].operator,
        |r| r.payments.swap(0, 1),
        |r| {
            r.payments[0].amount_micro -= 1;
            r.payments[1].amount_micro += 1;
        },
        |r| r.asked_k = 2,
        |r| r.k = 4,
        |r| r.output_tokens += 1,
    ];
    for (i, change) in changes.iter().enumerate() {
        let mut document =
            Document { status: Status::Pending, anchor: None, evidence: None, ..document(evidence(Some(1))) };
        change(&mut document.receipt);
        let failed = failures(&document.canonical().unwrap());
        assert!(failed.contains(&"quorum"), "change {i}: {failed:?}");
    }
}

#[test]
fn what_a_dispatcher_may_not_sign_is_refused() {
    let table = [
        ("request", evidence_of(1, 4, 8, None, 0)),
        ("request", evidence_of(8, 4, 8, None, 0)),
        ("request", evidence_of(3, 3, 8, None, 0)),
        ("request", evidence_of(3, 5, 8, None, 0)),
        // Three tokens were answered.
        ("commitments and reveals", evidence_of(3, 4, 2, None, 0)),
    ];
    for (expected, forged) in table {
        if let Ok(receipt) = Receipt::build(&forged) {
            let document =
                Document { receipt, status: Status::Pending, anchor: None, evidence: Some(forged) };
            let failed = failures(&document.canonical().unwrap());
            assert!(failed.contains(&expected), "{expected}: {failed:?}");
            assert!(!failed.contains(&"assignment proof") && !failed.contains(&"draw"), "{failed:?}");
        } else {
            assert!(forged.check_request().is_err());
        }
    }
    // k can't be lowered afterwards: it is signed.
    let mut lowered = evidence_of(7, 4, 8, None, 0);
    lowered.k = 3;
    assert!(lowered.check_assignment().is_err());
}

#[test]
fn a_result_that_breaks_the_limits_is_a_mismatch() {
    let mut evidence = evidence_of(3, 4, 2, None, 0);
    assert!(evidence.check_slots().is_err());
    for slot in &mut evidence.slots {
        slot.outcome = SlotOutcome::Mismatch;
    }
    evidence.check_slots().unwrap();
    let mut honest = crate::evidence(None);
    honest.slots[0].outcome = SlotOutcome::Mismatch;
    assert!(honest.check_slots().is_err());
}

#[test]
fn an_outlier_is_named_and_not_paid() {
    let evidence = evidence(Some(1));
    let outlier = evidence.slots[1].node;
    let receipt = Receipt::build(&evidence).unwrap();
    assert_eq!(receipt.verified.len(), 2);
    assert_eq!(receipt.unpaid.len(), 1);
    assert_eq!((receipt.unpaid[0].node, receipt.unpaid[0].reason), (outlier, UnpaidReason::Outlier));
    // price 3 x (3 prompt + 3 output tokens) for each of the two.
    assert_eq!(receipt.charged_micro, 36);
    assert!(receipt.payments.iter().all(|p| p.amount_micro == 18));
    assert!(failures(&document(evidence).canonical().unwrap()).is_empty());
}

#[test]
fn every_forgery_is_caught_by_its_own_check() {
    type Forgery = (&'static str, fn(&mut Evidence));
    let forgeries: [Forgery; 7] = [
        ("draw", |e| e.slots.swap(0, 1)),
        ("draw", |e| e.eligible.reverse()),
        ("assignment proof", |e| e.assign_proof = dispatcher().prove(&Hash32::ZERO)),
        ("commitments and reveals", |e| {
            e.slots[0].commitment.as_mut().unwrap().signature = infera_protocol::bytes::Signature([1; 64]);
        }),
        ("commitments and reveals", |e| {
            e.slots[2].reveal.as_mut().unwrap().salt = Hash32([9; 32]);
        }),
        ("post draw", |e| e.post_proof = dispatcher().prove(&Hash32::ZERO)),
        ("dispatcher", |e| e.dispatcher = VrfSecret::from_seed(&[3; 32]).unwrap().key()),
    ];
    for (expected, forge) in forgeries {
        let mut forged = evidence(None);
        forge(&mut forged);
        // The forger rebuilds the receipt, so that its hashes fit.
        let bytes = document(forged).canonical().unwrap();
        assert!(failures(&bytes).contains(&expected), "{expected}: {:?}", failures(&bytes));
    }
}

#[test]
fn a_receipt_without_a_majority_does_not_exist() {
    let mut evidence = evidence(Some(0));
    evidence.slots[2].outcome = SlotOutcome::NoReveal;
    evidence.slots[2].reveal = None;
    assert!(Receipt::build(&evidence).is_err());
}

#[test]
fn another_network_is_refused() {
    let bytes = document(evidence(None)).canonical().unwrap();
    let mut elsewhere = manifest();
    elsewhere.domain.chain_id = 1;
    let report = check(&bytes, &elsewhere, &registry().into());
    assert!(report.failed());
    let mut dearer = registry();
    dearer.models[0].price_micro = 4;
    assert!(check(&bytes, &manifest(), &dearer.into()).failed());
}
