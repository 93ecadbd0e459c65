//! `GET /v1/usage`: an account's requests, the newest first.

use actix_web::{HttpRequest, HttpResponse, web};
use infera_runtime::http::ApiError;
use sea_orm::{DatabaseConnection, DbErr};
use serde::Serialize;
use tokio::sync::mpsc::{Sender, error::SendError};
use uuid::Uuid;

use super::{
    csv::{self, Line, Part},
    owner,
    period::{MOST_LINES, Period, Query},
};
use crate::{
    domain,
    http::State,
    store::usage::{self as store, Filter, Used},
};

/// The answer.
#[derive(Debug, Serialize)]
pub struct Page {
    pub account: String,
    /// Included, ms since 1970: when settlement took the request.
    pub from_ms: i64,
    /// Not included.
    pub to_ms: i64,
    pub data: Vec<Usage>,
    /// Of the whole period, not only of this page.
    pub totals: store::Totals,
    /// Where the next page begins; null on the last.
    pub next_cursor: Option<String>,
}

/// A request. Amounts in 10^-6 INFER.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Usage {
    pub request_id: Uuid,
    pub model: String,
    /// `open`, `settled`, `released` or `rejected`.
    pub state: String,
    /// Why it was rejected or failed; empty otherwise.
    pub code: String,
    pub prompt_tokens: i64,
    pub completion_tokens: i64,
    /// What it held; nothing of it is held any more once it is closed. Of a rejected one nothing ever was.
    pub held_micro: i64,
    pub charged_micro: i64,
    pub submitted_at_ms: i64,
    pub closed_at_ms: Option<i64>,
    /// For `GET /v1/receipts/{id}`.
    pub receipt_id: Option<Uuid>,
    /// The batch that its receipt stands in.
    pub batch: Option<i64>,
}

const COLUMNS: [&str; 12] = [
    "request_id",
    "model",
    "state",
    "code",
    "prompt_tokens",
    "completion_tokens",
    "held_micro",
    "charged_micro",
    "submitted_at_ms",
    "closed_at_ms",
    "receipt_id",
    "batch",
];

impl From<Used> for Usage {
    fn from(used: Used) -> Self {
        let Used { row, batch } = used;
        let settled = row.state == domain::State::Settled.name();
        let rejected = row.state == domain::State::Rejected.name();
        Self {
            request_id: row.id,
            model: row.model,
            state: row.state,
            code: row.code,
            prompt_tokens: row.prompt_tokens,
            completion_tokens: row.completion_tokens,
            held_micro: if rejected { 0 } else { row.held_micro },
            charged_micro: row.charged_micro,
            // Rows that are older than that column have the time of their funding.
            submitted_at_ms: if row.submitted_at_ms > 0 { row.submitted_at_ms } else { row.funded_at_ms },
            closed_at_ms: row.closed_at_ms,
            receipt_id: settled.then_some(row.id),
            batch,
        }
    }
}

impl Usage {
    fn line(&self, into: &mut String) {
        Line::default()
            .with(self.request_id)
            .with(&self.model)
            .with(&self.state)
            .with(&self.code)
            .with(self.prompt_tokens)
            .with(self.completion_tokens)
            .with(self.held_micro)
            .with(self.charged_micro)
            .with(self.submitted_at_ms)
            .or_empty(self.closed_at_ms)
            .or_empty(self.receipt_id)
            .or_empty(self.batch)
            .end(into);
    }
}

/// `GET /v1/usage`.
pub(crate) async fn usage(
    state: web::Data<State>,
    request: HttpRequest,
    query: web::Query<Query>,
) -> Result<HttpResponse, ApiError> {
    let account = owner(&state, &request)?.sub;
    let period = query.period(&request)?;
    let filter = filter(account, query.model.clone(), &period);
    if period.csv {
        let db = state.db.clone();
        return Ok(csv::answer("usage", |parts| write(db, filter, parts)));
    }
    let totals = store::totals(&state.db, &filter).await.map_err(ApiError::internal)?;
    let (used, next) = store::page(&state.db, &filter, period.limit).await.map_err(ApiError::internal)?;
    Ok(HttpResponse::Ok().json(Page {
        account: filter.account,
        from_ms: period.from_ms,
        to_ms: period.to_ms,
        data: used.into_iter().map(Usage::from).collect(),
        totals,
        next_cursor: next.map(|place| place.cursor()),
    }))
}

fn filter(account: String, model: Option<String>, period: &Period) -> Filter {
    Filter { account, model, from_ms: period.from_ms, to_ms: period.to_ms, after: period.after }
}

async fn write(
    db: DatabaseConnection,
    mut filter: Filter,
    parts: Sender<Part>,
) -> Result<(), SendError<Part>> {
    let mut text = String::new();
    COLUMNS.iter().fold(Line::default(), |line, column| line.with(column)).end(&mut text);
    loop {
        let page: Result<_, DbErr> = store::page(&db, &filter, MOST_LINES).await;
        match page {
            Ok((used, next)) => {
                used.into_iter().map(Usage::from).for_each(|one| one.line(&mut text));
                parts.send(Ok(std::mem::take(&mut text).into())).await?;
                if next.is_none() {
                    return Ok(());
                }
                filter.after = next;
            }
            Err(error) => {
                tracing::error!(%error, "a list of usage breaks off");
                return parts.send(Err("the database failed".to_owned())).await;
            }
        }
    }
}
