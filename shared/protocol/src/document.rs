//! The receipt document that an account downloads, and its check by a stranger.
//!
//! One canonical encoding: compact JSON in the order of the fields. [`check`] parses, writes again
//! and compares bytes, so that a document can't be changed without a check noticing.

use crate::{
    agreement::{Decision, quorum},
    assignment::{assign_message, epoch_of, post_message},
    bytes::{Address, Hash32, NodeId},
    evidence::{Evidence, Terms},
    identity::Domain,
    merkle::root_of,
    money::cost_micro,
    receipt::{Receipt, UnpaidReason},
    registry::{History, Manifest, Registry},
    request::{MAX_REPLICAS, MIN_REPLICAS},
    vrf,
};
use serde::{Deserialize, Serialize};

/// Largest document that is read, bytes: evidence is at most one `ResultsCollected` in JSON.
pub const MAX_DOCUMENT_BYTES: usize = 16 * 1024 * 1024;

/// Whether a batch on the chain holds the receipt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    Pending,
    Anchored,
}

/// Where the receipt stands on the chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Anchor {
    /// Batch number, from 1.
    pub sequence: u64,
    pub receipts_root: Hash32,
    pub proof: Vec<Hash32>,
}

/// What `GET /v1/receipts/{id}` answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    pub receipt: Receipt,
    pub status: Status,
    pub anchor: Option<Anchor>,
    /// Only for the account that asked.
    pub evidence: Option<Evidence>,
}

/// Result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Passed,
    Failed(String),
    /// The document doesn't hold what this check needs; says what.
    NotChecked(String),
}

/// One named check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    pub name: &'static str,
    pub outcome: Outcome,
}

/// All checks that need no chain.
#[derive(Debug, Clone)]
pub struct Report {
    pub checks: Vec<Check>,
    /// The document, where it could be read.
    pub document: Option<Document>,
}

impl Report {
    /// Something was found wrong.
    pub fn failed(&self) -> bool {
        self.checks.iter().any(|c| matches!(c.outcome, Outcome::Failed(_)))
    }

    /// Every check could be made, whatever came of it.
    pub fn complete(&self) -> bool {
        !self.checks.iter().any(|c| matches!(c.outcome, Outcome::NotChecked(_)))
    }

    fn push(&mut self, name: &'static str, result: Result<(), String>) {
        let outcome = match result {
            Ok(()) => Outcome::Passed,
            Err(reason) => Outcome::Failed(reason),
        };
        self.checks.push(Check { name, outcome });
    }

    fn skip(&mut self, name: &'static str, why: &str) {
        self.checks.push(Check { name, outcome: Outcome::NotChecked(why.into()) });
    }
}

impl Document {
    /// The one encoding.
    ///
    /// # Errors
    /// Only if a number can't be written as JSON.
    pub fn canonical(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec(self)
    }
}

/// Checks a document against the network's manifest and the registries of its time. Trusts no service; what stands
/// on the chain (the batch's root) is the caller's to compare.
///
/// Without evidence only what the receipt itself holds can be checked: that the dispatcher signed
/// request, k, epoch, eligible set and commitments, that price and calibration are those of a registry
/// in force between submission and verdict, and that quorum, operators and payments are consistent. It can't show that the named nodes were
/// the drawn ones, that they signed and revealed what is claimed, that their results agree, nor
/// what prompt, output and account the salted hashes stand for: for those fields a batch on the
/// chain shows only that settlement vouched for them. Until the receipt is anchored, nothing holds
/// the fields that the dispatcher did not sign. [`Report::complete`] tells the shapes apart.
pub fn check(bytes: &[u8], manifest: &Manifest, registries: &History) -> Report {
    let mut report = Report { checks: Vec::new(), document: None };
    report.push(
        "registry",
        match registries.current().hash() {
            Ok(hash) if hash == manifest.registry_hash => Ok(()),
            Ok(hash) => {
                Err(format!("the registry's hash is {hash}, the manifest names {}", manifest.registry_hash))
            }
            Err(error) => Err(error.to_string()),
        },
    );
    let document = match parse(bytes) {
        Ok(document) => document,
        Err(reason) => {
            report.push("encoding", Err(reason));
            return report;
        }
    };
    report.push("encoding", Ok(()));
    check_receipt(&mut report, &document.receipt, manifest);
    check_registry(&mut report, &document.receipt, registries);
    check_anchor(&mut report, &document);
    match &document.evidence {
        Some(evidence) => {
            check_terms(&mut report, evidence, registries);
            check_evidence(&mut report, &document.receipt, evidence);
        }
        None => report
            .skip("evidence", "the document has none: fetch it with the API key of the account that asked"),
    }
    report.document = Some(document);
    report
}

