//! `consume`: once per transaction, whatever is redelivered; garbage stops nothing.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use infera_bus::outbox::Relay;
use infera_bus::watch::Watch;
use infera_bus::{BusError, ConsumerSpec, Envelope, Reject, consume, consume_then, outbox};
use infera_runtime::CancellationToken;
use infera_runtime::health::Health;
use infera_testkit::eventually;
use sea_orm::DatabaseTransaction;
use tokio::sync::Semaphore;
use tokio::sync::oneshot;
use uuid::Uuid;

use crate::support::{
    Adapter, DEADLINE, DELIVERY_LIMIT, Engine, Proxy, Store, World, effect, effects, envelope, next, on_all,
    on_thread, within,
};

on_all!(
    a_message_said_twice_is_processed_once,
    a_rejected_transaction_leaves_nothing,
    what_cannot_be_processed_is_a_dead_letter,
    what_never_works_is_a_dead_letter_with_its_reason,
    what_became_of_messages_is_counted,
    a_handlers_messages_are_said_after_its_commit,
    shutdown_finishes_what_was_begun,
);

struct Consumer {
    stop: CancellationToken,
    relay: Relay,
    task: oneshot::Receiver<Result<(), BusError>>,
}

impl Consumer {
    fn start<H>(world: &World, store: &Store, handler: H) -> Self
    where
        H: AsyncFn(&DatabaseTransaction, &Envelope) -> Result<(), Reject> + Send + 'static,
    {
        let stop = CancellationToken::new();
        let relay = Relay::start(store.db.clone(), world.bus.clone(), stop.clone());
        let spec = ConsumerSpec {
            bus: world.bus.clone(),
            db: store.db.clone(),
            queue: "orders",
            prefetch: 4,
            relay: Some(relay.clone()),
        };
        let token = stop.clone();
        // As a service does it: on a thread of its own, which needs no `Send` of the handler's futures.
        let task = on_thread(move || consume(spec, token, handler));
        Self { stop, relay, task }
    }

    async fn stop(self) {
        self.stop.cancel();
        within("the consumer's end", self.task).await.unwrap().unwrap();
        within("the relay's end", self.relay.stopped()).await;
    }
}

async fn until_effects(store: &Store, expected: &[&str]) {
    let poll = || async {
        let now = effects(&store.db).await;
        if now == expected { Ok(()) } else { Err(now) }
    };
    eventually(DEADLINE, poll).await;
}

async fn a_message_said_twice_is_processed_once(world: World, store: Store) {
    let consumer = Consumer::start(&world, &store, async |tx: &DatabaseTransaction, envelope: &Envelope| {
        Ok(effect(tx, &envelope.body).await?)
    });
    let message = envelope("a");
    for _ in 0..3 {
        within("the confirm", world.publish("order.placed", &message)).await.unwrap().unwrap();
    }
    within("the confirm", world.publish("order.placed", &envelope("b"))).await.unwrap().unwrap();
    until_effects(&store, &["a", "b"]).await;
    consumer.stop().await;
    assert_eq!(effects(&store.db).await, ["a", "b"]);
}

async fn a_rejected_transaction_leaves_nothing(world: World, store: Store) {
    let tries = Arc::new(AtomicUsize::new(0));
    let counter = tries.clone();
    let consumer =
        Consumer::start(&world, &store, async move |tx: &DatabaseTransaction, envelope: &Envelope| {
            effect(tx, &envelope.body).await?;
            if counter.fetch_add(1, Ordering::SeqCst) < 2 {
                return Err(Reject::Retry("not yet".to_owned()));
            }
            Ok(())
        });
    let publishing = world.publish("order.placed", &envelope("third time"));
    until_effects(&store, &["third time"]).await;
    within("the confirm", publishing).await.unwrap().unwrap();
    consumer.stop().await;
    assert_eq!(tries.load(Ordering::SeqCst), 3);
}

