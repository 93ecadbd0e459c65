//! `golden/receipts.json`: receipts with everything that is computed on the way, for whoever writes a checker in another
//! language (docs/src/receipts.md). `cargo test -p infera-protocol --test it vectors -- --ignored` writes it anew.

use infera_protocol::{
    assignment::{Eligible, beta, eligible_root, order_nodes},
    bytes::{Hash32, NodeId, Signature},
    commitment::{commitment, decline_digest},
    document::{Anchor, Document, Outcome, Status, check},
    evidence::{Evidence, Reveal, SlotEvidence},
    hash::keccak,
    identity::{node_id, sign, verify},
    judgement::{is_planted, planted},
    merkle::MerkleTree,
    receipt::{Receipt, account_hash, output_hash, prompt_hash},
    referee::report_digest,
    registry::{Manifest, Registry},
};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

use crate::{
    DOMAIN,
    attempts::{agreed, assigned, audited, drawn, near_tie, place, posted, registries, trusted},
    key,
};

const ABOUT: &str =
    "Test vectors of docs/src/receipts.md. Documents are text: their bytes are what is checked.";

#[derive(Serialize, Deserialize)]
pub struct Vectors {
    pub about: String,
    pub keccak: Vec<HashCase>,
    /// First 8 bytes.
    pub blake3_keyed: Vec<KeyedCase>,
    /// 32-bit floats as canonical JSON writes them.
    pub numbers: Vec<NumberCase>,
    pub signatures: Vec<SignatureCase>,
    pub manifest: Manifest,
    pub registry: Registry,
    /// Former registries, canonical.
    pub former: Vec<String>,
    pub documents: Vec<DocumentCase>,
    pub batch: Batch,
    /// Changed documents, and the checks that fail.
    pub edits: Vec<Edit>,
}

#[derive(Serialize, Deserialize)]
pub struct HashCase {
    input: String,
    output: Hash32,
}

#[derive(Serialize, Deserialize)]
pub struct KeyedCase {
    key: Hash32,
    input: String,
    output: String,
}

#[derive(Serialize, Deserialize)]
pub struct NumberCase {
    bits: String,
    text: String,
}

#[derive(Serialize, Deserialize)]
pub struct SignatureCase {
    why: String,
    key: NodeId,
    digest: Hash32,
    signature: Signature,
    holds: bool,
}

#[derive(Serialize, Deserialize)]
pub struct DocumentCase {
    pub name: String,
    pub document: String,
    /// Exit status of a checker: 0 all holds, 1 failed, 3 only partly checked.
    pub status: u8,
    /// Name and outcome, in order.
    pub checks: Vec<(String, String)>,
    pub receipt: Option<ReceiptValues>,
    pub evidence: Option<EvidenceValues>,
}

#[derive(Serialize, Deserialize)]
pub struct ReceiptValues {
    abi_encode: String,
    leaf: Hash32,
}

#[derive(Serialize, Deserialize)]
pub struct EvidenceValues {
    request_hash: Hash32,
    account_hash: Hash32,
    prompt_hash: Hash32,
    calibration_hash: Hash32,
    eligible_root: Hash32,
    assign_message: Hash32,
    beta: Hash32,
    draw: Vec<NodeId>,
    results: Vec<ResultValues>,
    declines: Vec<Hash32>,
    commitments_root: Hash32,
    post_message: Hash32,
    beta2: Hash32,
    delivery_order: Vec<NodeId>,
    referee_order: Vec<NodeId>,
    reports: Vec<Hash32>,
    /// Output hash of the planted defect of each referee, or none.
    defects: Vec<Option<Hash32>>,
    evidence_root: Hash32,
}

#[derive(Serialize, Deserialize)]
pub struct ResultValues {
    tokens_root: Hash32,
    fingerprint_root: Hash32,
    output_hash: Hash32,
    salted_output_hash: Hash32,
    commitment: Hash32,
}

#[derive(Serialize, Deserialize)]
pub struct Batch {
    leaves: Vec<Hash32>,
    root: Hash32,
    proofs: Vec<Vec<Hash32>>,
}

#[derive(Serialize, Deserialize)]
pub struct Edit {
    of: String,
    /// The first place where this stands
    find: String,
    /// becomes this.
    put: String,
    failed: Vec<String>,
}

/// Name and outcome of every check.
pub fn outcomes(document: &[u8]) -> Vec<(String, String)> {
    let (manifest, history) = trusted();
    let outcome = |outcome: &Outcome| match outcome {
        Outcome::Passed => "passed",
        Outcome::Failed(_) => "failed",
        Outcome::NotChecked(_) => "not_checked",
    };
    let checks = check(document, &manifest, &history).checks;
    checks.iter().map(|c| (c.name.to_owned(), outcome(&c.outcome).to_owned())).collect()
}

