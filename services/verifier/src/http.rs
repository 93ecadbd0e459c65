//! `GET /v1/verdicts/{request_id}`: what was decided and how the results stood to each other. Public:
//! nodes, relations and times, never a text.

use actix_web::web::{self, Data, Path, ServiceConfig};
use actix_web::{HttpResponse, get};
use infera_protocol::bytes::{Address, NodeId};
use infera_protocol::evidence::{Evidence, SlotOutcome};
use infera_runtime::http::ApiError;
use infera_wire::{Message, v1};
use sea_orm::DatabaseConnection;
use serde::Serialize;
use uuid::Uuid;

use crate::store::{self, findings, verdicts};

/// The routes and what they read.
pub(crate) fn routes(db: DatabaseConnection) -> impl FnOnce(&mut ServiceConfig) {
    move |config| {
        config.app_data(Data::new(db)).service(get_verdicts);
    }
}

#[derive(Debug, Serialize)]
struct Verdicts {
    request_id: Uuid,
    /// Nothing follows after this.
    closed: bool,
    verdicts: Vec<View>,
}

#[derive(Debug, Serialize)]
struct View {
    attempt: u32,
    round: u32,
    outcome: String,
    /// Why it failed.
    code: Option<String>,
    /// How many more nodes are drawn.
    more_nodes: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    more_referees: Option<u32>,
    decided_at_ms: i64,
    model: String,
    class: Option<String>,
    lowest_similarity_millionths: Option<u32>,
    /// The verified set; the first one's result was delivered.
    verified: Vec<NodeId>,
    /// Every drawn node in the order of the draw.
    slots: Vec<Slot>,
    relations: Vec<Pair>,
}

#[derive(Debug, Serialize)]
struct Slot {
    node: NodeId,
    operator: Address,
    outcome: SlotOutcome,
}

#[derive(Debug, Serialize)]
struct Pair {
    a: NodeId,
    b: NodeId,
    relation: String,
    /// First token that differs.
    parting: Option<i64>,
    similarity_millionths: i64,
}

#[get("/v1/verdicts/{request_id}")]
async fn get_verdicts(
    db: Data<DatabaseConnection>,
    request_id: Path<String>,
) -> Result<HttpResponse, ApiError> {
    let request_id = Uuid::parse_str(&request_id)
        .map_err(|_| ApiError::bad_request("request_id", "request_id must be a UUID"))?;
    let rows = store::verdicts_of(db.get_ref(), request_id).await.map_err(ApiError::internal)?;
    if rows.is_empty() {
        return Err(ApiError::not_found(format!("there is no verdict for request {request_id}")));
    }
    let findings = store::findings_of(db.get_ref(), request_id).await.map_err(ApiError::internal)?;
    // Evidence may be some MB of JSON: not on the thread that serves others.
    let views =
        web::block(move || rows.into_iter().map(|row| view(row, &findings)).collect::<Result<Vec<_>, _>>())
            .await
            .map_err(ApiError::internal)?
            .map_err(ApiError::internal)?;
    let closed = views.iter().any(|view| matches!(view.outcome.as_str(), "verified" | "failed"));
    Ok(HttpResponse::Ok().json(Verdicts { request_id, closed, verdicts: views }))
}

fn view(row: verdicts::Model, findings: &[findings::Model]) -> Result<View, String> {
    let verdict = v1::Verdict::decode(row.body.as_slice()).map_err(|e| e.to_string())?;
    let mut view = View {
        attempt: verdict.attempt,
        round: verdict.round,
        outcome: row.outcome,
        code: None,
        more_nodes: None,
        more_referees: None,
        decided_at_ms: row.decided_at_ms,
        model: row.model,
        class: (!row.class.is_empty()).then_some(row.class),
        lowest_similarity_millionths: None,
        verified: Vec::new(),
        slots: Vec::new(),
        relations: findings.iter().filter(|f| f.round == row.round).map(pair).collect::<Result<_, _>>()?,
    };
    let mut evidence = row.evidence;
    match verdict.outcome {
        Some(v1::verdict::Outcome::Verified(verified)) => {
            view.lowest_similarity_millionths = Some(verified.lowest_similarity_millionths);
            view.verified = verified.nodes.iter().map(|n| node(n)).collect::<Result<_, _>>()?;
            evidence = Some(verified.evidence);
        }
        Some(v1::verdict::Outcome::MoreNodes(more)) => view.more_nodes = Some(more.count),
        Some(v1::verdict::Outcome::MoreReferees(more)) => view.more_referees = Some(more.count),
        Some(v1::verdict::Outcome::Failed(failed)) => view.code = Some(failed.code),
        None => {}
    }
    if let Some(evidence) = evidence {
        let evidence: Evidence = serde_json::from_slice(&evidence).map_err(|e| e.to_string())?;
        view.slots = evidence
            .slots
            .iter()
            .map(|slot| Slot { node: slot.node, operator: slot.operator, outcome: slot.outcome })
            .collect();
    }
    Ok(view)
}

fn pair(finding: &findings::Model) -> Result<Pair, String> {
    Ok(Pair {
        a: node(&finding.node_a)?,
        b: node(&finding.node_b)?,
        relation: finding.relation.clone(),
        parting: finding.parting,
        similarity_millionths: finding.similarity_millionths,
    })
}

fn node(bytes: &[u8]) -> Result<NodeId, String> {
    NodeId::try_from(bytes).map_err(|e| e.to_string())
}
