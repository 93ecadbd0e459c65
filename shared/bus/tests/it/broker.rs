//! What only the RabbitMQ adapter has to stand: restarts, foreign messages, a missing broker.

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Duration;

use infera_bus::outbox::{self, Relay};
use infera_bus::{Bus, BusError, Topology};
use infera_runtime::CancellationToken;
use infera_testkit::{Cluster, cache_dir, cluster, eventually};
use lapin::options::BasicPublishOptions;
use lapin::{BasicProperties, Connection, ConnectionProperties};
use sea_orm::TransactionTrait;
use uuid::Uuid;

use crate::support::{Adapter, DEADLINE, Engine, Store, World, envelope, next, topology, within};

#[tokio::test(flavor = "multi_thread")]
async fn a_confirmed_message_needs_no_consumer_and_no_publisher() {
    let world = World::new(Adapter::Rabbit).await;
    let message = envelope("stored");
    within("the confirm", world.bus.publish("order.placed", message.clone())).await.unwrap();
    let other = world.another().await;
    world.bus.close().await;
    assert!(!world.bus.healthy());
    assert!(matches!(world.bus.publish("order.placed", message.clone()).await, Err(BusError::Closed)));
    let mut orders = other.subscribe("orders", 1).await.unwrap();
    let delivery = next(&mut orders).await;
    assert_eq!(delivery.envelope, message);
    delivery.ack().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_envelope_is_a_dead_letter() {
    let world = World::new(Adapter::Rabbit).await;
    let connection = Connection::connect(&cluster().amqp_url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let long = "x".repeat(200);
    for (id, body) in
        [(None, &b"\xff\xfe garbage"[..]), (Some("not a uuid"), b""), (Some(long.as_str()), b"z")]
    {
        let mut properties = BasicProperties::default();
        if let Some(id) = id {
            properties = properties.with_message_id(id.into());
        }
        let exchange = format!("{}events", world.prefix);
        channel
            .basic_publish(
                exchange.into(),
                "order.placed".into(),
                BasicPublishOptions::default(),
                body,
                properties,
            )
            .await
            .unwrap();
    }
    let fine = envelope("fine");
    world.bus.publish("order.placed", fine.clone()).await.unwrap();
    let mut orders = world.bus.subscribe("orders", 1).await.unwrap();
    let delivery = next(&mut orders).await;
    assert_eq!(delivery.envelope, fine);
    delivery.ack().await.unwrap();
    let mut dead = world.bus.subscribe("dead", 10).await.unwrap();
    let mut bodies = HashSet::new();
    for _ in 0..3 {
        let letter = next(&mut dead).await;
        let why = letter.dead_letter.clone().unwrap();
        assert_eq!(
            (why.origin_queue.as_str(), why.reason.as_str()),
            ("orders", "the message id is not a UUID")
        );
        assert_eq!(letter.envelope.id, Uuid::nil());
        bodies.insert(letter.envelope.body.to_vec());
        letter.ack().await.unwrap();
    }
    assert_eq!(bodies, HashSet::from([b"\xff\xfe garbage".to_vec(), Vec::new(), b"z".to_vec()]));
}

#[tokio::test(flavor = "multi_thread")]
async fn networks_with_different_prefixes_do_not_meet() {
    let (one, two) = (World::new(Adapter::Rabbit).await, World::new(Adapter::Rabbit).await);
    let (first, second) = (envelope("one"), envelope("two"));
    one.bus.publish("order.placed", first.clone()).await.unwrap();
    two.bus.publish("order.placed", second.clone()).await.unwrap();
    for (world, message) in [(one, first), (two, second)] {
        let mut orders = world.bus.subscribe("orders", 5).await.unwrap();
        let delivery = next(&mut orders).await;
        assert_eq!(delivery.envelope, message);
        delivery.ack().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_of_another_shape_is_refused_with_a_reason() {
    let world = World::new(Adapter::Rabbit).await;
    let other = Topology { delivery_limit: 7, ..topology() };
    let error = world.bus.declare(&other).await.unwrap_err();
    assert!(matches!(error, BusError::Refused { .. }), "{error}");
    assert!(error.to_string().contains("x-delivery-limit"), "{error}");
    // The refusal closed one channel and nothing else.
    world.bus.publish("order.placed", envelope("x")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_broker_is_waited_for() {
    let port = infera_testkit::free_port();
    let bus = Bus::rabbit(&format!("amqp://127.0.0.1:{port}/%2f"), "x.").await.unwrap();
    assert!(!bus.healthy());
    bus.publish_transient("slots", envelope("nobody"));
    assert_eq!(bus.dropped(), 1);
    let declaring = bus.clone();
    let declaring = tokio::spawn(async move { declaring.declare(&topology()).await });
    bus.close().await;
    let declared = within("the end of waiting", declaring).await.unwrap();
    assert!(matches!(declared, Err(BusError::Closed)));
    for url in ["", "http://127.0.0.1", "amqp://host:notaport/"] {
        let error = Bus::rabbit(url, "x.").await.unwrap_err();
        assert!(matches!(error, BusError::Url { .. }), "{url}: {error}");
    }
    let error = Bus::rabbit("amqp://127.0.0.1", &"x".repeat(101)).await.unwrap_err();
    assert!(matches!(error, BusError::Name { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_queue_is_declared_again() {
    let world = World::new(Adapter::Rabbit).await;
    let mut orders = world.bus.subscribe("orders", 5).await.unwrap();
    let connection = Connection::connect(&cluster().amqp_url, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let name = format!("{}orders", world.prefix);
    channel.queue_delete(name.into(), Default::default()).await.unwrap();
    let message = envelope("x");
    within("the confirm", world.bus.publish("order.placed", message.clone())).await.unwrap();
    let delivery = next(&mut orders).await;
    assert_eq!(delivery.envelope, message);
    delivery.ack().await.unwrap();
}

/// A broker of this test's own: it is stopped and killed. Ends with the test.
struct Private(Cluster);

impl Private {
    fn start() -> Self {
        let dir: PathBuf = cache_dir().join("test-cluster-bus");
        Self(Cluster::start(dir))
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Messages flow from an outbox to a consumer while the broker restarts and is killed; all arrive, and
/// both durable and transient subscriptions work afterwards.
#[tokio::test(flavor = "multi_thread")]
async fn consuming_and_publishing_go_on_after_the_broker_restarts() {
    let private = tokio::task::spawn_blocking(Private::start).await.unwrap();
    let url = private.0.amqp_url.clone();
    let prefix = format!("{}.", infera_testkit::unique("bus"));
    let bus = Bus::rabbit(&url, &prefix).await.unwrap();
    bus.declare(&topology()).await.unwrap();
    let mut slots = bus.subscribe_transient("slots", &["slots"], 10).await.unwrap();
    let mut orders = bus.subscribe("orders", 10).await.unwrap();
    let store = Store::new(Engine::Sqlite).await;
    let relay = Relay::start(store.db.clone(), bus.clone(), CancellationToken::new());
    let (said, mut is_said) = tokio::sync::mpsc::unbounded_channel();
    let (db, waker) = (store.db.clone(), relay.clone());
    let go_on = CancellationToken::new();
    let until = go_on.clone();
    let saying = tokio::spawn(async move {
        while !until.is_cancelled() {
            let id = Uuid::now_v7();
            let tx = db.begin().await.unwrap();
            outbox::enqueue(&tx, "order.placed", id, &"x".to_owned()).await.unwrap();
            tx.commit().await.unwrap();
            waker.wake();
            said.send(id).unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    let collected = std::sync::Arc::new(std::sync::Mutex::new(HashSet::new()));
    let seen = collected.clone();
    let collecting = tokio::spawn(async move {
        while let Some(delivery) = orders.next().await {
            seen.lock().unwrap().insert(delivery.envelope.id);
            // Stale after a restart: then it comes again.
            let _ = delivery.ack().await;
        }
    });
    let count = || collected.lock().unwrap().len();
    for kill in [false, true] {
        let before = count();
        eventually(DEADLINE, || async { count() > before + 20 }).await;
        let cluster = private.0.clone();
        tokio::task::spawn_blocking(move || {
            if kill {
                cluster.kill("rabbit");
                cluster.revive();
            } else {
                cluster.restart("rabbit");
            }
        })
        .await
        .unwrap();
        let after = count();
        eventually(2 * DEADLINE, || async { count() > after + 20 }).await;
        assert!(bus.healthy());
    }
    go_on.cancel();
    within("the last message", saying).await.unwrap();
    let mut all = HashSet::new();
    while let Ok(id) = is_said.try_recv() {
        all.insert(id);
    }
    eventually(DEADLINE, || async { *collected.lock().unwrap() == all }).await;
    let db = &store.db;
    eventually(DEADLINE, || async { outbox::pending(db).await.unwrap() == 0 }).await;
    let message = envelope("slots");
    let heard = async {
        loop {
            bus.publish_transient("slots", message.clone());
            tokio::select! {
                delivery = slots.next() => break delivery.unwrap(),
                () = tokio::time::sleep(Duration::from_millis(100)) => {}
            }
        }
    };
    assert_eq!(within("a transient message", heard).await.envelope, message);
    bus.close().await;
    within("the end of the stream", collecting).await.unwrap();
}
