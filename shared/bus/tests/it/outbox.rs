//! The outbox and its relay: what commits is published, once it is confirmed it is gone.

use std::collections::HashSet;

use infera_bus::outbox::{self, Relay};
use infera_bus::{Bus, DeadLetter};
use infera_runtime::CancellationToken;
use infera_testkit::eventually;
use prost::Message;
use sea_orm::{DatabaseConnection, TransactionTrait};
use uuid::Uuid;

use crate::support::{Adapter, DEADLINE, Engine, Store, World, next, on_all, topology, within};

on_all!(
    only_what_commits_is_published,
    what_was_left_is_published_at_the_next_start,
    the_same_message_is_not_written_twice,
    a_message_nobody_takes_holds_up_no_other,
    a_dead_letter_survives_a_restart,
    what_no_queue_receives_is_a_dead_letter,
    a_relay_ends_with_its_token,
    a_dead_letter_of_the_database_is_tried_again,
);

/// Any message will do: prost's own `String`.
async fn enqueue(db: &DatabaseConnection, key: &str, body: &str) -> Uuid {
    let id = Uuid::now_v7();
    let tx = db.begin().await.unwrap();
    outbox::enqueue(&tx, key, id, &body.to_owned()).await.unwrap();
    tx.commit().await.unwrap();
    id
}

async fn until_empty(db: &DatabaseConnection) {
    eventually(DEADLINE, || async { outbox::pending(db).await.unwrap() == 0 }).await;
}

async fn only_what_commits_is_published(world: World, store: Store) {
    let stop = CancellationToken::new();
    let relay = Relay::start(store.db.clone(), world.bus.clone(), stop.clone());
    let tx = store.db.begin().await.unwrap();
    outbox::enqueue(&tx, "order.placed", Uuid::now_v7(), &"rolled back".to_owned()).await.unwrap();
    tx.rollback().await.unwrap();
    relay.wake();
    let id = enqueue(&store.db, "order.placed", "committed").await;
    relay.wake();
    let mut orders = world.bus.subscribe("orders", 5).await.unwrap();
    let delivery = next(&mut orders).await;
    assert_eq!(delivery.envelope.id, id);
    assert_eq!(delivery.envelope.kind, "order.placed");
    let body = String::decode(delivery.envelope.body.clone()).unwrap();
    assert_eq!(body, "committed");
    if world.adapter == Adapter::InProcess {
        assert_eq!(outbox::pending(&store.db).await.unwrap(), 1, "kept until it is acked");
    }
    delivery.ack().await.unwrap();
    until_empty(&store.db).await;
    stop.cancel();
    within("the relay's end", relay.stopped()).await;
}

async fn what_was_left_is_published_at_the_next_start(world: World, store: Store) {
    let mut ids = HashSet::new();
    for n in 0..150 {
        ids.insert(enqueue(&store.db, "order.placed", &n.to_string()).await);
    }
    let _relay = Relay::start(store.db.clone(), world.bus.clone(), CancellationToken::new());
    let mut orders = world.bus.subscribe("orders", 50).await.unwrap();
    let mut seen = HashSet::new();
    while seen.len() < ids.len() {
        let delivery = next(&mut orders).await;
        assert!(seen.insert(delivery.envelope.id), "one relay publishes a message once");
        delivery.ack().await.unwrap();
    }
    assert_eq!(seen, ids);
    until_empty(&store.db).await;
}

async fn the_same_message_is_not_written_twice(world: World, store: Store) {
    let id = Uuid::now_v7();
    let tx = store.db.begin().await.unwrap();
    for key in ["order.placed", "order.placed", "order.shipped"] {
        outbox::enqueue(&tx, key, id, &"again".to_owned()).await.unwrap();
    }
    tx.commit().await.unwrap();
    assert_eq!(outbox::pending(&store.db).await.unwrap(), 2, "one for each key");
    let _relay = Relay::start(store.db.clone(), world.bus.clone(), CancellationToken::new());
    for queue in ["orders", "shipping"] {
        let mut subscription = world.bus.subscribe(queue, 5).await.unwrap();
        let delivery = next(&mut subscription).await;
        assert_eq!(delivery.envelope.id, id);
        delivery.ack().await.unwrap();
    }
    until_empty(&store.db).await;
}

