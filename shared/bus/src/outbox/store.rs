//! Queries of the outbox.

use std::collections::HashSet;

use sea_orm::sea_query::{Expr, ExprTrait, LockBehavior, LockType, OnConflict, Query, SelectStatement};
use sea_orm::{
    ColumnTrait, Condition, ConnectionTrait, DatabaseConnection, DbBackend, DbErr, EntityTrait,
    FromQueryResult, IntoActiveModel, PaginatorTrait, QueryFilter, QueryOrder, QuerySelect, QueryTrait,
    TransactionTrait,
};
use uuid::Uuid;

use super::schema::{dead, outbox};
use crate::bus::Envelope;
use crate::delivery::DeadLetter;

/// Names a row: message id and routing key.
pub(super) type Key = (Uuid, String);

pub(super) async fn insert<C: ConnectionTrait>(tx: &C, row: outbox::Model) -> Result<(), DbErr> {
    let insert = outbox::Entity::insert(row.into_active_model())
        .on_conflict(OnConflict::new().do_nothing().to_owned());
    tx.execute(&insert.into_query()).await.map(drop)
}

pub(super) async fn pending<C: ConnectionTrait>(db: &C) -> Result<u64, DbErr> {
    outbox::Entity::find().count(db).await
}

pub(super) async fn dead_letters<C: ConnectionTrait>(db: &C) -> Result<u64, DbErr> {
    dead::Entity::find().count(db).await
}

/// Takes up to `limit` rows, oldest first, that no relay has: `owner` has them until `until_ms`. Relays
/// that ask at the same time get different rows.
pub(super) async fn claim<C: ConnectionTrait>(
    db: &C,
    owner: Uuid,
    now_ms: i64,
    until_ms: i64,
    limit: usize,
) -> Result<Vec<outbox::Model>, DbErr> {
    let free = free_rows(db.get_database_backend(), now_ms, limit);
    let mut update = Query::update();
    update
        .table(outbox::Entity)
        .value(outbox::Column::LeaseOwner, owner)
        .value(outbox::Column::LeaseUntilMs, until_ms)
        .and_where(
            Expr::tuple([Expr::col(outbox::Column::Id), Expr::col(outbox::Column::RoutingKey)])
                .in_subquery(free),
        )
        .returning_all();
    let mut rows = db
        .query_all(&update)
        .await?
        .iter()
        .map(|row| outbox::Model::from_query_result(row, ""))
        .collect::<Result<Vec<_>, _>>()?;
    rows.sort_by_key(|row| row.created_ms);
    Ok(rows)
}

/// Up to `limit` rows, oldest first, that are not `in_flight`: for a table with one relay.
pub(super) async fn waiting<C: ConnectionTrait>(
    db: &C,
    in_flight: &HashSet<Key>,
    limit: usize,
) -> Result<Vec<outbox::Model>, DbErr> {
    let keys: Vec<Key> = outbox::Entity::find()
        .select_only()
        .columns([outbox::Column::Id, outbox::Column::RoutingKey])
        .order_by_asc(outbox::Column::CreatedMs)
        .limit((in_flight.len() + limit) as u64)
        .into_tuple()
        .all(db)
        .await?;
    let fresh: Vec<Key> = keys.into_iter().filter(|key| !in_flight.contains(key)).take(limit).collect();
    if fresh.is_empty() {
        return Ok(Vec::new());
    }
    outbox::Entity::find().filter(any_of(&fresh)).order_by_asc(outbox::Column::CreatedMs).all(db).await
}

fn free_rows(backend: DbBackend, now_ms: i64, limit: usize) -> SelectStatement {
    let mut select = Query::select();
    select
        .columns([outbox::Column::Id, outbox::Column::RoutingKey])
        .from(outbox::Entity)
        .and_where(Expr::col(outbox::Column::LeaseUntilMs).lt(now_ms))
        .order_by(outbox::Column::CreatedMs, sea_orm::Order::Asc)
        .limit(limit as u64);
    if backend == DbBackend::Postgres {
        select.lock_with_behavior(LockType::Update, LockBehavior::SkipLocked);
    }
    select
}

/// Keeps what `owner` has until `until_ms`.
pub(super) async fn renew<C: ConnectionTrait>(db: &C, owner: Uuid, until_ms: i64) -> Result<(), DbErr> {
    outbox::Entity::update_many()
        .col_expr(outbox::Column::LeaseUntilMs, Expr::value(until_ms))
        .filter(outbox::Column::LeaseOwner.eq(owner))
        .exec(db)
        .await
        .map(drop)
}

