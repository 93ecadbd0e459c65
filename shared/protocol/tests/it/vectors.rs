//! `golden/receipts.json`: receipts with everything that is computed on the way, for whoever writes a checker in another
//! language (docs/src/receipts.md). `cargo test -p infera-protocol --test it vectors -- --ignored` writes it anew.

use infera_protocol::{
    agreement::Decision,
    assignment::{
        ALWAYS_PPM, Eligible, MIXED_CLASS, assign_message, beta, draw, eligible_root, freeze, of_class,
        order_nodes, post_message,
    },
    bytes::{Address, Hash32, NodeId, Signature, VrfProof},
    calibration::{Bounds, Calibration, Pair},
    commitment::{Slot, commitment, decline_digest},
    document::{Anchor, Document, Outcome, Status, check},
    evidence::{
        Evidence, RefereeOutcome, Reveal, SignedCommitment, SignedDecline, Similarity, SlotEvidence,
        SlotOutcome, Terms,
    },
    fingerprint::{Entry, Fingerprint},
    grammar::{Grammar, GrammarKind},
    hash::keccak,
    identity::{node_id, sign, verify},
    judgement::{is_planted, planted},
    merkle::MerkleTree,
    receipt::{Receipt, account_hash, output_hash, prompt_hash},
    referee::report_digest,
    registry::{History, Manifest, Registry, Replaced},
    request::{Finish, Output, Request},
    sampling::{SamplingParams, gumbel},
};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use uuid::Uuid;

use crate::{DOMAIN, dispatcher, key, key_of, manifest, output, referee, registry};

/// 2026-05-28, in epoch 178,000,000.
const SUBMITTED_MS: i64 = 1_780_000_001_000;
const EPOCH: u64 = 178_000_000;
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

/// The registry of that time, and the one in force now.
pub fn registries() -> (Registry, Registry) {
    let bounds = |near_tie_milli| Bounds { near_tie_milli, ..registry().calibration.pairs[0].bounds };
    let pair = |a: &str, b: &str, near| Pair { classes: [a.into(), b.into()], bounds: bounds(near) };
    let pairs = vec![pair("exact", "exact", 300), pair("exact", "fast", 400), pair("fast", "fast", 300)];
    let first =
        Registry { calibration: Calibration { pairs }, releases: vec![Hash32([6; 32])], ..registry() };
    let mut dearer = first.clone();
    dearer.models[0].price_micro = 4;
    dearer.replaces =
        Some(Replaced { registry_hash: first.hash().unwrap(), at_ms: SUBMITTED_MS + 86_400_000 });
    (first, dearer)
}

pub fn trusted() -> (Manifest, History) {
    let (first, current) = registries();
    let manifest = Manifest { registry_hash: current.hash().unwrap(), ..manifest() };
    let history = History::follow(current, |_| Ok(Some(serde_json::to_vec(&first).unwrap()))).unwrap();
    (manifest, history)
}

/// Nodes of twelve keys: two of one operator, one that has no weight, one of another class.
fn everybody(audit_ppm: u32) -> Vec<Eligible> {
    let member = |n: u8| Eligible {
        node: node_id(&key(n)),
        operator: Address([if n == 10 { 1 } else { n }; 20]),
        class: if n == 12 { "fast" } else { "exact" }.into(),
        weight: if n == 11 { 0 } else { u32::from(n) },
        audit_ppm,
        trusted: n.is_multiple_of(2),
    };
    freeze((1..=12).map(member).collect())
}

fn request(sampling: SamplingParams) -> Request {
    Request {
        id: Uuid::from_u128(0x019e_6d2e_a3e8_7000_8000_0000_0000_0001),
        model_root: Hash32([7; 32]),
        prompt: vec![10, 11, 12],
        sampling,
        max_tokens: 8,
        stop: vec![],
        seed: 5,
        grammar: None,
    }
}