async fn what_cannot_be_processed_is_a_dead_letter(world: World, store: Store) {
    let consumer = Consumer::start(&world, &store, async |tx: &DatabaseTransaction, envelope: &Envelope| {
        if envelope.body.starts_with(b"garbage") {
            effect(tx, b"never to be seen").await?;
            return Err(Reject::DeadLetter("field `price` is missing".to_owned()));
        }
        Ok(effect(tx, &envelope.body).await?)
    });
    let mut publishing = Vec::new();
    let garbage: Vec<Envelope> = (0..6).map(|n| envelope(&format!("garbage {n}"))).collect();
    for (n, garbage) in garbage.iter().enumerate() {
        publishing.push(world.publish("order.placed", garbage));
        publishing.push(world.publish("order.placed", &envelope(&format!("fine {n}"))));
    }
    until_effects(&store, &["fine 0", "fine 1", "fine 2", "fine 3", "fine 4", "fine 5"]).await;
    let mut dead = world.bus.subscribe("dead", 10).await.unwrap();
    for _ in &garbage {
        let letter = next(&mut dead).await;
        assert!(garbage.contains(&letter.envelope));
        let why = letter.dead_letter.clone().unwrap();
        assert_eq!((why.origin_queue.as_str(), why.reason.as_str()), ("orders", "field `price` is missing"));
        letter.ack().await.unwrap();
    }
    for publish in publishing {
        within("the confirm", publish).await.unwrap().unwrap();
    }
    consumer.stop().await;
}

async fn what_became_of_messages_is_counted(world: World, store: Store) {
    let health = Health::new("test");
    let watch = Watch::new(&health, world.bus.clone(), store.db.clone(), true).unwrap();
    assert_eq!(health.readiness().failing, ["bus", "database"]);
    let stop = CancellationToken::new();
    let watching = tokio::spawn(watch.run(stop.clone()));
    let consumer =
        Consumer::start(
            &world,
            &store,
            async |tx: &DatabaseTransaction, envelope: &Envelope| match &*envelope.body {
                b"bad" => Err(Reject::DeadLetter("bad".to_owned())),
                body => Ok(effect(tx, body).await?),
            },
        );
    let messages = [envelope("good"), envelope("bad")];
    for publishing in messages.iter().map(|message| world.publish("order.placed", message)) {
        within("the confirm", publishing).await.unwrap().unwrap();
    }
    let figure = |name: &str, outcome: &str| {
        let families = health.registry().gather();
        let family = families.into_iter().find(|family| family.name() == name)?;
        let metrics = family.get_metric();
        let metric = metrics
            .iter()
            .find(|m| outcome.is_empty() || m.get_label().iter().any(|label| label.value() == outcome))?;
        Some((metric.get_counter().get_value() + metric.get_gauge().get_value()) as u64)
    };
    eventually(DEADLINE, || async {
        health.is_ready()
            && figure("infera_bus_deliveries_total", "processed") == Some(1)
            && figure("infera_bus_deliveries_total", "dead") == Some(1)
            && figure("infera_bus_dead_letters", "") == Some(1)
            && figure("infera_outbox_waiting", "") == Some(0)
    })
    .await;
    consumer.stop().await;
    stop.cancel();
    within("the watch's end", watching).await.unwrap();
    assert_eq!(health.readiness().status, "draining");
}

async fn what_never_works_is_a_dead_letter_with_its_reason(world: World, store: Store) {
    let tries = Arc::new(AtomicUsize::new(0));
    let counter = tries.clone();
    let consumer = Consumer::start(&world, &store, async move |_: &DatabaseTransaction, _: &Envelope| {
        counter.fetch_add(1, Ordering::SeqCst);
        Err(Reject::Retry("the moon is not full".to_owned()))
    });
    let message = envelope("x");
    let publishing = world.publish("order.placed", &message);
    let mut dead = world.bus.subscribe("dead", 10).await.unwrap();
    let letter = next(&mut dead).await;
    assert_eq!(letter.envelope, message);
    assert_eq!(letter.dead_letter.clone().unwrap().reason, "the moon is not full");
    letter.ack().await.unwrap();
    within("the confirm", publishing).await.unwrap().unwrap();
    consumer.stop().await;
    assert_eq!(tries.load(Ordering::SeqCst), DELIVERY_LIMIT as usize + 1);
}

async fn a_handlers_messages_are_said_after_its_commit(world: World, store: Store) {
    let consumer = Consumer::start(&world, &store, async |tx: &DatabaseTransaction, envelope: &Envelope| {
        effect(tx, &envelope.body).await?;
        outbox::enqueue(tx, "order.shipped", envelope.id, &"shipped".to_owned()).await?;
        Ok(())
    });
    let message = envelope("order");
    let publishing = world.publish("order.placed", &message);
    let mut shipping = world.bus.subscribe("shipping", 1).await.unwrap();
    let delivery = next(&mut shipping).await;
    assert_eq!(delivery.envelope.id, message.id);
    assert_eq!(effects(&store.db).await, ["order"]);
    delivery.ack().await.unwrap();
    within("the confirm", publishing).await.unwrap().unwrap();
    let db = &store.db;
    eventually(DEADLINE, || async { outbox::pending(db).await.unwrap() == 0 }).await;
    consumer.stop().await;
}

