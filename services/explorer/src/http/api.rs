//! `/v1`: JSON for programs.

use actix_web::web::{Data, Path};
use actix_web::{HttpRequest, HttpResponse, get};
use infera_protocol::document::Status;
use infera_protocol::receipt::Receipt;
use infera_runtime::http::ApiError;
use serde::Serialize;
use uuid::Uuid;

use super::{Explorer, Found};
use crate::params::{DEFAULT_HITS, DEFAULT_LIMIT, MAX_HITS, MAX_LIMIT, Params};
use crate::query::{self, Batch, Entry};

/// Parameters that filter.
pub(super) const FILTERS: [&str; 6] = ["model", "operator", "node", "from_ms", "to_ms", "status"];

/// A receipt in a list.
#[derive(Debug, Serialize)]
pub(super) struct Summary {
    id: Uuid,
    model: String,
    status: Status,
    /// Batch on the chain.
    batch: Option<i64>,
    submitted_at_ms: i64,
    decided_at_ms: i64,
    class: String,
    attempt: u32,
    k: u32,
    verified: usize,
    unpaid: usize,
    lowest_similarity_millionths: u32,
    prompt_tokens: u32,
    output_tokens: u32,
    charged_micro: u64,
}

impl From<&Entry> for Summary {
    fn from(entry: &Entry) -> Self {
        let receipt = &entry.receipt;
        Self {
            id: receipt.id,
            model: entry.model.clone(),
            status: entry.status(),
            batch: entry.batch,
            submitted_at_ms: receipt.submitted_at_ms,
            decided_at_ms: receipt.decided_at_ms,
            class: receipt.class.clone(),
            attempt: receipt.attempt,
            k: receipt.k,
            verified: receipt.verified.len(),
            unpaid: receipt.unpaid.len(),
            lowest_similarity_millionths: receipt.lowest_similarity_millionths,
            prompt_tokens: receipt.prompt_tokens,
            output_tokens: receipt.output_tokens,
            charged_micro: receipt.charged_micro,
        }
    }
}

#[derive(Debug, Serialize)]
struct Page {
    data: Vec<Summary>,
    /// Give it as `cursor` for the next page; null at the end.
    next_cursor: Option<String>,
}

#[derive(Debug, Serialize)]
struct Detail {
    model: String,
    status: Status,
    receipt: Receipt,
    /// Where its batch stands on the chain.
    anchor: Option<Batch>,
}

#[derive(Debug, Serialize)]
struct Hits {
    data: Vec<Hit>,
}

#[derive(Debug, Serialize)]
struct Hit {
    /// Cosine of the answer's embedding and the question's.
    score: f32,
    #[serde(flatten)]
    summary: Summary,
}

#[get("/v1/history")]
pub(super) async fn history(
    explorer: Data<Explorer>,
    request: HttpRequest,
) -> Result<HttpResponse, ApiError> {
    let known: Vec<&str> = FILTERS.into_iter().chain(["cursor", "limit"]).collect();
    let params = Params::parse(request.query_string(), &known)?;
    let (filter, after) = (params.filter()?, params.cursor()?);
    let limit = params.limit(DEFAULT_LIMIT, MAX_LIMIT)?;
    let (entries, next) = page(&explorer, &filter, after, limit).await?;
    let data = entries.iter().map(Summary::from).collect();
    Ok(HttpResponse::Ok().json(Page { data, next_cursor: next.map(|cursor| cursor.to_string()) }))
}

/// A page and where the next one begins.
pub(super) async fn page(
    explorer: &Explorer,
    filter: &query::Filter,
    after: Option<query::Cursor>,
    limit: u64,
) -> Result<(Vec<Entry>, Option<query::Cursor>), ApiError> {
    // One more than asked for says whether there is a next page.
    let mut entries =
        query::page(&explorer.db, filter, after, limit + 1).await.map_err(ApiError::internal)?;
    let more = entries.len() as u64 > limit;
    if more {
        entries.pop();
    }
    let next = if more { entries.last().map(Entry::cursor) } else { None };
    Ok((entries, next))
}

#[get("/v1/history/{id}")]
pub(super) async fn history_of(explorer: Data<Explorer>, id: Path<String>) -> Result<HttpResponse, ApiError> {
    let (entry, anchor) = detail(&explorer, &id).await?;
    let status = entry.status();
    Ok(HttpResponse::Ok().json(Detail { model: entry.model, status, receipt: entry.receipt, anchor }))
}

/// A receipt and its batch.
pub(super) async fn detail(explorer: &Explorer, id: &str) -> Result<(Entry, Option<Batch>), ApiError> {
    let id =
        Uuid::parse_str(id).map_err(|_| ApiError::bad_request("id", "id must be the UUID of a request"))?;
    let entry = query::receipt(&explorer.db, id).await.map_err(ApiError::internal)?.ok_or_else(|| {
        ApiError::not_found(format!("there is no receipt {id}; only verified requests have one"))
    })?;
    let batch = match entry.batch {
        Some(sequence) => query::batch(&explorer.db, sequence).await.map_err(ApiError::internal)?,
        None => None,
    };
    Ok((entry, batch))
}

#[get("/v1/search")]
pub(super) async fn search(explorer: Data<Explorer>, request: HttpRequest) -> Result<HttpResponse, ApiError> {
    let params = Params::parse(request.query_string(), &["q", "limit", "min_score"])?;
    let question =
        params.text("q").ok_or_else(|| ApiError::bad_request("q", "q is missing: say what to search for"))?;
    let limit = params.limit(DEFAULT_HITS as u64, MAX_HITS as u64)?;
    let min_score = params.min_score(explorer.min_score)?;
    let limit = usize::try_from(limit).unwrap_or(MAX_HITS);
    let found = explorer.find(question, limit, min_score).await?;
    let data = found.iter().map(hit).collect();
    Ok(HttpResponse::Ok().json(Hits { data }))
}

fn hit(found: &Found) -> Hit {
    Hit { score: found.score, summary: Summary::from(&found.entry) }
}

#[get("/v1/stats")]
pub(super) async fn stats(explorer: Data<Explorer>) -> Result<HttpResponse, ApiError> {
    let stats = query::stats(&explorer.db).await.map_err(ApiError::internal)?;
    Ok(HttpResponse::Ok().json(stats))
}
