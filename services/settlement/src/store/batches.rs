//! The journal of leaves and the batches made of them.

use infera_protocol::{bytes::Hash32, receipt::Payment};
use sea_orm::{
    ColumnTrait, ConnectionTrait, DbErr, EntityTrait, PaginatorTrait, QueryFilter, QueryOrder, QuerySelect,
    QueryTrait, Set, Statement,
    sea_query::{Expr, OnConflict},
};
use serde::Deserialize;
use uuid::Uuid;

use super::{
    corrupt, hash, signed,
    tables::{batches, journal},
    unsigned,
};
use crate::{
    chain::Batch,
    domain::{BatchState, BatchView, Local},
};

pub use batches::Model as BatchRow;
pub use journal::Model as JournalRow;

fn view(row: &BatchRow) -> Result<BatchView, DbErr> {
    Ok(BatchView {
        sequence: unsigned("batches.sequence", row.sequence)?,
        hash: hash("batches.hash", &row.hash)?,
        state: BatchState::parse(&row.state).ok_or_else(|| corrupt("batches.state", "unknown state"))?,
    })
}

/// The batch as the contract takes it.
///
/// # Errors
/// Values that are none of ours.
pub fn batch(row: &BatchRow) -> Result<Batch, DbErr> {
    Ok(Batch {
        sequence: unsigned("batches.sequence", row.sequence)?,
        previous_hash: hash("batches.previous_hash", &row.previous_hash)?.0.into(),
        receipts_root: hash("batches.receipts_root", &row.receipts_root)?.0.into(),
        count: unsigned("batches.count", row.count)?,
        reward_root: hash("batches.reward_root", &row.reward_root)?.0.into(),
        total: u128::from(unsigned("batches.total_micro", row.total_micro)?),
    })
}

/// What the planner needs to know, at a chain whose head is `head_sequence`.
///
/// # Errors
/// The database's.
pub async fn local<C: ConnectionTrait>(db: &C, head_sequence: u64) -> Result<Local, DbErr> {
    let head = signed("head", head_sequence)?;
    let at = async |sequence: i64| -> Result<Option<BatchView>, DbErr> {
        batches::Entity::find_by_id(sequence).one(db).await?.as_ref().map(view).transpose()
    };
    let last = batches::Entity::find().order_by_desc(batches::Column::Sequence).one(db).await?;
    let unconfirmed: Vec<i64> = batches::Entity::find()
        .select_only()
        .column(batches::Column::Sequence)
        .filter(batches::Column::Sequence.lte(head))
        .filter(batches::Column::State.is_in([BatchState::Formed.name(), BatchState::Signed.name()]))
        .order_by_asc(batches::Column::Sequence)
        .into_tuple()
        .all(db)
        .await?;
    let (waiting, oldest_ms) = waiting(db).await?;
    Ok(Local {
        last: last.as_ref().map(view).transpose()?,
        at_head: if head > 0 { at(head).await? } else { None },
        after_head: at(head + 1).await?,
        unconfirmed: unconfirmed
            .into_iter()
            .map(|sequence| unsigned("batches.sequence", sequence))
            .collect::<Result<_, _>>()?,
        waiting,
        oldest_ms,
    })
}

/// Receipts without a batch, and the time of the oldest.
///
/// # Errors
/// The database's.
pub async fn waiting<C: ConnectionTrait>(db: &C) -> Result<(u64, Option<i64>), DbErr> {
    let without = || journal::Entity::find().filter(journal::Column::BatchSequence.is_null());
    let count = without().count(db).await?;
    let oldest: Option<i64> = without()
        .select_only()
        .column_as(journal::Column::AtMs.min(), "oldest")
        .into_tuple::<Option<i64>>()
        .one(db)
        .await?
        .flatten();
    Ok((count, oldest))
}

/// Batches that are not on the chain yet, as far as this database knows.
///
/// # Errors
/// The database's.
pub async fn open_batches<C: ConnectionTrait>(db: &C) -> Result<u64, DbErr> {
    batches::Entity::find()
        .filter(batches::Column::State.is_in([BatchState::Formed.name(), BatchState::Signed.name()]))
        .count(db)
        .await
}

