//! A collector for tests: receives traces over gRPC as a real one does.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value::Value};
use opentelemetry_proto::tonic::trace::v1 as proto;
use tokio::sync::oneshot;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// One span as it arrived.
#[derive(Debug, Clone, PartialEq)]
pub struct Span {
    pub name: String,
    /// 32 hex digits.
    pub trace_id: String,
    /// 16 hex digits.
    pub span_id: String,
    /// The parent's span id; `None` for the first span of a trace.
    pub parent: Option<String>,
    /// `internal`, `server`, `client`, `producer` or `consumer`.
    pub kind: &'static str,
    /// True when the span's status is an error.
    pub is_error: bool,
    /// Attributes by name; numbers and booleans in decimal and `true` / `false`.
    pub attributes: BTreeMap<String, String>,
    /// The resource's `service.name`.
    pub service: String,
    /// Nanoseconds since the Unix epoch.
    pub start_ns: u64,
    /// Nanoseconds since the Unix epoch.
    pub end_ns: u64,
}

/// The collector; ends when it is dropped. It has a thread of its own, so that it answers while a test
/// blocks.
pub struct Receiver {
    address: SocketAddr,
    spans: Arc<Mutex<Vec<Span>>>,
    /// Dropping it ends the server.
    _stop: oneshot::Sender<()>,
}

impl Receiver {
    /// Starts it on a free loopback port.
    pub async fn start() -> Self {
        let spans = Arc::new(Mutex::new(Vec::new()));
        let collector = Collector { spans: spans.clone() };
        let (stop, stopped) = oneshot::channel();
        let (bound, address) = oneshot::channel();
        std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(serve(collector, bound, stopped));
        });
        Self { address: address.await.expect("the collector listens"), spans, _stop: stop }
    }

    /// What to give as `otlp_endpoint`: `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Everything that has arrived, in that order (children usually before their parents).
    pub fn spans(&self) -> Vec<Span> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The spans of one trace.
    pub fn trace(&self, trace_id: &str) -> Vec<Span> {
        self.spans().into_iter().filter(|span| span.trace_id == trace_id).collect()
    }

    /// Waits until `predicate` holds for what has arrived, and returns that.
    ///
    /// # Panics
    /// At `deadline`, with a list of what has arrived.
    pub async fn wait_for(&self, predicate: impl Fn(&[Span]) -> bool, deadline: Duration) -> Vec<Span> {
        let start = Instant::now();
        loop {
            let spans = self.spans();
            if predicate(&spans) {
                return spans;
            }
            assert!(
                start.elapsed() < deadline,
                "not the expected spans after {deadline:?}:\n{}",
                list(&spans)
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

fn list(spans: &[Span]) -> String {
    spans.iter().fold(String::new(), |mut text, span| {
        let parent = span.parent.as_deref().unwrap_or("-");
        let _ =
            writeln!(text, "{} {} <- {parent} {}: {}", span.trace_id, span.span_id, span.service, span.name);
        text
    })
}

async fn serve(collector: Collector, bound: oneshot::Sender<SocketAddr>, stopped: oneshot::Receiver<()>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("loopback has a free port");
    let address = listener.local_addr().expect("a listener has an address");
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let service = TraceServiceServer::new(collector);
    let server = Server::builder().serve_with_incoming(service, incoming);
    // The test may be gone already.
    let _ = bound.send(address);
    tokio::select! {
        result = server => result.expect("the collector serves"),
        _ = stopped => {}
    }
}

struct Collector {
    spans: Arc<Mutex<Vec<Span>>>,
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut arrived = Vec::new();
        for resource in request.into_inner().resource_spans {
            let of_resource = resource.resource.map(|it| attributes(it.attributes)).unwrap_or_default();
            let service = of_resource.get("service.name").cloned().unwrap_or_default();
            let spans = resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            arrived.extend(spans.map(|span| convert(span, &service)));
        }
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).extend(arrived);
        Ok(Response::new(ExportTraceServiceResponse { partial_success: None }))
    }
}

fn convert(span: proto::Span, service: &str) -> Span {
    use proto::span::SpanKind;
    use proto::status::StatusCode;
    Span {
        kind: match span.kind() {
            SpanKind::Unspecified | SpanKind::Internal => "internal",
            SpanKind::Server => "server",
            SpanKind::Client => "client",
            SpanKind::Producer => "producer",
            SpanKind::Consumer => "consumer",
        },
        is_error: span.status.as_ref().is_some_and(|status| status.code() == StatusCode::Error),
        trace_id: hex(&span.trace_id),
        span_id: hex(&span.span_id),
        parent: (!span.parent_span_id.is_empty()).then(|| hex(&span.parent_span_id)),
        attributes: attributes(span.attributes),
        service: service.to_owned(),
        start_ns: span.start_time_unix_nano,
        end_ns: span.end_time_unix_nano,
        name: span.name,
    }
}

fn attributes(list: Vec<KeyValue>) -> BTreeMap<String, String> {
    list.into_iter().map(|it| (it.key, it.value.map(text).unwrap_or_default())).collect()
}

fn text(value: AnyValue) -> String {
    match value.value {
        Some(Value::StringValue(text)) => text,
        Some(Value::BoolValue(value)) => value.to_string(),
        Some(Value::IntValue(value)) => value.to_string(),
        Some(Value::DoubleValue(value)) => value.to_string(),
        Some(Value::BytesValue(bytes)) => hex(&bytes),
        Some(other) => format!("{other:?}"),
        None => String::new(),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
