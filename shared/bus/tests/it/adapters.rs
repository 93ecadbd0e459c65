//! What both adapters promise.

use std::collections::HashSet;
use std::time::Duration;

use infera_bus::{BusError, DeadLetter, Envelope, dead};
use infera_testkit::eventually;
use infera_wire::MAX_BUS_BODY_BYTES;

use crate::support::{Adapter, DEADLINE, DELIVERY_LIMIT, World, envelope, next, on_both, within};

on_both!(
    a_message_reaches_every_queue_bound_to_its_key,
    a_queue_collects_before_anybody_consumes,
    a_dropped_delivery_comes_again,
    retries_are_counted_and_end_in_the_dead_letters,
    a_dead_letter_keeps_content_and_reason,
    a_dead_letter_can_be_left_for_later,
    a_dead_letter_goes_back_to_where_it_failed,
    consumers_of_a_queue_share_its_messages,
    prefetch_bounds_what_a_subscription_holds,
    a_closed_subscription_gives_back_what_it_held,
    transient_subscriptions_hear_what_they_asked_for,
    a_full_transient_subscription_drops_and_counts,
    misuse_is_an_error,
    a_body_of_the_largest_size_passes,
    many_publishes_are_in_flight_at_once,
    declaring_again_changes_nothing,
);

async fn a_message_reaches_every_queue_bound_to_its_key(world: World) {
    let mut billing = world.bus.subscribe("billing", 10).await.unwrap();
    let mut audit = world.bus.subscribe("audit", 10).await.unwrap();
    let (paid, deep) = (envelope("paid"), envelope("deep"));
    let paying = world.publish("invoice.paid", &paid);
    let delivery = next(&mut billing).await;
    assert_eq!(delivery.envelope, paid);
    assert_eq!(delivery.delivery_count, 0);
    assert_eq!(delivery.dead_letter, None);
    delivery.ack().await.unwrap();
    let delivery = next(&mut audit).await;
    assert_eq!(delivery.envelope, paid);
    delivery.ack().await.unwrap();
    within("the confirm", paying).await.unwrap().unwrap();

    // `*` is one word, `#` is any number: only the audit hears this one.
    let publishing = world.publish("invoice.paid.late", &deep);
    let delivery = next(&mut audit).await;
    assert_eq!(delivery.envelope, deep);
    delivery.ack().await.unwrap();
    within("the confirm", publishing).await.unwrap().unwrap();
    let last = envelope("last");
    let publishing = world.publish("invoice.sent", &last);
    let delivery = next(&mut billing).await;
    assert_eq!(delivery.envelope, last, "`deep` is not for billing");
    delivery.ack().await.unwrap();
    next(&mut audit).await.ack().await.unwrap();
    within("the confirm", publishing).await.unwrap().unwrap();
}

async fn a_queue_collects_before_anybody_consumes(world: World) {
    let messages: Vec<Envelope> = (0..5).map(|n| envelope(&n.to_string())).collect();
    let mut publishing = Vec::new();
    for message in &messages {
        publishing.push(world.publish("order.placed", message));
        // One after the other, so that their order is known.
        tokio::task::yield_now().await;
    }
    let mut orders = world.another().await.subscribe("orders", 10).await.unwrap();
    let mut seen = HashSet::new();
    for _ in &messages {
        let delivery = next(&mut orders).await;
        seen.insert(delivery.envelope.id);
        delivery.ack().await.unwrap();
    }
    assert_eq!(seen, messages.iter().map(|message| message.id).collect());
    for publish in publishing {
        within("the confirm", publish).await.unwrap().unwrap();
    }
}

async fn a_dropped_delivery_comes_again(world: World) {
    let mut orders = world.bus.subscribe("orders", 1).await.unwrap();
    let message = envelope("dropped");
    let publishing = world.publish("order.placed", &message);
    drop(next(&mut orders).await);
    let again = next(&mut orders).await;
    assert_eq!(again.envelope, message);
    assert_eq!(again.delivery_count, 1);
    again.ack().await.unwrap();
    within("the confirm", publishing).await.unwrap().unwrap();
}

