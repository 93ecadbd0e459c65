//! Requests with their holds, and the receipts of those that were verified.

use infera_protocol::bytes::Hash32;
use sea_orm::{
    ColumnTrait, ConnectionTrait, DbErr, EntityTrait, QueryFilter, QueryOrder, QuerySelect, QueryTrait,
    Select, Set,
    sea_query::{Expr, ExprTrait, OnConflict},
};
use uuid::Uuid;

use super::{
    signed,
    tables::{journal, receipts, requests},
};
use crate::domain::{Rejection, State};

pub use receipts::Model as ReceiptRow;
pub use requests::Model as RequestRow;

/// A request that is about to be funded.
#[derive(Debug, Clone)]
pub struct NewRequest<'a> {
    pub id: Uuid,
    pub account: &'a str,
    pub model: &'a str,
    pub request_hash: Hash32,
    pub k: u32,
    pub calibration_hash: Hash32,
    pub price_micro: u64,
    pub held_micro: u64,
    pub deadline_ms: i64,
    pub prompt_tokens: u32,
    pub submitted_at_ms: i64,
}

/// Writes an open request; `false` if its id is there already.
///
/// # Errors
/// The database's.
pub async fn open<C: ConnectionTrait>(tx: &C, new: &NewRequest<'_>, now_ms: i64) -> Result<bool, DbErr> {
    let row = requests::ActiveModel {
        id: Set(new.id),
        account: Set(new.account.to_owned()),
        model: Set(new.model.to_owned()),
        state: Set(State::Open.name().to_owned()),
        request_hash: Set(new.request_hash.to_vec()),
        k: Set(i64::from(new.k)),
        calibration_hash: Set(new.calibration_hash.to_vec()),
        price_micro: Set(signed("requests.price_micro", new.price_micro)?),
        held_micro: Set(signed("requests.held_micro", new.held_micro)?),
        held_escrow_micro: Set(0),
        charged_micro: Set(0),
        charged_escrow_micro: Set(0),
        prompt_tokens: Set(new.prompt_tokens.into()),
        completion_tokens: Set(0),
        submitted_at_ms: Set(new.submitted_at_ms),
        code: Set(String::new()),
        message: Set(String::new()),
        funded_at_ms: Set(now_ms),
        deadline_ms: Set(new.deadline_ms),
        closed_at_ms: Set(None),
    };
    let insert = requests::Entity::insert(row).on_conflict(OnConflict::new().do_nothing().to_owned());
    Ok(tx.execute(&insert.into_query()).await?.rows_affected() == 1)
}

/// Notes how much of an open request's hold was taken from escrow.
///
/// # Errors
/// The database's.
pub async fn set_held_escrow<C: ConnectionTrait>(tx: &C, id: Uuid, micro: u64) -> Result<(), DbErr> {
    requests::Entity::update_many()
        .col_expr(
            requests::Column::HeldEscrowMicro,
            Expr::value(signed("requests.held_escrow_micro", micro)?),
        )
        .filter(requests::Column::Id.eq(id))
        .exec(tx)
        .await
        .map(drop)
}

/// Notes what a settled request's answer was, and what of its charge the escrow pays.
///
/// # Errors
/// The database's.
pub async fn set_settled<C: ConnectionTrait>(
    tx: &C,
    id: Uuid,
    completion_tokens: u32,
    charged_escrow_micro: u64,
) -> Result<(), DbErr> {
    let charged = signed("requests.charged_escrow_micro", charged_escrow_micro)?;
    requests::Entity::update_many()
        .col_expr(requests::Column::CompletionTokens, Expr::value(i64::from(completion_tokens)))
        .col_expr(requests::Column::ChargedEscrowMicro, Expr::value(charged))
        .filter(requests::Column::Id.eq(id))
        .exec(tx)
        .await
        .map(drop)
}

/// How an open request ends.
#[derive(Debug, Clone, Copy)]
pub struct Close<'a> {
    pub state: State,
    pub charged_micro: u64,
    pub code: &'a str,
    pub message: &'a str,
}