pub fn status(checks: &[(String, String)]) -> u8 {
    let some = |wanted: &str| checks.iter().any(|(_, outcome)| outcome == wanted);
    if some("failed") {
        1
    } else if some("not_checked") {
        3
    } else {
        0
    }
}

/// Without values: what is checked alone.
pub fn case(name: &str, bytes: &[u8]) -> DocumentCase {
    let checks = outcomes(bytes);
    DocumentCase {
        name: name.into(),
        document: String::from_utf8(bytes.to_vec()).unwrap(),
        status: status(&checks),
        checks,
        receipt: None,
        evidence: None,
    }
}

fn with_values(name: &str, document: &Document) -> DocumentCase {
    let receipt = &document.receipt;
    DocumentCase {
        receipt: Some(ReceiptValues {
            abi_encode: format!("0x{}", hex::encode(receipt.abi_encode())),
            leaf: receipt.leaf(),
        }),
        evidence: document.evidence.as_ref().map(values),
        ..case(name, &document.canonical().unwrap())
    }
}

fn values(e: &Evidence) -> EvidenceValues {
    let beta2 = e.beta2();
    let revealed = |slot: &SlotEvidence| {
        let Reveal { output, salt } = slot.reveal.as_ref()?;
        Some(ResultValues {
            tokens_root: output.tokens_root(),
            fingerprint_root: output.fingerprint_root(),
            output_hash: output.hash(),
            salted_output_hash: output_hash(&e.salt, output),
            commitment: commitment(&DOMAIN, &place(e, slot.node), output, salt),
        })
    };
    let declined = |slot: &SlotEvidence| {
        let decline = slot.decline.as_ref()?;
        Some(decline_digest(&DOMAIN, &place(e, slot.node), &decline.reason))
    };
    let nodes = |members: Vec<&Eligible>| members.iter().map(|e| e.node).collect::<Vec<_>>();
    let receipt = Receipt::build(e).unwrap();
    let mut members: Vec<NodeId> = receipt.verified.iter().map(|v| v.node).collect();
    members.sort();
    let reports = e.referees.iter().flat_map(|r| r.reports.iter().map(move |report| (r.node, report)));
    let defect = |node: &NodeId| {
        let (_, _, first) = e.answers()[0];
        is_planted(&beta2, node).then(|| planted(&beta2, node, first, e.terms.vocab_size).hash())
    };
    EvidenceValues {
        request_hash: e.request_hash(),
        account_hash: account_hash(&e.salt, &e.account),
        prompt_hash: prompt_hash(&e.salt, &e.request.prompt),
        calibration_hash: e.terms.calibration.hash(),
        eligible_root: eligible_root(&e.eligible),
        assign_message: assigned(e),
        beta: beta(&e.assign_proof),
        draw: nodes(drawn(e)),
        results: e.slots.iter().filter_map(revealed).collect(),
        declines: e.slots.iter().filter_map(declined).collect(),
        commitments_root: e.commitments_root(),
        post_message: posted(e),
        beta2,
        delivery_order: order_nodes(&beta2, &members),
        referee_order: nodes(e.referee_order()),
        reports: reports
            .map(|(node, r)| {
                report_digest(&DOMAIN, &e.request_hash(), e.attempt, &node, &r.subject, &r.scores)
            })
            .collect(),
        defects: e.referees.iter().map(|r| defect(&r.node)).collect(),
        evidence_root: e.root().unwrap(),
    }
}