fn parse(bytes: &[u8]) -> Result<Document, String> {
    if bytes.len() > MAX_DOCUMENT_BYTES {
        return Err(format!("{} bytes; at most {MAX_DOCUMENT_BYTES} are read", bytes.len()));
    }
    let document: Document =
        serde_json::from_slice(bytes).map_err(|e| format!("not a receipt document: {e}"))?;
    let canonical = document.canonical().map_err(|e| e.to_string())?;
    if canonical == bytes {
        Ok(document)
    } else {
        let at =
            canonical.iter().zip(bytes).position(|(a, b)| a != b).unwrap_or(canonical.len().min(bytes.len()));
        Err(format!("not the canonical encoding: differs at byte {at}"))
    }
}

fn check_receipt(report: &mut Report, receipt: &Receipt, manifest: &Manifest) {
    let domain = Domain { chain_id: receipt.chain_id, contract: receipt.contract };
    report.push(
        "network",
        ensure(domain == manifest.domain, || {
            format!("made for chain {} and contract {}", receipt.chain_id, receipt.contract)
        }),
    );
    report.push(
        "dispatcher",
        ensure(manifest.dispatchers.contains(&receipt.dispatcher), || {
            format!("{} is not a dispatcher of this network", receipt.dispatcher)
        }),
    );
    let assign = assign_message(
        &domain,
        receipt.id,
        &receipt.request_hash,
        receipt.asked_k,
        receipt.attempt,
        receipt.epoch,
        &receipt.eligible_root,
    );
    report.push(
        "assignment proof",
        vrf::verify(&receipt.dispatcher, &assign, &receipt.assign_proof).map_err(|e| e.to_string()),
    );
    let post = post_message(&domain, &receipt.request_hash, receipt.attempt, &receipt.commitments_root);
    report.push(
        "post-draw proof",
        vrf::verify(&receipt.dispatcher, &post, &receipt.post_proof).map_err(|e| e.to_string()),
    );
    let (first, last) = (epoch_of(receipt.submitted_at_ms), epoch_of(receipt.decided_at_ms));
    report.push(
        "epoch",
        ensure((first..=last).contains(&receipt.epoch), || {
            format!("drawn in epoch {}, submission and verdict allow {first} to {last}", receipt.epoch)
        }),
    );
    report.push("quorum", check_quorum(receipt));
    let paid: Option<u64> = receipt.payments.iter().try_fold(0_u64, |sum, p| sum.checked_add(p.amount_micro));
    report.push(
        "payments",
        ensure(paid == Some(receipt.charged_micro), || {
            format!("payments sum to {paid:?}, charged were {}", receipt.charged_micro)
        }),
    );
}

/// Model, price and calibration, as some registry in force between submission and verdict has them: a request may be
/// funded under one version and decided under the next.
fn check_registry(report: &mut Report, receipt: &Receipt, registries: &History) {
    let versions: Vec<&Registry> =
        registries.in_force(receipt.submitted_at_ms, receipt.decided_at_ms).collect();
    let missing = registries.unknown_before(receipt.submitted_at_ms);
    let mut push = |name, result: Result<(), String>| match (result, missing) {
        (Err(_), Some(hash)) => report.skip(
            name,
            &format!("the registry {hash}, in force when it was submitted, is not among the former ones"),
        ),
        (result, _) => report.push(name, result),
    };
    let prices: Vec<u64> = versions
        .iter()
        .filter_map(|registry| registry.by_root(&receipt.model_root))
        .map(|model| model.price_micro)
        .collect();
    push(
        "model",
        match prices.first() {
            None => Err(format!("no model of the registry in force has the weights {}", receipt.model_root)),
            Some(price) => ensure(prices.contains(&receipt.price_micro), || {
                format!("price {} per token, the registry in force says {price}", receipt.price_micro)
            }),
        },
    );
    let calibrated = versions.iter().any(|registry| registry.calibration.hash() == receipt.calibration_hash);
    push(
        "calibration",
        ensure(calibrated, || "another calibration than that of the registry in force".into()),
    );
}

/// The terms are those of the model in the registry whose calibration the receipt names.
fn check_terms(report: &mut Report, evidence: &Evidence, registries: &History) {
    let mut versions = registries.in_force(evidence.submitted_at_ms, evidence.decided_at_ms);
    let holds = versions.any(|registry| {
        let model = registry.by_root(&evidence.request.model_root);
        model.is_some_and(|model| Terms::of(registry, model) == evidence.terms)
    });
    match registries.unknown_before(evidence.submitted_at_ms) {
        Some(hash) if !holds => {
            report
                .skip("terms", &format!("the registry {hash}, in force when it was submitted, is not there"));
        }
        _ => report.push(
            "terms",
            ensure(holds, || {
                "threshold, vocabulary or calibration are not those of the registry in force".into()
            }),
        ),
    }
}

