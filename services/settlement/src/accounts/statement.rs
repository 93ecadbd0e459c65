//! `GET /v1/statement`: what moved an account's money, the oldest first, between its opening and its closing balance.

use actix_web::{HttpRequest, HttpResponse, web};
use infera_runtime::http::ApiError;
use sea_orm::DatabaseConnection;
use serde::Serialize;
use tokio::sync::mpsc::{Sender, error::SendError};
use uuid::Uuid;

use super::{
    csv::{self, Line, Part},
    owner,
    period::{MOST_LINES, Period, Place, Query},
};
use crate::{
    http::State,
    ledger::Kind,
    store::usage::{self as store, Moved},
};

/// The answer.
#[derive(Debug, Serialize)]
pub struct Page {
    pub account: String,
    /// Included, ms since 1970.
    pub from_ms: i64,
    /// Not included.
    pub to_ms: i64,
    /// The first is `opening`, the last `closing`: of this page, if there are several.
    pub data: Vec<Entry>,
    /// Where the next page begins; null on the last.
    pub next_cursor: Option<String>,
}

/// A line. Amounts in 10^-6 INFER.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Entry {
    pub at_ms: i64,
    /// `opening`, `credit`, `deposit`, `hold`, `charge`, `release`, `withdrawal`, `closing`.
    pub kind: &'static str,
    pub transfer_id: Option<Uuid>,
    pub request_id: Option<Uuid>,
    /// What it added to the account's money; a hold moves it only.
    pub amount_micro: i64,
    /// Held after it.
    pub held_micro: i64,
    /// The account's money after it, what is held included. Below zero: owed beyond escrow.
    pub balance_micro: i64,
}

const COLUMNS: [&str; 7] =
    ["at_ms", "kind", "transfer_id", "request_id", "amount_micro", "held_micro", "balance_micro"];

/// Balances as lines pass.
#[derive(Debug, Clone, Copy)]
struct Running {
    balance: i64,
    held: i64,
}

impl Running {
    fn stands(self, at_ms: i64, kind: &'static str) -> Entry {
        Entry {
            at_ms,
            kind,
            transfer_id: None,
            request_id: None,
            amount_micro: 0,
            held_micro: self.held,
            balance_micro: self.balance,
        }
    }

    fn add(&mut self, moved: &Moved) -> Entry {
        let amount = moved.free_micro + moved.held_micro;
        self.balance += amount;
        self.held += moved.held_micro;
        Entry {
            transfer_id: Some(moved.id),
            request_id: moved.request_id,
            amount_micro: amount,
            ..self.stands(moved.at_ms, kind(&moved.kind))
        }
    }
}

fn kind(stored: &str) -> &'static str {
    let is = |kind: Kind| kind.name() == stored;
    match stored {
        _ if is(Kind::Settle) => "charge",
        _ if is(Kind::Withdraw) => "withdrawal",
        _ if is(Kind::Credit) => Kind::Credit.name(),
        _ if is(Kind::Deposit) => Kind::Deposit.name(),
        _ if is(Kind::Hold) => Kind::Hold.name(),
        _ if is(Kind::Release) => Kind::Release.name(),
        _ => "other",
    }
}

impl Entry {
    fn line(&self, into: &mut String) {
        Line::default()
            .with(self.at_ms)
            .with(self.kind)
            .or_empty(self.transfer_id)
            .or_empty(self.request_id)
            .with(self.amount_micro)
            .with(self.held_micro)
            .with(self.balance_micro)
            .end(into);
    }
}

/// `GET /v1/statement`.
pub(crate) async fn statement(
    state: web::Data<State>,
    request: HttpRequest,
    query: web::Query<Query>,
) -> Result<HttpResponse, ApiError> {
    let account = owner(&state, &request)?.sub;
    let period = query.period(&request)?;
    if query.model.is_some() {
        return Err(ApiError::bad_request("model", "a statement is of all models; see GET /v1/usage"));
    }
    let db = state.db.clone();
    let opening = opening(&db, &account, &period).await?;
    if period.csv {
        return Ok(csv::answer("statement", |parts| write(db, account, period, opening, parts)));
    }
    let mut running = opening;
    let (moved, next) =
        store::moved(&db, &account, (period.from_ms, period.to_ms), period.after, period.limit)
            .await
            .map_err(ApiError::internal)?;
    let mut data = vec![running.stands(period.after.map_or(period.from_ms, |place| place.at_ms), "opening")];
    data.extend(moved.iter().map(|one| running.add(one)));
    data.push(running.stands(next.map_or(period.to_ms, |place| place.at_ms), "closing"));
    let Period { from_ms, to_ms, .. } = period;
    let next_cursor = next.map(|place| place.cursor());
    Ok(HttpResponse::Ok().json(Page { account, from_ms, to_ms, data, next_cursor }))
}

async fn opening(db: &DatabaseConnection, account: &str, period: &Period) -> Result<Running, ApiError> {
    // A cursor before the period is none.
    let after = period.after.filter(|place| place.at_ms >= period.from_ms);
    let first = Place { at_ms: period.from_ms, id: Uuid::nil() };
    let (balance, held) = match after {
        Some(place) => store::as_of(db, account, place, true).await,
        None => store::as_of(db, account, first, false).await,
    }
    .map_err(ApiError::internal)?;
    Ok(Running { balance, held })
}

async fn write(
    db: DatabaseConnection,
    account: String,
    period: Period,
    mut running: Running,
    parts: Sender<Part>,
) -> Result<(), SendError<Part>> {
    let mut text = String::new();
    COLUMNS.iter().fold(Line::default(), |line, column| line.with(column)).end(&mut text);
    running.stands(period.from_ms, "opening").line(&mut text);
    let mut after = period.after;
    loop {
        match store::moved(&db, &account, (period.from_ms, period.to_ms), after, MOST_LINES).await {
            Ok((moved, next)) => {
                moved.iter().for_each(|one| running.add(one).line(&mut text));
                if next.is_none() {
                    running.stands(period.to_ms, "closing").line(&mut text);
                    return parts.send(Ok(text.into())).await;
                }
                parts.send(Ok(std::mem::take(&mut text).into())).await?;
                after = next;
            }
            Err(error) => {
                tracing::error!(%error, "a statement breaks off");
                return parts.send(Err("the database failed".to_owned())).await;
            }
        }
    }
}