async fn retries_are_counted_and_end_in_the_dead_letters(world: World) {
    let mut orders = world.bus.subscribe("orders", 5).await.unwrap();
    let mut dead = world.bus.subscribe("dead", 5).await.unwrap();
    let message = envelope("poison");
    let publishing = world.publish("order.placed", &message);
    for count in 0..=DELIVERY_LIMIT {
        let delivery = next(&mut orders).await;
        assert_eq!(delivery.envelope, message);
        assert_eq!(delivery.delivery_count, count);
        // Both ways of not processing it count.
        if count % 2 == 0 {
            delivery.retry(Duration::from_millis(20));
        } else {
            drop(delivery);
        }
    }
    let letter = next(&mut dead).await;
    assert_eq!(letter.envelope, message, "content, id, kind and trace are kept");
    let expected = DeadLetter { origin_queue: "orders".to_owned(), reason: "delivery_limit".to_owned() };
    assert_eq!(letter.dead_letter, Some(expected));
    within("the confirm", publishing).await.unwrap().unwrap();
    letter.ack().await.unwrap();

    // The queue goes on with the next.
    let publishing = world.publish("order.placed", &envelope("fine"));
    next(&mut orders).await.ack().await.unwrap();
    within("the confirm", publishing).await.unwrap().unwrap();
}

async fn a_dead_letter_keeps_content_and_reason(world: World) {
    let mut billing = world.bus.subscribe("billing", 5).await.unwrap();
    let mut audit = world.bus.subscribe("audit", 5).await.unwrap();
    let mut dead = world.bus.subscribe("dead", 5).await.unwrap();
    let message = envelope("not an invoice");
    let publishing = world.publish("invoice.paid", &message);
    let delivery = next(&mut billing).await;
    delivery.dead_letter("field `amount` is missing").await.unwrap();
    next(&mut audit).await.ack().await.unwrap();
    within("the confirm", publishing).await.unwrap().unwrap();
    let letter = next(&mut dead).await;
    assert_eq!(letter.envelope, message);
    let expected =
        DeadLetter { origin_queue: "billing".to_owned(), reason: "field `amount` is missing".to_owned() };
    assert_eq!(letter.dead_letter, Some(expected));
    letter.ack().await.unwrap();
}

async fn a_dead_letter_can_be_left_for_later(world: World) {
    let mut orders = world.bus.subscribe("orders", 5).await.unwrap();
    let message = envelope("bad");
    let publishing = world.publish("order.placed", &message);
    next(&mut orders).await.dead_letter("bad").await.unwrap();
    within("the confirm", publishing).await.unwrap().unwrap();
    let mut dead = world.bus.subscribe("dead", 1).await.unwrap();
    // More often than a queue with a limit would deliver it.
    for _ in 0..DELIVERY_LIMIT + 3 {
        let letter = next(&mut dead).await;
        assert_eq!(letter.envelope, message);
        drop(letter);
    }
    next(&mut dead).await.ack().await.unwrap();
}

async fn a_dead_letter_goes_back_to_where_it_failed(world: World) {
    let mut billing = world.bus.subscribe("billing", 5).await.unwrap();
    let mut audit = world.bus.subscribe("audit", 5).await.unwrap();
    let message = envelope("an invoice");
    let publishing = world.publish("invoice.paid", &message);
    next(&mut billing).await.dead_letter("the ledger is closed").await.unwrap();
    next(&mut audit).await.ack().await.unwrap();
    within("the confirm", publishing).await.unwrap().unwrap();

    // Looking at it leaves it where it is.
    for _ in 0..2 {
        eventually(DEADLINE, || async { world.bus.dead_letters().await.unwrap() == 1 }).await;
        let held = within("the dead letter", dead::hold(&world.bus, 10)).await.unwrap();
        assert_eq!(held.letters.len(), 1);
        assert_eq!(held.letters[0].envelope, message);
        assert_eq!(held.letters[0].dead_letter.as_ref().unwrap().origin_queue, "billing");
    }
    eventually(DEADLINE, || async { world.bus.dead_letters().await.unwrap() == 1 }).await;

    let mut held = within("the dead letter", dead::hold(&world.bus, 10)).await.unwrap();
    let letter = held.letters.pop().unwrap();
    let bus = world.bus.clone();
    let replaying = tokio::spawn(async move { dead::replay(&bus, letter).await });
    let again = next(&mut billing).await;
    assert_eq!(again.envelope, message);
    assert_eq!((again.delivery_count, &again.dead_letter), (0, &None), "as if for the first time");
    again.ack().await.unwrap();
    within("the replay", replaying).await.unwrap().unwrap();
    drop(held);
    assert_eq!(world.bus.dead_letters().await.unwrap(), 0);
    assert!(within("no dead letter", dead::hold(&world.bus, 10)).await.unwrap().letters.is_empty());

    // The other queue of its key did not hear it again: the next thing there is something else.
    let other = envelope("the next");
    let publishing = world.publish("invoice.sent", &other);
    let delivery = next(&mut audit).await;
    assert_eq!(delivery.envelope, other);
    delivery.ack().await.unwrap();
    next(&mut billing).await.ack().await.unwrap();
    within("the confirm", publishing).await.unwrap().unwrap();
}