/// An attempt whose nodes are drawn.
fn start(request: Request, k: u32, epoch: u64, class: &str, eligible: Vec<Eligible>) -> Evidence {
    let (first, _) = registries();
    let submitted_at_ms = SUBMITTED_MS + i64::try_from(epoch - EPOCH).unwrap() * 10_000;
    let mut evidence = Evidence {
        domain: DOMAIN,
        request,
        account: "alice".into(),
        model: "tiny".into(),
        salt: Hash32([5; 32]),
        k,
        submitted_at_ms,
        decided_at_ms: submitted_at_ms + 1_500,
        attempt: 1,
        epoch,
        class: class.into(),
        price_micro: 3,
        terms: Terms::of(&first, &first.models[0]),
        eligible,
        dispatcher: dispatcher().key(),
        assign_proof: VrfProof::ZERO,
        post_proof: VrfProof::ZERO,
        post_slots: 0,
        slots: vec![],
        referees: vec![],
        unfit: vec![],
        similarities: vec![],
    };
    evidence.assign_proof = dispatcher().prove(&assigned(&evidence));
    evidence
}

fn assigned(e: &Evidence) -> Hash32 {
    let root = eligible_root(&e.eligible);
    assign_message(&DOMAIN, e.request.id, &e.request_hash(), e.k, e.attempt, e.epoch, &root)
}

fn posted(e: &Evidence) -> Hash32 {
    post_message(&DOMAIN, &e.request_hash(), e.attempt, &e.commitments_root())
}

fn drawn(e: &Evidence) -> Vec<&Eligible> {
    draw(&beta(&e.assign_proof), of_class(&e.eligible, &e.class))
}

fn place(e: &Evidence, node: NodeId) -> Slot {
    Slot { request_hash: e.request_hash(), attempt: e.attempt, node }
}

/// What each node of the draw does: answers, or something else.
fn results(e: &mut Evidence, parts: &[Result<Output, SlotOutcome>]) {
    let drawn: Vec<Eligible> = drawn(e).into_iter().cloned().collect();
    for (i, (drawn, part)) in drawn.iter().zip(parts).enumerate() {
        let (key, place) = (key_of(drawn.node), place(e, drawn.node));
        let mut slot = SlotEvidence {
            node: drawn.node,
            operator: drawn.operator,
            outcome: SlotOutcome::Revealed,
            commitment: None,
            reveal: None,
            decline: None,
        };
        match part {
            Ok(output) => {
                let salt = Hash32([u8::try_from(i).unwrap(); 32]);
                let digest = commitment(&DOMAIN, &place, output, &salt);
                slot.commitment = Some(SignedCommitment { digest, signature: sign(&key, &digest) });
                slot.reveal = Some(Reveal { output: output.clone(), salt });
            }
            Err(SlotOutcome::Declined) => {
                let reason = "out of memory \"é\"\n".to_owned();
                let signature = sign(&key, &decline_digest(&DOMAIN, &place, &reason));
                slot.outcome = SlotOutcome::Declined;
                slot.decline = Some(SignedDecline { reason, signature });
            }
            Err(outcome) => slot.outcome = *outcome,
        }
        e.slots.push(slot);
    }
    e.post_slots = u32::try_from(e.slots.len()).unwrap();
    e.post_proof = dispatcher().prove(&posted(e));
}

/// Four agree on three answers of four: one declines, one is busy, one is an outlier that two referees deny, one referee
/// is silent.
pub fn agreed() -> Evidence {
    let sampling = SamplingParams { temperature: 0.7, top_p: 0.95, min_p: 0.01, ..SamplingParams::default() };
    let mut e = start(request(sampling), 4, EPOCH, "exact", everybody(50_000));
    let (good, bad) = (output(&[50, 51, 2]), output(&[60, 2]));
    let similarity = Similarity { answers: sorted(good.hash(), bad.hash()), millionths: 310_000 };
    let [declined, busy] = [SlotOutcome::Declined, SlotOutcome::Busy].map(Err);
    results(&mut e, &[declined, Ok(good.clone()), busy, Ok(good.clone()), Ok(bad), Ok(good)]);
    e.similarities = vec![similarity];
    while !e.no_more_referees() {
        let mut next = referee(&e, |tokens| if tokens[0] == 50 { 0 } else { 9_000_000 });
        if e.referees.is_empty() {
            next.outcome = RefereeOutcome::NoReport;
            next.reports.clear();
        }
        e.referees.push(next);
    }
    e
}

