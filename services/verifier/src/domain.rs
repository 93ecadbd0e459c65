//! What the verifier decides, as pure functions: no clock, no database, no network.
//!
//! ```text
//! ResultsCollected -> admit -> Case -> unfit, similarities -> judge -> Verdict
//! ```
//!
//! - Admission refuses what no honest dispatcher sends: a key that the manifest does not name, a draw
//!   that does not follow, a commitment that nobody signed. It is garbage and closes nothing.
//! - A verdict follows from the evidence alone ([`Evidence::decide`]), so that whoever holds it comes to the same. What
//!   takes the model's tokenizer or the embedder is noted in it first: which results do not keep to the request's
//!   grammar, and how alike different answers are.

use infera_protocol::agreement::{Decision, Disagreement, FULL_SIMILARITY_MILLIONTHS, Relation, quorum};
use infera_protocol::assignment::order_nodes;
use infera_protocol::bytes::{Hash32, NodeId, VrfKey};
use infera_protocol::evidence::{Evidence, EvidenceError, Similarity, Terms};
use infera_protocol::receipt::lowest_similarity;
use infera_protocol::request::{MAX_REPLICAS, Output};
use infera_wire::convert::{self, CloseReason, Submitted};
use infera_wire::{Message, WireError, v1};
use uuid::Uuid;

/// The class in which honest results are equal (protocol section 7).
pub const EXACT_CLASS: &str = "exact";
/// Round key of a close request, before every round of every attempt.
pub const CLOSE_ROUND: i64 = 0;
/// Most rounds of an attempt: they share an integer with the attempt.
const MAX_ROUND: u32 = 0xff;

/// By what the verifier judges: the registry in force, and those under which open requests may have been funded.
pub use infera_runtime::network::Roots as Rules;

/// Why collected results are no evidence. They go to the dead letters.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Rejection {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("{0} is not a dispatcher of this network")]
    Dispatcher(VrfKey),
    #[error(transparent)]
    Evidence(#[from] EvidenceError),
    #[error("no model of the registry is `{0}` with these weights")]
    Model(String),
    #[error("the price is {actual} per token, the registry says {expected}")]
    Price { actual: u64, expected: u64 },
    #[error("attempt {attempt}, round {round}: rounds count from 1 to {MAX_ROUND}, attempts from 1")]
    Round { attempt: u32, round: u32 },
    #[error("{0} results were revealed, at most {MAX_REPLICAS} are asked for")]
    TooMany(usize),
    #[error("a request closes for one of {known}, not for `{0}`", known = known_reasons())]
    Reason(String),
}

impl Rejection {
    fn model(id: &str) -> Self {
        Self::Model(id.chars().take(128).collect())
    }
}

fn known_reasons() -> String {
    CloseReason::ALL.map(CloseReason::as_str).join(", ")
}

/// Collected results that hold together.
#[derive(Debug, Clone)]
pub struct Case {
    pub evidence: Evidence,
    pub reply_to: String,
    pub round: u32,
    pub exhausted: bool,
}

impl Case {
    pub fn request_id(&self) -> Uuid {
        self.evidence.request.id
    }

    /// What the verdict's primary key holds besides the request.
    pub fn round_key(&self) -> i64 {
        round_key(self.evidence.attempt, self.round)
    }

    /// The revealed outputs, in the order of the draw.
    pub fn outputs(&self) -> Vec<(NodeId, &Output)> {
        self.evidence.revealed().map(|(slot, output)| (slot.node, output)).collect()
    }
}

/// Attempt and round in one integer, ordered as they happen.
pub fn round_key(attempt: u32, round: u32) -> i64 {
    (i64::from(attempt) << 8) | i64::from(round & MAX_ROUND)
}

/// The attempt of a round key.
pub fn attempt_of(round_key: i64) -> i64 {
    round_key >> 8
}