async fn consumers_of_a_queue_share_its_messages(world: World) {
    let mut first = world.bus.subscribe("orders", 10).await.unwrap();
    let mut second = world.another().await.subscribe("orders", 10).await.unwrap();
    let messages: Vec<Envelope> = (0..40).map(|n| envelope(&n.to_string())).collect();
    let publishing: Vec<_> = messages.iter().map(|message| world.publish("order.placed", message)).collect();
    // Each gets one before any is acked.
    let (a, b) = (next(&mut first).await, next(&mut second).await);
    let mut seen = vec![a.envelope.id, b.envelope.id];
    a.ack().await.unwrap();
    b.ack().await.unwrap();
    while seen.len() < messages.len() {
        let delivery = within("a delivery", async {
            tokio::select! {
                delivery = first.next() => delivery,
                delivery = second.next() => delivery,
            }
        });
        let delivery = delivery.await.unwrap();
        seen.push(delivery.envelope.id);
        delivery.ack().await.unwrap();
    }
    let all: HashSet<_> = messages.iter().map(|message| message.id).collect();
    assert_eq!(seen.iter().copied().collect::<HashSet<_>>(), all);
    assert_eq!(seen.len(), all.len(), "none came twice");
    for publish in publishing {
        within("the confirm", publish).await.unwrap().unwrap();
    }
}

async fn prefetch_bounds_what_a_subscription_holds(world: World) {
    let mut greedy = world.bus.subscribe("orders", 2).await.unwrap();
    let messages: Vec<Envelope> = (0..3).map(|n| envelope(&n.to_string())).collect();
    let publishing: Vec<_> = messages.iter().map(|message| world.publish("order.placed", message)).collect();
    let held = [next(&mut greedy).await, next(&mut greedy).await];
    let mut other = world.bus.subscribe("orders", 2).await.unwrap();
    let third = next(&mut other).await;
    assert!(held.iter().all(|delivery| delivery.envelope != third.envelope));
    third.ack().await.unwrap();
    for delivery in held {
        delivery.ack().await.unwrap();
    }
    for publish in publishing {
        within("the confirm", publish).await.unwrap().unwrap();
    }
}

async fn a_closed_subscription_gives_back_what_it_held(world: World) {
    let mut orders = world.bus.subscribe("orders", 5).await.unwrap();
    let message = envelope("given back");
    let publishing = world.publish("order.placed", &message);
    let stale = next(&mut orders).await;
    drop(orders);
    let mut orders = world.bus.subscribe("orders", 5).await.unwrap();
    let again = next(&mut orders).await;
    assert_eq!(again.envelope, message);
    assert_eq!(again.delivery_count, 1);
    assert!(matches!(stale.ack().await, Err(BusError::Stale)));
    again.ack().await.unwrap();
    within("the confirm", publishing).await.unwrap().unwrap();
}