/// The documents of one batch, and the batch.
pub fn documents() -> (Vec<(&'static str, Document)>, Batch) {
    let evidence = [agreed(), near_tie(0.1), audited()];
    let receipts = evidence.each_ref().map(|e| Receipt::build(e).unwrap());
    let mut leaves: Vec<Hash32> = receipts.iter().map(Receipt::leaf).collect();
    leaves.extend([b"other", b"again"].map(|other| keccak(&[other])));
    let tree = MerkleTree::new(&leaves).unwrap();
    let proofs: Vec<Vec<Hash32>> = (0..leaves.len()).map(|i| tree.proof(i).unwrap()).collect();
    let anchored = |i: usize| Document {
        receipt: receipts[i].clone(),
        status: Status::Anchored,
        anchor: Some(Anchor { sequence: 7, receipts_root: tree.root(), proof: proofs[i].clone() }),
        evidence: Some(evidence[i].clone()),
    };
    let pending = Document { status: Status::Pending, anchor: None, ..anchored(2) };
    let documents = vec![
        ("agreed", anchored(0)),
        ("agreed, as a stranger gets it", Document { evidence: None, ..anchored(0) }),
        ("near-tie", anchored(1)),
        ("audited", anchored(2)),
        ("audited, pending", pending.clone()),
        ("audited, pending, as a stranger gets it", Document { evidence: None, ..pending }),
    ];
    (documents, Batch { root: tree.root(), leaves, proofs })
}

fn edits(documents: &[(&'static str, Document)]) -> Vec<Edit> {
    let table = [
        ("agreed", "\"tokens\":[50,51,2]", "\"tokens\":[50,52,2]"),
        ("agreed", "\"amount_micro\":18", "\"amount_micro\":19"),
        ("agreed", "\"sequence\":7", "\"sequence\":8"),
        ("agreed", "\"outcome\":\"busy\"", "\"outcome\":\"no_commit\""),
        ("agreed", "out of memory", "out of monkey"),
        ("agreed", "\"millionths\":310000", "\"millionths\":310001"),
        ("agreed", "\"account\":\"alice\"", "\"account\":\"alicf\""),
        ("agreed", "\"temperature\":0.7", "\"temperature\":0.70"),
        ("agreed", "\"temperature\":0.7", "\"temperature\":0.6999999"),
        ("agreed", "\"epoch\":178000000,\"attempt\":1", "\"attempt\":1,\"epoch\":178000000"),
        ("agreed", "{\"receipt\"", "{ \"receipt\""),
        ("agreed", "\"attempt\":1,", "\"attempt\":1,\"extra\":1,"),
        ("agreed", "\"attempt\":1,", "\"attempt\":1,\"attempt\":1,"),
        ("agreed", "\"seed\":5", "\"seed\":5,\"grammar\":null"),
        ("agreed", "é", "\\u00e9"),
        ("near-tie", "\"millionths\":900000", "\"millionths\":499999"),
        ("agreed, as a stranger gets it", "\"price_micro\":3", "\"price_micro\":4"),
        ("agreed, as a stranger gets it", "\"asked_k\":4", "\"asked_k\":3"),
        ("audited, pending, as a stranger gets it", "\"decided_at_ms\":1", "\"decided_at_ms\":-1"),
    ];
    let text = |of: &str| {
        let (_, document) = documents.iter().find(|(name, _)| *name == of).unwrap();
        String::from_utf8(document.canonical().unwrap()).unwrap()
    };
    let edit = |of: &str, find: &str, put: &str| {
        let text = text(of);
        assert!(text.contains(find), "{of}: {find}");
        let failed = failed(&outcomes(text.replacen(find, put, 1).as_bytes()));
        Edit { of: of.into(), find: find.into(), put: put.into(), failed }
    };
    // One digit of a hash, a proof or a signature.
    let digits = [
        "request_hash",
        "receipts_root",
        "proof\":[",
        "commitments_root",
        "signature",
        "assign_proof",
        "salt",
    ];
    let digit = |name: &str| {
        let text = text("agreed");
        let start = text.find(&format!("\"{name}")).unwrap();
        let end = start + text[start..].find("0x").unwrap() + 34;
        let find = &text[start..end];
        let put = if find.ends_with('1') { "2" } else { "1" };
        edit("agreed", find, &format!("{}{put}", &find[..find.len() - 1]))
    };
    let digits = digits.map(digit);
    table.into_iter().map(|(of, find, put)| edit(of, find, put)).chain(digits).collect()
}

fn failed(checks: &[(String, String)]) -> Vec<String> {
    checks.iter().filter(|(_, outcome)| outcome == "failed").map(|(name, _)| name.clone()).collect()
}

fn numbers() -> Vec<NumberCase> {
    let values = [
        0.0,
        -0.0,
        1.0,
        -2.0,
        0.1,
        0.7,
        0.95,
        0.3,
        1.0 / 3.0,
        100.0,
        -99.99,
        33.333_332,
        1e-4,
        1e-5,
        1.5e-5,
        1e-6,
        1.5e-6,
        1e-7,
        -1.25e-7,
        5.684_342e-14,
        9.860_761e-32,
        f32::MIN_POSITIVE,
        f32::from_bits(1),
        0.999_999_94,
        1.000_000_1,
        16.000_002,
    ];
    let powers = (-40..7).map(|n| 2_f32.powi(n));
    values
        .into_iter()
        .chain(powers)
        .map(|value| NumberCase {
            bits: format!("{:08x}", value.to_bits()),
            text: serde_json::to_string(&value).unwrap(),
        })
        .collect()
}

/// The order of the group, little endian (RFC 8032, section 5.1).
const ORDER: &str = "edd3f55c1a631258d69cf7a2def9de1400000000000000000000000000000010";

fn signatures() -> Vec<SignatureCase> {
    let digest = keccak(&[b"a digest"]);
    let (node, good) = (node_id(&key(1)), sign(&key(1), &digest));
    let order = hex::decode(ORDER).unwrap();
    let mut above = good;
    let mut carry = 0;
    for (byte, added) in above.0[32..].iter_mut().zip(order) {
        let sum = u16::from(*byte) + u16::from(added) + carry;
        (*byte, carry) = ((sum & 0xff) as u8, sum >> 8);
    }
    let hex64 = |text: &str| Signature::try_from(hex::decode(text).unwrap().as_slice()).unwrap();
    let id = |text: &str| NodeId::try_from(hex::decode(text).unwrap().as_slice()).unwrap();
    let zero = "00".repeat(31);
    let neutral = format!("01{zero}");
    let case = |why: &str, key, digest, signature| {
        let holds = verify(&key, &digest, &signature).is_ok();
        SignatureCase { why: why.into(), key, digest, signature, holds }
    };
    let mut cases = vec![
        case("a signature", node, digest, good),
        case("of another digest", node, keccak(&[b"another digest"]), good),
        case("S is above the order of the group", node, digest, above),
        case("key and R are the neutral element", id(&neutral), digest, hex64(&format!("{neutral}00{zero}"))),
        case(
            "the neutral element in a second encoding",
            id(&format!("ee{}7f", "ff".repeat(30))),
            digest,
            hex64(&format!("{neutral}00{zero}")),
        ),
        case("a key that is no point", id(&format!("02{zero}")), digest, good),
    ];
    cases.extend(MIXED_ORDER.map(|(why, key, signature)| case(why, id(key), digest, hex64(signature))));
    cases
}

/// Made with `receipts_crypto.py`: the equation holds times the cofactor 8, and not without it.
const MIXED_ORDER: [(&str, &str, &str); 2] = [
    (
        "a key of mixed order: holds only with the cofactor",
        "6a84d583f06569edb3f5ed77df65544b27d6948b4f0b2cb76f33dd8413b20719",
        "6b12d4d055bd943206034b402ebe601bf715a3bbe772cdac6ab65b94d9a07bf6\
         ee81b4ac951397ed0f9ecc6c9e6f35c927cf81bf7409ba2239135f922f46da05",
    ),
    (
        "R of mixed order: holds only with the cofactor",
        "7767a3242dc9b58bbc68488c1265cc6cc5f26c6f3c88a5d55e901b0734dca572",
        "e9c6aa47f2c1dc30d08679feb45162ca38dfa1e557af575b803e03f30110eff5\
         c912be4ebecf4ffd0920ab68e7b2133fffadf737562fe36f58761ebc8c1c420c",
    ),
];

fn vectors() -> Vectors {
    let (documents, batch) = documents();
    let (manifest, _) = trusted();
    let (first, current) = registries();
    let hash = |input: String| HashCase { output: keccak(&[input.as_bytes()]), input };
    let keyed = |n: u8, input: &str| {
        let mut output = [0; 8];
        blake3::Hasher::new_keyed(&[n; 32]).update(input.as_bytes()).finalize_xof().fill(&mut output);
        KeyedCase { key: Hash32([n; 32]), input: input.into(), output: format!("0x{}", hex::encode(output)) }
    };
    Vectors {
        about: ABOUT.into(),
        keccak: ["".into(), "abc".into(), "a".repeat(135), "a".repeat(136), "a".repeat(300)].map(hash).into(),
        blake3_keyed: vec![
            keyed(0, ""),
            keyed(1, "audit"),
            keyed(255, &"a".repeat(32)),
            keyed(2, &"b".repeat(64)),
        ],
        numbers: numbers(),
        signatures: signatures(),
        manifest,
        registry: current,
        former: vec![serde_json::to_string(&first).unwrap()],
        edits: edits(&documents),
        documents: documents.iter().map(|(name, document)| with_values(name, document)).collect(),
        batch,
    }
}

pub fn golden() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

pub fn text(vectors: &Vectors) -> String {
    serde_json::to_string_pretty(vectors).unwrap() + "\n"
}

#[test]
#[ignore = "writes tests/golden/receipts.json"]
fn vectors_are_written() {
    std::fs::write(golden().join("receipts.json"), text(&vectors())).unwrap();
}

/// A change of the format is a change of this file.
#[test]
fn vectors_are_what_the_code_gives() {
    let committed = std::fs::read_to_string(golden().join("receipts.json")).unwrap();
    let now = text(&vectors());
    let differs = committed.lines().zip(now.lines()).position(|(a, b)| a != b);
    assert!(committed == now, "receipts.json differs from line {:?} on", differs.map(|line| line + 1));
}

#[test]
fn vectors_show_every_outcome() {
    let (documents, _) = documents();
    let status = |name| {
        let (_, document) = documents.iter().find(|(known, _)| *known == name).unwrap();
        self::status(&outcomes(&document.canonical().unwrap()))
    };
    assert_eq!([status("agreed"), status("audited")], [0, 0]);
    assert_eq!([status("near-tie"), status("audited, pending")], [3, 3]);
    assert_eq!(status("agreed, as a stranger gets it"), 3);
}
