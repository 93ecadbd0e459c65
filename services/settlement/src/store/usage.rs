//! What an account used, and what moved its money.

use std::collections::HashMap;

use sea_orm::{
    ColumnTrait, Condition, ConnectionTrait, DbErr, EntityTrait, QueryFilter, QueryOrder, QuerySelect,
    Select, Statement,
};
use serde::Serialize;
use uuid::Uuid;

use super::{
    requests::RequestRow,
    tables::{journal, requests},
};
use crate::{accounts::Place, ledger::Account};

/// Which requests.
#[derive(Debug, Clone)]
pub struct Filter {
    pub account: String,
    pub model: Option<String>,
    /// When they were funded or rejected, ms since 1970: included, and not included.
    pub from_ms: i64,
    pub to_ms: i64,
    /// Only older ones.
    pub after: Option<Place>,
}

/// A request, and the batch of its receipt.
#[derive(Debug, Clone)]
pub struct Used {
    pub row: RequestRow,
    pub batch: Option<i64>,
}

/// Sums over a period. Amounts in 10^-6 INFER.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    pub requests: i64,
    pub settled: i64,
    pub prompt_tokens: i64,
    pub completion_tokens: i64,
    pub charged_micro: i64,
}

impl Filter {
    fn period(&self) -> Condition {
        use requests::Column as R;
        Condition::all()
            .add(R::Account.eq(&self.account))
            .add(R::FundedAtMs.gte(self.from_ms))
            .add(R::FundedAtMs.lt(self.to_ms))
            .add_option(self.model.as_ref().map(|model| R::Model.eq(model)))
    }

    fn rows(&self) -> Select<requests::Entity> {
        use requests::Column as R;
        let older = self.after.map(|place| {
            Condition::any()
                .add(R::FundedAtMs.lt(place.at_ms))
                .add(Condition::all().add(R::FundedAtMs.eq(place.at_ms)).add(R::Id.lt(place.id)))
        });
        requests::Entity::find()
            .filter(self.period().add_option(older))
            .order_by_desc(R::FundedAtMs)
            .order_by_desc(R::Id)
    }
}

/// A page of requests, the newest first, and where the next begins.
///
/// # Errors
/// The database's.
pub async fn page<C: ConnectionTrait>(
    db: &C,
    filter: &Filter,
    limit: u64,
) -> Result<(Vec<Used>, Option<Place>), DbErr> {
    let mut rows = filter.rows().limit(limit + 1).all(db).await?;
    let next = cut(&mut rows, limit, |row| Place { at_ms: row.funded_at_ms, id: row.id });
    let ids = rows.iter().map(|row| row.id);
    let journal = journal::Entity::find().filter(journal::Column::RequestId.is_in(ids)).all(db).await?;
    let batches: HashMap<Uuid, Option<i64>> =
        journal.into_iter().map(|entry| (entry.request_id, entry.batch_sequence)).collect();
    let used = rows.into_iter().map(|row| Used { batch: batches.get(&row.id).copied().flatten(), row });
    Ok((used.collect(), next))
}

/// Drops what is beyond `limit`; if there is something, the last one that stays is where the next page begins.
fn cut<T>(rows: &mut Vec<T>, limit: u64, place: impl Fn(&T) -> Place) -> Option<Place> {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = rows.len() > limit;
    rows.truncate(limit);
    rows.last().filter(|_| more).map(place)
}

/// Sums over the whole period.
///
/// # Errors
/// The database's.
pub async fn totals<C: ConnectionTrait>(db: &C, filter: &Filter) -> Result<Totals, DbErr> {
    let model = if filter.model.is_some() { "AND model = $4" } else { "" };
    let sql = format!(
        "SELECT COUNT(*) AS requests, COUNT(CASE WHEN state = 'settled' THEN 1 END) AS settled, \
         CAST(COALESCE(SUM(prompt_tokens), 0) AS BIGINT) AS prompt, \
         CAST(COALESCE(SUM(completion_tokens), 0) AS BIGINT) AS completion, \
         CAST(COALESCE(SUM(charged_micro), 0) AS BIGINT) AS charged \
         FROM requests WHERE account = $1 AND funded_at_ms >= $2 AND funded_at_ms < $3 {model}"
    );
    let mut values: Vec<sea_orm::Value> =
        vec![filter.account.clone().into(), filter.from_ms.into(), filter.to_ms.into()];
    values.extend(filter.model.clone().map(Into::into));
    let statement = Statement::from_sql_and_values(db.get_database_backend(), sql, values);
    let Some(row) = db.query_one_raw(statement).await? else { return Ok(Totals::default()) };
    Ok(Totals {
        requests: row.try_get("", "requests")?,
        settled: row.try_get("", "settled")?,
        prompt_tokens: row.try_get("", "prompt")?,
        completion_tokens: row.try_get("", "completion")?,
        charged_micro: row.try_get("", "charged")?,
    })
}

/// What an account was charged over its lifetime, 10^-6 INFER.
///
/// # Errors
/// The database's.
pub async fn charged<C: ConnectionTrait>(db: &C, account: &str) -> Result<i64, DbErr> {
    let sql =
        "SELECT CAST(COALESCE(SUM(charged_micro), 0) AS BIGINT) AS charged FROM requests WHERE account = $1";
    let statement = Statement::from_sql_and_values(db.get_database_backend(), sql, [account.into()]);
    match db.query_one_raw(statement).await? {
        Some(row) => row.try_get("", "charged"),
        None => Ok(0),
    }
}