/// Gives up what `owner` has, so that the next relay need not wait for the leases to end.
pub(super) async fn release<C: ConnectionTrait>(db: &C, owner: Uuid) -> Result<(), DbErr> {
    outbox::Entity::update_many()
        .col_expr(outbox::Column::LeaseUntilMs, Expr::value(0_i64))
        .filter(outbox::Column::LeaseOwner.eq(owner))
        .exec(db)
        .await
        .map(drop)
}

/// Gives up these rows of `owner`.
pub(super) async fn release_rows<C: ConnectionTrait>(db: &C, owner: Uuid, keys: &[Key]) -> Result<(), DbErr> {
    outbox::Entity::update_many()
        .col_expr(outbox::Column::LeaseUntilMs, Expr::value(0_i64))
        .filter(outbox::Column::LeaseOwner.eq(owner))
        .filter(any_of(keys))
        .exec(db)
        .await
        .map(drop)
}

/// Deletes rows whose messages are confirmed.
pub(super) async fn delete<C: ConnectionTrait>(db: &C, keys: &[Key]) -> Result<(), DbErr> {
    outbox::Entity::delete_many().filter(any_of(keys)).exec(db).await.map(drop)
}

fn any_of(keys: &[Key]) -> Condition {
    keys.iter().fold(Condition::any(), |any, (id, routing_key)| {
        any.add(
            Condition::all()
                .add(outbox::Column::Id.eq(*id))
                .add(outbox::Column::RoutingKey.eq(routing_key.as_str())),
        )
    })
}

/// Moves a message that ended as a dead letter in some queues out of the outbox.
pub(super) async fn bury(
    db: &DatabaseConnection,
    key: &Key,
    envelope: &Envelope,
    dead: &[DeadLetter],
    now_ms: i64,
) -> Result<(), DbErr> {
    let tx = db.begin().await?;
    for letter in dead {
        let row = dead::Model {
            id: envelope.id,
            queue: letter.origin_queue.clone(),
            reason: letter.reason.clone(),
            kind: envelope.kind.clone(),
            body: envelope.body.to_vec(),
            traceparent: envelope.traceparent.clone(),
            created_ms: now_ms,
        };
        let insert = dead::Entity::insert(row.into_active_model())
            .on_conflict(OnConflict::new().do_nothing().to_owned());
        tx.execute(&insert.into_query()).await?;
    }
    delete(&tx, std::slice::from_ref(key)).await?;
    tx.commit().await
}

/// Dead letters that nobody has handled, oldest first.
pub(super) async fn buried<C: ConnectionTrait>(
    db: &C,
    limit: u64,
) -> Result<Vec<(Envelope, DeadLetter)>, DbErr> {
    let rows = dead::Entity::find().order_by_asc(dead::Column::CreatedMs).limit(limit).all(db).await?;
    Ok(rows
        .into_iter()
        .map(|row| {
            let envelope =
                Envelope { id: row.id, kind: row.kind, body: row.body.into(), traceparent: row.traceparent };
            let letter = DeadLetter { origin_queue: row.queue, reason: row.reason };
            (envelope, letter)
        })
        .collect())
}

/// Moves a dead letter back into the outbox, for `routing_key`; `false` if it is not there.
pub(super) async fn revive(
    db: &DatabaseConnection,
    id: Uuid,
    queue: &str,
    routing_key: String,
) -> Result<bool, DbErr> {
    let tx = db.begin().await?;
    let Some(row) = dead::Entity::find_by_id((id, queue.to_owned())).one(&tx).await? else {
        return Ok(false);
    };
    let waiting = outbox::Model {
        id,
        routing_key,
        kind: row.kind,
        body: row.body,
        traceparent: row.traceparent,
        created_ms: row.created_ms,
        lease_owner: None,
        lease_until_ms: 0,
    };
    insert(&tx, waiting).await?;
    unbury(&tx, id, queue).await?;
    tx.commit().await?;
    Ok(true)
}

/// A dead letter was handled.
pub(super) async fn unbury<C: ConnectionTrait>(db: &C, id: Uuid, queue: &str) -> Result<(), DbErr> {
    dead::Entity::delete_many()
        .filter(dead::Column::Id.eq(id))
        .filter(dead::Column::Queue.eq(queue))
        .exec(db)
        .await
        .map(drop)
}
