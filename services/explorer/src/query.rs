//! What is read: pages of receipts, one receipt, counters.

use infera_protocol::bytes::{Address, Hash32, NodeId};
use infera_protocol::document::Status;
use infera_protocol::receipt::Receipt;
use sea_orm::entity::prelude::*;
use sea_orm::sea_query::{Expr, Query, SelectStatement};
use sea_orm::{
    Condition, ConnectionTrait, FromQueryResult, JoinType, QueryOrder, QuerySelect, RelationTrait,
};
use serde::Serialize;

use crate::store::{anchors, batches, participants, receipts};

/// Which receipts.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Filter {
    pub model: Option<String>,
    pub operator: Option<Address>,
    pub node: Option<NodeId>,
    /// Decided at or after.
    pub from_ms: Option<i64>,
    /// Decided before.
    pub to_ms: Option<i64>,
    pub status: Option<Status>,
}

/// The last receipt of a page: the next page begins after it. As text `<decided_at_ms>_<id>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    pub decided_at_ms: i64,
    pub id: Uuid,
}

impl std::fmt::Display for Cursor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}_{}", self.decided_at_ms, self.id.simple())
    }
}

impl std::str::FromStr for Cursor {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        let (ms, id) = text.split_once('_').ok_or(())?;
        Ok(Self { decided_at_ms: ms.parse().map_err(drop)?, id: Uuid::parse_str(id).map_err(drop)? })
    }
}

#[derive(Debug, FromQueryResult)]
struct Row {
    model: String,
    receipt: Vec<u8>,
    sequence: Option<i64>,
}

/// A receipt as it is listed.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    pub model: String,
    pub receipt: Receipt,
    /// Its batch on the chain.
    pub batch: Option<i64>,
}

impl Entry {
    pub fn cursor(&self) -> Cursor {
        Cursor { decided_at_ms: self.receipt.decided_at_ms, id: self.receipt.id }
    }

    pub fn status(&self) -> Status {
        if self.batch.is_some() { Status::Anchored } else { Status::Pending }
    }
}

/// Where a batch stands on the chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Batch {
    pub sequence: i64,
    pub receipts_root: Hash32,
    pub receipts: i64,
    pub transaction: Hash32,
    pub block_number: i64,
    pub anchored_at_ms: i64,
}

/// Totals over everything.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, FromQueryResult)]
pub struct Stats {
    pub receipts: i64,
    /// Prompt and answer, counted once a request.
    pub tokens: i64,
    pub charged_micro: i64,
    pub anchored: i64,
    pub batches: i64,
    /// That were paid at least once.
    pub operators: i64,
}

fn select() -> sea_orm::Select<receipts::Entity> {
    receipts::Entity::find()
        .select_only()
        .columns([receipts::Column::Model, receipts::Column::Receipt])
        .column_as(anchors::Column::Sequence, "sequence")
        .join(JoinType::LeftJoin, receipts::Relation::Anchor.def())
}

fn entry(row: Row) -> Result<Entry, DbErr> {
    let receipt = serde_json::from_slice(&row.receipt)
        .map_err(|error| DbErr::Custom(format!("a stored receipt cannot be read: {error}")))?;
    Ok(Entry { model: row.model, receipt, batch: row.sequence })
}

/// At most `limit` receipts that match, newest first, from after `after`.
///
/// # Errors
/// The database's; so everywhere below.
pub async fn page<C: ConnectionTrait>(
    db: &C,
    filter: &Filter,
    after: Option<Cursor>,
    limit: u64,
) -> Result<Vec<Entry>, DbErr> {
    let mut query = select().filter(condition(filter));
    if let Some(after) = after {
        query = query.filter(
            Condition::any().add(receipts::Column::DecidedAtMs.lt(after.decided_at_ms)).add(
                Condition::all()
                    .add(receipts::Column::DecidedAtMs.eq(after.decided_at_ms))
                    .add(receipts::Column::Id.lt(after.id)),
            ),
        );
    }
    let rows = query
        .order_by_desc(receipts::Column::DecidedAtMs)
        .order_by_desc(receipts::Column::Id)
        .limit(limit)
        .into_model::<Row>()
        .all(db)
        .await?;
    rows.into_iter().map(entry).collect()
}

