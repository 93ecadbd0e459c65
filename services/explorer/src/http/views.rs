//! What the pages show, made ready: templates only place it.

use askama::Template;
use infera_protocol::receipt::{Receipt, UnpaidReason};

use super::Found;
use crate::format::{duration, grouped, infer, millionths, short, time};
use crate::query::{Batch, Entry, Filter, Stats};

/// A figure at the top of the list.
pub struct Counter {
    /// Its name in `/v1/stats`.
    pub name: &'static str,
    pub label: &'static str,
    pub value: String,
}

/// A receipt in a list.
pub struct Line {
    pub id: String,
    pub short_id: String,
    pub time: String,
    pub model: String,
    /// `3 of 4`: verified, and results that counted.
    pub nodes: String,
    pub tokens: String,
    pub charged: String,
    pub anchored: bool,
    pub chain: String,
    /// Of a search.
    pub score: Option<String>,
}

/// An entry of the filter for models.
pub struct Choice {
    pub value: String,
    pub chosen: bool,
}

/// `/`.
#[derive(Template)]
#[template(path = "home.html")]
pub struct Home {
    pub network: String,
    pub counters: Vec<Counter>,
    pub question: String,
    pub models: Vec<Choice>,
    pub operator: String,
    pub node: String,
    pub status: String,
    pub filtered: bool,
    /// Above the list.
    pub title: String,
    pub lines: Vec<Line>,
    pub empty: String,
    pub searching: bool,
    /// Address of the next page.
    pub next: Option<String>,
    /// Filters for the exports, with `?` in front unless empty.
    pub export_query: String,
}

/// A node of a receipt.
pub struct Node {
    pub id: String,
    pub short_id: String,
    pub operator: String,
    pub short_operator: String,
    pub role: &'static str,
    pub meaning: &'static str,
    pub paid: bool,
    pub amount: String,
    /// Salted hash of its answer.
    pub output: String,
    pub short_output: String,
}

/// A field with its explanation.
pub struct Field {
    pub name: &'static str,
    pub value: String,
    pub meaning: &'static str,
}

/// Fields that belong together.
pub struct Group {
    pub title: &'static str,
    pub fields: Vec<Field>,
}

/// Where the batch stands.
pub struct Anchor {
    pub sequence: i64,
    pub root: String,
    pub receipts: String,
    pub transaction: String,
    pub block: i64,
    pub time: String,
}

/// `/receipts/{id}`.
#[derive(Template)]
#[template(path = "receipt.html")]
pub struct ReceiptPage {
    pub network: String,
    pub id: String,
    pub model: String,
    pub time: String,
    pub took: String,
    pub quorum: String,
    pub tokens: String,
    pub charged: String,
    pub anchor: Option<Anchor>,
    pub leaf: String,
    pub nodes: Vec<Node>,
    pub groups: Vec<Group>,
    pub receipts_url: String,
    pub rpc_url: String,
}

/// `/governance`.
#[derive(Clone, Template)]
#[template(path = "governance.html")]
pub struct GovernancePage {
    pub network: String,
    pub block: u64,
    pub time: String,
    pub revision: u64,
    pub models: Vec<ListedModel>,
    pub releases: Vec<String>,
    pub calibration_hash: String,
    pub proposals: Vec<ProposalLine>,
}

/// A model as the holders list it.
#[derive(Clone)]
pub struct ListedModel {
    pub id: String,
    pub weights_root: String,
    pub threshold: String,
    pub price_cap: String,
    pub active: bool,
}

/// A proposal's line.
#[derive(Clone)]
pub struct ProposalLine {
    pub id: String,
    pub short_id: String,
    pub title: String,
    pub state: String,
    pub good: bool,
    pub bad: bool,
    pub actions: Vec<String>,
    pub votes_for: String,
    pub votes_against: String,
    pub abstentions: String,
    pub quorum: String,
    pub deadline: String,
}

/// Anything that went wrong.
#[derive(Template)]
#[template(path = "error.html")]
pub struct ErrorPage {
    pub network: String,
    pub status: u16,
    pub title: &'static str,
    pub message: String,
}

pub(super) fn counters(stats: &Stats) -> Vec<Counter> {
    let whole = |value: i64| grouped(value.unsigned_abs());
    vec![
        Counter { name: "receipts", label: "verified answers", value: whole(stats.receipts) },
        Counter { name: "tokens", label: "tokens", value: whole(stats.tokens) },
        Counter { name: "anchored", label: "on the chain", value: whole(stats.anchored) },
        Counter { name: "batches", label: "batches", value: whole(stats.batches) },
        Counter { name: "operators", label: "operators paid", value: whole(stats.operators) },
        Counter {
            name: "charged_micro",
            label: "INFER charged",
            value: infer(stats.charged_micro.unsigned_abs()),
        },
    ]
}