fn sorted(a: Hash32, b: Hash32) -> [Hash32; 2] {
    if a <= b { [a, b] } else { [b, a] }
}

/// Two texts that part at a near-tie: the scores of the two tokens differ by some `gap` logits.
pub fn near_tie(gap: f64) -> Evidence {
    let sampling = SamplingParams {
        temperature: 0.7,
        frequency_penalty: 0.5,
        presence_penalty: 0.25,
        logit_bias: [(60, 1.5), (61, -0.25), (99, 0.1)].into(),
        ..SamplingParams::default()
    };
    let mut request = request(sampling);
    request.stop = vec!["\n\"é\"".into(), "END".into()];
    request.grammar = Some(Grammar { kind: GrammarKind::JsonSchema, text: "{\"type\": \"string\"}".into() });
    // Token 60 was emitted once.
    let first = -1.0;
    let noise = |seed, token| 0.7 * gumbel(seed, 2, token);
    let second = |seed| first + 1.5 - 0.75 + noise(seed, 60) + 0.25 - noise(seed, 61) - gap;
    request.seed = (1..).find(|seed| (-5.0..-1.0).contains(&(second(*seed) + gap))).unwrap();
    let at_parting = [(60, first), (61, second(request.seed))]
        .map(|(token, logprob)| Entry { token, logprob: half::f16::from_f64(logprob).to_bits() });
    let text = |tokens: &[u32], own: usize| {
        let print = |(i, token): (usize, &u32)| {
            let alone = vec![Entry { token: *token, logprob: 0 }];
            let both = vec![at_parting[own], at_parting[1 - own]];
            Fingerprint::new(if i == 2 { both } else { alone }).unwrap().encode()
        };
        let fingerprints = tokens.iter().enumerate().flat_map(print).collect();
        Output { tokens: tokens.to_vec(), fingerprints, finish: Finish::Stop }
    };
    let (a, b) = (text(&[50, 60, 60, 5], 0), text(&[50, 60, 61, 6, 7], 1));
    let similarity = Similarity { answers: sorted(a.hash(), b.hash()), millionths: 900_000 };
    let mut e = start(request, 3, EPOCH, "exact", everybody(0));
    results(&mut e, &[Ok(a.clone()), Ok(b), Ok(a)]);
    e.similarities = vec![similarity];
    e.referees.push(referee(&e, |_| 100_000));
    e
}

/// Equal results of an attempt over several classes, audited; the first referee finds the defect that was planted in its
/// job, the next one confirms the answer.
pub fn audited() -> Evidence {
    let class = |i: usize| ["exact", "fast", "slow"][i % 3].to_owned();
    let members = everybody(ALWAYS_PPM).into_iter().filter(|e| (1..7).any(|n| node_id(&key(n)) == e.node));
    let eligible: Vec<Eligible> =
        members.enumerate().map(|(i, e)| Eligible { class: class(i), ..e }).collect();
    let answer = [50, 51, 2];
    let at = |epoch| {
        let sampling = SamplingParams::greedy();
        let mut e = start(request(sampling), 3, epoch, MIXED_CLASS, eligible.clone());
        let drawn = vec![Ok(output(&answer)); 3];
        results(&mut e, &drawn);
        while let Decision::MoreReferees { .. } = e.decide(true) {
            e.referees.push(referee(&e, |tokens| if tokens == answer { 0 } else { u32::MAX }));
        }
        e
    };
    let proves = |e: &Evidence| {
        let first = e.referees.first().is_some_and(|first| is_planted(&e.beta2(), &first.node));
        first && e.referees.len() == 2 && e.class_of(&e.referees[1].node) != Some("slow")
    };
    (EPOCH..EPOCH + 2_000).map(at).find(proves).expect("one in twenty")
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
