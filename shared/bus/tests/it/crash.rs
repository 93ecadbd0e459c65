//! A process dies at each planned point; the next one goes on and nothing is processed twice or lost.

use std::process::ExitStatus;

use infera_bus::outbox::{self, Relay};
use infera_bus::{Bus, ConsumerSpec, Envelope, consume};
use infera_runtime::CancellationToken;
use infera_testkit::{Process, TempDir, eventually};
use sea_orm::{DatabaseConnection, DatabaseTransaction, TransactionTrait};
use uuid::Uuid;

use crate::support::{
    Adapter, DEADLINE, Engine, Store, World, effect, effects, on_all, on_thread, open, topology,
};

on_all!(
    before_a_message_is_published,
    after_a_message_is_published,
    before_a_handler_commits,
    after_a_handler_commits,
);

/// What is at stake: each message is processed by a handler that says another message, which is
/// processed too.
const BODIES: [&str; 5] = ["a", "b", "c", "d", "e"];

async fn before_a_message_is_published(world: World, store: Store) {
    dies_at("outbox.order.placed.before_publish=abort@3", world, store).await;
}

async fn after_a_message_is_published(world: World, store: Store) {
    dies_at("outbox.order.placed.after_publish=abort@2", world, store).await;
}

async fn before_a_handler_commits(world: World, store: Store) {
    dies_at("orders.before_commit=abort@3", world, store).await;
}

async fn after_a_handler_commits(world: World, store: Store) {
    dies_at("orders.after_commit=abort@2", world, store).await;
}

async fn dies_at(plan: &str, world: World, store: Store) {
    let tx = store.db.begin().await.unwrap();
    for body in BODIES {
        outbox::enqueue_bytes(&tx, "order.placed", Uuid::now_v7(), body.into()).await.unwrap();
    }
    tx.commit().await.unwrap();
    if store.engine == Engine::Sqlite {
        // The file is for one process at a time.
        store.db.close_by_ref().await.unwrap();
    }
    let dir = TempDir::new().unwrap();
    let status = child(&dir, &world, &store, plan).await;
    assert!(!status.success(), "{plan}: it was to abort");
    let status = child(&dir, &world, &store, "").await;
    assert!(status.success(), "{plan}: the second process finishes the work");
    let db = store.reopen().await;
    let expected: Vec<String> =
        BODIES.iter().flat_map(|body| [body.to_string(), format!("{body} shipped")]).collect();
    assert_eq!(effects(&db).await, expected, "{plan}: each once");
    assert_eq!(outbox::pending(&db).await.unwrap(), 0);
}

/// Runs `works_until_done` below in a process of its own.
async fn child(dir: &TempDir, world: &World, store: &Store, plan: &str) -> ExitStatus {
    let mut process = Process::spec(std::env::current_exe().unwrap(), dir.path().join("child.log"))
        .args(["--exact", "crash::works_until_done", "--ignored", "--nocapture", "--test-threads=1"])
        .env("BUS_ADAPTER", format!("{:?}", world.adapter))
        .env("BUS_PREFIX", &world.prefix)
        .env("BUS_DB", &store.url)
        .env("BUS_SCHEMA", store.schema.as_deref().unwrap_or_default())
        .env("INFERA_FAIL", plan)
        .spawn();
    process.wait(DEADLINE).await
}

/// Not a test of its own: the process that dies.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "started by the tests above with its environment"]
async fn works_until_done() {
    let var = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
    let schema = var("BUS_SCHEMA");
    let db = open(&var("BUS_DB"), Some(schema.as_str()).filter(|s| !s.is_empty())).await;
    let bus = if var("BUS_ADAPTER") == format!("{:?}", Adapter::Rabbit) {
        let url = &infera_testkit::cluster().amqp_url;
        Bus::rabbit(url, &var("BUS_PREFIX")).await.unwrap()
    } else {
        Bus::in_process()
    };
    bus.declare(&topology()).await.unwrap();
    let stop = CancellationToken::new();
    let relay = Relay::start(db.clone(), bus.clone(), stop.clone());
    let orders = consumer(
        &bus,
        &db,
        "orders",
        &relay,
        &stop,
        async |tx: &DatabaseTransaction, envelope: &Envelope| {
            effect(tx, &envelope.body).await?;
            let shipped = [&envelope.body[..], b" shipped"].concat();
            outbox::enqueue_bytes(tx, "order.shipped", envelope.id, shipped).await?;
            Ok(())
        },
    );
    let shipping = consumer(
        &bus,
        &db,
        "shipping",
        &relay,
        &stop,
        async |tx: &DatabaseTransaction, envelope: &Envelope| Ok(effect(tx, &envelope.body).await?),
    );
    eventually(DEADLINE, || async {
        effects(&db).await.len() >= 2 * BODIES.len() && outbox::pending(&db).await.unwrap() == 0
    })
    .await;
    stop.cancel();
    orders.await.unwrap();
    shipping.await.unwrap();
    relay.stopped().await;
    bus.close().await;
    db.close().await.unwrap();
}

fn consumer<H>(
    bus: &Bus,
    db: &DatabaseConnection,
    queue: &'static str,
    relay: &Relay,
    stop: &CancellationToken,
    handler: H,
) -> tokio::sync::oneshot::Receiver<()>
where
    H: AsyncFn(&DatabaseTransaction, &Envelope) -> Result<(), infera_bus::Reject> + Send + 'static,
{
    let spec =
        ConsumerSpec { bus: bus.clone(), db: db.clone(), queue, prefetch: 2, relay: Some(relay.clone()) };
    let stop = stop.clone();
    on_thread(move || async move { consume(spec, stop, handler).await.unwrap() })
}
