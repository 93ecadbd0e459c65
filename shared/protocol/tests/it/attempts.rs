//! Attempts as they may happen: what was asked, drawn, answered and refereed, signed with real keys.

use infera_protocol::{
    agreement::Decision,
    assignment::{
        ALWAYS_PPM, Eligible, MIXED_CLASS, assign_message, beta, draw, eligible_root, freeze, of_class,
        post_message,
    },
    bytes::{Address, Hash32, NodeId, VrfProof},
    calibration::{Bounds, Calibration, Pair},
    commitment::{Slot, commitment, decline_digest},
    evidence::{
        Evidence, RefereeOutcome, Reveal, SignedCommitment, SignedDecline, Similarity, SlotEvidence,
        SlotOutcome, Terms,
    },
    fingerprint::{Entry, Fingerprint},
    grammar::{Grammar, GrammarKind},
    identity::{node_id, sign},
    judgement::is_planted,
    registry::{History, Manifest, Registry, Replaced},
    request::{Finish, Output, Request},
    sampling::{SamplingParams, gumbel},
};
use uuid::Uuid;

use crate::{DOMAIN, dispatcher, key, key_of, manifest, output, referee, registry};

/// 2026-05-28, in epoch 178,000,000.
pub const SUBMITTED_MS: i64 = 1_780_000_001_000;
pub const EPOCH: u64 = 178_000_000;

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
pub fn everybody(audit_ppm: u32) -> Vec<Eligible> {
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

pub fn request(sampling: SamplingParams) -> Request {
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
pub fn start(request: Request, k: u32, epoch: u64, class: &str, eligible: Vec<Eligible>) -> Evidence {
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

pub fn assigned(e: &Evidence) -> Hash32 {
    let root = eligible_root(&e.eligible);
    assign_message(&DOMAIN, e.request.id, &e.request_hash(), e.k, e.attempt, e.epoch, &root)
}

pub fn posted(e: &Evidence) -> Hash32 {
    post_message(&DOMAIN, &e.request_hash(), e.attempt, &e.commitments_root())
}

pub fn drawn(e: &Evidence) -> Vec<&Eligible> {
    draw(&beta(&e.assign_proof), of_class(&e.eligible, &e.class))
}

pub fn place(e: &Evidence, node: NodeId) -> Slot {
    Slot { request_hash: e.request_hash(), attempt: e.attempt, node }
}

/// What each node of the draw does: answers, or something else.
pub fn results(e: &mut Evidence, parts: &[Result<Output, SlotOutcome>]) {
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

pub fn sorted(a: Hash32, b: Hash32) -> [Hash32; 2] {
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
