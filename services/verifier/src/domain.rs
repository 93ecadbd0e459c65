//! What the verifier decides, as pure functions: no clock, no database, no network.
//!
//! ```text
//! ResultsCollected -> admit -> Case -> findings (every pair) -> judge -> Verdict
//! ```
//!
//! - Admission refuses what no honest dispatcher sends: a key that the manifest does not name, a draw
//!   that does not follow, a commitment that nobody signed. It is garbage and closes nothing.
//! - A verdict follows from the evidence and the registry's tokenizer alone, so that whoever holds them
//!   comes to the same. A result that does not keep to its grammar stays in the count and agrees with
//!   nothing; a verified set is a strict majority of the count, so that a receipt follows from the
//!   evidence without looking at grammars.

use std::collections::BTreeSet;

use infera_protocol::agreement::{
    Decision, Disagreement, FULL_SIMILARITY_MILLIONTHS, Relation, compare, decide, quorum,
};
use infera_protocol::assignment::{beta, order_nodes};
use infera_protocol::bytes::{Hash32, NodeId};
use infera_protocol::evidence::{Evidence, EvidenceError};
use infera_protocol::hash::keccak;
use infera_protocol::registry::{History, Manifest};
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

/// By what the verifier judges.
#[derive(Debug, Clone)]
pub struct Rules {
    pub manifest: Manifest,
    /// The registry in force, and those under which open requests may have been funded.
    pub registries: History,
}

/// Why collected results are no evidence. They go to the dead letters.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Rejection {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("{0} is not a dispatcher of this network")]
    Dispatcher(NodeId),
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
    /// The model's similarity threshold.
    pub threshold_millionths: u32,
    /// Nodes whose results do not keep to the request's grammar.
    pub unfit: BTreeSet<NodeId>,
}

impl Case {
    pub fn request_id(&self) -> Uuid {
        self.evidence.request.id
    }

    /// What the verdict's primary key holds besides the request.
    pub fn round_key(&self) -> i64 {
        round_key(self.evidence.attempt, self.round)
    }

