//! Declares exchanges and queues.

use infera_wire::topology::Topology;
use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, ExchangeKind};

use super::Names;
use super::link::Link;

/// Messages in one queue at most; beyond, the broker refuses and publishers wait.
const MAX_QUEUE_MESSAGES: i32 = 1_000_000;

/// AMQP reply codes that say the declaration itself is wrong.
const REFUSALS: [u16; 3] = [403, 406, 540];

pub(super) async fn declare(link: &Link, names: &Names, topology: &Topology) -> lapin::Result<()> {
    let channel = link.open_channel().await?;
    let result = declare_on(&channel, names, topology).await;
    if channel.status().connected() {
        // Everything is declared; a channel that does not close cleanly goes with its connection.
        let _ = channel.close(200, "declared".into()).await;
    }
    result
}

async fn declare_on(channel: &Channel, names: &Names, topology: &Topology) -> lapin::Result<()> {
    let exchange = names.full(topology.exchange);
    let dead = names.full(topology.dead_letters);
    let exchange_options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    for (name, kind) in [(&exchange, ExchangeKind::Topic), (&dead, ExchangeKind::Fanout)] {
        channel.exchange_declare(name.as_str().into(), kind, exchange_options, FieldTable::default()).await?;
    }
    let mut quorum = FieldTable::default();
    quorum.insert("x-queue-type".into(), text("quorum"));
    queue(channel, &dead, quorum.clone()).await?;
    bind(channel, &dead, &dead, "").await?;
    for binding in &topology.queues {
        let name = names.full(binding.queue);
        let mut arguments = quorum.clone();
        let limit = i32::try_from(topology.delivery_limit).unwrap_or(i32::MAX);
        arguments.insert("x-delivery-limit".into(), AMQPValue::LongInt(limit));
        arguments.insert("x-max-length".into(), AMQPValue::LongInt(MAX_QUEUE_MESSAGES));
        // At-least-once dead-lettering needs a queue that refuses instead of dropping its oldest.
        arguments.insert("x-overflow".into(), text("reject-publish"));
        arguments.insert("x-dead-letter-strategy".into(), text("at-least-once"));
        arguments.insert("x-dead-letter-exchange".into(), text(&dead));
        arguments.insert("x-dead-letter-routing-key".into(), text(binding.queue));
        queue(channel, &name, arguments).await?;
        bind(channel, &name, &exchange, binding.pattern).await?;
    }
    Ok(())
}

/// Messages of a declared queue that nobody holds.
pub(super) async fn depth(link: &Link, queue: &str) -> lapin::Result<u64> {
    let channel = link.open_channel().await?;
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let declared = channel.queue_declare(queue.into(), options, FieldTable::default()).await?;
    let depth = u64::from(declared.message_count());
    // A channel that does not close cleanly goes with its connection.
    let _ = channel.close(200, "counted".into()).await;
    Ok(depth)
}

async fn queue(channel: &Channel, name: &str, arguments: FieldTable) -> lapin::Result<()> {
    channel.queue_declare(name.into(), QueueDeclareOptions::durable(), arguments).await.map(drop)
}

pub(super) async fn bind(channel: &Channel, queue: &str, exchange: &str, pattern: &str) -> lapin::Result<()> {
    channel
        .queue_bind(
            queue.into(),
            exchange.into(),
            pattern.into(),
            QueueBindOptions::default(),
            FieldTable::default(),
        )
        .await
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

/// Whether trying again would end the same way.
pub(super) fn is_refusal(error: &lapin::Error) -> bool {
    match error.kind() {
        lapin::ErrorKind::ProtocolError(error) => REFUSALS.contains(&error.get_id()),
        _ => false,
    }
}