/// Checks collected results against the network's roots.
///
/// # Errors
/// [`Rejection`]: no honest dispatcher sent this.
pub fn admit(rules: &Rules, wire: &v1::ResultsCollected, decided_at_ms: i64) -> Result<Case, Rejection> {
    let domain = rules.manifest.domain;
    let funded = convert::required("collected.funded", &wire.funded)?;
    let submitted = convert::required("funded.submitted", &funded.submitted)?;
    // One that was withdrawn meanwhile is finished under the last version that lists it.
    let (registry, model) = rules
        .registries
        .in_force(submitted.submitted_at_ms, decided_at_ms)
        .find_map(|registry| Some((registry, registry.by_id(&submitted.model)?)))
        .ok_or_else(|| Rejection::model(&submitted.model))?;
    let terms = Terms::of(registry, model);
    let reply_to = submitted.reply_to.clone();
    let evidence = convert::evidence(wire, domain, terms, decided_at_ms)?;
    if wire.attempt == 0 || wire.round == 0 || wire.round > MAX_ROUND {
        return Err(Rejection::Round { attempt: wire.attempt, round: wire.round });
    }
    if !rules.manifest.dispatchers.contains(&evidence.dispatcher) {
        return Err(Rejection::Dispatcher(evidence.dispatcher));
    }
    if model.weights_root != evidence.request.model_root {
        return Err(Rejection::model(&evidence.model));
    }
    let priced = rules
        .registries
        .in_force(evidence.submitted_at_ms, decided_at_ms)
        .filter_map(|registry| registry.by_root(&model.weights_root))
        .any(|model| model.price_micro == evidence.price_micro);
    if !priced {
        return Err(Rejection::Price { actual: evidence.price_micro, expected: model.price_micro });
    }
    evidence.check_request()?;
    evidence.check_assignment()?;
    evidence.check_slots()?;
    evidence.check_post()?;
    evidence.check_referees()?;
    let revealed = evidence.revealed().count();
    if revealed > MAX_REPLICAS as usize {
        return Err(Rejection::TooMany(revealed));
    }
    Ok(Case { evidence, reply_to, round: wire.round, exhausted: wire.exhausted })
}

/// How two results of a case stand to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finding {
    pub a: NodeId,
    pub b: NodeId,
    pub relation: Relation,
    /// Of the texts; 1,000,000 where the tokens are equal.
    pub similarity_millionths: u32,
}

/// Notes in the evidence how alike the texts of distinct answers are. `similarity(i, j)` is the cosine of the texts of
/// the i-th and j-th of [`Evidence::answers`].
pub fn note_similarities(evidence: &mut Evidence, similarity: impl Fn(usize, usize) -> u32) {
    let hashes: Vec<Hash32> = evidence.answers().iter().map(|(hash, ..)| *hash).collect();
    let pairs = (0..hashes.len()).flat_map(|j| (0..j).map(move |i| (i, j)));
    evidence.similarities = pairs
        .map(|(i, j)| {
            let (low, high) = (hashes[i].min(hashes[j]), hashes[i].max(hashes[j]));
            Similarity { answers: [low, high], millionths: similarity(i, j) }
        })
        .collect();
}

/// Every pair of results, in the order of the draw.
pub fn findings(evidence: &Evidence) -> Vec<Finding> {
    let outputs: Vec<(NodeId, Hash32)> =
        evidence.revealed().map(|(slot, output)| (slot.node, output.hash())).collect();
    let mut findings = Vec::new();
    for (j, (b, answer_b)) in outputs.iter().enumerate() {
        for (a, answer_a) in outputs.iter().take(j) {
            let unfit = evidence.unfit.contains(a) || evidence.unfit.contains(b);
            let relation = match evidence.relation(answer_a, answer_b) {
                Some(relation) if !unfit => relation,
                _ => Relation::Disagree(Disagreement::Unfit),
            };
            let same = answer_a == answer_b;
            let similarity = if same { None } else { evidence.similarity(answer_a, answer_b) };
            findings.push(Finding {
                a: *a,
                b: *b,
                relation,
                similarity_millionths: similarity.unwrap_or(FULL_SIMILARITY_MILLIONTHS),
            });
        }
    }
    findings
}

/// The name of a relation, for the database, metrics and the public view.
pub fn relation_name(relation: Relation) -> &'static str {
    match relation {
        Relation::Equal => "equal",
        Relation::Unconfirmed { .. } => "unconfirmed",
        Relation::Disagree(Disagreement::Finish) => "finish",
        Relation::Disagree(Disagreement::Uncalibrated) => "uncalibrated",
        Relation::Disagree(Disagreement::Fingerprint) => "fingerprint",
        Relation::Disagree(Disagreement::Distribution { .. }) => "distribution",
        Relation::Disagree(Disagreement::NotATie { .. }) => "not_a_tie",
        Relation::Disagree(Disagreement::Similarity) => "similarity",
        Relation::Disagree(Disagreement::Unfit) => "unfit",
    }
}