async fn transient_subscriptions_hear_what_they_asked_for(world: World) {
    let bus = world.another().await;
    let patterns = ["slots", "invoice.gw1", "deltas.*"];
    let mut mine = bus.subscribe_transient("reply.gw1", &patterns, 100).await.unwrap();
    let mut same = bus.subscribe_transient("reply.gw1", &["slots"], 100).await.unwrap();
    let (slots, delta, other) = (envelope("slots"), envelope("delta"), envelope("other"));
    world.bus.publish_transient("elsewhere", other);
    world.bus.publish_transient("slots", slots.clone());
    world.bus.publish_transient("deltas.gw1", delta.clone());
    assert_eq!(next(&mut mine).await.envelope, slots);
    assert_eq!(next(&mut mine).await.envelope, delta);
    let heard = next(&mut same).await;
    assert_eq!(heard.envelope, slots);
    heard.ack().await.unwrap();

    // A durable message reaches them too, without waiting for them.
    let invoice = envelope("invoice");
    let publishing = world.publish("invoice.gw1", &invoice);
    assert_eq!(next(&mut mine).await.envelope, invoice);
    for queue in ["billing", "audit"] {
        let mut durable = world.bus.subscribe(queue, 5).await.unwrap();
        next(&mut durable).await.ack().await.unwrap();
    }
    within("the confirm", publishing).await.unwrap().unwrap();
}

async fn a_full_transient_subscription_drops_and_counts(world: World) {
    let slow = world.bus.subscribe_transient("slow", &["slots"], 4).await.unwrap();
    let mut quick = world.bus.subscribe_transient("quick", &["slots"], 2_000).await.unwrap();
    let before = world.bus.dropped();
    for n in 0..1_000 {
        world.bus.publish_transient("slots", envelope(&n.to_string()));
    }
    let bus = world.bus.clone();
    eventually(DEADLINE, || async { bus.dropped() > before }).await;
    // A slow one does not keep others from hearing.
    let heard = next(&mut quick).await;
    assert_eq!(&heard.envelope.body[..], b"0");
    drop(slow);
}

async fn misuse_is_an_error(world: World) {
    let error = world.bus.publish("nobody.listens", envelope("x")).await.unwrap_err();
    assert!(
        matches!(error, BusError::Unroutable { ref routing_key } if routing_key == "nobody.listens"),
        "{error}"
    );
    let error = world.bus.publish("order", envelope("x")).await.unwrap_err();
    assert!(matches!(error, BusError::Unroutable { .. }), "{error}");
    let error = world.bus.subscribe("unknown", 1).await.unwrap_err();
    assert!(matches!(error, BusError::UnknownQueue { ref queue } if queue == "unknown"), "{error}");
    let mut large = envelope("");
    large.body = vec![0; MAX_BUS_BODY_BYTES + 1].into();
    let error = world.bus.publish("order.placed", large).await.unwrap_err();
    assert!(matches!(error, BusError::TooLarge { .. }), "{error}");
    assert!(world.bus.healthy());
}

async fn a_body_of_the_largest_size_passes(world: World) {
    let mut orders = world.bus.subscribe("orders", 1).await.unwrap();
    let mut message = envelope("");
    message.body = (0..MAX_BUS_BODY_BYTES).map(|n| n as u8).collect::<Vec<u8>>().into();
    let publishing = world.publish("order.placed", &message);
    let delivery = next(&mut orders).await;
    assert!(delivery.envelope == message, "the body is the same");
    delivery.ack().await.unwrap();
    within("the confirm", publishing).await.unwrap().unwrap();
}

async fn many_publishes_are_in_flight_at_once(world: World) {
    let mut orders = world.bus.subscribe("orders", 100).await.unwrap();
    let publishing: Vec<_> =
        (0..1_000).map(|n| world.publish("order.placed", &envelope(&n.to_string()))).collect();
    let mut seen = HashSet::new();
    for _ in 0..1_000 {
        let delivery = next(&mut orders).await;
        seen.insert(delivery.envelope.id);
        delivery.ack().await.unwrap();
    }
    assert_eq!(seen.len(), 1_000);
    for publish in publishing {
        within("the confirm", publish).await.unwrap().unwrap();
    }
}

async fn declaring_again_changes_nothing(world: World) {
    let message = envelope("kept");
    let publishing = world.publish("order.placed", &message);
    if world.adapter == Adapter::Rabbit {
        within("the confirm", async {
            while !publishing.is_finished() {
                tokio::task::yield_now().await
            }
        })
        .await;
    }
    world.bus.declare(&crate::support::topology()).await.unwrap();
    let mut orders = world.bus.subscribe("orders", 1).await.unwrap();
    let delivery = next(&mut orders).await;
    assert_eq!(delivery.envelope, message);
    delivery.ack().await.unwrap();
    within("the confirm", publishing).await.unwrap().unwrap();
}
