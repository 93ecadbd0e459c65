//! The handle that services hold, over either adapter.

use bytes::Bytes;
use infera_wire::MAX_BUS_BODY_BYTES;
use infera_wire::topology::Topology;
use prometheus::IntCounterVec;
use uuid::Uuid;

use crate::delivery::{Source, Subscription};
use crate::error::BusError;
use crate::memory::{Buried, Memory};
use crate::rabbit::Rabbit;

/// A message on the bus. Its body is never logged.
#[derive(Clone, PartialEq, Eq)]
pub struct Envelope {
    /// Names the message for deduplication; the same message republished has the same id.
    pub id: Uuid,
    /// What the body is, for logs and dead letters: see `infera_wire::topology::kind`.
    pub kind: String,
    /// The encoded message, at most `infera_wire::MAX_BUS_BODY_BYTES`.
    pub body: Bytes,
    /// W3C trace context of the span that published it.
    pub traceparent: Option<String>,
}

impl Envelope {
    /// An envelope with the trace context of the current span.
    pub fn new(id: Uuid, kind: impl Into<String>, body: impl Into<Bytes>) -> Self {
        Self {
            id,
            kind: kind.into(),
            body: body.into(),
            traceparent: infera_runtime::trace::current_traceparent(),
        }
    }
}

impl std::fmt::Debug for Envelope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Envelope")
            .field("id", &self.id)
            .field("kind", &self.kind)
            .field("body_bytes", &self.body.len())
            .field("traceparent", &self.traceparent)
            .finish()
    }
}

/// What an in-process bus holds at most.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Unsettled messages per durable queue; publishing waits while a queue is full.
    pub queue_messages: usize,
    /// Dead letters kept; the oldest leaves when another comes.
    pub dead_letters: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { queue_messages: 10_000, dead_letters: 10_000 }
    }
}

/// A bus; clones share it. It may be used from any number of threads and tokio runtimes.
#[derive(Debug, Clone)]
pub struct Bus {
    adapter: Adapter,
    processed: Option<IntCounterVec>,
}

#[derive(Debug, Clone)]
enum Adapter {
    Memory(Memory),
    Rabbit(Rabbit),
}

impl Bus {
    fn of(adapter: Adapter) -> Self {
        Self { adapter, processed: crate::watch::processed() }
    }

    /// A bus inside this process, with the default [`Limits`].
    pub fn in_process() -> Self {
        Self::in_process_with(Limits::default())
    }

    /// A bus inside this process.
    pub fn in_process_with(limits: Limits) -> Self {
        Self::of(Adapter::Memory(Memory::new(limits)))
    }

    /// A bus over RabbitMQ. `prefix` is put before the exchange's and every queue's name, so that
    /// several networks share a broker. Connects in the background and reconnects for ever:
    /// [`Bus::healthy`] says how it stands, and operations wait for a connection.
    ///
    /// # Errors
    /// [`BusError::Url`]; [`BusError::Start`] when no thread can be started.
    pub async fn rabbit(url: &str, prefix: &str) -> Result<Self, BusError> {
        Ok(Self::of(Adapter::Rabbit(Rabbit::start(url, prefix)?)))
    }

    /// Creates exchanges and durable queues. From here on the queues collect messages, whether or
    /// not anybody consumes yet. Repeating it changes nothing.
    ///
    /// # Errors
    /// [`BusError::Refused`] when the broker has a queue of that name with other arguments.
    pub async fn declare(&self, topology: &Topology) -> Result<(), BusError> {
        match &self.adapter {
            Adapter::Memory(memory) => {
                memory.declare(topology);
                Ok(())
            }
            Adapter::Rabbit(rabbit) => rabbit.declare(topology).await,
        }
    }

    /// Publishes durably. RabbitMQ: resolves when every queue bound to the key stored it on disk.
    /// In process: when every durable queue bound to the key has acked it or moved it to the dead
    /// letters, which may take as long as its processing. Waits while a queue is full or the broker
    /// is away; a caller that stops waiting leaves the outcome open.
    ///
    /// The key `@NAME` ([`infera_wire::topology::keys::direct`]) goes to the durable queue NAME alone; where there is
    /// none, to whoever receives the key NAME.
    ///
    /// # Errors
    /// [`BusError::Unroutable`], [`BusError::TooLarge`], [`BusError::Closed`].
    pub async fn publish(&self, routing_key: &str, envelope: Envelope) -> Result<(), BusError> {
        self.publish_confirmed(routing_key, envelope).await.map(drop)
    }

    /// As [`Bus::publish`], and tells which queues moved it to the dead letters: an in-process bus
    /// forgets those when the process ends, so the publisher's outbox keeps them.
    pub(crate) async fn publish_confirmed(
        &self,
        routing_key: &str,
        envelope: Envelope,
    ) -> Result<Vec<Buried>, BusError> {
        check_size(&envelope)?;
        match &self.adapter {
            Adapter::Memory(memory) => memory.publish(routing_key, envelope).await,
            Adapter::Rabbit(rabbit) => {
                rabbit.publish(routing_key, &envelope).await?;
                Ok(Vec::new())
            }
        }
    }

