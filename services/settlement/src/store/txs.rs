//! Signed transactions: stored before they are sent, kept until one of their batch is final.

use infera_protocol::bytes::Hash32;
use sea_orm::{
    ColumnTrait, ConnectionTrait, DbErr, EntityTrait, QueryFilter, QueryOrder, QueryTrait, Set,
    sea_query::OnConflict,
};

use super::{hash, signed, tables::batch_txs, unsigned};
use crate::chain::{Fees, SignedTx};

/// What a transaction is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// Posts the batch, perhaps with charges and its rewards.
    Post,
    /// Charges escrows for a batch that is posted; there may be several.
    Charge,
    /// Queues the rewards of a batch that is posted.
    Queue,
}

impl Purpose {
    pub fn name(self) -> &'static str {
        match self {
            Self::Post => "post",
            Self::Charge => "charge",
            Self::Queue => "queue",
        }
    }
}

/// A batch and what is to be done with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Job {
    pub sequence: u64,
    pub purpose: Purpose,
}

/// One signed transaction of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Variant {
    pub hash: Hash32,
    pub nonce: u64,
    pub fees: Fees,
    pub raw: Vec<u8>,
    pub signed_at_ms: i64,
}

fn fee(micro: i64) -> Result<u128, DbErr> {
    Ok(u128::from(unsigned("batch_txs.fee", micro)?))
}

fn variant(row: batch_txs::Model) -> Result<Variant, DbErr> {
    Ok(Variant {
        hash: hash("batch_txs.hash", &row.hash)?,
        nonce: unsigned("batch_txs.nonce", row.nonce)?,
        fees: Fees { max: fee(row.max_fee)?, priority: fee(row.priority_fee)? },
        raw: row.raw,
        signed_at_ms: row.signed_at_ms,
    })
}

/// Stores a signed transaction: before it is sent.
///
/// # Errors
/// The database's.
pub async fn add<C: ConnectionTrait>(db: &C, job: Job, tx: &SignedTx, now_ms: i64) -> Result<(), DbErr> {
    let wei = |fee: u128| signed("batch_txs.fee", u64::try_from(fee).unwrap_or(u64::MAX));
    let row = batch_txs::ActiveModel {
        hash: Set(tx.hash.to_vec()),
        sequence: Set(signed("batch_txs.sequence", job.sequence)?),
        purpose: Set(job.purpose.name().to_owned()),
        nonce: Set(signed("batch_txs.nonce", tx.nonce)?),
        raw: Set(tx.raw.clone()),
        max_fee: Set(wei(tx.fees.max)?),
        priority_fee: Set(wei(tx.fees.priority)?),
        signed_at_ms: Set(now_ms),
    };
    // The same bytes signed again are the same transaction.
    let insert = batch_txs::Entity::insert(row).on_conflict(OnConflict::new().do_nothing().to_owned());
    db.execute(&insert.into_query()).await.map(drop)
}

/// All variants of a job, oldest first.
///
/// # Errors
/// The database's.
pub async fn of<C: ConnectionTrait>(db: &C, job: Job) -> Result<Vec<Variant>, DbErr> {
    let rows = batch_txs::Entity::find()
        .filter(batch_txs::Column::Sequence.eq(signed("batch_txs.sequence", job.sequence)?))
        .filter(batch_txs::Column::Purpose.eq(job.purpose.name()))
        .order_by_asc(batch_txs::Column::SignedAtMs)
        .order_by_asc(batch_txs::Column::MaxFee)
        .all(db)
        .await?;
    rows.into_iter().map(variant).collect()
}

/// The highest fees that any stored transaction with this nonce offers: what replaces it must offer more.
///
/// # Errors
/// The database's.
pub async fn offered<C: ConnectionTrait>(db: &C, nonce: u64) -> Result<Option<Fees>, DbErr> {
    let rows = batch_txs::Entity::find()
        .filter(batch_txs::Column::Nonce.eq(signed("batch_txs.nonce", nonce)?))
        .all(db)
        .await?;
    let mut highest: Option<Fees> = None;
    for row in rows {
        let fees = variant(row)?.fees;
        highest = Some(highest.map_or(fees, |known| known.or_higher(fees)));
    }
    Ok(highest)
}

/// Forgets what a final batch does not need any more: its other variants, and queueings and charges of earlier batches,
/// which can't succeed behind a newer head. `kept` stays: it is sent again should the chain lose the batch all the same.
///
/// # Errors
/// The database's.
pub async fn forget<C: ConnectionTrait>(db: &C, sequence: u64, kept: &Hash32) -> Result<(), DbErr> {
    let sequence = signed("batch_txs.sequence", sequence)?;
    batch_txs::Entity::delete_many()
        .filter(batch_txs::Column::Sequence.eq(sequence))
        .filter(batch_txs::Column::Purpose.eq(Purpose::Post.name()))
        .filter(batch_txs::Column::Hash.ne(kept.to_vec()))
        .exec(db)
        .await?;
    batch_txs::Entity::delete_many()
        .filter(batch_txs::Column::Sequence.lt(sequence))
        .filter(batch_txs::Column::Purpose.is_in([Purpose::Queue.name(), Purpose::Charge.name()]))
        .exec(db)
        .await
        .map(drop)
}
