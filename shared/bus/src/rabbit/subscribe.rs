//! Consuming: a pump per subscription, which subscribes again on each new connection.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use lapin::Acker;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Consumer};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::DropGuard;
use uuid::Uuid;

use super::link::Link;
use super::{Rabbit, Shared, message, topology};
use crate::bus::Envelope;
use crate::delivery::{self, Delivery};
use crate::error::BusError;

/// Wait before a subscription that failed on a working connection is made again.
const BACKOFF: Duration = Duration::from_millis(500);

/// Longest name of a queue, bytes.
const MAX_NAME: usize = 255;
/// What a temporary queue's name gets behind it, bytes.
const SUFFIX: usize = 33;

#[derive(Debug)]
pub(crate) struct Subscription {
    deliveries: mpsc::Receiver<Delivery>,
    _keeps_the_connection: Arc<DropGuard>,
}

impl Subscription {
    pub async fn next(&mut self) -> Option<Delivery> {
        loop {
            let delivery = self.deliveries.recv().await?;
            // Left over from a connection that is gone: the broker delivers it again.
            match &delivery.ticket {
                delivery::Ticket::Rabbit(ticket) if !ticket.usable() => {}
                _ => return Some(delivery),
            }
        }
    }
}

impl Rabbit {
    pub async fn subscribe(&self, queue: &str, prefetch: u16) -> Result<Subscription, BusError> {
        let limits = self.shared.delivery_limits();
        let Some((&name, &delivery_limit)) = limits.get_key_value(queue) else {
            return Err(BusError::UnknownQueue { queue: queue.to_owned() });
        };
        let what = What::Durable {
            queue: name.into(),
            prefetch,
            delivery_limit,
            dead: name == self.shared.dead_letters(),
        };
        self.pump(what, usize::from(prefetch)).await
    }

    pub async fn subscribe_transient(
        &self,
        queue: &str,
        patterns: &[&str],
        capacity: usize,
    ) -> Result<Subscription, BusError> {
        let longest = patterns.iter().map(|pattern| pattern.len()).max();
        let full = self.shared.names.full(queue).len() + SUFFIX;
        if full.max(longest.unwrap_or(0)) > MAX_NAME {
            return Err(BusError::Name { name: queue.to_owned(), limit: MAX_NAME });
        }
        let what = What::Transient {
            queue: queue.to_owned(),
            patterns: patterns.iter().map(|&pattern| pattern.to_owned()).collect(),
            capacity,
        };
        self.pump(what, capacity).await
    }

    async fn pump(&self, what: What, capacity: usize) -> Result<Subscription, BusError> {
        let (sender, deliveries) = mpsc::channel(capacity);
        let (ready, is_ready) = oneshot::channel();
        let pump = Pump { shared: self.shared.clone(), what, deliveries: sender };
        self.shared.runtime.spawn(pump.run(ready));
        is_ready.await.map_err(|_| BusError::Closed)?;
        Ok(Subscription { deliveries, _keeps_the_connection: self._ends_with_the_last.clone() })
    }
}

enum What {
    Durable {
        queue: Arc<str>,
        prefetch: u16,
        delivery_limit: u32,
        /// Whether it is the queue of dead letters.
        dead: bool,
    },
    Transient {
        queue: String,
        patterns: Vec<String>,
        capacity: usize,
    },
}

struct Pump {
    shared: Arc<Shared>,
    what: What,
    deliveries: mpsc::Sender<Delivery>,
}

impl Pump {
    async fn run(self, ready: oneshot::Sender<()>) {
        let mut ready = Some(ready);
        loop {
            let link = tokio::select! {
                () = self.deliveries.closed() => return,
                link = self.shared.link() => link,
            };
            let Ok(link) = link else { return };
            match self.attach(&link).await {
                Ok((channel, consumer)) => {
                    if let Some(ready) = ready.take() {
                        // Nobody waits any more when the subscriber gave up: seen below.
                        let _ = ready.send(());
                    }
                    let closed = self.forward(&link, consumer).await;
                    if channel.status().connected() {
                        // The broker requeues what was not settled.
                        let _ = channel.close(200, "subscription closed".into()).await;
                    }
                    if closed {
                        return;
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, queue = self.name(), "cannot subscribe, trying again");
                    link.broken.cancel();
                }
            }
            tokio::time::sleep(BACKOFF).await;
        }
    }

    fn name(&self) -> &str {
        match &self.what {
            What::Durable { queue, .. } => queue,
            What::Transient { queue, .. } => queue,
        }
    }

    async fn attach(&self, link: &Link) -> lapin::Result<(Channel, Consumer)> {
        let channel = link.open_channel().await?;
        let (queue, options) = match &self.what {
            What::Durable { queue, prefetch, .. } => {
                channel.basic_qos(*prefetch, BasicQosOptions::default()).await?;
                let queue = self.shared.names.full(queue);
                (queue, BasicConsumeOptions::default())
            }
            What::Transient { queue, patterns, capacity } => {
                let queue = self.temporary(&channel, queue, patterns, *capacity).await?;
                let options =
                    BasicConsumeOptions { no_ack: true, exclusive: true, ..BasicConsumeOptions::default() };
                (queue, options)
            }
        };
        let consumer =
            channel.basic_consume(queue.as_str().into(), "".into(), options, FieldTable::default()).await?;
        Ok((channel, consumer))
    }