/// What the receipt alone says about its majority and who is paid for it.
fn check_quorum(receipt: &Receipt) -> Result<(), String> {
    ensure((MIN_REPLICAS..=MAX_REPLICAS).contains(&receipt.asked_k), || {
        format!("{} replicas were asked for; allowed are {MIN_REPLICAS} to {MAX_REPLICAS}", receipt.asked_k)
    })?;
    let outliers = receipt.unpaid.iter().filter(|u| u.reason == UnpaidReason::Outlier).count();
    let revealed = u32::try_from(receipt.verified.len() + outliers).unwrap_or(u32::MAX);
    ensure(receipt.k == receipt.asked_k.max(revealed) && receipt.k <= MAX_REPLICAS, || {
        format!("k is {}, with {} asked for and {revealed} revealed", receipt.k, receipt.asked_k)
    })?;
    ensure(receipt.verified.len() >= quorum(receipt.k) as usize, || {
        format!("{} nodes agree, {} of {} must", receipt.verified.len(), quorum(receipt.k), receipt.k)
    })?;
    let mut nodes: Vec<NodeId> = receipt.verified.iter().map(|v| v.node).collect();
    nodes.extend(receipt.unpaid.iter().map(|u| u.node));
    let mut operators: Vec<Address> = receipt.verified.iter().map(|v| v.operator).collect();
    operators.extend(receipt.unpaid.iter().map(|u| u.operator));
    let slots = nodes.len();
    nodes.sort();
    nodes.dedup();
    operators.sort();
    operators.dedup();
    ensure(nodes.len() == slots && operators.len() == slots, || {
        "a node or an operator stands in it twice".to_owned()
    })?;
    let paid: Vec<Address> = receipt.payments.iter().map(|p| p.operator).collect();
    let earned: Vec<Address> = receipt.verified.iter().map(|v| v.operator).collect();
    ensure(paid == earned, || "the payments do not go to the verified operators in their order".to_owned())?;
    let tokens = u64::from(receipt.prompt_tokens) + u64::from(receipt.output_tokens);
    let each = cost_micro(receipt.price_micro, tokens, 1);
    ensure(receipt.payments.iter().all(|p| Some(p.amount_micro) == each), || {
        format!("a payment is not {} per token for {tokens} tokens", receipt.price_micro)
    })
}

fn check_anchor(report: &mut Report, document: &Document) {
    match (document.status, &document.anchor) {
        (Status::Anchored, Some(anchor)) => {
            let root = root_of(&document.receipt.leaf(), &anchor.proof);
            report.push(
                "merkle proof",
                ensure(root == anchor.receipts_root, || {
                    format!("leads to {root}, the batch's root is {}", anchor.receipts_root)
                }),
            );
        }
        (Status::Pending, None) => {
            report.skip("merkle proof", "the receipt waits for its batch; fetch it again in a moment")
        }
        _ => report.push("merkle proof", Err("status and anchor contradict each other".into())),
    }
}

fn check_evidence(report: &mut Report, receipt: &Receipt, evidence: &Evidence) {
    report.push(
        "evidence root",
        match evidence.root() {
            Ok(root) => ensure(root == receipt.evidence_root, || format!("the evidence hashes to {root}")),
            Err(error) => Err(error.to_string()),
        },
    );
    report.push("request", evidence.check_request().map_err(|e| e.to_string()));
    report.push("draw", evidence.check_assignment().map_err(|e| e.to_string()));
    report.push("commitments and reveals", evidence.check_slots().map_err(|e| e.to_string()));
    report.push("post draw", evidence.check_post().map_err(|e| e.to_string()));
    report.push("referees", evidence.check_referees().map_err(|e| e.to_string()));
    report.push(
        "agreement",
        match evidence.decide(true) {
            Decision::Verified { members } => {
                let mut named: Vec<_> = receipt.verified.iter().map(|v| v.node).collect();
                named.sort();
                ensure(named == members, || "another verified set follows from the reveals".into())
            }
            Decision::MoreReferees { .. } => Err("a referee was due and there is no report".into()),
            _ => Err("the reveals have no quorum".into()),
        },
    );
    let answers: std::collections::BTreeSet<Hash32> =
        receipt.verified.iter().map(|v| v.output_hash).collect();
    if answers.len() > 1 {
        report.skip(
            "similarity",
            "how alike the different texts are was measured by the verifier; compute their embeddings to check it",
        );
    }
    if !evidence.unfit.is_empty() {
        report.skip(
            "fitness",
            "that a result breaks the grammar or goes on after a stop string was found by the verifier; the model's tokenizer is needed to check it",
        );
    }
    report.push(
        "every field",
        match Receipt::build(evidence) {
            Ok(rebuilt) if rebuilt == *receipt => Ok(()),
            Ok(_) => Err("the receipt is not the one that follows from the evidence".into()),
            Err(error) => Err(error.to_string()),
        },
    );
}

fn ensure(holds: bool, reason: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(reason()) }
}
