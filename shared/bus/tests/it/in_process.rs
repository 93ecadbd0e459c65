//! What only the in-process bus promises: the confirm is the ack, queues are bounded, threads and
//! runtimes do not matter.

use infera_bus::{Bus, BusError, Limits};

use crate::support::{envelope, next, on_thread, topology, within};

#[tokio::test]
async fn a_publish_resolves_only_when_every_durable_queue_has_acked() {
    let bus = Bus::in_process();
    bus.declare(&topology()).await.unwrap();
    let mut publish = std::pin::pin!(bus.publish("invoice.paid", envelope("x")));
    assert!(futures::poll!(&mut publish).is_pending());
    let mut billing = bus.subscribe("billing", 1).await.unwrap();
    let mut audit = bus.subscribe("audit", 1).await.unwrap();
    next(&mut billing).await.ack().await.unwrap();
    assert!(futures::poll!(&mut publish).is_pending(), "audit has not acked");
    drop(next(&mut audit).await);
    assert!(futures::poll!(&mut publish).is_pending(), "a redelivery is no ack");
    next(&mut audit).await.ack().await.unwrap();
    publish.await.unwrap();
}

#[tokio::test]
async fn publishing_waits_while_a_queue_is_full() {
    let limits = Limits { queue_messages: 2, dead_letters: 2 };
    let bus = Bus::in_process_with(limits);
    bus.declare(&topology()).await.unwrap();
    let mut orders = bus.subscribe("orders", 5).await.unwrap();
    let mut publishing: Vec<_> =
        (0..3).map(|n| Box::pin(bus.publish("order.placed", envelope(&n.to_string())))).collect();
    for publish in &mut publishing {
        assert!(futures::poll!(publish).is_pending());
    }
    let first = next(&mut orders).await;
    let second = next(&mut orders).await;
    let mut third = std::pin::pin!(orders.next());
    assert!(futures::poll!(&mut third).is_pending(), "delivered is not settled");
    first.ack().await.unwrap();
    assert!(futures::poll!(&mut publishing[2]).is_pending());
    let third = within("the third", third).await.unwrap();
    assert_eq!(&third.envelope.body[..], b"2");
    second.ack().await.unwrap();
    third.ack().await.unwrap();
    for publish in publishing {
        publish.await.unwrap();
    }
}

#[tokio::test]
async fn full_dead_letters_push_the_oldest_out() {
    let limits = Limits { queue_messages: 10, dead_letters: 2 };
    let bus = Bus::in_process_with(limits);
    bus.declare(&topology()).await.unwrap();
    let mut orders = bus.subscribe("orders", 5).await.unwrap();
    for n in 0..3 {
        let publish = bus.publish("order.placed", envelope(&n.to_string()));
        let (published, ()) = tokio::join!(publish, async {
            next(&mut orders).await.dead_letter("bad").await.unwrap();
        });
        published.unwrap();
    }
    let mut dead = bus.subscribe("dead", 5).await.unwrap();
    for n in ["1", "2"] {
        let letter = next(&mut dead).await;
        assert_eq!(&letter.envelope.body[..], n.as_bytes());
        letter.ack().await.unwrap();
    }
}

/// As `infera up` runs it: each service on its own thread with its own current-thread runtime.
#[test]
fn services_on_different_runtimes_share_it() {
    let bus = Bus::in_process();
    let consumer = {
        let bus = bus.clone();
        on_thread(move || async move {
            bus.declare(&topology()).await.unwrap();
            let mut orders = bus.subscribe("orders", 4).await.unwrap();
            for n in 0..500 {
                let delivery = next(&mut orders).await;
                // A timer of this runtime; the message outlives neither.
                if n % 50 == 0 && delivery.delivery_count == 0 {
                    delivery.retry(std::time::Duration::from_millis(1));
                    next(&mut orders).await.ack().await.unwrap();
                } else {
                    delivery.ack().await.unwrap();
                }
            }
        })
    };
    let publisher = on_thread(move || async move {
        bus.declare(&topology()).await.unwrap();
        let mut publishing = tokio::task::JoinSet::new();
        for n in 0..500 {
            let bus = bus.clone();
            publishing.spawn(async move { bus.publish("order.placed", envelope(&n.to_string())).await });
        }
        while let Some(published) = within("the confirms", publishing.join_next()).await {
            published.unwrap().unwrap();
        }
    });
    publisher.blocking_recv().unwrap();
    consumer.blocking_recv().unwrap();
}

/// A consumer's runtime that ends with a retry pending gives the message to the next.
#[test]
fn a_retry_survives_the_end_of_its_runtime() {
    let bus = Bus::in_process();
    let setup = bus.clone();
    on_thread(move || async move {
        setup.declare(&topology()).await.unwrap();
        let publish = setup.clone();
        tokio::spawn(async move { publish.publish("order.placed", envelope("x")).await });
        let mut orders = setup.subscribe("orders", 1).await.unwrap();
        next(&mut orders).await.retry(std::time::Duration::from_secs(200));
        // The runtime ends here, and the timer with it.
    })
    .blocking_recv()
    .unwrap();
    on_thread(move || async move {
        let mut orders = bus.subscribe("orders", 1).await.unwrap();
        let delivery = next(&mut orders).await;
        assert_eq!(delivery.delivery_count, 1);
        delivery.ack().await.unwrap();
    })
    .blocking_recv()
    .unwrap();
}

#[tokio::test]
async fn nothing_is_known_before_it_is_declared() {
    let bus = Bus::in_process();
    let error = bus.publish("order.placed", envelope("x")).await.unwrap_err();
    assert!(matches!(error, BusError::Unroutable { .. }), "{error}");
    assert!(matches!(bus.subscribe("orders", 1).await, Err(BusError::UnknownQueue { .. })));
}
