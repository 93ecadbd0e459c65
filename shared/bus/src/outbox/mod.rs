//! The outbox: messages that a transaction says, published by a [`Relay`] after it commits.
//!
//! ```text
//! tx { state, enqueue } commit -> Relay: publish, wait for the confirm, delete the row
//! ```
//!
//! A row is deleted only after its confirm, so a crash at any point republishes it; consumers
//! recognise it by its id. On the in-process bus the confirm is the consumers' ack, so the row is
//! what makes the message durable; messages that end as dead letters there move to
//! `outbox_dead`, and come back into the queue of dead letters at the next start.
//! A message that can never be published, because no queue receives its key, moves there too, under its
//! key instead of a queue.

mod relay;
mod schema;
mod store;

use infera_runtime::{clock, trace};
use infera_wire::MAX_BUS_BODY_BYTES;
use infera_wire::topology;
use sea_orm::{ConnectionTrait, DatabaseConnection, DbErr};
use sea_orm_migration::MigrationTrait;
use uuid::Uuid;

pub use relay::Relay;

use crate::bus::Envelope;
use crate::delivery::DeadLetter;

/// Says `message` under `routing_key` if the transaction `tx` commits; then wake the [`Relay`]. The
/// trace context of the current span travels with it. A message that waits already under the same
/// id and key is not written twice.
///
/// # Errors
/// The database's; `DbErr::Custom` when the message exceeds `MAX_BUS_BODY_BYTES`.
pub async fn enqueue<C, M>(tx: &C, routing_key: &str, id: Uuid, message: &M) -> Result<(), DbErr>
where
    C: ConnectionTrait,
    M: prost::Message,
{
    enqueue_bytes(tx, routing_key, id, message.encode_to_vec()).await
}

/// As [`enqueue`], for a message that is encoded already, such as stored bytes that are said again.
///
/// # Errors
/// As [`enqueue`].
pub async fn enqueue_bytes<C: ConnectionTrait>(
    tx: &C,
    routing_key: &str,
    id: Uuid,
    body: Vec<u8>,
) -> Result<(), DbErr> {
    if body.len() > MAX_BUS_BODY_BYTES {
        let bytes = body.len();
        return Err(DbErr::Custom(format!(
            "message {id} for `{routing_key}` has {bytes} bytes, the limit is {MAX_BUS_BODY_BYTES}"
        )));
    }
    let row = schema::outbox::Model {
        id,
        routing_key: routing_key.to_owned(),
        kind: topology::kind(routing_key).to_owned(),
        body,
        traceparent: trace::current_traceparent(),
        created_ms: clock::now_ms(),
        lease_owner: None,
        lease_until_ms: 0,
    };
    store::insert(tx, row).await
}

/// Messages that wait for their confirm.
///
/// # Errors
/// The database's.
pub async fn pending<C: ConnectionTrait>(db: &C) -> Result<u64, DbErr> {
    store::pending(db).await
}

/// Dead letters of an in-process bus that nobody has handled.
///
/// # Errors
/// The database's.
pub async fn dead_letters<C: ConnectionTrait>(db: &C) -> Result<u64, DbErr> {
    store::dead_letters(db).await
}

/// The dead letters that this database keeps, oldest first, with where and why they failed: those of an in-process
/// bus, and what no queue receives.
///
/// # Errors
/// The database's.
pub async fn buried<C: ConnectionTrait>(db: &C, limit: u64) -> Result<Vec<(Envelope, DeadLetter)>, DbErr> {
    store::buried(db, limit).await
}

/// Puts a dead letter of [`buried`] back: the [`Relay`], at the latest that of the next start, publishes it to the queue
/// it failed in. `false`: it is not there.
///
/// # Errors
/// The database's.
pub async fn replay(db: &DatabaseConnection, id: Uuid, queue: &str) -> Result<bool, DbErr> {
    store::revive(db, id, queue, topology::keys::direct(queue)).await
}

/// Creates the tables `outbox` and `outbox_dead`; put it into the service's migrator.
pub fn migration() -> Box<dyn MigrationTrait> {
    Box::new(schema::Create)
}
