//! `GET /v1/contradictions`: what nodes signed that costs their operators' stake, for anybody to report.

use actix_web::HttpResponse;
use actix_web::http::header::ContentType;
use actix_web::web::{self, Data};
use infera_protocol::bytes::{Address, NodeId};
use infera_runtime::http::ApiError;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::session::Shared;
use crate::store;

/// Contradictions of one page.
const MOST: u64 = 100;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Page {
    operator: Option<Address>,
    /// The `id` of the last one of the page before.
    before: Option<Uuid>,
}

/// The body of `GET /v1/contradictions`, newest first.
#[derive(Debug, Serialize)]
struct List {
    contradictions: Vec<Item>,
    has_more: bool,
}

#[derive(Debug, Serialize)]
struct Item {
    id: Uuid,
    kind: String,
    operator: String,
    node: String,
    request: Uuid,
    attempt: i64,
    seen_at_ms: i64,
}

impl From<store::Kept> for Item {
    fn from(kept: store::Kept) -> Self {
        Self {
            id: kept.id,
            kind: kept.kind,
            operator: <[u8; 20]>::try_from(kept.operator)
                .map(|bytes| Address(bytes).to_string())
                .unwrap_or_default(),
            node: <[u8; 32]>::try_from(kept.node).map(|bytes| NodeId(bytes).to_string()).unwrap_or_default(),
            request: kept.request,
            attempt: kept.attempt,
            seen_at_ms: kept.seen_ms,
        }
    }
}

pub async fn list(shared: Data<Shared>, page: web::Query<Page>) -> Result<HttpResponse, ApiError> {
    let found = store::contradictions(&shared.db, page.operator, page.before, MOST + 1);
    let mut found = found.await.map_err(ApiError::internal)?;
    let has_more = found.len() as u64 > MOST;
    found.truncate(MOST as usize);
    let contradictions = found.into_iter().map(Item::from).collect();
    Ok(HttpResponse::Ok().json(List { contradictions, has_more }))
}

/// The evidence alone, as `infera operator slash` takes it.
pub async fn one(shared: Data<Shared>, id: web::Path<Uuid>) -> Result<HttpResponse, ApiError> {
    let kept = store::contradiction(&shared.db, *id).await.map_err(ApiError::internal)?;
    let kept = kept.ok_or_else(|| ApiError::not_found(format!("no contradiction has the id {id}")))?;
    Ok(HttpResponse::Ok().content_type(ContentType::json()).body(kept.evidence))
}
