//! What operators have earned: in all, as of each batch, and what earned them nothing.

use std::collections::BTreeMap;

use infera_protocol::{bytes::Address, receipt::Unpaid};
use sea_orm::{
    ColumnTrait, ConnectionTrait, DbErr, EntityTrait, PaginatorTrait, QueryFilter, QueryOrder, QuerySelect,
    QueryTrait, Set,
    sea_query::{Expr, ExprTrait, OnConflict},
};
use uuid::Uuid;

use super::{
    corrupt, signed,
    tables::{reward_history, rewards, unpaid},
    unsigned,
};

/// Rows that one statement writes at most, below the limits on bound values.
const CHUNK: usize = 400;

pub use unpaid::Model as UnpaidRow;

fn address(text: &str) -> Result<Address, DbErr> {
    text.parse().map_err(|_| corrupt("rewards.operator", "not an address"))
}

/// Adds what a batch's receipts earn to the operators' cumulative rewards and returns all of them, by operator.
///
/// # Errors
/// The database's.
pub async fn add<C: ConnectionTrait>(
    tx: &C,
    sequence: u64,
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
    let all: Vec<(Address, u64)> = rows
        .iter()
        .map(|row| {
            let operator = address(&row.operator)?;
            Ok((operator, unsigned("rewards.cumulative_micro", row.cumulative_micro)?))
        })
        .collect::<Result<_, DbErr>>()?;
    let sequence = signed("reward_history.sequence", sequence)?;
    let changed: Vec<&(Address, u64)> = all.iter().filter(|(of, _)| earned.contains_key(of)).collect();
    for chunk in changed.chunks(CHUNK) {
        let rows = chunk
            .iter()
            .map(|(operator, cumulative)| {
                Ok(reward_history::ActiveModel {
                    operator: Set(operator.to_string()),
                    sequence: Set(sequence),
                    cumulative_micro: Set(signed("reward_history.cumulative_micro", *cumulative)?),
                })
            })
            .collect::<Result<Vec<_>, DbErr>>()?;
        reward_history::Entity::insert_many(rows).exec_without_returning(tx).await?;
    }
    Ok(all)
}

/// The leaves of batch `sequence`'s reward tree: every operator with what it had earned in all by then.
///
/// # Errors
/// The database's.
pub async fn as_of<C: ConnectionTrait>(db: &C, sequence: u64) -> Result<Vec<(Address, u64)>, DbErr> {
    let rows: Vec<(String, i64)> = reward_history::Entity::find()
        .select_only()
        .column(reward_history::Column::Operator)
        // What is cumulative never shrinks.
        .column_as(reward_history::Column::CumulativeMicro.max(), "cumulative")
        .filter(reward_history::Column::Sequence.lte(signed("reward_history.sequence", sequence)?))
        .group_by(reward_history::Column::Operator)
        .order_by_asc(reward_history::Column::Operator)
        .into_tuple()
        .all(db)
        .await?;
    rows.into_iter()
        .map(|(operator, cumulative)| {
            Ok((address(&operator)?, unsigned("reward_history.cumulative_micro", cumulative)?))
        })
        .collect()
}

/// What an operator had earned as of batch `sequence`, 10^-6 INFER.
///
/// # Errors
/// The database's.
pub async fn cumulative<C: ConnectionTrait>(db: &C, operator: &Address, sequence: u64) -> Result<u64, DbErr> {
    let most: Option<i64> = reward_history::Entity::find()
        .select_only()
        .column_as(reward_history::Column::CumulativeMicro.max(), "cumulative")
        .filter(reward_history::Column::Operator.eq(operator.to_string()))
        .filter(reward_history::Column::Sequence.lte(signed("reward_history.sequence", sequence)?))
        .into_tuple::<Option<i64>>()
        .one(db)
        .await?
        .flatten();
    unsigned("reward_history.cumulative_micro", most.unwrap_or(0))
}

/// Notes whose work a receipt does not pay.
///
/// # Errors
/// The database's.
pub async fn note_unpaid<C: ConnectionTrait>(
    tx: &C,
    request: Uuid,
    list: &[Unpaid],
    now_ms: i64,
) -> Result<(), DbErr> {
    if list.is_empty() {
        return Ok(());
    }
    let rows = list.iter().map(|one| {
        let reason = serde_json::to_value(one.reason).ok().and_then(|v| v.as_str().map(str::to_owned));
        unpaid::ActiveModel {
            request_id: Set(request),
            node: Set(one.node.to_vec()),
            operator: Set(one.operator.to_string()),
            reason: Set(reason.unwrap_or_default()),
            at_ms: Set(now_ms),
        }
    });
    let insert = unpaid::Entity::insert_many(rows).on_conflict(OnConflict::new().do_nothing().to_owned());
    tx.execute(&insert.into_query()).await.map(drop)
}

/// An operator's newest unpaid work, and how much there is in all.
///
/// # Errors
/// The database's.
pub async fn unpaid_of<C: ConnectionTrait>(
    db: &C,
    operator: &Address,
    limit: u64,
) -> Result<(Vec<UnpaidRow>, u64), DbErr> {
    let of = || unpaid::Entity::find().filter(unpaid::Column::Operator.eq(operator.to_string()));
    let newest = of().order_by_desc(unpaid::Column::AtMs).limit(limit).all(db).await?;
    Ok((newest, of().count(db).await?))
}