    /// The revealed results as [`decide`] takes them: an unfit one equals nothing but itself.
    fn results(&self) -> Vec<(NodeId, Hash32)> {
        let own = |node: &NodeId| keccak(&[b"infera.unfit.v1", &node.0]);
        let results = self.evidence.results().into_iter();
        results
            .map(|(node, hash)| (node, if self.unfit.contains(&node) { own(&node) } else { hash }))
            .collect()
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
    let calibration = rules.registries.current().calibration.hash();
    let evidence = convert::evidence(wire, domain, calibration, decided_at_ms)?;
    let funded = convert::required("collected.funded", &wire.funded)?;
    let reply_to = convert::required("funded.submitted", &funded.submitted)?.reply_to.clone();
    if wire.attempt == 0 || wire.round == 0 || wire.round > MAX_ROUND {
        return Err(Rejection::Round { attempt: wire.attempt, round: wire.round });
    }
    if !rules.manifest.dispatchers.contains(&evidence.dispatcher) {
        return Err(Rejection::Dispatcher(evidence.dispatcher));
    }
    let model = rules
        .registries
        .current()
        .by_id(&evidence.model)
        .filter(|model| model.weights_root == evidence.request.model_root)
        .ok_or_else(|| Rejection::Model(evidence.model.clone()))?;
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
    let revealed = evidence.revealed().count();
    if revealed > MAX_REPLICAS as usize {
        return Err(Rejection::TooMany(revealed));
    }
    let threshold_millionths = model.similarity_threshold_millionths;
    Ok(Case {
        evidence,
        reply_to,
        round: wire.round,
        exhausted: wire.exhausted,
        threshold_millionths,
        unfit: BTreeSet::new(),
    })
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

/// Compares every pair of results, in the order of the draw. `similarity(i, j)` is the cosine of the
/// texts of the i-th and j-th revealed output; it is asked only where their tokens differ.
pub fn findings(rules: &Rules, case: &Case, similarity: impl Fn(usize, usize) -> u32) -> Vec<Finding> {
    let outputs = case.outputs();
    let class = &case.evidence.class;
    let bounds = rules.registries.current().calibration.bounds(class, class);
    let mut findings = Vec::new();
    for (j, (b, output_b)) in outputs.iter().enumerate() {
        for (i, (a, output_a)) in outputs.iter().enumerate().take(j) {
            let similarity_millionths = if output_a.tokens == output_b.tokens {
                FULL_SIMILARITY_MILLIONTHS
            } else {
                similarity(i, j)
            };
            let relation = if case.unfit.contains(a) || case.unfit.contains(b) {
                Relation::Disagree(Disagreement::Grammar)
            } else {
                compare(
                    &case.evidence.request,
                    bounds,
                    case.threshold_millionths,
                    output_a,
                    output_b,
                    similarity_millionths,
                )
            };
            findings.push(Finding { a: *a, b: *b, relation, similarity_millionths });
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
        Relation::Disagree(Disagreement::Grammar) => "grammar",
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
    let canonical = case.evidence.canonical()?;
    let verdict = |outcome| v1::Verdict {
        request_id: case.request_id().as_bytes().to_vec(),
        reply_to: case.reply_to.clone(),
        attempt: case.evidence.attempt,
        round: case.round,
        account: case.evidence.account.clone(),
        decided_at_ms: case.evidence.decided_at_ms,
        outcome: Some(outcome),
    };
    let failed = |code: &str, reason: String| {
        v1::verdict::Outcome::Failed(v1::Failed { code: code.to_owned(), reason })
    };
    let results = case.results();
    let outcome = match decide(case.evidence.k, &results, case.exhausted) {
        Decision::Verified { members } => {
            let full = verdict(v1::verdict::Outcome::Verified(verified(case, &members, canonical.clone())));
            let bytes = full.encoded_len();
            if bytes <= largest_bytes {
                return Ok(Judgement { verdict: full, evidence: None });
            }
            let reason = format!("the verdict has {bytes} bytes, at most {largest_bytes} can be sent");
            failed("evidence_too_large", reason)
        }
        Decision::MoreNodes { count } => v1::verdict::Outcome::MoreNodes(v1::MoreNodes { count }),
        Decision::NoQuorum if results.len() < quorum(case.evidence.k) as usize => {
            let needed = quorum(case.evidence.k);
            failed("no_nodes", format!("{} nodes answered, {needed} must agree", results.len()))
        }
        Decision::NoQuorum => {
            let unfit = match case.unfit.len() {
                0 => String::new(),
                unfit => format!(" and keeps to the grammar: {unfit} do not"),
            };
            failed("no_quorum", format!("no majority of {} results is equal{unfit}", results.len()))
        }
    };
    Ok(Judgement { verdict: verdict(outcome), evidence: Some(canonical) })
}

fn verified(case: &Case, members: &[NodeId], evidence: Vec<u8>) -> v1::Verified {
    let ordered = order_nodes(&beta(&case.evidence.post_signature), members);
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
        lowest_similarity_millionths: FULL_SIMILARITY_MILLIONTHS,
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
    };
    Ok((submitted, verdict))
}

/// The name of an outcome, for the database, metrics and the public view.
pub fn outcome_name(verdict: &v1::Verdict) -> &'static str {
    match verdict.outcome {
        Some(v1::verdict::Outcome::Verified(_)) => "verified",
        Some(v1::verdict::Outcome::MoreNodes(_)) => "more_nodes",
        Some(v1::verdict::Outcome::Failed(_)) | None => "failed",
    }
}

/// Whether nothing follows after this verdict.
pub fn is_closing(verdict: &v1::Verdict) -> bool {
    !matches!(verdict.outcome, Some(v1::verdict::Outcome::MoreNodes(_)))
}

#[cfg(test)]
mod tests {
    use infera_protocol::registry::Replaced;
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
            let registries = History::follow(current, |_| Ok(Some(former.clone()))).unwrap();
            Rules { manifest: network.manifest.clone(), registries }
        };
        let rules = changed_at(case.submitted_at_ms + 500);
        let admitted = admit(&rules, &collected, decided_at_ms).unwrap();
        assert_eq!(
            admitted.evidence.calibration_hash,
            rules.registries.current().calibration.hash(),
            "judged by what is in force"
        );
        let before = changed_at(case.submitted_at_ms - 500);
        let refused = admit(&before, &collected, decided_at_ms).map(|case| case.round).unwrap_err();
        assert_eq!(refused, Rejection::Price { actual: 2, expected: 3 });
    }
}
