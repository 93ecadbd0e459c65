//! The loop of a consumer: delivery -> transaction {inbox, handler} -> commit -> ack.

use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use infera_runtime::{CancellationToken, clock, planned, trace};
use sea_orm::{DatabaseConnection, DatabaseTransaction, DbErr, TransactionTrait};
use tracing::Instrument;

use crate::bus::{Bus, Envelope};
use crate::delivery::Delivery;
use crate::error::BusError;
use crate::inbox;
use crate::outbox::Relay;

/// Waits between redeliveries double from the first to the last: 20 of them take about six minutes.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(30);
/// How long to wait before a database that is away is tried again.
const DATABASE_RETRY: Duration = Duration::from_millis(500);
const PRUNE_EVERY: Duration = Duration::from_secs(3600);

/// What to consume and where to write.
#[derive(Debug, Clone)]
pub struct ConsumerSpec {
    pub bus: Bus,
    /// Its migrator must hold `inbox::migration()`.
    pub db: DatabaseConnection,
    /// A durable queue, see `infera_wire::topology::queues`.
    pub queue: &'static str,
    /// Deliveries processed at a time: their order is not kept. On SQLite they take turns at the one
    /// connection.
    pub prefetch: u16,
    /// Woken after each commit.
    pub relay: Option<Relay>,
}

/// Why a handler did not process a message. Its transaction is rolled back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reject {
    /// It may work later. Redelivered with growing waits, a dead letter in the end.
    Retry(String),
    /// It never will. A dead letter at once, with this reason: no prompt or output in it.
    DeadLetter(String),
}

impl From<DbErr> for Reject {
    fn from(error: DbErr) -> Self {
        Self::Retry(error.to_string())
    }
}

impl From<infera_wire::WireError> for Reject {
    fn from(error: infera_wire::WireError) -> Self {
        Self::DeadLetter(error.to_string())
    }
}

impl From<prost::DecodeError> for Reject {
    fn from(error: prost::DecodeError) -> Self {
        Self::DeadLetter(error.to_string())
    }
}

/// Consumes `spec.queue` until `shutdown`, then finishes what it holds and returns.
///
/// Each delivery is a span `<queue> process` whose parent is the span that published it. The
/// handler's writes, its outbox messages and the note in the inbox commit together; a message that
/// an earlier transaction processed is acked unseen. A database that is away is waited for: that is
/// not the message's fault and costs it no redelivery.
///
/// The handler is called as `handler(&tx, &envelope)`; write it as `async |tx, envelope| { .. }`. It must use `tx` and
/// never the connection: on SQLite there is only one, and the transaction has it.
///
/// # Errors
/// [`BusError::UnknownQueue`], and [`BusError::Closed`] when the bus was closed.
pub async fn consume<H>(spec: ConsumerSpec, shutdown: CancellationToken, handler: H) -> Result<(), BusError>
where
    H: AsyncFn(&DatabaseTransaction, &Envelope) -> Result<(), Reject>,
{
    consume_then(spec, shutdown, handler, async |_| {}).await
}

/// As [`consume`], and calls `committed` after each commit and before the ack, for those who keep
/// in memory what the database says. It is also called for a message that was processed before.
///
/// # Errors
/// As [`consume`].
pub async fn consume_then<H, C>(
    spec: ConsumerSpec,
    shutdown: CancellationToken,
    handler: H,
    committed: C,
) -> Result<(), BusError>
where
    H: AsyncFn(&DatabaseTransaction, &Envelope) -> Result<(), Reject>,
    C: AsyncFn(&Envelope),
{
    let mut subscription = spec.bus.subscribe(spec.queue, spec.prefetch).await?;
    let janitor = shutdown.child_token();
    let _janitor_stops_with_us = janitor.clone().drop_guard();
    tokio::spawn(prune_inbox(spec.db.clone(), janitor));
    let consumer = Consumer {
        before_commit: format!("{}.before_commit", spec.queue),
        after_commit: format!("{}.after_commit", spec.queue),
        span_name: format!("{} process", spec.queue),
        shutdown,
        spec,
        handler,
        committed,
    };
    let mut processing = FuturesUnordered::new();
    let result = loop {
        tokio::select! {
            () = consumer.shutdown.cancelled() => break Ok(()),
            Some(()) = processing.next() => {}
            delivery = subscription.next() => match delivery {
                Some(delivery) => processing.push(consumer.process(delivery)),
                None => break Err(BusError::Closed),
            },
        }
    };
    while processing.next().await.is_some() {}
    result
}

struct Consumer<H, C> {
    spec: ConsumerSpec,
    shutdown: CancellationToken,
    handler: H,
    committed: C,
    before_commit: String,
    after_commit: String,
    span_name: String,
}

/// What became of one attempt at a delivery.
enum Attempt {
    Done,
    Rejected(Reject),
    /// The database is away.
    NoDatabase(DbErr),
}