    /// Publishes at most once to whoever listens now. Never waits: what does not fit into a
    /// listener's capacity, or finds no broker, is dropped and counted.
    pub fn publish_transient(&self, routing_key: &str, envelope: Envelope) {
        if let Err(error) = check_size(&envelope) {
            tracing::warn!(%error, routing_key, "transient message dropped");
            return;
        }
        match &self.adapter {
            Adapter::Memory(memory) => memory.publish_transient(routing_key, &envelope),
            Adapter::Rabbit(rabbit) => rabbit.publish_transient(routing_key, envelope),
        }
    }

    /// Consumes a durable queue in competition with its other subscriptions. At most `prefetch`
    /// (at least 1) deliveries are unsettled at a time.
    ///
    /// # Errors
    /// [`BusError::UnknownQueue`], [`BusError::Closed`].
    pub async fn subscribe(&self, queue: &str, prefetch: u16) -> Result<Subscription, BusError> {
        let prefetch = prefetch.max(1);
        let source = match &self.adapter {
            Adapter::Memory(memory) => Source::Memory(memory.subscribe(queue, prefetch)?),
            Adapter::Rabbit(rabbit) => Source::Rabbit(rabbit.subscribe(queue, prefetch).await?),
        };
        Ok(Subscription { source })
    }

    /// Receives what is published from now on under any of `patterns`, until the subscription is
    /// dropped. At most `capacity` messages wait; more are dropped and counted. During an outage of
    /// the broker messages are missed.
    ///
    /// # Errors
    /// [`BusError::Closed`].
    pub async fn subscribe_transient(
        &self,
        queue: &str,
        patterns: &[&str],
        capacity: usize,
    ) -> Result<Subscription, BusError> {
        let capacity = capacity.max(1);
        let source = match &self.adapter {
            Adapter::Memory(memory) => Source::Memory(memory.subscribe_transient(queue, patterns, capacity)),
            Adapter::Rabbit(rabbit) => {
                Source::Rabbit(rabbit.subscribe_transient(queue, patterns, capacity).await?)
            }
        };
        Ok(Subscription { source })
    }

    /// Whether messages can be published now.
    pub fn healthy(&self) -> bool {
        match &self.adapter {
            Adapter::Memory(_) => true,
            Adapter::Rabbit(rabbit) => rabbit.healthy(),
        }
    }

    /// Transient messages dropped so far.
    pub fn dropped(&self) -> u64 {
        match &self.adapter {
            Adapter::Memory(memory) => memory.dropped(),
            Adapter::Rabbit(rabbit) => rabbit.dropped(),
        }
    }

    /// Dead letters of the whole network that nobody holds. In process: those of this process.
    ///
    /// # Errors
    /// [`BusError::Closed`].
    pub async fn dead_letters(&self) -> Result<u64, BusError> {
        match &self.adapter {
            Adapter::Memory(memory) => Ok(memory.dead_letters()),
            Adapter::Rabbit(rabbit) => rabbit.dead_letters().await,
        }
    }

    /// Consumes the dead letters, whatever their queue is called.
    pub(crate) async fn subscribe_dead(&self, prefetch: u16) -> Result<Subscription, BusError> {
        let source = match &self.adapter {
            Adapter::Memory(memory) => Source::Memory(memory.subscribe_dead(prefetch)),
            Adapter::Rabbit(rabbit) => Source::Rabbit(rabbit.subscribe_dead(prefetch).await?),
        };
        Ok(Subscription { source })
    }

    /// Notes what became of a delivery.
    pub(crate) fn count(&self, queue: &str, outcome: &str) {
        if let Some(processed) = &self.processed {
            processed.with_label_values(&[queue, outcome]).inc();
        }
    }

    /// Deliveries by queue and outcome; for the metrics of each service that uses this bus.
    pub(crate) fn processed(&self) -> Option<&IntCounterVec> {
        self.processed.as_ref()
    }

    /// What a span says the messaging system is (OpenTelemetry's `messaging.system`).
    pub(crate) fn system(&self) -> &'static str {
        match &self.adapter {
            Adapter::Memory(_) => "infera_in_process",
            Adapter::Rabbit(_) => "rabbitmq",
        }
    }

    /// Says goodbye to the broker, so that acks already given are not lost; a last step of a clean
    /// shutdown. Does nothing in process, where other services still use the bus.
    pub async fn close(&self) {
        if let Adapter::Rabbit(rabbit) = &self.adapter {
            rabbit.close().await;
        }
    }

    /// Puts a dead letter that an earlier process kept back into the queue of dead letters; the
    /// confirm resolves when somebody acks it there. RabbitMQ keeps its own.
    pub(crate) fn restore_dead_letter(&self, envelope: Envelope, dead: crate::DeadLetter) -> Option<Buried> {
        match &self.adapter {
            Adapter::Memory(memory) => Some(memory.bury(envelope, dead)),
            Adapter::Rabbit(_) => None,
        }
    }
}

fn check_size(envelope: &Envelope) -> Result<(), BusError> {
    if envelope.body.len() > MAX_BUS_BODY_BYTES {
        return Err(BusError::TooLarge {
            id: envelope.id,
            bytes: envelope.body.len(),
            limit: MAX_BUS_BODY_BYTES,
        });
    }
    Ok(())
}
