//! The helpers themselves: a helper that hides a failure would hide it in every test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use infera_testkit::anvil::Anvil;
use infera_testkit::otlp::Receiver;
use infera_testkit::{Cluster, Process, TempDir, cache_dir, cluster, eventually, free_port, unique};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value::Value};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span, Status};

const DEADLINE: Duration = Duration::from_secs(60);

fn alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// The message of the panic in `future`.
async fn panic_of(future: impl Future<Output = ()> + Send + 'static) -> String {
    let panic = tokio::spawn(future).await.expect_err("it panics").into_panic();
    *panic.downcast::<String>().expect("a message")
}

#[tokio::test]
async fn eventually_returns_the_first_success() {
    let calls = AtomicUsize::new(0);
    let third = eventually(DEADLINE, async || {
        let n = calls.fetch_add(1, Ordering::Relaxed) + 1;
        (n >= 3).then_some(n)
    })
    .await;
    assert_eq!((third, calls.load(Ordering::Relaxed)), (3, 3));
    eventually(DEADLINE, async || true).await;
    assert_eq!(eventually(DEADLINE, async || Ok::<_, ()>(7)).await, 7);
}

#[tokio::test]
async fn eventually_fails_with_the_last_answer_and_the_callers_place() {
    let message = panic_of(async { eventually(Duration::ZERO, async || Err("not yet")).await }).await;
    assert!(message.contains("not yet") && message.contains(file!()), "{message}");
}

#[tokio::test]
async fn a_process_is_killed_when_it_is_dropped() {
    let dir = TempDir::new().unwrap();
    let process = Process::spec("sleep", dir.path().join("log")).args(["1000"]).spawn();
    let pid = process.pid();
    assert!(alive(pid));
    drop(process);
    assert!(!alive(pid));

    let mut process = Process::spec("sleep", dir.path().join("log")).args(["1000"]).spawn();
    process.terminate();
    assert!(!process.wait(DEADLINE).await.success());
    process.kill9();
}

#[tokio::test]
async fn waiting_for_a_process_that_ends_shows_its_log() {
    let dir = TempDir::new().unwrap();
    let spec = Process::spec("sh", dir.path().join("log"))
        .args(["-c", "echo out $WORD; echo err >&2"])
        .env("WORD", "w0rd");
    let url = format!("http://127.0.0.1:{}/", free_port());
    let message = panic_of(async move { spec.spawn().wait_ready(&url, DEADLINE).await }).await;
    assert!(message.contains("out w0rd") && message.contains("err"), "{message}");
}

#[tokio::test]
async fn anvil_answers_and_ends() {
    let anvil = Anvil::start().await;
    let call = serde_json::json!({ "jsonrpc": "2.0", "id": 1, "method": "eth_chainId", "params": [] });
    let answer = reqwest::Client::new().post(anvil.url()).json(&call).send().await.unwrap();
    assert_eq!(answer.json::<serde_json::Value>().await.unwrap()["result"], "0x7a69");
    let pid = anvil.pid();
    drop(anvil);
    assert!(!alive(pid));
}

#[tokio::test]
async fn the_receiver_keeps_what_a_span_says() {
    let receiver = Receiver::start().await;
    let attribute = |key: &str, value| KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue { value: Some(value) }),
        ..Default::default()
    };
    let span = Span {
        trace_id: vec![0xab; 16],
        span_id: vec![1; 8],
        parent_span_id: vec![2; 8],
        name: "one".to_owned(),
        kind: 5,
        attributes: vec![attribute("n", Value::IntValue(-3)), attribute("ok", Value::BoolValue(true))],
        status: Some(Status { code: 2, message: String::new() }),
        ..Default::default()
    };
    let resource = Resource {
        attributes: vec![attribute("service.name", Value::StringValue("svc".to_owned()))],
        ..Default::default()
    };
    let request = ExportTraceServiceRequest {
        resource_spans: vec![ResourceSpans {
            resource: Some(resource),
            scope_spans: vec![ScopeSpans { spans: vec![span], ..Default::default() }],
            ..Default::default()
        }],
    };
    TraceServiceClient::connect(receiver.endpoint()).await.unwrap().export(request).await.unwrap();
    let spans = receiver.wait_for(|spans| !spans.is_empty(), DEADLINE).await;
    let span = &spans[0];
    assert_eq!(span.trace_id, "ab".repeat(16));
    assert_eq!(
        (span.parent.as_deref(), span.kind, span.is_error),
        (Some("0202020202020202"), "consumer", true)
    );
    assert_eq!(
        (span.service.as_str(), span.attributes["n"].as_str(), span.attributes["ok"].as_str()),
        ("svc", "-3", "true")
    );
    assert_eq!(receiver.trace(&span.trace_id).len(), 1);
    let message = panic_of(async move {
        receiver.wait_for(|spans| spans.len() > 1, Duration::ZERO).await;
    })
    .await;
    assert!(message.contains("svc: one"), "{message}");
}

#[test]
fn names_are_unique_and_short_enough() {
    let names: std::collections::HashSet<String> =
        (0..1000).map(|_| unique("a_prefix_of_thirty_characters_")).collect();
    assert_eq!(names.len(), 1000);
    assert!(names.iter().all(|name| name.len() <= 63));
}

#[test]
fn the_cluster_is_started_once() {
    let first = cluster();
    let again = Cluster::start(cache_dir().join("test-cluster"));
    assert_eq!(
        (&first.amqp_url, &first.redis_url, &first.pg_url),
        (&again.amqp_url, &again.redis_url, &again.pg_url)
    );
    for (url, scheme) in
        [(&first.amqp_url, "amqp://"), (&first.redis_url, "redis://"), (&first.pg_url, "postgres://")]
    {
        assert!(url.starts_with(scheme) && url.contains("127.0.0.1"), "{url}");
    }
}