/// The first token in which two results differ, where the relation knows it.
pub fn parting(relation: Relation) -> Option<usize> {
    match relation {
        Relation::Unconfirmed { parting }
        | Relation::Disagree(Disagreement::Distribution { parting } | Disagreement::NotATie { parting }) => {
            Some(parting)
        }
        _ => None,
    }
}

/// A verdict, and the evidence where the message itself does not carry it.
#[derive(Debug, Clone, PartialEq)]
pub struct Judgement {
    pub verdict: v1::Verdict,
    pub evidence: Option<Vec<u8>>,
}

/// What follows from the case. A verdict too large for the bus fails the request: it could never be
/// delivered.
///
/// # Errors
/// [`Rejection::Evidence`] only if the evidence can't be written as JSON.
pub fn judge(case: &Case, largest_bytes: usize) -> Result<Judgement, Rejection> {
    let evidence = &case.evidence;
    let canonical = evidence.canonical()?;
    let decision = evidence.decide(case.exhausted);
    let closing = matches!(decision, Decision::Verified { .. } | Decision::NoQuorum);
    let conduct = if closing { evidence.conduct(&decision) } else { Vec::new() };
    let verdict = |outcome| v1::Verdict {
        request_id: case.request_id().as_bytes().to_vec(),
        reply_to: case.reply_to.clone(),
        attempt: evidence.attempt,
        round: case.round,
        account: evidence.account.clone(),
        decided_at_ms: evidence.decided_at_ms,
        outcome: Some(outcome),
        conduct: conduct.iter().map(convert::conduct_to_wire).collect(),
        overturned: closing && evidence.is_overturned(),
    };
    let failed = |code: &str, reason: String| {
        v1::verdict::Outcome::Failed(v1::Failed { code: code.to_owned(), reason })
    };
    let revealed = evidence.revealed().count();
    let outcome = match &decision {
        Decision::Verified { members } => {
            let full = verdict(v1::verdict::Outcome::Verified(verified(case, members, canonical.clone())));
            let bytes = full.encoded_len();
            if bytes <= largest_bytes {
                return Ok(Judgement { verdict: full, evidence: None });
            }
            let reason = format!("the verdict has {bytes} bytes, at most {largest_bytes} can be sent");
            failed("evidence_too_large", reason)
        }
        Decision::MoreReferees { count, answers } => {
            let answers = answers.iter().map(|answer| answer.to_vec()).collect();
            v1::verdict::Outcome::MoreReferees(v1::MoreReferees { count: *count, answers })
        }
        Decision::MoreNodes { count } => v1::verdict::Outcome::MoreNodes(v1::MoreNodes { count: *count }),
        Decision::NoQuorum if revealed < quorum(evidence.k) as usize => {
            failed("no_nodes", format!("{revealed} nodes answered, {} must agree", quorum(evidence.k)))
        }
        Decision::NoQuorum => {
            let unfit = match evidence.unfit.len() {
                0 => String::new(),
                unfit => format!(" and keeps to the grammar: {unfit} do not"),
            };
            failed("no_quorum", format!("no majority of {revealed} results agrees{unfit}"))
        }
    };
    Ok(Judgement { verdict: verdict(outcome), evidence: Some(canonical) })
}

fn verified(case: &Case, members: &[NodeId], evidence: Vec<u8>) -> v1::Verified {
    let ordered = order_nodes(&case.evidence.beta2(), members);
    let delivered = case
        .evidence
        .revealed()
        .find(|(slot, _)| Some(&slot.node) == ordered.first())
        .map(|(_, output)| output);
    v1::Verified {
        evidence,
        tokens: delivered.map(|output| output.tokens.clone()).unwrap_or_default(),
        finish: delivered.map_or(v1::Finish::Unspecified, |o| convert::finish_to_wire(o.finish)).into(),
        nodes: ordered.iter().map(|node| node.to_vec()).collect(),
        lowest_similarity_millionths: lowest_similarity(&case.evidence, members),
        prompt_tokens: u32::try_from(case.evidence.request.prompt.len()).unwrap_or(u32::MAX),
    }
}

