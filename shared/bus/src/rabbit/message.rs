//! Envelopes as AMQP messages.

use infera_wire::MAX_BUS_BODY_BYTES;
use lapin::BasicProperties;
use lapin::message::Delivery;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use uuid::Uuid;

use super::Names;
use crate::bus::Envelope;
use crate::delivery::DeadLetter;

const TRACEPARENT: &str = "traceparent";
/// The durable queue that a dead letter comes from, without prefix.
const ORIGIN_QUEUE: &str = "x-origin-queue";
const REASON: &str = "x-reason";
/// Longest reason in a header, bytes.
const MAX_REASON: usize = 1024;
const PERSISTENT: u8 = 2;
const NOT_PERSISTENT: u8 = 1;

pub(super) fn properties(envelope: &Envelope, durable: bool) -> BasicProperties {
    let mut headers = FieldTable::default();
    if let Some(traceparent) = &envelope.traceparent {
        headers.insert(TRACEPARENT.into(), text(traceparent));
    }
    BasicProperties::default()
        .with_message_id(short(&envelope.id.to_string()))
        .with_type(short(&envelope.kind))
        .with_content_type("application/protobuf".into())
        .with_delivery_mode(if durable { PERSISTENT } else { NOT_PERSISTENT })
        .with_headers(headers)
}

/// The properties of a message that leaves `queue` for the dead letters: all it had, and why.
pub(super) fn dead_properties(of: BasicProperties, queue: &str, reason: &str) -> BasicProperties {
    let mut headers = of.headers().clone().unwrap_or_default();
    headers.insert(ORIGIN_QUEUE.into(), text(queue));
    headers.insert(REASON.into(), text(cut(reason, MAX_REASON)));
    of.with_headers(headers).with_delivery_mode(PERSISTENT)
}

/// What a delivery holds, or why it can't be used.
pub(super) fn envelope(delivery: &mut Delivery) -> Result<Envelope, &'static str> {
    let id = delivery.properties.message_id().as_ref();
    let id = id.and_then(|id| Uuid::try_parse(id.as_str()).ok());
    let Some(id) = id else {
        return Err("the message id is not a UUID");
    };
    if delivery.data.len() > MAX_BUS_BODY_BYTES {
        return Err("the body is larger than 4 MiB");
    }
    Ok(unchecked(delivery, id))
}

/// What a dead letter holds, whatever it is.
pub(super) fn dead_envelope(delivery: &mut Delivery) -> Envelope {
    let id = delivery.properties.message_id().as_ref();
    let id = id.and_then(|id| Uuid::try_parse(id.as_str()).ok());
    unchecked(delivery, id.unwrap_or(Uuid::nil()))
}

fn unchecked(delivery: &mut Delivery, id: Uuid) -> Envelope {
    let kind = delivery.properties.kind().as_ref();
    Envelope {
        id,
        kind: kind.map(|kind| kind.as_str().to_owned()).unwrap_or_default(),
        body: std::mem::take(&mut delivery.data).into(),
        traceparent: header_text(&delivery.properties, TRACEPARENT),
    }
}

/// Deliveries before this one that did not end in an ack; quorum queues count them.
pub(super) fn delivery_count(properties: &BasicProperties) -> u32 {
    let count = header(properties, "x-delivery-count").map_or(0, integer);
    u32::try_from(count.max(0)).unwrap_or(u32::MAX)
}

/// Where and why a dead letter failed: our own headers, or the broker's.
pub(super) fn dead_letter(properties: &BasicProperties, names: &Names) -> DeadLetter {
    let origin_queue = header_text(properties, ORIGIN_QUEUE)
        .or_else(|| {
            let queue = header_text(properties, "x-first-death-queue")?;
            Some(names.bare(&queue).to_owned())
        })
        .unwrap_or_default();
    let reason = header_text(properties, REASON)
        .or_else(|| header_text(properties, "x-first-death-reason"))
        .unwrap_or_default();
    DeadLetter { origin_queue, reason }
}

fn header<'a>(properties: &'a BasicProperties, name: &str) -> Option<&'a AMQPValue> {
    properties.headers().as_ref()?.inner().get(name)
}

fn header_text(properties: &BasicProperties, name: &str) -> Option<String> {
    match header(properties, name)? {
        AMQPValue::LongString(text) => Some(text.to_string()),
        AMQPValue::ShortString(text) => Some(text.to_string()),
        _ => None,
    }
}

fn integer(value: &AMQPValue) -> i64 {
    match *value {
        AMQPValue::ShortShortInt(n) => n.into(),
        AMQPValue::ShortShortUInt(n) => n.into(),
        AMQPValue::ShortInt(n) => n.into(),
        AMQPValue::ShortUInt(n) => n.into(),
        AMQPValue::LongInt(n) => n.into(),
        AMQPValue::LongUInt(n) => n.into(),
        AMQPValue::LongLongInt(n) => n,
        _ => 0,
    }
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

/// AMQP's short strings hold 255 bytes.
pub(super) fn short(text: &str) -> ShortString {
    cut(text, 255).into()
}

fn cut(text: &str, most: usize) -> &str {
    &text[..text.floor_char_boundary(most)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_cut_between_characters() {
        assert_eq!(cut("abc", 5), "abc");
        assert_eq!(cut("aé", 2), "a");
        assert_eq!(short(&"é".repeat(200)).as_str().len(), 254);
    }
}