pub(super) fn line(entry: &Entry) -> Line {
    let r = &entry.receipt;
    Line {
        id: r.id.to_string(),
        short_id: short(&r.id),
        time: time(r.decided_at_ms),
        model: entry.model.clone(),
        nodes: quorum(r),
        tokens: grouped(tokens(r)),
        charged: infer(r.charged_micro),
        anchored: entry.batch.is_some(),
        chain: entry.batch.map_or_else(|| "pending".to_owned(), |batch| format!("batch {batch}")),
        score: None,
    }
}

pub(super) fn found(found: &Found) -> Line {
    Line { score: Some(format!("{:.2}", found.score)), ..line(&found.entry) }
}

fn tokens(r: &Receipt) -> u64 {
    u64::from(r.prompt_tokens) + u64::from(r.output_tokens)
}

/// The query string of a filter, without `?`.
pub(super) fn filter_query(filter: &Filter) -> String {
    use infera_protocol::document::Status;
    let mut pairs: Vec<(&str, String)> = Vec::new();
    pairs.extend(filter.model.clone().map(|model| ("model", model)));
    pairs.extend(filter.operator.map(|operator| ("operator", operator.to_string())));
    pairs.extend(filter.node.map(|node| ("node", node.to_string())));
    pairs.extend(filter.from_ms.map(|ms| ("from_ms", ms.to_string())));
    pairs.extend(filter.to_ms.map(|ms| ("to_ms", ms.to_string())));
    pairs.extend(filter.status.map(|status| {
        let status = match status {
            Status::Pending => "pending",
            Status::Anchored => "anchored",
        };
        ("status", status.to_owned())
    }));
    pairs.iter().map(|(name, value)| format!("{name}={}", percent(value))).collect::<Vec<_>>().join("&")
}

