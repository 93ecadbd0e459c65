//! Routes of this service.
//!
//! | route | who | answer |
//! |---|---|---|
//! | `GET /v1/receipts/{id}` | everybody; with an API key of the account also the evidence | the receipt document in its canonical encoding |
//! | `GET /v1/balance` | an API key | `{account, available_micro, held_micro}` |
//! | `GET /v1/ledger/audit` | everybody | the sums that prove the ledger's invariants |
//! | `/livez`, `/readyz`, `/metrics` | | see [`infera_runtime::health`] |

use std::sync::Arc;

use actix_web::{
    HttpRequest, HttpResponse,
    http::header::AUTHORIZATION,
    web::{self, ServiceConfig},
};
use infera_protocol::{
    document::{Anchor, Document, Status},
    evidence::Evidence,
    merkle::MerkleTree,
    receipt::Receipt,
};
use infera_runtime::{health, http::ApiError, http::defaults, jwt::Claims, jwt::Verifier};
use sea_orm::{DatabaseConnection, DbErr};
use serde::Serialize;
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::{
    batcher::is_anchored,
    config::AUDIENCE,
    ledger::{self, Account},
    store::{batches, corrupt, hash, requests, unsigned},
};

/// Bodies are not read here at all.
const MAX_BODY: usize = 1024;

/// What the routes need.
#[derive(Clone)]
pub struct State {
    pub db: DatabaseConnection,
    pub keys: Verifier,
    /// One audit at a time: it reads every row.
    pub audit: Arc<Mutex<()>>,
}

/// A balance, 10^-6 INFER.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Balance {
    pub account: String,
    /// What may be spent.
    pub available_micro: i64,
    /// What open requests hold.
    pub held_micro: i64,
}

/// Adds all routes.
pub fn routes(state: State, health: health::Health) -> impl FnOnce(&mut ServiceConfig) {
    move |config| {
        config
            .configure(defaults(MAX_BODY))
            .configure(health::routes(health))
            .app_data(web::Data::new(state))
            .route("/v1/receipts/{id}", web::get().to(receipt))
            .route("/v1/balance", web::get().to(balance))
            .route("/v1/ledger/audit", web::get().to(audit));
    }
}

async fn receipt(
    state: web::Data<State>,
    request: HttpRequest,
    id: web::Path<String>,
) -> Result<HttpResponse, ApiError> {
    let id: Uuid = id.parse().map_err(|_| {
        ApiError::bad_request("id", "`id` must be a request's id, such as the receipt's in an answer")
    })?;
    let claims = claims(&state, &request)?;
    let Some(row) = requests::receipt(&state.db, id).await.map_err(ApiError::internal)? else {
        let known = requests::find(&state.db, id).await.map_err(ApiError::internal)?.is_some();
        return Err(no_receipt(known));
    };
    let owner = claims.is_some_and(|claims| claims.sub == row.account);
    let document = document(&state.db, row, owner).await.map_err(ApiError::internal)?;
    let bytes = document.canonical().map_err(ApiError::internal)?;
    Ok(HttpResponse::Ok().content_type("application/json").body(bytes))
}

fn no_receipt(known: bool) -> ApiError {
    if known {
        ApiError::not_found(
            "this request has no receipt: it is not decided yet, or it failed and was refunded",
        )
        .with_code("no_receipt")
    } else {
        ApiError::not_found("there is no receipt with this id").with_code("receipt_not_found")
    }
}

async fn document(
    db: &DatabaseConnection,
    row: requests::ReceiptRow,
    with_evidence: bool,
) -> Result<Document, DbErr> {
    let receipt: Receipt =
        serde_json::from_slice(&row.receipt).map_err(|e| corrupt("receipts.receipt", &e.to_string()))?;
    let evidence: Option<Evidence> = if with_evidence {
        Some(
            serde_json::from_slice(&row.evidence)
                .map_err(|e| corrupt("receipts.evidence", &e.to_string()))?,
        )
    } else {
        None
    };
    let anchor = anchor(db, row.request_id).await?;
    let status = if anchor.is_some() { Status::Anchored } else { Status::Pending };
    Ok(Document { receipt, status, anchor, evidence })
}

async fn anchor(db: &DatabaseConnection, id: Uuid) -> Result<Option<Anchor>, DbErr> {
    let Some((sequence, index)) =
        batches::entry(db, id).await?.and_then(|entry| entry.batch_sequence.zip(entry.batch_index))
    else {
        return Ok(None);
    };
    let sequence_number = unsigned("journal.batch_sequence", sequence)?;
    let Some(batch) = batches::find(db, sequence_number).await?.filter(is_anchored) else { return Ok(None) };
    let leaves: Vec<_> = batches::leaves(db, sequence).await?.into_iter().map(|(_, leaf)| leaf).collect();
    let index = usize::try_from(index).map_err(|_| corrupt("journal.batch_index", "it is negative"))?;
    // A large batch is some ten thousand hashes: not on the thread that serves others.
    let tree =
        web::block(move || MerkleTree::new(&leaves).and_then(|tree| Some((tree.root(), tree.proof(index)?))))
            .await
            .map_err(|error| DbErr::Custom(error.to_string()))?;
    let (root, proof) = tree.ok_or_else(|| corrupt("journal.batch_index", "the batch has no such leaf"))?;
    let receipts_root = hash("batches.receipts_root", &batch.receipts_root)?;
    if root != receipts_root {
        return Err(corrupt("batches.receipts_root", "the batch's leaves lead to another root"));
    }
    Ok(Some(Anchor { sequence: sequence_number, receipts_root, proof }))
}

async fn balance(state: web::Data<State>, request: HttpRequest) -> Result<HttpResponse, ApiError> {
    let claims = claims(&state, &request)?.ok_or_else(|| {
        ApiError::unauthorized("missing_api_key", "send an API key: Authorization: Bearer KEY")
    })?;
    let of = async |account: Account| ledger::balance(&state.db, &account).await.map_err(ApiError::internal);
    let available_micro = of(Account::Consumer(claims.sub.clone())).await?;
    let held_micro = of(Account::Held(claims.sub.clone())).await?;
    Ok(HttpResponse::Ok().json(Balance { account: claims.sub, available_micro, held_micro }))
}

async fn audit(state: web::Data<State>) -> Result<HttpResponse, ApiError> {
    let _turn = state.audit.lock().await;
    Ok(HttpResponse::Ok().json(ledger::audit(&state.db).await.map_err(ApiError::internal)?))
}

/// Who asks; `None` without a key. A key that is there must be good.
fn claims(state: &State, request: &HttpRequest) -> Result<Option<Claims>, ApiError> {
    let Some(header) = request.headers().get(AUTHORIZATION) else { return Ok(None) };
    let token = header
        .to_str()
        .ok()
        .and_then(|value| value.strip_prefix("Bearer ").or_else(|| value.strip_prefix("bearer ")))
        .ok_or_else(|| {
            ApiError::unauthorized("invalid_api_key", "write the header as Authorization: Bearer KEY")
        })?;
    Ok(Some(state.keys.verify(token.trim(), AUDIENCE)?))
}
