//! One trace from the span that enqueues to the span of the handler, over the bus.

use infera_bus::outbox::{self, Relay};
use infera_bus::{ConsumerSpec, Envelope, consume};
use infera_runtime::{CancellationToken, telemetry};
use infera_testkit::otlp::Receiver;
use sea_orm::{DatabaseTransaction, TransactionTrait};
use tracing::Instrument;
use uuid::Uuid;

use crate::support::{Adapter, DEADLINE, Engine, Store, World, effect, within};

/// Both adapters in one test: telemetry is set up once a process.
#[tokio::test(flavor = "multi_thread")]
async fn a_handler_continues_the_trace_of_the_enqueuer() {
    let collector = Receiver::start().await;
    let guard = telemetry::init("bus-test", Some(&collector.endpoint()), "info", false).unwrap();
    for adapter in [Adapter::InProcess, Adapter::Rabbit] {
        one_hop(adapter).await;
    }
    guard.shutdown().await;
    let consumed = |spans: &[infera_testkit::otlp::Span]| {
        spans.iter().filter(|span| span.name == "orders process").count() >= 2
    };
    let spans = collector.wait_for(consumed, DEADLINE).await;
    let systems = spans
        .iter()
        .filter(|span| span.name == "enqueuing")
        .map(|enqueuing| {
            let process = spans
                .iter()
                .find(|span| span.trace_id == enqueuing.trace_id && span.name == "orders process")
                .expect("the same trace");
            assert_eq!(process.parent.as_ref(), Some(&enqueuing.span_id));
            let inside = spans
                .iter()
                .find(|span| span.trace_id == enqueuing.trace_id && span.name == "inside the handler")
                .expect("the same trace");
            assert_eq!(inside.parent.as_ref(), Some(&process.span_id));
            assert_eq!(process.kind, "consumer");
            assert_eq!(process.attributes.get("messaging.destination.name").unwrap(), "orders");
            process.attributes.get("messaging.system").unwrap().clone()
        })
        .collect::<Vec<_>>();
    assert_eq!(systems, ["infera_in_process", "rabbitmq"]);
}

async fn one_hop(adapter: Adapter) {
    let world = World::new(adapter).await;
    let store = Store::new(Engine::Sqlite).await;
    let stop = CancellationToken::new();
    async {
        let tx = store.db.begin().await.unwrap();
        outbox::enqueue(&tx, "order.placed", Uuid::now_v7(), &"x".to_owned()).await.unwrap();
        tx.commit().await.unwrap();
    }
    .instrument(tracing::info_span!("enqueuing"))
    .await;
    let relay = Relay::start(store.db.clone(), world.bus.clone(), stop.clone());
    let spec = ConsumerSpec {
        bus: world.bus.clone(),
        db: store.db.clone(),
        queue: "orders",
        prefetch: 1,
        relay: Some(relay.clone()),
    };
    let done = stop.clone();
    let handler = async |tx: &DatabaseTransaction, envelope: &Envelope| {
        let span = tracing::info_span!("inside the handler");
        effect(tx, &envelope.body).instrument(span).await?;
        done.cancel();
        Ok(())
    };
    within("the consumer", consume(spec, stop.clone(), handler)).await.unwrap();
    within("the relay", relay.stopped()).await;
}