/// RFC 3986: everything but unreserved characters.
fn percent(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

pub(super) fn anchor(batch: Batch) -> Anchor {
    Anchor {
        sequence: batch.sequence,
        root: batch.receipts_root.to_string(),
        receipts: grouped(batch.receipts.unsigned_abs()),
        transaction: batch.transaction.to_string(),
        block: batch.block_number,
        time: time(batch.anchored_at_ms),
    }
}

pub(super) fn nodes(r: &Receipt) -> Vec<Node> {
    let verified = r.verified.iter().enumerate().map(|(index, node)| {
        let paid = r.payments.get(index).map_or(0, |payment| payment.amount_micro);
        let (role, meaning) = if index == 0 {
            ("delivered", "Its answer went to the requester; drawn at random after all had committed.")
        } else {
            ("verified", "Gave the same answer, token by token.")
        };
        Node {
            id: node.node.to_string(),
            short_id: short(&node.node),
            operator: node.operator.to_string(),
            short_operator: short(&node.operator),
            role,
            meaning,
            paid: true,
            amount: infer(paid),
            output: node.output_hash.to_string(),
            short_output: short(&node.output_hash),
        }
    });
    let unpaid = r.unpaid.iter().map(|node| {
        let (role, meaning) = reason(node.reason);
        Node {
            id: node.node.to_string(),
            short_id: short(&node.node),
            operator: node.operator.to_string(),
            short_operator: short(&node.operator),
            role,
            meaning,
            paid: false,
            amount: infer(0),
            output: String::new(),
            short_output: String::new(),
        }
    });
    verified.chain(unpaid).collect()
}

fn reason(reason: UnpaidReason) -> (&'static str, &'static str) {
    match reason {
        UnpaidReason::Outlier => ("outlier", "Revealed another answer than the majority."),
        UnpaidReason::NoCommit => ("no commitment", "Its lease ran out before it committed to an answer."),
        UnpaidReason::NoReveal => ("no reveal", "Committed to an answer and never showed it."),
        UnpaidReason::Mismatch => ("mismatch", "Showed another answer than it had committed to."),
        UnpaidReason::Declined => ("declined", "Signed that it would not take the job. No fault."),
        UnpaidReason::Busy => ("busy", "Had no free place when it was drawn."),
        UnpaidReason::Refereed => ("referee", "Its operator had refereed this request before it was drawn."),
        UnpaidReason::Disconnected => ("disconnected", "Lost its connection before it committed."),
    }
}

/// Verified nodes of those whose results counted.
pub(super) fn quorum(r: &Receipt) -> String {
    format!("{} of {}", r.verified.len(), r.k)
}

pub(super) fn took(r: &Receipt) -> String {
    duration(r.decided_at_ms.saturating_sub(r.submitted_at_ms).max(0))
}

pub(super) fn all_tokens(r: &Receipt) -> String {
    format!("{} + {}", grouped(u64::from(r.prompt_tokens)), grouped(u64::from(r.output_tokens)))
}

/// Every field of the receipt, in the words of the protocol.
pub(super) fn groups(r: &Receipt, model: &str) -> Vec<Group> {
    let field = |name, value: String, meaning| Field { name, value, meaning };
    let referees = if r.referees.is_empty() {
        "none".to_owned()
    } else {
        r.referees.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    };
    vec![
        Group {
            title: "Request",
            fields: vec![
                field("id", r.id.to_string(), "Names the request, its verdict and this receipt."),
                field(
                    "model_root",
                    r.model_root.to_string(),
                    "BLAKE3 of the model's files that every node proved to have.",
                ),
                field("model", model.to_owned(), "Its name in the model registry."),
                field(
                    "request_hash",
                    r.request_hash.to_string(),
                    "Prompt, parameters and seed as one hash: fixed before anyone worked on it. Every commitment is to this hash.",
                ),
                field(
                    "account_hash",
                    r.account_hash.to_string(),
                    "Who asked, hashed with a salt that only the account has.",
                ),
                field(
                    "prompt_hash",
                    r.prompt_hash.to_string(),
                    "The prompt's tokens, hashed with the same salt. The text itself is not public.",
                ),
                field(
                    "output_hash",
                    r.output_hash.to_string(),
                    "The delivered answer, hashed with the same salt.",
                ),
            ],
        },
        Group {
            title: "Assignment",
            fields: vec![
                field(
                    "epoch",
                    r.epoch.to_string(),
                    "The 10-second epoch whose set of eligible nodes was frozen.",
                ),
                field(
                    "eligible_root",
                    r.eligible_root.to_string(),
                    "Merkle root over that set: nodes, operators, classes, weights and how often each is refereed.",
                ),
                field(
                    "dispatcher",
                    r.dispatcher.to_string(),
                    "Key of the dispatcher that drew the nodes; the network's manifest names it.",
                ),
                field(
                    "assign_proof",
                    r.assign_proof.to_string(),
                    "Its proof of the draw from request and set. There is only one, so nothing could be tried out; anybody can check it.",
                ),
                field(
                    "attempt",
                    r.attempt.to_string(),
                    "Counts from 1; a dispatcher that fails is followed by another attempt.",
                ),
                field(
                    "class",
                    r.class.clone(),
                    "Numerics class of the nodes: in `exact`, honest answers are equal token by token.",
                ),
                field(
                    "asked_k",
                    r.asked_k.to_string(),
                    "Nodes that were asked for; the draw was made for it.",
                ),
                field("k", r.k.to_string(), "Nodes whose results counted for the majority."),
            ],
        },
        Group {
            title: "Agreement",
            fields: vec![
                field(
                    "lowest_similarity_millionths",
                    millionths(r.lowest_similarity_millionths),
                    "Lowest similarity in meaning between two verified answers; 1 is equal.",
                ),
                field(
                    "commitments_root",
                    r.commitments_root.to_string(),
                    "Hash over what the nodes committed to before any of them showed its answer.",
                ),
                field(
                    "post_proof",
                    r.post_proof.to_string(),
                    "The dispatcher's proof of the second draw, from these commitments. It decides whose answer is delivered and who referees, and nobody could know it before.",
                ),
                field(
                    "evidence_root",
                    r.evidence_root.to_string(),
                    "Hash over everything the verdict rests on. The account that asked can fetch it and repeat the decision.",
                ),
                field("calibration_hash", r.calibration_hash.to_string(), "Which tolerances were in force."),
                field("referees", referees, "Nodes that examined the answers of others."),
            ],
        },
        Group {
            title: "Work and price",
            fields: vec![
                field("prompt_tokens", grouped(u64::from(r.prompt_tokens)), "Tokens of the prompt."),
                field(
                    "output_tokens",
                    grouped(u64::from(r.output_tokens)),
                    "Tokens of the delivered answer, the end token included.",
                ),
                field("price_micro", infer(r.price_micro), "INFER per token and verified node."),
                field(
                    "charged_micro",
                    infer(r.charged_micro),
                    "INFER that the account paid: the sum of the payments above.",
                ),
            ],
        },
        Group {
            title: "Time and place",
            fields: vec![
                field("submitted_at_ms", time(r.submitted_at_ms), "When the gateway took the request."),
                field("decided_at_ms", time(r.decided_at_ms), "When the verdict fell."),
                field("chain_id", r.chain_id.to_string(), "The chain that the receipt is for."),
                field("contract", r.contract.to_string(), "The settlement contract on it."),
            ],
        },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_survives_its_address() {
        let filter = Filter { model: Some("a b&c=ä".to_owned()), from_ms: Some(5), ..Filter::default() };
        assert_eq!(filter_query(&filter), "model=a%20b%26c%3D%C3%A4&from_ms=5");
        let params = crate::params::Params::parse(&filter_query(&filter), &["model", "from_ms"]).unwrap();
        assert_eq!(params.filter().unwrap(), filter);
    }
}