/// Puts the oldest receipts without a batch, at most `limit`, into batch `sequence` and returns their leaves in the order
/// of the tree.
///
/// # Errors
/// The database's.
pub async fn take<C: ConnectionTrait>(tx: &C, sequence: u64, limit: u64) -> Result<Vec<Hash32>, DbErr> {
    let sequence = signed("journal.batch_sequence", sequence)?;
    let limit = signed("batch.limit", limit)?;
    // First the choice, then the reading of what was chosen: rows that others add meanwhile belong to the next batch.
    let sql = format!(
        "UPDATE journal SET batch_sequence = {sequence}, batch_index = chosen.place FROM \
         (SELECT request_id AS id, ROW_NUMBER() OVER (ORDER BY at_ms, request_id) - 1 AS place FROM journal \
         WHERE batch_sequence IS NULL ORDER BY at_ms, request_id LIMIT {limit}) AS chosen \
         WHERE journal.request_id = chosen.id AND journal.batch_sequence IS NULL"
    );
    tx.execute_unprepared(&sql).await?;
    Ok(leaves(tx, sequence).await?.into_iter().map(|(_, leaf)| leaf).collect())
}

/// What a receipt moves, as far as a batch needs it; its other fields are the leaf's.
#[derive(Debug, Deserialize)]
pub struct Moved {
    /// What the account was charged, 10^-6 INFER.
    pub charged_micro: u64,
    pub payments: Vec<Payment>,
}

/// The receipts of a batch.
///
/// # Errors
/// The database's; a receipt that is none.
pub async fn moved<C: ConnectionTrait>(tx: &C, sequence: u64) -> Result<Vec<Moved>, DbErr> {
    let sequence = signed("journal.batch_sequence", sequence)?;
    let sql = format!(
        "SELECT receipts.receipt AS receipt FROM journal JOIN receipts ON receipts.request_id = journal.request_id \
         WHERE journal.batch_sequence = {sequence}"
    );
    let statement = Statement::from_string(tx.get_database_backend(), sql);
    let rows = tx.query_all_raw(statement).await?;
    rows.iter()
        .map(|row| {
            let bytes: Vec<u8> = row.try_get("", "receipt")?;
            serde_json::from_slice(&bytes).map_err(|e| corrupt("receipts.receipt", &e.to_string()))
        })
        .collect()
}

/// Writes a new batch, whose leaves [`take`] chose. `false` if somebody else was faster: roll back.
///
/// # Errors
/// The database's.
pub async fn form<C: ConnectionTrait>(
    tx: &C,
    batch: &Batch,
    reward_total: u64,
    now_ms: i64,
) -> Result<bool, DbErr> {
    insert(tx, batch, batch.hash().0, BatchState::Formed, reward_total, now_ms).await
}

/// Notes the chain's head as the batch that the next one follows.
///
/// # Errors
/// The database's.
pub async fn adopt<C: ConnectionTrait>(
    tx: &C,
    sequence: u64,
    hash: Hash32,
    root: Hash32,
    now_ms: i64,
) -> Result<bool, DbErr> {
    let batch = Batch {
        sequence,
        previous_hash: Default::default(),
        receipts_root: root.0.into(),
        count: 0,
        reward_root: Default::default(),
        total: 0,
    };
    insert(tx, &batch, hash.0, BatchState::Adopted, 0, now_ms).await
}

async fn insert<C: ConnectionTrait>(
    tx: &C,
    batch: &Batch,
    hash: [u8; 32],
    state: BatchState,
    reward_total: u64,
    now_ms: i64,
) -> Result<bool, DbErr> {
    let total = u64::try_from(batch.total).map_err(|_| corrupt("batches.total_micro", "it is too large"))?;
    let row = batches::ActiveModel {
        sequence: Set(signed("batches.sequence", batch.sequence)?),
        state: Set(state.name().to_owned()),
        previous_hash: Set(batch.previous_hash.to_vec()),
        receipts_root: Set(batch.receipts_root.to_vec()),
        reward_root: Set(batch.reward_root.to_vec()),
        count: Set(signed("batches.count", batch.count)?),
        total_micro: Set(signed("batches.total_micro", total)?),
        hash: Set(hash.to_vec()),
        tx_hash: Set(None),
        block_number: Set(None),
        formed_at_ms: Set(now_ms),
        anchored_at_ms: Set(None),
        reward_total_micro: Set(signed("batches.reward_total_micro", reward_total)?),
    };
    let insert = batches::Entity::insert(row).on_conflict(OnConflict::new().do_nothing().to_owned());
    Ok(tx.execute(&insert.into_query()).await?.rows_affected() == 1)
}

/// A batch.
///
/// # Errors
/// The database's.
pub async fn find<C: ConnectionTrait>(db: &C, sequence: u64) -> Result<Option<BatchRow>, DbErr> {
    batches::Entity::find_by_id(signed("batches.sequence", sequence)?).one(db).await
}

