//! Batches for everybody: what stands behind a root on the chain, so that a stranger can recompute it
//! (`infera verify --batches`).
//!
//! | route | answer |
//! |---|---|
//! | `GET /v1/batches/{sequence}` | [`BatchInfo`] |
//! | `GET /v1/batches/{sequence}/receipts?from=N` | [`ReceiptPage`]: the batch's receipts, at most 500 at a time |
//! | `GET /v1/batches/{sequence}/rewards` | [`RewardLeaves`]: the leaves of the batch's reward tree |
//!
//! Only batches that are final on the chain are answered. Receipts hold no prompt, no answer and no account's name.

use actix_web::{HttpResponse, web};
use infera_protocol::{
    bytes::{Address, Hash32},
    receipt::Receipt,
};
use infera_runtime::http::ApiError;
use serde::{Deserialize, Serialize};

use crate::{
    batcher::is_anchored,
    http::State,
    store::{batches, hash, listing, rewards, unsigned},
};

/// Receipts of one answer: some MB.
pub const PAGE: u64 = 500;

/// A batch as it was posted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchInfo {
    pub sequence: u64,
    pub previous_hash: Hash32,
    pub receipts_root: Hash32,
    pub count: u64,
    pub reward_root: Hash32,
    /// What its receipts charged together, 10^-6 INFER.
    pub total_micro: u64,
    /// `hashBatch` of the contract.
    pub hash: Hash32,
    /// Where it was found; none for a batch that another settler posted.
    pub transaction: Option<Hash32>,
    pub block: Option<u64>,
}

/// Some receipts of a batch, in the order of its journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiptPage {
    pub receipts: Vec<Receipt>,
    /// Where the next page begins; none after the last one.
    pub next: Option<u64>,
}

/// The leaves of a batch's reward tree, by operator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RewardLeaves {
    pub rewards: Vec<RewardLeaf>,
}

/// What an operator has earned in all as of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RewardLeaf {
    pub operator: Address,
    pub cumulative_micro: u64,
}

/// Where a page begins.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PageQuery {
    #[serde(default)]
    from: u64,
}

/// Adds the routes.
pub fn routes(config: &mut web::ServiceConfig) {
    config
        .route("/v1/batches/{sequence}", web::get().to(info))
        .route("/v1/batches/{sequence}/receipts", web::get().to(receipts))
        .route("/v1/batches/{sequence}/rewards", web::get().to(leaves));
}

async fn find(state: &State, text: &str) -> Result<(u64, batches::BatchRow), ApiError> {
    let sequence: u64 =
        text.parse().ok().filter(|sequence| *sequence <= i64::MAX.unsigned_abs()).ok_or_else(|| {
            ApiError::bad_request("sequence", "`sequence` must be a batch's number, from 1")
        })?;
    let row = batches::find(&state.db, sequence).await.map_err(ApiError::internal)?;
    let row = row.filter(is_anchored).ok_or_else(|| {
        ApiError::not_found("there is no batch with this number that is final on the chain")
            .with_code("batch_not_found")
    })?;
    Ok((sequence, row))
}

async fn info(state: web::Data<State>, path: web::Path<String>) -> Result<HttpResponse, ApiError> {
    let (sequence, row) = find(&state, &path).await?;
    let number = |name, value| unsigned(name, value).map_err(ApiError::internal);
    let word = |name, value: &[u8]| hash(name, value).map_err(ApiError::internal);
    Ok(HttpResponse::Ok().json(BatchInfo {
        sequence,
        previous_hash: word("batches.previous_hash", &row.previous_hash)?,
        receipts_root: word("batches.receipts_root", &row.receipts_root)?,
        count: number("batches.count", row.count)?,
        reward_root: word("batches.reward_root", &row.reward_root)?,
        total_micro: number("batches.total_micro", row.total_micro)?,
        hash: word("batches.hash", &row.hash)?,
        transaction: row.tx_hash.as_deref().map(|hash| word("batches.tx_hash", hash)).transpose()?,
        block: row.block_number.map(|block| number("batches.block_number", block)).transpose()?,
    }))
}

async fn receipts(
    state: web::Data<State>,
    path: web::Path<String>,
    query: web::Query<PageQuery>,
) -> Result<HttpResponse, ApiError> {
    let (sequence, _) = find(&state, &path).await?;
    if query.from > i64::MAX.unsigned_abs() {
        return Err(ApiError::bad_request("from", "`from` is too large"));
    }
    let rows =
        listing::receipts_of(&state.db, sequence, query.from, PAGE).await.map_err(ApiError::internal)?;
    let full = rows.len() as u64 == PAGE;
    let next = rows.last().filter(|_| full).map(|(place, _)| place + 1);
    let receipts: Result<Vec<Receipt>, _> =
        rows.iter().map(|(_, receipt)| serde_json::from_slice(receipt)).collect();
    Ok(HttpResponse::Ok().json(ReceiptPage { receipts: receipts.map_err(ApiError::internal)?, next }))
}

async fn leaves(state: web::Data<State>, path: web::Path<String>) -> Result<HttpResponse, ApiError> {
    let (sequence, _) = find(&state, &path).await?;
    let rows = rewards::as_of(&state.db, sequence).await.map_err(ApiError::internal)?;
    let rewards = rows
        .into_iter()
        .map(|(operator, cumulative_micro)| RewardLeaf { operator, cumulative_micro })
        .collect();
    Ok(HttpResponse::Ok().json(RewardLeaves { rewards }))
}