async fn a_message_nobody_takes_holds_up_no_other(world: World, store: Store) {
    let relay = Relay::start(store.db.clone(), world.bus.clone(), CancellationToken::new());
    for n in 0..70 {
        enqueue(&store.db, "order.placed", &format!("stuck {n}")).await;
    }
    relay.wake();
    let mut shipping = world.bus.subscribe("shipping", 5).await.unwrap();
    for n in 0..3 {
        let id = enqueue(&store.db, "order.shipped", &n.to_string()).await;
        relay.wake();
        let delivery = next(&mut shipping).await;
        assert_eq!(delivery.envelope.id, id);
        delivery.ack().await.unwrap();
    }
    let left = if world.adapter == Adapter::InProcess { 70 } else { 0 };
    eventually(DEADLINE, || async { outbox::pending(&store.db).await.unwrap() == left }).await;
}

async fn a_dead_letter_of_the_database_is_tried_again(world: World, store: Store) {
    if world.adapter == Adapter::Rabbit {
        // The broker keeps it; the database has only what no queue receives.
        let relay = Relay::start(store.db.clone(), world.bus.clone(), CancellationToken::new());
        let id = enqueue(&store.db, "nobody.hears", "it").await;
        relay.wake();
        eventually(DEADLINE, || async { outbox::dead_letters(&store.db).await.unwrap() == 1 }).await;
        assert!(outbox::replay(&store.db, id, "nobody.hears").await.unwrap());
        relay.wake();
        // Still nobody: it comes back.
        until_empty(&store.db).await;
        assert_eq!(outbox::buried(&store.db, 5).await.unwrap()[0].1.origin_queue, "nobody.hears");
        return;
    }
    let relay = Relay::start(store.db.clone(), world.bus.clone(), CancellationToken::new());
    let mut billing = world.bus.subscribe("billing", 5).await.unwrap();
    let mut audit = world.bus.subscribe("audit", 5).await.unwrap();
    let id = enqueue(&store.db, "invoice.paid", "broken").await;
    relay.wake();
    next(&mut billing).await.dead_letter("no such product").await.unwrap();
    next(&mut audit).await.ack().await.unwrap();
    until_empty(&store.db).await;
    let (envelope, why) = outbox::buried(&store.db, 5).await.unwrap().remove(0);
    assert_eq!(
        (envelope.id, why.origin_queue.as_str(), why.reason.as_str()),
        (id, "billing", "no such product")
    );

    assert!(!outbox::replay(&store.db, id, "audit").await.unwrap(), "it did not fail there");
    assert!(outbox::replay(&store.db, id, "billing").await.unwrap());
    relay.wake();
    let delivery = next(&mut billing).await;
    assert_eq!((delivery.envelope.id, &delivery.dead_letter), (id, &None));
    delivery.ack().await.unwrap();
    until_empty(&store.db).await;
    assert_eq!(outbox::dead_letters(&store.db).await.unwrap(), 0);
    assert_eq!(world.bus.dead_letters().await.unwrap(), 0);
}

async fn a_dead_letter_survives_a_restart(world: World, store: Store) {
    let stop = CancellationToken::new();
    let relay = Relay::start(store.db.clone(), world.bus.clone(), stop.clone());
    let id = enqueue(&store.db, "order.placed", "broken").await;
    relay.wake();
    let mut orders = world.bus.subscribe("orders", 5).await.unwrap();
    next(&mut orders).await.dead_letter("no such product").await.unwrap();
    drop(orders);
    until_empty(&store.db).await;
    stop.cancel();
    within("the relay's end", relay.stopped()).await;

    // Another process: of an in-process bus nothing is left.
    let bus = match world.adapter {
        Adapter::InProcess => {
            let bus = Bus::in_process();
            bus.declare(&topology()).await.unwrap();
            bus
        }
        Adapter::Rabbit => world.another().await,
    };
    for handled in [false, true] {
        let stop = CancellationToken::new();
        let relay = Relay::start(store.db.clone(), bus.clone(), stop.clone());
        let mut dead = bus.subscribe("dead", 5).await.unwrap();
        let letter = next(&mut dead).await;
        assert_eq!(letter.envelope.id, id);
        assert_eq!(String::decode(letter.envelope.body.clone()).unwrap(), "broken");
        let expected = DeadLetter { origin_queue: "orders".to_owned(), reason: "no such product".to_owned() };
        assert_eq!(letter.dead_letter, Some(expected));
        if handled {
            letter.ack().await.unwrap();
            let db = &store.db;
            eventually(DEADLINE, || async { outbox::dead_letters(db).await.unwrap() == 0 }).await;
        } else {
            drop(letter);
        }
        stop.cancel();
        within("the relay's end", relay.stopped()).await;
        if world.adapter == Adapter::InProcess && !handled {
            assert_eq!(outbox::dead_letters(&store.db).await.unwrap(), 1);
            // The copy that the bus of this process still holds.
            let mut dead = bus.subscribe("dead", 5).await.unwrap();
            next(&mut dead).await.ack().await.unwrap();
        }
    }
}

