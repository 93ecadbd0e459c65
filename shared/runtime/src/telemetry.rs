//! Logs on standard error and traces to an OTLP collector.

use std::time::Duration;

use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracerProvider};
use tokio::runtime::Runtime;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry};

/// One export may take this long; a collector that is away must not hold up a shutdown for longer.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for the last spans when the process ends.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(8);
/// Spans that wait for the exporter; more are dropped. One request makes about 30.
const MAX_QUEUE: usize = 16_384;
const MAX_BATCH: usize = 512;
const EXPORT_EVERY: Duration = Duration::from_secs(1);
/// Libraries whose spans are not ours; those below the exporter would also trace themselves.
const NOT_EXPORTED: [&str; 12] = [
    "actix_http",
    "actix_server",
    "actix_web",
    "h2",
    "hyper",
    "hyper_util",
    "lapin",
    "opentelemetry",
    "reqwest",
    "sea_orm",
    "tonic",
    "tower",
];

/// Why logs and traces cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter is malformed.
    #[error(
        "log_filter `{filter}` is not usable: {reason}; use a level as `info`, or `info,infera_bus=debug`"
    )]
    Filter { filter: String, reason: String },
    /// The endpoint is malformed.
    #[error("otlp_endpoint `{endpoint}` is not usable: {reason}; use http://HOST:PORT of a gRPC collector")]
    Endpoint { endpoint: String, reason: String },
    /// The thread of the exporter cannot be started.
    #[error("the trace exporter cannot be started: {0}")]
    Runtime(std::io::Error),
    /// Called twice, or another library was first.
    #[error("logs are set up already in this process")]
    Twice,
}

/// Keeps the exporter alive. End it with [`TelemetryGuard::shutdown`], or the last second is lost.
#[must_use = "the last spans are lost without a shutdown"]
pub struct TelemetryGuard {
    exporter: Option<Exporter>,
}

/// The exporter has a runtime of its own: its gRPC connection then outlives every actix System, and a
/// flush works from any thread. (On the caller's single-threaded runtime the connection would wait for
/// the thread that waits for the flush.)
struct Exporter {
    provider: SdkTracerProvider,
    /// Only kept alive.
    _runtime: Background,
}

/// A runtime that may be dropped anywhere: a plain drop would block, which tokio refuses inside another.
struct Background(Option<Runtime>);

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// Sets up logs, and traces when `otlp_endpoint` (`http://HOST:PORT`, gRPC) is given. Once per process.
///
/// `log_filter` is for log lines only (`EnvFilter` syntax); every span at INFO of our own crates is
/// exported. `json` writes one JSON object a line. `service_name` becomes the resource's `service.name`.
///
/// # Errors
/// [`TelemetryError`]. A collector that is away is no error: spans wait, then are dropped.
pub fn init(
    service_name: &str,
    otlp_endpoint: Option<&str>,
    log_filter: &str,
    json: bool,
) -> Result<TelemetryGuard, TelemetryError> {
    let exporter = otlp_endpoint.map(|endpoint| exporter(service_name, endpoint)).transpose()?;
    let traces = exporter.as_ref().map(|exporter| {
        let filter = Targets::new()
            .with_default(LevelFilter::INFO)
            .with_targets(NOT_EXPORTED.map(|target| (target, LevelFilter::OFF)));
        tracing_opentelemetry::layer().with_tracer(exporter.provider.tracer("infera")).with_filter(filter)
    });
    tracing_subscriber::registry()
        .with(logs(log_filter, json)?)
        .with(traces)
        .try_init()
        .map_err(|_| TelemetryError::Twice)?;
    Ok(TelemetryGuard { exporter })
}

fn logs(filter: &str, json: bool) -> Result<Box<dyn Layer<Registry> + Send + Sync>, TelemetryError> {
    let refused = |reason: String| TelemetryError::Filter { filter: filter.to_owned(), reason };
    let env_filter = EnvFilter::try_new(filter)
        .map_err(|error| refused(error.to_string()))?
        // It logs the bodies of messages, which may be prompts and answers.
        .add_directive(
            "lapin::returned_messages=off".parse().map_err(|error: ParseError| refused(error.to_string()))?,
        );
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    Ok(if json {
        layer.json().flatten_event(true).with_filter(env_filter).boxed()
    } else {
        layer.with_ansi(false).with_filter(env_filter).boxed()
    })
}

fn exporter(service_name: &str, endpoint: &str) -> Result<Exporter, TelemetryError> {
    let refused = |reason: String| TelemetryError::Endpoint { endpoint: endpoint.to_owned(), reason };
    if !endpoint.starts_with("http://") {
        return Err(refused("it does not start with http://".to_owned()));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("otlp")
        .enable_all()
        .build()
        .map_err(TelemetryError::Runtime)?;
    let runtime = Background(Some(runtime));
    let entered = runtime.0.as_ref().map(Runtime::enter);
    let span_exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .with_timeout(EXPORT_TIMEOUT)
        .build()
        .map_err(|error| refused(error.to_string()))?;
    let batch = BatchConfigBuilder::default()
        .with_max_queue_size(MAX_QUEUE)
        .with_max_export_batch_size(MAX_BATCH)
        .with_scheduled_delay(EXPORT_EVERY)
        .build();
    let provider = SdkTracerProvider::builder()
        .with_sampler(Sampler::AlwaysOn)
        .with_resource(Resource::builder().with_service_name(service_name.to_owned()).build())
        .with_span_processor(BatchSpanProcessor::builder(span_exporter).with_batch_config(batch).build())
        .build();
    drop(entered);
    Ok(Exporter { provider, _runtime: runtime })
}

impl TelemetryGuard {
    /// Sends what is finished so far; traces go on.
    pub async fn flush(&self) {
        let Some(exporter) = &self.exporter else { return };
        let provider = exporter.provider.clone();
        let flushed = tokio::task::spawn_blocking(move || provider.force_flush()).await;
        if let Ok(Err(error)) = flushed {
            tracing::warn!(%error, "traces are not sent");
        }
    }

    /// Sends the last spans and ends the exporter; call it when everything else has ended. Takes at most
    /// 8 s, and blocks no other task.
    pub async fn shutdown(mut self) {
        let Some(exporter) = self.exporter.take() else { return };
        let done = tokio::task::spawn_blocking(move || end(&exporter)).await;
        if let Err(error) = done {
            tracing::warn!(%error, "the last traces are lost");
        }
    }
}

impl Drop for TelemetryGuard {
    /// For early returns: does what `shutdown` does, but blocks.
    fn drop(&mut self) {
        if let Some(exporter) = self.exporter.take() {
            end(&exporter);
        }
    }
}

fn end(exporter: &Exporter) {
    if let Err(error) = exporter.provider.shutdown_with_timeout(SHUTDOWN_TIMEOUT) {
        tracing::warn!(%error, "the last traces are lost");
    }
}
