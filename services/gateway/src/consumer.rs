//! What the bus brings: closing messages into the database, wake-ups and deltas to the clients that wait.

use std::sync::Arc;

use actix::Addr;
use infera_bus::{Bus, BusError, ConsumerSpec, Envelope, Reject, Subscription, consume};
use infera_runtime::{CancellationToken, clock};
use infera_wire::topology::{keys, queues};
use infera_wire::{WireError, convert, decode, v1};
use sea_orm::DatabaseTransaction;
use uuid::Uuid;

use crate::actor::{Closed, Deltas, Replies};
use crate::domain::merge::Delta;
use crate::domain::outcome::{self, Outcome};
use crate::store;

/// Messages that may wait in a transient queue; more are dropped, which costs latency only.
const TRANSIENT_CAPACITY: usize = 4096;

/// `gateway.verdict`: stores what closed a request. Shared by all replicas.
pub(crate) async fn verdicts(
    spec: ConsumerSpec,
    shutdown: CancellationToken,
    replies: Addr<Replies>,
) -> Result<(), BusError> {
    consume(spec, shutdown, async |tx, envelope| match verdict(envelope)? {
        Some((id, outcome)) => close(tx, id, outcome, &replies).await,
        None => Ok(()),
    })
    .await
}

/// `gateway.rejected`: stores why a request was not admitted. Shared by all replicas.
pub(crate) async fn rejections(
    spec: ConsumerSpec,
    shutdown: CancellationToken,
    replies: Addr<Replies>,
) -> Result<(), BusError> {
    consume(spec, shutdown, async |tx, envelope| {
        let (id, outcome) = rejection(envelope)?;
        close(tx, id, outcome, &replies).await
    })
    .await
}

fn verdict(envelope: &Envelope) -> Result<Option<(Uuid, Outcome)>, WireError> {
    outcome::of_verdict(&decode::<v1::Verdict>("Verdict", &envelope.body)?)
}

fn rejection(envelope: &Envelope) -> Result<(Uuid, Outcome), WireError> {
    outcome::of_rejection(&decode::<v1::RequestRejected>("RequestRejected", &envelope.body)?)
}

async fn close(
    tx: &DatabaseTransaction,
    id: Uuid,
    outcome: Outcome,
    replies: &Addr<Replies>,
) -> Result<(), Reject> {
    if !store::close(tx, id, &outcome, clock::now_ms()).await? {
        tracing::debug!(%id, "closing message changes nothing");
    }
    // A client of this replica may wait although the request names another one (a repeat after a restart).
    // Nothing is lost if this transaction fails: the message is delivered again and says the same.
    let _ = replies.send(Closed { id, outcome: Arc::new(outcome) }).await;
    Ok(())
}

/// Subscribes to what wakes this replica's clients. Do it before the first of them waits.
pub(crate) async fn subscribe_replies(bus: &Bus, replica: &str) -> Result<Subscription, BusError> {
    let patterns = [keys::verdict(replica), keys::request_rejected(replica)];
    let patterns = patterns.each_ref().map(String::as_str);
    bus.subscribe_transient(&queues::gateway_reply(replica), &patterns, TRANSIENT_CAPACITY).await
}

/// Subscribes to the deltas of this replica's streams.
pub(crate) async fn subscribe_deltas(bus: &Bus, replica: &str) -> Result<Subscription, BusError> {
    let key = keys::deltas(replica);
    bus.subscribe_transient(&queues::gateway_deltas(replica), &[&key], TRANSIENT_CAPACITY).await
}

/// Wakes clients until `shutdown`.
pub(crate) async fn wake(
    subscription: Subscription,
    shutdown: CancellationToken,
    replies: Addr<Replies>,
) -> Result<(), BusError> {
    each(subscription, shutdown, async |envelope| {
        let closing = match envelope.kind.as_str() {
            "request.rejected" => rejection(envelope).map(Some),
            _ => verdict(envelope),
        };
        match closing {
            Ok(Some((id, outcome))) => {
                let _ = replies.send(Closed { id, outcome: Arc::new(outcome) }).await;
            }
            Ok(None) => {}
            // The durable queue delivers the same message and moves it to the dead letters.
            Err(error) => tracing::debug!(%error, "unreadable wake-up"),
        }
    })
    .await
}

/// Feeds streams until `shutdown`.
pub(crate) async fn deltas(
    subscription: Subscription,
    shutdown: CancellationToken,
    replies: Addr<Replies>,
) -> Result<(), BusError> {
    each(subscription, shutdown, async |envelope| {
        match decode::<v1::DeltaBatch>("DeltaBatch", &envelope.body).and_then(|batch| entries(&batch)) {
            Ok(entries) => {
                let _ = replies.send(Deltas(entries)).await;
            }
            Err(error) => tracing::warn!(%error, "deltas are dropped"),
        }
    })
    .await
}

fn entries(batch: &v1::DeltaBatch) -> Result<Vec<(Uuid, Delta)>, WireError> {
    let entry = |entry: &v1::DeltaEntry| {
        let id = convert::uuid("delta.request_id", &entry.request_id)?;
        let node = convert::fixed("delta.node", entry.node.as_slice())?;
        Ok((id, Delta { attempt: entry.attempt, node, offset: entry.offset, tokens: entry.tokens.clone() }))
    };
    batch.entries.iter().map(entry).collect()
}

async fn each<F>(
    mut subscription: Subscription,
    shutdown: CancellationToken,
    handle: F,
) -> Result<(), BusError>
where
    F: AsyncFn(&Envelope),
{
    loop {
        let delivery = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            delivery = subscription.next() => delivery.ok_or(BusError::Closed)?,
        };
        handle(&delivery.envelope).await;
        // At most once: there is nothing to settle, and nothing that could fail.
        let _ = delivery.ack().await;
    }
}