async fn what_no_queue_receives_is_a_dead_letter(world: World, store: Store) {
    let relay = Relay::start(store.db.clone(), world.bus.clone(), CancellationToken::new());
    let lost = enqueue(&store.db, "nobody.listens", "lost").await;
    let id = enqueue(&store.db, "order.placed", "found").await;
    relay.wake();
    let mut orders = world.bus.subscribe("orders", 5).await.unwrap();
    let delivery = next(&mut orders).await;
    assert_eq!(delivery.envelope.id, id);
    delivery.ack().await.unwrap();
    until_empty(&store.db).await;
    assert_eq!(outbox::dead_letters(&store.db).await.unwrap(), 1);
    if world.adapter == Adapter::InProcess {
        let mut dead = world.bus.subscribe("dead", 5).await.unwrap();
        let letter = next(&mut dead).await;
        assert_eq!(letter.envelope.id, lost);
        let why = letter.dead_letter.clone().unwrap();
        assert_eq!(why.origin_queue, "nobody.listens");
        assert!(why.reason.contains("no queue receives"), "{}", why.reason);
        letter.ack().await.unwrap();
        let db = &store.db;
        eventually(DEADLINE, || async { outbox::dead_letters(db).await.unwrap() == 0 }).await;
    }
}

async fn a_relay_ends_with_its_token(world: World, store: Store) {
    let stop = CancellationToken::new();
    let relay = Relay::start(store.db.clone(), world.bus.clone(), stop.clone());
    enqueue(&store.db, "order.placed", "waits").await;
    relay.wake();
    // In process its confirm would never come: nobody consumes.
    let mut orders = world.bus.subscribe("orders", 5).await.unwrap();
    let held = next(&mut orders).await;
    stop.cancel();
    within("the relay's end", relay.stopped()).await;
    drop(held);
    next(&mut orders).await.ack().await.unwrap();

    // What is still in the table is free for the next relay.
    let _relay = Relay::start(store.db.clone(), world.bus.clone(), CancellationToken::new());
    if outbox::pending(&store.db).await.unwrap() > 0 {
        next(&mut orders).await.ack().await.unwrap();
    }
    until_empty(&store.db).await;
}

/// Two replicas of a service share a table and say each message once.
#[tokio::test(flavor = "multi_thread")]
async fn replicas_share_the_work() {
    let world = World::new(Adapter::Rabbit).await;
    let store = Store::new(Engine::Postgres).await;
    let other = store.reopen().await;
    let relays = [
        Relay::start(store.db.clone(), world.bus.clone(), CancellationToken::new()),
        Relay::start(other, world.another().await, CancellationToken::new()),
    ];
    let mut ids = HashSet::new();
    for n in 0..200 {
        ids.insert(enqueue(&store.db, "order.placed", &n.to_string()).await);
        relays[n % 2].wake();
    }
    until_empty(&store.db).await;
    let mut orders = world.bus.subscribe("orders", 50).await.unwrap();
    let mut seen = HashSet::new();
    for _ in 0..ids.len() {
        let delivery = next(&mut orders).await;
        assert!(seen.insert(delivery.envelope.id), "said twice");
        delivery.ack().await.unwrap();
    }
    assert_eq!(seen, ids);
}