async fn shutdown_finishes_what_was_begun(world: World, store: Store) {
    let (begun, go) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
    let (begin, wait) = (begun.clone(), go.clone());
    let mut consumer =
        Consumer::start(&world, &store, async move |tx: &DatabaseTransaction, envelope: &Envelope| {
            begin.add_permits(1);
            wait.acquire().await.unwrap().forget();
            Ok(effect(tx, &envelope.body).await?)
        });
    let publishing = world.publish("order.placed", &envelope("begun"));
    within("the handler", begun.acquire()).await.unwrap().forget();
    consumer.stop.cancel();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(consumer.task.try_recv().is_err(), "it waits for its handler");
    go.add_permits(1);
    consumer.stop().await;
    assert_eq!(effects(&store.db).await, ["begun"]);
    within("the confirm", publishing).await.unwrap().unwrap();
}

/// A consumer can be spawned on a multi-threaded runtime too: its future is `Send` if the handler's is.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_can_be_spawned() {
    let world = World::new(Adapter::InProcess).await;
    let store = Store::new(Engine::Sqlite).await;
    let stop = CancellationToken::new();
    let spec = ConsumerSpec {
        bus: world.bus.clone(),
        db: store.db.clone(),
        queue: "orders",
        prefetch: 1,
        relay: None,
    };
    let task =
        tokio::spawn(consume(spec, stop.clone(), async |tx: &DatabaseTransaction, envelope: &Envelope| {
            Ok(effect(tx, &envelope.body).await?)
        }));
    let mut message = envelope("spawned");
    message.id = Uuid::now_v7();
    within("the confirm", world.publish("order.placed", &message)).await.unwrap().unwrap();
    stop.cancel();
    within("the consumer's end", task).await.unwrap().unwrap();
    assert_eq!(effects(&store.db).await, ["spawned"]);
}

/// An outage longer than all redeliveries would take costs the message none of them.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_away_is_waited_for() {
    let proxy = Proxy::of_postgres().await;
    let world = World::new(Adapter::InProcess).await;
    let store = Store::behind(proxy.address).await;
    let handler = async |tx: &DatabaseTransaction, envelope: &Envelope| Ok(effect(tx, &envelope.body).await?);
    let consumer = Consumer::start(&world, &store, handler);
    within("the confirm", world.publish("order.placed", &envelope("before"))).await.unwrap().unwrap();
    proxy.set_open(false);
    let publishing = world.publish("order.placed", &envelope("during"));
    eventually(DEADLINE, || async { proxy.refused() > 12 }).await;
    assert!(!publishing.is_finished());
    proxy.set_open(true);
    within("the confirm", publishing).await.unwrap().unwrap();
    assert_eq!(effects(&store.db).await, ["before", "during"]);
    consumer.stop().await;
}

/// The hook runs after the commit, also for a message that was processed before.
#[tokio::test(flavor = "multi_thread")]
async fn a_hook_sees_what_was_committed() {
    let world = World::new(Adapter::InProcess).await;
    let store = Store::new(Engine::Sqlite).await;
    let stop = CancellationToken::new();
    let spec = ConsumerSpec {
        bus: world.bus.clone(),
        db: store.db.clone(),
        queue: "orders",
        prefetch: 1,
        relay: None,
    };
    let seen = Mutex::new(Vec::new());
    let handler = async |tx: &DatabaseTransaction, envelope: &Envelope| Ok(effect(tx, &envelope.body).await?);
    let committed = async |_: &Envelope| {
        let now = effects(&store.db).await;
        seen.lock().unwrap().push(now);
    };
    let message = envelope("x");
    let publishing = async {
        for _ in 0..2 {
            within("the confirm", world.publish("order.placed", &message)).await.unwrap().unwrap();
        }
        stop.cancel();
    };
    let consuming = consume_then(spec, stop.clone(), handler, committed);
    let (consumed, ()) = tokio::join!(consuming, publishing);
    consumed.unwrap();
    assert_eq!(*seen.lock().unwrap(), [["x"], ["x"]]);
}