fn condition(filter: &Filter) -> Condition {
    let mut all = Condition::all();
    if let Some(model) = &filter.model {
        all = all.add(receipts::Column::Model.eq(model));
    }
    if let Some(from) = filter.from_ms {
        all = all.add(receipts::Column::DecidedAtMs.gte(from));
    }
    if let Some(to) = filter.to_ms {
        all = all.add(receipts::Column::DecidedAtMs.lt(to));
    }
    if let Some(operator) = &filter.operator {
        all = all.add(receipts::Column::Id.in_subquery(with(participants::Column::Operator, operator)));
    }
    if let Some(node) = &filter.node {
        all = all.add(receipts::Column::Id.in_subquery(with(participants::Column::Node, node)));
    }
    match filter.status {
        Some(Status::Anchored) => all.add(anchors::Column::Sequence.is_not_null()),
        Some(Status::Pending) => all.add(anchors::Column::Sequence.is_null()),
        None => all,
    }
}

fn with(column: participants::Column, value: &impl ToString) -> SelectStatement {
    Query::select()
        .column(participants::Column::ReceiptId)
        .from(participants::Entity)
        .and_where(column.eq(value.to_string()))
        .to_owned()
}

/// One receipt.
pub async fn receipt<C: ConnectionTrait>(db: &C, id: Uuid) -> Result<Option<Entry>, DbErr> {
    let row = select().filter(receipts::Column::Id.eq(id)).into_model::<Row>().one(db).await?;
    row.map(entry).transpose()
}

/// Those of `ids` that are there, in no order.
pub async fn receipts_of<C: ConnectionTrait>(
    db: &C,
    ids: impl IntoIterator<Item = Uuid>,
) -> Result<Vec<Entry>, DbErr> {
    let rows = select().filter(receipts::Column::Id.is_in(ids)).into_model::<Row>().all(db).await?;
    rows.into_iter().map(entry).collect()
}

/// A batch.
pub async fn batch<C: ConnectionTrait>(db: &C, sequence: i64) -> Result<Option<Batch>, DbErr> {
    let Some(row) = batches::Entity::find_by_id(sequence).one(db).await? else { return Ok(None) };
    let hash = |bytes: &[u8]| {
        Hash32::try_from(bytes).map_err(|error| DbErr::Custom(format!("a stored batch: {error}")))
    };
    Ok(Some(Batch {
        sequence: row.sequence,
        receipts_root: hash(&row.receipts_root)?,
        receipts: row.receipts,
        transaction: hash(&row.transaction)?,
        block_number: row.block_number,
        anchored_at_ms: row.anchored_at_ms,
    }))
}

/// The totals.
pub async fn stats<C: ConnectionTrait>(db: &C) -> Result<Stats, DbErr> {
    // PostgreSQL sums big integers into a numeric: cast back.
    let sum = |column: receipts::Column| {
        Expr::cust(format!("CAST(COALESCE(SUM({}), 0) AS BIGINT)", column.to_string()))
    };
    let totals: Option<(i64, i64, i64)> = receipts::Entity::find()
        .select_only()
        .column_as(receipts::Column::Id.count(), "receipts")
        .column_as(sum(receipts::Column::Tokens), "tokens")
        .column_as(sum(receipts::Column::ChargedMicro), "charged_micro")
        .into_tuple()
        .one(db)
        .await?;
    let (receipts, tokens, charged_micro) = totals.unwrap_or_default();
    let anchored = count(select().filter(anchors::Column::Sequence.is_not_null()).count(db).await?);
    let batches = count(batches::Entity::find().count(db).await?);
    let operators: Option<i64> = participants::Entity::find()
        .select_only()
        .column_as(Expr::cust("COUNT(DISTINCT operator)"), "operators")
        .filter(participants::Column::AmountMicro.gt(0))
        .into_tuple()
        .one(db)
        .await?;
    Ok(Stats { receipts, tokens, charged_micro, anchored, batches, operators: operators.unwrap_or(0) })
}

fn count(rows: u64) -> i64 {
    i64::try_from(rows).unwrap_or(i64::MAX)
}

/// Registry ids of the models that have receipts, at most 50, in order.
pub async fn models<C: ConnectionTrait>(db: &C) -> Result<Vec<String>, DbErr> {
    receipts::Entity::find()
        .select_only()
        .column(receipts::Column::Model)
        .distinct()
        .order_by_asc(receipts::Column::Model)
        .limit(50)
        .into_tuple()
        .all(db)
        .await
}
