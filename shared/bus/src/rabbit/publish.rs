//! Publishing: durable with a confirm each, transient without.

use std::sync::Arc;
use std::time::Duration;

use infera_wire::topology::keys;
use lapin::options::BasicPublishOptions;
use lapin::{BasicProperties, Confirmation};
use tokio::sync::mpsc;

use super::link::Link;
use super::{Rabbit, Shared, message};
use crate::bus::Envelope;
use crate::error::BusError;

/// Wait before a message that the broker refused (a queue is full) is offered again.
const REFUSED_BACKOFF: Duration = Duration::from_millis(200);
/// Longest routing key, bytes: AMQP's short string.
const MAX_ROUTING_KEY: usize = 255;

impl Rabbit {
    pub async fn publish(&self, routing_key: &str, envelope: &Envelope) -> Result<(), BusError> {
        let direct = keys::direct_queue(routing_key);
        if let Some(queue) = direct.filter(|queue| self.shared.delivery_limits().contains_key(queue)) {
            let properties = message::properties(envelope, true);
            // The broker's own exchange delivers to the queue that the key names.
            return self
                .shared
                .publish("", &self.shared.names.full(queue), &properties, &envelope.body)
                .await;
        }
        let routing_key = direct.unwrap_or(routing_key);
        let exchange = self.shared.exchange_of(routing_key);
        let Some(exchange) = exchange.filter(|_| routing_key.len() <= MAX_ROUTING_KEY) else {
            return Err(BusError::Unroutable { routing_key: routing_key.to_owned() });
        };
        let exchange = self.shared.names.full(exchange);
        let properties = message::properties(envelope, true);
        self.shared.publish(&exchange, routing_key, &properties, &envelope.body).await
    }

    pub fn publish_transient(&self, routing_key: &str, envelope: Envelope) {
        let connected = self.shared.link.borrow().is_some();
        let job = (routing_key.to_owned(), envelope);
        if !connected || self.shared.transient.try_send(job).is_err() {
            self.shared.drop_transient();
        }
    }
}

impl Shared {
    /// Publishes until the broker confirms.
    pub(super) async fn publish(
        &self,
        exchange: &str,
        routing_key: &str,
        properties: &BasicProperties,
        body: &[u8],
    ) -> Result<(), BusError> {
        let place = self.window.acquire().await.map_err(|_| BusError::Closed)?;
        loop {
            let link = self.link().await?;
            match publish_on(&link, exchange, routing_key, properties, body).await {
                Ok(Confirmation::Ack(None)) => break,
                Ok(Confirmation::Ack(Some(_))) => {
                    // It is bound by what this process declared, so a queue was deleted under us: a
                    // new connection declares it again.
                    tracing::warn!(routing_key, "a declared queue is gone, declaring again");
                    link.broken.cancel();
                }
                Ok(Confirmation::Nack(_) | Confirmation::NotRequested) => {
                    tracing::warn!(routing_key, "the broker refused a message, trying again");
                    tokio::time::sleep(REFUSED_BACKOFF).await;
                }
                Err(error) => {
                    tracing::debug!(%error, routing_key, "message not confirmed, trying again");
                    link.broken.cancel();
                }
            }
        }
        drop(place);
        Ok(())
    }

    /// Puts a message into the dead letters.
    pub(super) async fn bury(
        &self,
        of: BasicProperties,
        body: &[u8],
        queue: &str,
        reason: &str,
    ) -> Result<(), BusError> {
        let exchange = self.names.full(self.dead_letters());
        let properties = message::dead_properties(of, queue, reason);
        self.publish(&exchange, queue, &properties, body).await
    }
}

async fn publish_on(
    link: &Link,
    exchange: &str,
    routing_key: &str,
    properties: &BasicProperties,
    body: &[u8],
) -> lapin::Result<Confirmation> {
    let channel = link.publisher().await?;
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let confirm = channel
        .basic_publish(exchange.into(), message::short(routing_key), options, body, properties.clone())
        .await?
        .await?;
    // A channel that failed, or whose caller stopped waiting, is not used again.
    link.put_back(channel);
    Ok(confirm)
}

/// Sends transient messages one after the other; what finds no connection is dropped.
pub(super) async fn run_transient(shared: Arc<Shared>, mut jobs: mpsc::Receiver<(String, Envelope)>) {
    loop {
        let job = tokio::select! {
            () = shared.stop.cancelled() => return,
            job = jobs.recv() => job,
        };
        let Some((routing_key, envelope)) = job else {
            return;
        };
        let link = shared.link.borrow().clone();
        let Some(link) = link else {
            shared.drop_transient();
            continue;
        };
        let exchange = shared.exchange_of(&routing_key).unwrap_or_else(|| shared.any_exchange());
        let published = link
            .transient
            .basic_publish(
                shared.names.full(exchange).into(),
                message::short(&routing_key),
                BasicPublishOptions::default(),
                &envelope.body,
                message::properties(&envelope, false),
            )
            .await;
        if let Err(error) = published {
            tracing::debug!(%error, routing_key, "transient message dropped");
            shared.drop_transient();
            link.broken.cancel();
        }
    }
}
