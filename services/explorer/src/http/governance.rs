//! `/governance`: what holders decided and what they vote about, as settlement reads it from the chain. The page asks for
//! it when it is opened; while it can't be had, the page says so and the rest of the explorer goes on. All who open it are
//! one address to the gateway, which limits those: what was answered is shown again for a while.

use std::time::{Duration, Instant};

use actix_web::web::Data;
use actix_web::{HttpResponse, get};
use infera_runtime::http::ApiError;
use serde::Deserialize;
use serde_json::Value;

use super::views::{GovernancePage, ListedModel, ProposalLine};
use super::{Explorer, pages};
use crate::format::{infer, millionths, time};

/// How long an answer is shown without asking again.
const LIFE: Duration = Duration::from_secs(5);
/// How long it is shown while no newer one can be had.
const STALE: Duration = Duration::from_secs(60);
/// Longest wait for the answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Longest answer, bytes.
const MOST_BYTES: usize = 4 * 1024 * 1024;

#[derive(Deserialize)]
struct Decisions {
    registry: Registry,
    proposals: Vec<Proposal>,
}

#[derive(Deserialize)]
struct Registry {
    block: u64,
    time_secs: i64,
    revision: u64,
    models: Vec<Model>,
    releases: Vec<String>,
    calibration_hash: String,
}

#[derive(Deserialize)]
struct Model {
    id: String,
    weights_root: String,
    similarity_threshold_millionths: u32,
    price_cap_micro: u64,
    active: bool,
}

#[derive(Deserialize)]
struct Proposal {
    id: String,
    state: String,
    description: String,
    actions: Vec<Value>,
    votes: Votes,
    quorum_micro: u64,
    deadline_secs: i64,
}

#[derive(Deserialize)]
struct Votes {
    for_micro: u64,
    against_micro: u64,
    abstain_micro: u64,
}

#[get("/governance")]
pub(super) async fn page(explorer: Data<Explorer>) -> HttpResponse {
    let page = newest(&explorer).await;
    pages::answer(&explorer, page)
}

async fn newest(explorer: &Explorer) -> Result<GovernancePage, ApiError> {
    let kept = explorer.governance.lock().await.clone();
    let younger_than = |life| kept.clone().filter(|(at, _)| at.elapsed() < life).map(|kept| kept.1);
    if let Some(known) = younger_than(LIFE) {
        return Ok(known);
    }
    match ask(explorer).await {
        Ok(decisions) => {
            let new = view(explorer, decisions);
            *explorer.governance.lock().await = Some((Instant::now(), new.clone()));
            Ok(new)
        }
        Err(error) => younger_than(STALE).ok_or(error),
    }
}

async fn ask(explorer: &Explorer) -> Result<Decisions, ApiError> {
    let away = |error: &dyn std::fmt::Display| {
        tracing::warn!(%error, "what holders decide is not read");
        ApiError::unavailable("what holders decide can't be read at this time; try again in a moment")
    };
    let url = format!("{}/v1/governance", explorer.receipts_url.trim_end_matches('/'));
    let answered = async {
        let mut response = explorer.client.get(url).send().await?.error_for_status()?;
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await? {
            body.extend_from_slice(&chunk);
            if body.len() > MOST_BYTES {
                break;
            }
        }
        Ok::<_, reqwest::Error>(body)
    };
    let body = tokio::time::timeout(PATIENCE, answered).await.map_err(|e| away(&e))?.map_err(|e| away(&e))?;
    serde_json::from_slice(&body).map_err(|e| away(&e))
}

fn view(explorer: &Explorer, decisions: Decisions) -> GovernancePage {
    let Decisions { registry, proposals } = decisions;
    GovernancePage {
        network: explorer.network.clone(),
        block: registry.block,
        time: time(registry.time_secs.saturating_mul(1_000)),
        revision: registry.revision,
        models: registry.models.into_iter().map(model).collect(),
        releases: registry.releases,
        calibration_hash: registry.calibration_hash,
        proposals: proposals.into_iter().map(proposal).collect(),
    }
}

fn model(model: Model) -> ListedModel {
    ListedModel {
        id: model.id,
        weights_root: model.weights_root,
        threshold: millionths(model.similarity_threshold_millionths),
        price_cap: infer(model.price_cap_micro.saturating_mul(1_000_000)),
        active: model.active,
    }
}

fn proposal(proposal: Proposal) -> ProposalLine {
    let first = proposal.description.lines().next().unwrap_or_default();
    ProposalLine {
        short_id: proposal.id.chars().take(10).collect(),
        title: first.trim().to_owned(),
        good: matches!(proposal.state.as_str(), "executed" | "succeeded" | "queued"),
        bad: matches!(proposal.state.as_str(), "defeated" | "canceled" | "expired"),
        state: proposal.state,
        actions: proposal.actions.iter().map(action).collect(),
        votes_for: infer(proposal.votes.for_micro),
        votes_against: infer(proposal.votes.against_micro),
        abstentions: infer(proposal.votes.abstain_micro),
        quorum: infer(proposal.quorum_micro),
        deadline: time(proposal.deadline_secs.saturating_mul(1_000)),
        id: proposal.id,
    }
}

/// A call as a line: its name, and what it names.
fn action(call: &Value) -> String {
    let field = |name: &str| call[name].as_str().unwrap_or_default().to_owned();
    let number = |name: &str| call[name].as_u64().unwrap_or_default();
    match call["call"].as_str() {
        Some("admit_model") => format!("serve the model {}", field("id")),
        Some("withdraw_model") => format!("withdraw the model {}", field("id")),
        Some("set_terms") => format!(
            "of the model {}: threshold {}, at most {} a million tokens",
            field("id"),
            millionths(u32::try_from(number("similarity_threshold_millionths")).unwrap_or(u32::MAX)),
            infer(number("price_cap_micro").saturating_mul(1_000_000))
        ),
        Some("approve_release") => format!("let the release {} work: {}", field("name"), field("release")),
        Some("withdraw_release") => format!("let the release {} work no longer", field("release")),
        Some("set_calibration") => format!("put the calibration {} in force", field("hash")),
        _ => format!("call {} with {}", field("target"), field("selector")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn calls_are_told_in_words() {
        for (call, expected) in [
            (json!({"call": "admit_model", "id": "m", "terms": {}}), "serve the model m"),
            (json!({"call": "withdraw_model", "id": "m"}), "withdraw the model m"),
            (
                json!({"call": "set_terms", "id": "m", "similarity_threshold_millionths": 700_000, "price_cap_micro": 2}),
                "of the model m: threshold 0.700000, at most 2.000000 a million tokens",
            ),
            (json!({"call": "set_calibration", "hash": "0x1"}), "put the calibration 0x1 in force"),
            (json!({"target": "0xa", "selector": "0xdeadbeef"}), "call 0xa with 0xdeadbeef"),
        ] {
            assert_eq!(action(&call), expected);
        }
    }
}
