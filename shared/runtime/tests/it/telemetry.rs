use std::collections::HashMap;
use std::time::Duration;

use actix_web::HttpResponse;
use actix_web::web::{self, Bytes, ServiceConfig};
use futures::StreamExt;
use infera_runtime::health::{self, Health};
use infera_runtime::{CancellationToken, http, telemetry, trace};
use infera_testkit::otlp::{Receiver, Span};
use infera_testkit::{TempDir, free_port};
use tokio::sync::oneshot;
use tracing::Instrument;

use crate::{DEADLINE, child};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLER: &str = "b7ad6b7169203331";
const CHILDREN: usize = 1500;

/// Answers after a tree of spans, one branch of it behind a hop that carries only the text of `traceparent`.
async fn work() -> String {
    let carried = trace::current_traceparent().expect("a request has a span");
    let hop = tracing::info_span!("hop", otel.kind = "consumer", queue = "q");
    trace::set_parent(&hop, &carried);
    async {
        for n in 0..CHILDREN {
            tracing::info_span!("leaf", n).in_scope(|| ());
        }
    }
    .instrument(hop)
    .await;
    carried
}

async fn streamed() -> HttpResponse {
    let parts = futures::stream::iter(["a", "b", "c"]).then(async |part| {
        tracing::info_span!("part")
            .in_scope(|| Ok::<_, actix_web::Error>(Bytes::from_static(part.as_bytes())))
    });
    HttpResponse::Ok().streaming(Box::pin(parts))
}

fn routes(config: &mut ServiceConfig) {
    config
        .configure(health::routes(Health::new("fixture")))
        .route("/v1/things/{id}", web::get().to(work))
        .route("/stream", web::get().to(streamed))
        .route("/boom", web::get().to(async || HttpResponse::InternalServerError().finish()));
}

async fn get(url: &str, traceparent: Option<&str>) -> String {
    let request = reqwest::Client::new().get(url);
    let request = match traceparent {
        Some(value) => request.header("traceparent", value),
        None => request,
    };
    request.send().await.unwrap().text().await.unwrap()
}

fn named<'a>(spans: &'a [Span], name: &str) -> &'a Span {
    spans.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("no span {name}"))
}

/// In a single-threaded actix System, where a flush that blocks would wait for its own connection.
#[actix_web::test]
async fn a_span_tree_is_complete_after_the_shutdown() {
    let receiver = Receiver::start().await;
    let guard = telemetry::init("runtime-test", Some(&receiver.endpoint()), "warn", true).unwrap();
    assert!(telemetry::init("again", None, "warn", false).is_err(), "once per process");

    let (token, (bound, address)) = (CancellationToken::new(), oneshot::channel());
    let stop = token.clone();
    let server =
        actix_web::rt::spawn(async move { http::serve(routes, "127.0.0.1:0", stop, Some(bound)).await });
    let url = format!("http://{}", address.await.unwrap());

    let carried = get(&format!("{url}/v1/things/7"), Some(&format!("00-{TRACE}-{CALLER}-01"))).await;
    let own = get(&format!("{url}/v1/things/8"), Some("garbage")).await;
    assert_eq!(get(&format!("{url}/stream"), None).await, "abc");
    get(&format!("{url}/boom"), None).await;
    token.cancel();
    server.await.unwrap().unwrap();
    guard.shutdown().await;

    // No waiting: what is not here now is lost.
    let spans = receiver.trace(TRACE);
    let root = named(&spans, "GET /v1/things/{id}");
    assert_eq!(root.parent.as_deref(), Some(CALLER));
    assert_eq!((root.kind, root.is_error, root.service.as_str()), ("server", false, "runtime-test"));
    assert_eq!(root.attributes["http.response.status_code"], "200");
    assert_eq!(root.attributes["http.route"], "/v1/things/{id}");
    assert!(root.attributes.contains_key("request_id"));
    assert_eq!(carried, format!("00-{TRACE}-{}-01", root.span_id));
    let hop = named(&spans, "hop");
    assert_eq!((hop.parent.as_ref(), hop.kind), (Some(&root.span_id), "consumer"));
    let leaves: HashMap<_, _> =
        spans.iter().filter(|span| span.name == "leaf").map(|leaf| (&leaf.attributes["n"], leaf)).collect();
    assert_eq!(leaves.len(), CHILDREN);
    assert!(leaves.values().all(|leaf| leaf.parent.as_ref() == Some(&hop.span_id)));

    // A malformed header starts a trace of its own.
    let own = trace::trace_id(&own).unwrap();
    assert_ne!(own, TRACE);
    assert_eq!(named(&receiver.trace(&own), "GET /v1/things/{id}").parent, None);

    // The span of a stream lasts as long as the stream.
    let all = receiver.spans();
    let stream = named(&all, "GET /stream");
    let parts: Vec<_> = all.iter().filter(|span| span.name == "part").collect();
    assert_eq!(parts.len(), 3);
    for part in parts {
        assert_eq!((&part.trace_id, part.parent.as_ref()), (&stream.trace_id, Some(&stream.span_id)));
        assert!(part.end_ns <= stream.end_ns);
    }
    assert!(named(&all, "GET /boom").is_error);
}

#[tokio::test]
async fn a_collector_that_is_away_holds_nothing_up() {
    let dir = TempDir::new().unwrap();
    let mut process = child("telemetry::exports_to_nobody", &dir.path().join("log"))
        .env("FIXTURE_ENDPOINT", format!("http://127.0.0.1:{}", free_port()))
        .spawn();
    let status = process.wait(DEADLINE).await;
    assert!(status.success() && process.log().contains("ended"), "{}", process.log());
}

#[actix_web::test]
#[ignore = "the child of the test above"]
async fn exports_to_nobody() {
    let endpoint = std::env::var("FIXTURE_ENDPOINT").unwrap();
    for (endpoint, filter, names) in
        [("ftp://x", "info", "otlp_endpoint"), ("http://127.0.0.1:1", "in=fo=x", "log_filter")]
    {
        let error = telemetry::init("x", Some(endpoint), filter, false).err().unwrap().to_string();
        assert!(error.contains(names), "{error}");
    }
    let guard = telemetry::init("x", Some(&endpoint), "info", false).unwrap();
    tracing::info_span!("lost").in_scope(|| tracing::info!(n = 1, "inside"));
    tokio::time::timeout(Duration::from_secs(30), guard.shutdown()).await.unwrap();
    println!("ended");
}