/// Notes that a batch has a signed transaction.
///
/// # Errors
/// The database's.
pub async fn set_signed<C: ConnectionTrait>(db: &C, sequence: u64) -> Result<(), DbErr> {
    batches::Entity::update_many()
        .col_expr(batches::Column::State, Expr::value(BatchState::Signed.name()))
        .filter(batches::Column::Sequence.eq(signed("batches.sequence", sequence)?))
        .filter(batches::Column::State.eq(BatchState::Formed.name()))
        .exec(db)
        .await
        .map(drop)
}

/// Takes anchored batches after `head_sequence` back, because the chain does not have them any more. How many there were.
///
/// # Errors
/// The database's.
pub async fn unanchor_after<C: ConnectionTrait>(db: &C, head_sequence: u64) -> Result<u64, DbErr> {
    let updated = batches::Entity::update_many()
        .col_expr(batches::Column::State, Expr::value(BatchState::Signed.name()))
        .filter(batches::Column::Sequence.gt(signed("head", head_sequence)?))
        .filter(batches::Column::State.eq(BatchState::Anchored.name()))
        .exec(db)
        .await?;
    Ok(updated.rows_affected)
}

/// The newest batch that is anchored together with all before it; 0 for none.
///
/// # Errors
/// The database's.
pub async fn last_anchored<C: ConnectionTrait>(db: &C) -> Result<u64, DbErr> {
    let open: Option<i64> = batches::Entity::find()
        .select_only()
        .column_as(batches::Column::Sequence.min(), "first")
        .filter(batches::Column::State.is_in([BatchState::Formed.name(), BatchState::Signed.name()]))
        .into_tuple::<Option<i64>>()
        .one(db)
        .await?
        .flatten();
    let last = match open {
        Some(first) => first - 1,
        None => batches::Entity::find()
            .order_by_desc(batches::Column::Sequence)
            .one(db)
            .await?
            .map_or(0, |row| row.sequence),
    };
    unsigned("batches.sequence", last)
}

/// What was charged and is not finally on the chain, 10^-6 INFER: receipts without a batch, and batches on their way.
///
/// # Errors
/// The database's.
pub async fn exposed<C: ConnectionTrait>(db: &C) -> Result<i64, DbErr> {
    let sql = "SELECT CAST((SELECT COALESCE(SUM(requests.charged_micro), 0) FROM journal \
         JOIN requests ON requests.id = journal.request_id WHERE journal.batch_sequence IS NULL) \
         + (SELECT COALESCE(SUM(total_micro), 0) FROM batches WHERE state IN ('formed', 'signed')) AS BIGINT) \
         AS value";
    let statement = Statement::from_string(db.get_database_backend(), sql);
    match db.query_one_raw(statement).await? {
        Some(row) => row.try_get("", "value"),
        None => Ok(0),
    }
}

/// Where a batch was found on the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub tx: Hash32,
    pub block: u64,
}

/// Marks a batch as anchored; `false` if it was already.
///
/// # Errors
/// The database's.
pub async fn set_anchored<C: ConnectionTrait>(
    tx: &C,
    sequence: u64,
    place: &Place,
    now_ms: i64,
) -> Result<bool, DbErr> {
    let updated = batches::Entity::update_many()
        .col_expr(batches::Column::State, Expr::value(BatchState::Anchored.name()))
        .col_expr(batches::Column::TxHash, Expr::value(place.tx.to_vec()))
        .col_expr(batches::Column::BlockNumber, Expr::value(signed("batches.block_number", place.block)?))
        .col_expr(batches::Column::AnchoredAtMs, Expr::value(now_ms))
        .filter(batches::Column::Sequence.eq(signed("batches.sequence", sequence)?))
        .filter(batches::Column::State.is_in([BatchState::Formed.name(), BatchState::Signed.name()]))
        .exec(tx)
        .await?;
    Ok(updated.rows_affected == 1)
}

/// A batch's leaves in the order in which its tree was made.
///
/// # Errors
/// The database's.
pub async fn leaves<C: ConnectionTrait>(db: &C, sequence: i64) -> Result<Vec<(Uuid, Hash32)>, DbErr> {
    let rows: Vec<(Uuid, Vec<u8>)> = journal::Entity::find()
        .select_only()
        .column(journal::Column::RequestId)
        .column(journal::Column::Leaf)
        .filter(journal::Column::BatchSequence.eq(sequence))
        .order_by_asc(journal::Column::BatchIndex)
        .into_tuple()
        .all(db)
        .await?;
    rows.into_iter().map(|(id, leaf)| Ok((id, hash("journal.leaf", &leaf)?))).collect()
}

/// A receipt's place in the journal.
///
/// # Errors
/// The database's.
pub async fn entry<C: ConnectionTrait>(db: &C, id: Uuid) -> Result<Option<JournalRow>, DbErr> {
    journal::Entity::find_by_id(id).one(db).await
}