/// What a transfer did to an account's money, 10^-6 INFER.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    pub id: Uuid,
    /// See [`crate::ledger::Kind`].
    pub kind: String,
    pub request_id: Option<Uuid>,
    pub at_ms: i64,
    /// Added to what is free, or owed.
    pub free_micro: i64,
    /// Added to what is held.
    pub held_micro: i64,
}

/// `$1` to `$5`: the ledger's accounts that are this account's money; the last two are held.
fn parts(account: &str) -> Vec<sea_orm::Value> {
    let name = || account.to_owned();
    let parts: [Account; PARTS] = [
        Account::Consumer(name()),
        Account::Escrow(name()),
        Account::EscrowDebt(name()),
        Account::Held(name()),
        Account::EscrowHeld(name()),
    ];
    parts.iter().map(|of| of.name().into()).collect()
}

/// Which of them count as free, and which as held.
const FREE: &str = "account IN ($1, $2, $3)";
const HELD: &str = "account IN ($4, $5)";
/// How many there are, and how many of them are free.
const PARTS: usize = 5;
const FREE_PARTS: usize = 3;

/// Transfers of a period (from, included, to, not), the oldest first, after a place; and where the next page begins. Reads
/// no more of each of the ledger's accounts than the page may hold.
///
/// # Errors
/// The database's.
pub async fn moved<C: ConnectionTrait>(
    db: &C,
    account: &str,
    (from_ms, to_ms): (i64, i64),
    after: Option<Place>,
    limit: u64,
) -> Result<(Vec<Moved>, Option<Place>), DbErr> {
    let mut values = parts(account);
    values.extend([from_ms.into(), to_ms.into()]);
    let mut newer = "";
    if let Some(place) = after {
        values.extend([place.at_ms.into(), place.id.into()]);
        newer = "AND (at_ms, transfer_id) > ($8, $9)";
    }
    // A transfer has one entry of an account at most, so the page's are among the first of each.
    let most = limit + 1;
    let of_part = |part: usize| {
        let held = part >= FREE_PARTS;
        let columns =
            if held { "0 AS free, amount_micro AS held" } else { "amount_micro AS free, 0 AS held" };
        let number = part + 1;
        format!(
            "SELECT * FROM (SELECT transfer_id, {columns} FROM entries WHERE account = ${number} AND at_ms >= $6 \
             AND at_ms < $7 {newer} ORDER BY at_ms, transfer_id LIMIT {most}) AS part{number}"
        )
    };
    let parts: Vec<String> = (0..PARTS).map(of_part).collect();
    let sql = format!(
        "SELECT t.id AS id, t.kind AS kind, t.request_id AS request, t.at_ms AS at_ms, \
         CAST(SUM(e.free) AS BIGINT) AS free, CAST(SUM(e.held) AS BIGINT) AS held \
         FROM ({}) AS e JOIN transfers t ON t.id = e.transfer_id GROUP BY t.id, t.kind, t.request_id, t.at_ms \
         ORDER BY t.at_ms, t.id LIMIT {most}",
        parts.join(" UNION ALL ")
    );
    let statement = Statement::from_sql_and_values(db.get_database_backend(), sql, values);
    let rows = db.query_all_raw(statement).await?;
    let mut moved = rows
        .iter()
        .map(|row| {
            Ok(Moved {
                id: row.try_get("", "id")?,
                kind: row.try_get("", "kind")?,
                request_id: row.try_get("", "request")?,
                at_ms: row.try_get("", "at_ms")?,
                free_micro: row.try_get("", "free")?,
                held_micro: row.try_get("", "held")?,
            })
        })
        .collect::<Result<Vec<_>, DbErr>>()?;
    let next = cut(&mut moved, limit, |one| Place { at_ms: one.at_ms, id: one.id });
    Ok((moved, next))
}

/// An account's money before a place, or with it (`through`): all of it, and what of it was held. What it has now, less
/// what came since: most ask about what was lately.
///
/// # Errors
/// The database's.
pub async fn as_of<C: ConnectionTrait>(
    db: &C,
    account: &str,
    place: Place,
    through: bool,
) -> Result<(i64, i64), DbErr> {
    let mut values = parts(account);
    values.extend([place.at_ms.into(), place.id.into()]);
    let since = if through { ">" } else { ">=" };
    // In one statement, so that both are of one moment.
    let before = |which: &str| {
        format!(
            "CAST((SELECT COALESCE(SUM(amount_micro), 0) FROM balances WHERE {which}) \
             - (SELECT COALESCE(SUM(amount_micro), 0) FROM entries WHERE {which} \
             AND (at_ms, transfer_id) {since} ($6, $7)) AS BIGINT)"
        )
    };
    let sql = format!("SELECT {} AS free, {} AS held", before(FREE), before(HELD));
    let statement = Statement::from_sql_and_values(db.get_database_backend(), sql, values);
    let Some(row) = db.query_one_raw(statement).await? else { return Ok((0, 0)) };
    let (free, held): (i64, i64) = (row.try_get("", "free")?, row.try_get("", "held")?);
    Ok((free + held, held))
}
