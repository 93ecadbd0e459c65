//! The journal of leaves and the batches made of them.

use std::collections::BTreeMap;

use infera_protocol::{
    bytes::{Address, Hash32},
    receipt::Receipt,
};
use sea_orm::{
    ColumnTrait, ConnectionTrait, DbErr, EntityTrait, PaginatorTrait, QueryFilter, QueryOrder, QuerySelect,
    QueryTrait, Set,
    sea_query::{Expr, ExprTrait, OnConflict},
};
use uuid::Uuid;

use super::{
    corrupt, hash, signed,
    tables::{batches, journal, receipts, rewards},
    unsigned,
};
use crate::{
    chain::{Batch, SignedTx},
    domain::{BatchState, BatchView, Local},
};

pub use batches::Model as BatchRow;
pub use journal::Model as JournalRow;

/// Rows that one statement reads or writes at most, below the limits on bound values.
const CHUNK: usize = 400;

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

/// The oldest receipts without a batch.
///
/// # Errors
/// The database's.
pub async fn take<C: ConnectionTrait>(tx: &C, limit: u64) -> Result<Vec<JournalRow>, DbErr> {
    journal::Entity::find()
        .filter(journal::Column::BatchSequence.is_null())
        .order_by_asc(journal::Column::AtMs)
        .order_by_asc(journal::Column::RequestId)
        .limit(limit)
        .all(tx)
        .await
}

/// The receipts of these requests.
///
/// # Errors
/// The database's; a receipt that is none.
pub async fn receipts_of<C: ConnectionTrait>(tx: &C, ids: &[Uuid]) -> Result<Vec<Receipt>, DbErr> {
    let mut all = Vec::with_capacity(ids.len());
    for chunk in ids.chunks(CHUNK) {
        let rows: Vec<Vec<u8>> = receipts::Entity::find()
            .select_only()
            .column(receipts::Column::Receipt)
            .filter(receipts::Column::RequestId.is_in(chunk.iter().copied()))
            .into_tuple()
            .all(tx)
            .await?;
        for bytes in rows {
            all.push(
                serde_json::from_slice(&bytes).map_err(|e| corrupt("receipts.receipt", &e.to_string()))?,
            );
        }
    }
    if all.len() == ids.len() { Ok(all) } else { Err(corrupt("journal", "a leaf has no receipt")) }
}

/// Adds what a batch's receipts earn to the operators' cumulative rewards and returns all of them, by operator.
///
/// # Errors
/// The database's.
pub async fn add_rewards<C: ConnectionTrait>(
    tx: &C,
    earned: &BTreeMap<Address, i64>,
) -> Result<Vec<(Address, u64)>, DbErr> {
    for (operator, amount) in earned {
        let row =
            rewards::ActiveModel { operator: Set(operator.to_string()), cumulative_micro: Set(*amount) };
        let column = Expr::col((rewards::Entity, rewards::Column::CumulativeMicro));
        let insert = rewards::Entity::insert(row).on_conflict(
            OnConflict::column(rewards::Column::Operator)
                .value(rewards::Column::CumulativeMicro, column.add(*amount))
                .to_owned(),
        );
        tx.execute(&insert.into_query()).await?;
    }
    let rows = rewards::Entity::find().order_by_asc(rewards::Column::Operator).all(tx).await?;
    rows.iter()
        .map(|row| {
            let operator = row.operator.parse().map_err(|_| corrupt("rewards.operator", "not an address"))?;
            Ok((operator, unsigned("rewards.cumulative_micro", row.cumulative_micro)?))
        })
        .collect()
}

/// Writes a new batch and puts the leaves into it in their order. `false` if somebody else was faster: roll back.
///
/// # Errors
/// The database's.
pub async fn form<C: ConnectionTrait>(
    tx: &C,
    batch: &Batch,
    leaves: &[JournalRow],
    now_ms: i64,
) -> Result<bool, DbErr> {
    let sequence = signed("batches.sequence", batch.sequence)?;
    if !insert(tx, batch, batch.hash().0, BatchState::Formed, now_ms).await? {
        return Ok(false);
    }
    for (index, leaf) in leaves.iter().enumerate() {
        let updated = journal::Entity::update_many()
            .col_expr(journal::Column::BatchSequence, Expr::value(sequence))
            .col_expr(journal::Column::BatchIndex, Expr::value(signed("journal.batch_index", index as u64)?))
            .filter(journal::Column::RequestId.eq(leaf.request_id))
            .filter(journal::Column::BatchSequence.is_null())
            .exec(tx)
            .await?;
        if updated.rows_affected != 1 {
            return Ok(false);
        }
    }
    Ok(true)
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
    insert(tx, &batch, hash.0, BatchState::Adopted, now_ms).await
}

async fn insert<C: ConnectionTrait>(
    tx: &C,
    batch: &Batch,
    hash: [u8; 32],
    state: BatchState,
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
        nonce: Set(None),
        tx_hash: Set(None),
        raw_tx: Set(None),
        block_number: Set(None),
        formed_at_ms: Set(now_ms),
        anchored_at_ms: Set(None),
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

/// Stores the signed transaction of a batch: before it is sent.
///
/// # Errors
/// The database's.
pub async fn set_signed<C: ConnectionTrait>(db: &C, sequence: u64, tx: &SignedTx) -> Result<(), DbErr> {
    batches::Entity::update_many()
        .col_expr(batches::Column::State, Expr::value(BatchState::Signed.name()))
        .col_expr(batches::Column::Nonce, Expr::value(signed("batches.nonce", tx.nonce)?))
        .col_expr(batches::Column::TxHash, Expr::value(tx.hash.to_vec()))
        .col_expr(batches::Column::RawTx, Expr::value(tx.raw.clone()))
        .filter(batches::Column::Sequence.eq(signed("batches.sequence", sequence)?))
        .exec(db)
        .await
        .map(drop)
}

/// Takes an anchored batch back: the chain lost it. `false` if it was not anchored.
///
/// # Errors
/// The database's.
pub async fn unanchor<C: ConnectionTrait>(db: &C, sequence: u64) -> Result<bool, DbErr> {
    let updated = batches::Entity::update_many()
        .col_expr(batches::Column::State, Expr::value(BatchState::Signed.name()))
        .filter(batches::Column::Sequence.eq(signed("batches.sequence", sequence)?))
        .filter(batches::Column::State.eq(BatchState::Anchored.name()))
        .exec(db)
        .await?;
    Ok(updated.rows_affected == 1)
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