/// The verdict of a request that is closed before its results were enough.
///
/// # Errors
/// [`Rejection`] where the message is garbage.
pub fn close(wire: &v1::CloseRequested, decided_at_ms: i64) -> Result<(Submitted, v1::Verdict), Rejection> {
    let submitted = convert::submitted(convert::required("close.submitted", &wire.submitted)?)?;
    let Some(reason) = CloseReason::parse(&wire.reason) else {
        return Err(Rejection::Reason(wire.reason.chars().take(64).collect()));
    };
    let text = match reason {
        CloseReason::Deadline => "the deadline passed before enough results agreed",
        CloseReason::Cancelled => "the account cancelled the request",
        CloseReason::Overloaded => "the network has more requests waiting than it takes",
    };
    let verdict = v1::Verdict {
        request_id: submitted.request.id.as_bytes().to_vec(),
        reply_to: submitted.reply_to.clone(),
        attempt: 0,
        round: 0,
        account: submitted.account.clone(),
        decided_at_ms,
        outcome: Some(v1::verdict::Outcome::Failed(v1::Failed {
            code: reason.as_str().to_owned(),
            reason: text.to_owned(),
        })),
        conduct: Vec::new(),
        overturned: false,
    };
    Ok((submitted, verdict))
}

/// The name of an outcome, for the database, metrics and the public view.
pub fn outcome_name(verdict: &v1::Verdict) -> &'static str {
    match verdict.outcome {
        Some(v1::verdict::Outcome::Verified(_)) => "verified",
        Some(v1::verdict::Outcome::MoreNodes(_)) => "more_nodes",
        Some(v1::verdict::Outcome::MoreReferees(_)) => "more_referees",
        Some(v1::verdict::Outcome::Failed(_)) | None => "failed",
    }
}

/// Whether nothing follows after this verdict.
pub fn is_closing(verdict: &v1::Verdict) -> bool {
    use v1::verdict::Outcome;
    !matches!(verdict.outcome, Some(Outcome::MoreNodes(_) | Outcome::MoreReferees(_)))
}

#[cfg(test)]
mod tests {
    use infera_protocol::registry::Replaced;
    use infera_protocol::stakes::Stakes;
    use infera_testkit::evidence;

    use super::*;

    #[test]
    fn a_wrong_reason_is_told_every_right_one() {
        let submitted = evidence::Case::new(&evidence::Network::new()).submitted();
        let closing = |reason: &str| {
            let wire = v1::CloseRequested { submitted: Some(submitted.clone()), reason: reason.to_owned() };
            close(&wire, 0).map(|_| ()).map_err(|error| error.to_string())
        };
        let error = closing("boredom").unwrap_err();
        assert!(error.contains("`boredom`"), "{error}");
        for reason in CloseReason::ALL {
            assert!(error.contains(reason.as_str()), "{error}");
            closing(reason.as_str()).unwrap();
        }
    }

    #[test]
    fn a_request_keeps_its_price_when_the_registry_changes_under_it() {
        let network = evidence::Network::new();
        let case = evidence::Case::new(&network);
        let collected = case.collected();
        let decided_at_ms = case.submitted_at_ms + 1_000;
        let changed_at = |at_ms| {
            let mut current = network.registry.clone();
            current.models[0].price_micro += 1;
            current.calibration.pairs[0].bounds.near_tie_milli += 1;
            current.replaces = Some(Replaced { registry_hash: network.registry.hash().unwrap(), at_ms });
            let former = serde_json::to_vec(&network.registry).unwrap();
            let registries =
                infera_protocol::registry::History::follow(current, |_| Ok(Some(former.clone()))).unwrap();
            Rules { manifest: network.manifest.clone(), registries, stakes: Stakes::default() }
        };
        let rules = changed_at(case.submitted_at_ms + 500);
        let admitted = admit(&rules, &collected, decided_at_ms).unwrap();
        assert_eq!(
            admitted.evidence.terms.calibration.hash(),
            rules.registries.current().calibration.hash(),
            "judged by what is in force"
        );
        let before = changed_at(case.submitted_at_ms - 500);
        let refused = admit(&before, &collected, decided_at_ms).map(|case| case.round).unwrap_err();
        assert_eq!(refused, Rejection::Price { actual: 2, expected: 3 });
    }
}