impl<H, C> Consumer<H, C>
where
    H: AsyncFn(&DatabaseTransaction, &Envelope) -> Result<(), Reject>,
    C: AsyncFn(&Envelope),
{
    async fn process(&self, delivery: Delivery) {
        let envelope = &delivery.envelope;
        let span = tracing::info_span!(
            "process",
            otel.name = self.span_name,
            otel.kind = "consumer",
            otel.status_code = tracing::field::Empty,
            messaging.system = self.spec.bus.system(),
            messaging.operation.type = "process",
            messaging.operation.name = "process",
            messaging.destination.name = self.spec.queue,
            messaging.message.id = %envelope.id,
            messaging.message.body.size = envelope.body.len(),
            infera.message.kind = envelope.kind,
            infera.delivery_count = delivery.delivery_count,
        );
        if let Some(parent) = &envelope.traceparent {
            trace::set_parent(&span, parent);
        }
        self.work(delivery).instrument(span).await;
    }

    async fn work(&self, delivery: Delivery) {
        loop {
            match self.attempt(&delivery.envelope).await {
                Attempt::Done => return self.done(delivery).await,
                Attempt::Rejected(reject) => return self.rejected(delivery, reject).await,
                Attempt::NoDatabase(error) => {
                    tracing::warn!(%error, queue = self.spec.queue, "database is not reachable, waiting");
                }
            }
            tokio::select! {
                // Dropped, so somebody else gets it.
                () = self.shutdown.cancelled() => return,
                () = tokio::time::sleep(DATABASE_RETRY) => {}
            }
        }
    }

    async fn attempt(&self, envelope: &Envelope) -> Attempt {
        let tx = match self.spec.db.begin().await {
            Ok(tx) => tx,
            Err(error) => return Attempt::NoDatabase(error),
        };
        let processed = match inbox::first_time(&tx, self.spec.queue, envelope.id).await {
            Ok(true) => (self.handler)(&tx, envelope).await,
            Ok(false) => {
                tracing::debug!(id = %envelope.id, queue = self.spec.queue, "message was processed before");
                Ok(())
            }
            Err(error) => Err(error.into()),
        };
        let result = match processed {
            Ok(()) => {
                planned::pause(&self.before_commit).await;
                tx.commit().await.map_err(Reject::from)
            }
            Err(reject) => {
                // A connection that fails here is gone, and its transaction with it.
                let _ = tx.rollback().await;
                Err(reject)
            }
        };
        match result {
            Ok(()) => Attempt::Done,
            Err(Reject::Retry(reason)) => match self.spec.db.ping().await {
                Ok(()) => Attempt::Rejected(Reject::Retry(reason)),
                Err(error) => Attempt::NoDatabase(error),
            },
            Err(reject) => Attempt::Rejected(reject),
        }
    }

    async fn done(&self, delivery: Delivery) {
        self.spec.bus.count(self.spec.queue, "processed");
        planned::pause(&self.after_commit).await;
        (self.committed)(&delivery.envelope).await;
        if let Some(relay) = &self.spec.relay {
            relay.wake();
        }
        if let Err(error) = delivery.ack().await {
            tracing::debug!(%error, queue = self.spec.queue, "not acked, the inbox will know it");
        }
    }

    async fn rejected(&self, delivery: Delivery, reject: Reject) {
        tracing::Span::current().record("otel.status_code", "ERROR");
        let queue = self.spec.queue;
        let (id, kind) = (delivery.envelope.id, &delivery.envelope.kind);
        let count = delivery.delivery_count;
        let reason = match reject {
            Reject::Retry(reason) if count < delivery.delivery_limit => {
                let after = backoff(count);
                tracing::warn!(%id, kind, queue, count, reason, ?after, "message will be redelivered");
                self.spec.bus.count(queue, "retried");
                return delivery.retry(after);
            }
            // One more would exceed the limit: it leaves now, with the reason.
            Reject::Retry(reason) | Reject::DeadLetter(reason) => reason,
        };
        tracing::error!(%id, kind, queue, count, reason, "message goes to the dead letters");
        self.spec.bus.count(queue, "dead");
        if let Err(error) = delivery.dead_letter(&reason).await {
            tracing::warn!(%error, queue, "message will be redelivered");
        }
    }
}

fn backoff(count: u32) -> Duration {
    FIRST_RETRY.saturating_mul(2_u32.saturating_pow(count)).min(LAST_RETRY)
}

async fn prune_inbox(db: DatabaseConnection, stop: CancellationToken) {
    let mut hour = tokio::time::interval(PRUNE_EVERY);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = hour.tick() => {}
        }
        if let Err(error) = inbox::prune(&db, clock::now_ms() - inbox::KEEP_MS).await {
            tracing::warn!(%error, "inbox is not pruned");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_last() {
        assert_eq!(backoff(0), Duration::from_millis(100));
        assert_eq!(backoff(3), Duration::from_millis(800));
        assert_eq!(backoff(9), LAST_RETRY);
        assert_eq!(backoff(u32::MAX), LAST_RETRY);
    }
}