    /// Declares a queue that ends with this subscription. Its name is new each time, so that a broker
    /// that has not noticed the end of the last connection does not hold it.
    async fn temporary(
        &self,
        channel: &Channel,
        queue: &str,
        patterns: &[String],
        capacity: usize,
    ) -> lapin::Result<String> {
        let suffix = Uuid::now_v7().simple().to_string();
        let name = self.shared.names.full(&format!("{queue}.{suffix}"));
        let mut arguments = FieldTable::default();
        let length = i32::try_from(capacity).unwrap_or(i32::MAX);
        arguments.insert("x-max-length".into(), AMQPValue::LongInt(length));
        let options = QueueDeclareOptions::exclusive().auto_delete();
        channel.queue_declare(name.as_str().into(), options, arguments).await?;
        let exchange = self.shared.names.full(self.shared.any_exchange());
        for pattern in patterns {
            topology::bind(channel, &name, &exchange, pattern).await?;
        }
        Ok(name)
    }

    /// Passes deliveries on until the subscriber is gone (`true`) or the broker ends it.
    async fn forward(&self, link: &Link, mut consumer: Consumer) -> bool {
        loop {
            let next = tokio::select! {
                () = self.deliveries.closed() => return true,
                () = self.shared.stop.cancelled() => return true,
                () = link.broken.cancelled() => return false,
                next = consumer.next() => next,
            };
            match next {
                Some(Ok(delivery)) => self.pass_on(delivery).await,
                Some(Err(error)) => {
                    tracing::warn!(%error, queue = self.name(), "subscription ended by the broker");
                    return false;
                }
                None => return false,
            }
        }
    }

    async fn pass_on(&self, mut raw: lapin::message::Delivery) {
        match &self.what {
            What::Transient { .. } => {
                let Ok(envelope) = message::envelope(&mut raw) else {
                    return self.shared.drop_transient();
                };
                let delivery = Delivery {
                    envelope,
                    delivery_count: 0,
                    delivery_limit: u32::MAX,
                    dead_letter: None,
                    ticket: delivery::Ticket::Transient,
                };
                if self.deliveries.try_send(delivery).is_err() {
                    self.shared.drop_transient();
                }
            }
            What::Durable { queue, delivery_limit, dead, .. } => {
                let envelope = if *dead {
                    message::dead_envelope(&mut raw)
                } else {
                    match message::envelope(&mut raw) {
                        Ok(envelope) => envelope,
                        Err(reason) => return self.refuse(queue.clone(), raw, reason),
                    }
                };
                let delivery = Delivery {
                    envelope,
                    delivery_count: message::delivery_count(&raw.properties),
                    delivery_limit: *delivery_limit,
                    dead_letter: dead.then(|| message::dead_letter(&raw.properties, &self.shared.names)),
                    ticket: delivery::Ticket::Rabbit(Box::new(Ticket {
                        shared: self.shared.clone(),
                        queue: queue.clone(),
                        properties: raw.properties,
                        acker: raw.acker,
                    })),
                };
                // The channel holds as many as the prefetch, so there is room. A subscriber that is
                // gone drops it, which gives it back.
                let _ = self.deliveries.send(delivery).await;
            }
        }
    }

    /// Moves what is no envelope to the dead letters, beside the stream.
    fn refuse(&self, queue: Arc<str>, raw: lapin::message::Delivery, reason: &'static str) {
        let shared = self.shared.clone();
        tracing::warn!(queue = &*queue, reason, bytes = raw.data.len(), "message refused");
        tokio::spawn(async move {
            let buried = shared.bury(raw.properties, &raw.data, &queue, reason).await;
            // Not acked, it comes again and is refused again.
            if buried.is_ok() {
                let _ = raw.acker.ack(BasicAckOptions::default()).await;
            }
        });
    }
}

/// The right to settle one delivery; dropped unused, it gives the message back.
#[derive(Debug)]
pub(crate) struct Ticket {
    shared: Arc<Shared>,
    queue: Arc<str>,
    properties: BasicProperties,
    acker: Acker,
}

impl Ticket {
    pub fn usable(&self) -> bool {
        self.acker.usable()
    }

    pub async fn ack(self) -> Result<(), BusError> {
        match self.acker.ack(BasicAckOptions::default()).await {
            Ok(true) => Ok(()),
            Ok(false) | Err(_) => Err(BusError::Stale),
        }
    }

    pub fn retry(self, after: Duration) {
        let runtime = self.shared.runtime.clone();
        runtime.spawn(async move {
            tokio::time::sleep(after).await;
            drop(self);
        });
    }

    pub async fn dead_letter(self, envelope: &Envelope, reason: &str) -> Result<(), BusError> {
        self.shared.bury(self.properties.clone(), &envelope.body, &self.queue, reason).await?;
        self.ack().await
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.acker.usable() {
            let acker = self.acker.clone();
            self.shared.runtime.spawn(async move {
                let options = BasicNackOptions { requeue: true, ..BasicNackOptions::default() };
                // A channel that is gone gave it back already.
                let _ = acker.nack(options).await;
            });
        }
    }
}