impl<'a> Close<'a> {
    pub fn rejected(rejection: &'a Rejection) -> Self {
        Self { state: State::Rejected, charged_micro: 0, code: rejection.code, message: &rejection.message }
    }
}

/// Ends an open request; `false` if it is not open.
///
/// # Errors
/// The database's.
pub async fn close<C: ConnectionTrait>(
    tx: &C,
    id: Uuid,
    close: &Close<'_>,
    now_ms: i64,
) -> Result<bool, DbErr> {
    let charged = signed("requests.charged_micro", close.charged_micro)?;
    let updated = requests::Entity::update_many()
        .col_expr(requests::Column::State, Expr::value(close.state.name()))
        .col_expr(requests::Column::ChargedMicro, Expr::value(charged))
        .col_expr(requests::Column::Code, Expr::value(close.code))
        .col_expr(requests::Column::Message, Expr::value(close.message))
        .col_expr(requests::Column::ClosedAtMs, Expr::value(now_ms))
        .filter(requests::Column::Id.eq(id))
        .filter(requests::Column::State.eq(State::Open.name()))
        .exec(tx)
        .await?;
    Ok(updated.rows_affected == 1)
}

/// Open requests whose deadline and funding both lie before `before_ms`, the oldest deadline first.
///
/// # Errors
/// The database's.
pub async fn overdue<C: ConnectionTrait>(
    db: &C,
    before_ms: i64,
    limit: u64,
) -> Result<Vec<RequestRow>, DbErr> {
    overdue_rows(before_ms).order_by_asc(requests::Column::DeadlineMs).limit(limit).all(db).await
}

/// How many those are, and what they hold together, 10^-6 INFER.
///
/// # Errors
/// The database's.
pub async fn overdue_total<C: ConnectionTrait>(db: &C, before_ms: i64) -> Result<(i64, i64), DbErr> {
    let held = requests::Column::HeldMicro.into_expr().sum().cast_as("bigint");
    let total: Option<(i64, Option<i64>)> = overdue_rows(before_ms)
        .select_only()
        .column_as(requests::Column::Id.count(), "holds")
        .column_as(held, "micro")
        .into_tuple()
        .one(db)
        .await?;
    Ok(total.map_or((0, 0), |(holds, micro)| (holds, micro.unwrap_or(0))))
}

fn overdue_rows(before_ms: i64) -> Select<requests::Entity> {
    requests::Entity::find()
        .filter(requests::Column::State.eq(State::Open.name()))
        .filter(requests::Column::DeadlineMs.lt(before_ms))
        // What was funded before deadlines were kept has 0.
        .filter(requests::Column::FundedAtMs.lt(before_ms))
}

/// A request.
///
/// # Errors
/// The database's.
pub async fn find<C: ConnectionTrait>(db: &C, id: Uuid) -> Result<Option<RequestRow>, DbErr> {
    requests::Entity::find_by_id(id).one(db).await
}

/// Writes a receipt and its leaf into the journal.
///
/// # Errors
/// The database's, also when the request has a receipt already.
pub async fn add_receipt<C: ConnectionTrait>(
    tx: &C,
    row: ReceiptRow,
    leaf: Vec<u8>,
    now_ms: i64,
) -> Result<(), DbErr> {
    let journal = journal::ActiveModel {
        request_id: Set(row.request_id),
        leaf: Set(leaf),
        at_ms: Set(now_ms),
        batch_sequence: Set(None),
        batch_index: Set(None),
    };
    let receipt = receipts::ActiveModel {
        request_id: Set(row.request_id),
        account: Set(row.account),
        receipt: Set(row.receipt),
        evidence: Set(row.evidence),
    };
    receipts::Entity::insert(receipt).exec_without_returning(tx).await?;
    journal::Entity::insert(journal).exec_without_returning(tx).await?;
    Ok(())
}

/// A receipt.
///
/// # Errors
/// The database's.
pub async fn receipt<C: ConnectionTrait>(db: &C, id: Uuid) -> Result<Option<ReceiptRow>, DbErr> {
    receipts::Entity::find_by_id(id).one(db).await
}
