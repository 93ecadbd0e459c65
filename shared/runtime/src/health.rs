//! Liveness, readiness and metrics of one service.
//!
//! In the embedded network several services share a process: each has its own [`Health`] and its own
//! Prometheus registry, so that their figures never mix.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use actix_web::web::{self, ServiceConfig};
use actix_web::{HttpResponse, http::StatusCode};
use parking_lot::Mutex;
use prometheus::{Encoder, Registry, TextEncoder};
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
};
use serde::Serialize;

use crate::http::HttpMetrics;

/// Bounds in seconds that OpenTelemetry recommends for `http.server.request.duration`, with more room at
/// the upper end: an answer of a model may take a minute.
pub const SECONDS: &[f64] =
    &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0];

/// The health of one service; clones share it.
#[derive(Clone)]
pub struct Health {
    inner: Arc<Inner>,
}

struct Inner {
    service: String,
    /// `None` = up, `Some` = the reason why not.
    checks: Mutex<BTreeMap<String, Option<String>>>,
    draining: AtomicBool,
    registry: Registry,
    http: Option<HttpMetrics>,
}

/// One dependency of a service. It counts as down until [`CheckHandle::up`] is called.
#[derive(Clone)]
pub struct CheckHandle {
    health: Health,
    name: String,
}

/// The body of `/readyz`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Readiness {
    pub service: String,
    /// `ready`, `failing` or `draining`.
    pub status: &'static str,
    /// Every check by name: `up`, or the reason why it is down.
    pub checks: BTreeMap<String, String>,
    /// Names of the checks that are down.
    pub failing: Vec<String>,
}

impl Health {
    /// A service without checks: ready at once.
    pub fn new(service: &str) -> Self {
        let registry = Registry::new();
        let http = HttpMetrics::register(&registry)
            .inspect_err(|error| tracing::error!(%error, "http metrics are not registered"))
            .ok();
        Self {
            inner: Arc::new(Inner {
                service: service.to_owned(),
                checks: Mutex::default(),
                draining: AtomicBool::new(false),
                registry,
                http,
            }),
        }
    }

    /// The name given to [`Health::new`].
    pub fn service(&self) -> &str {
        &self.inner.service
    }

    /// Adds the check `name`, down with the reason `starting` until it is up.
    pub fn check(&self, name: &str) -> CheckHandle {
        self.set(name, Some("starting".to_owned()));
        CheckHandle { health: self.clone(), name: name.to_owned() }
    }

    /// From now on not ready: load balancers take the service out while it finishes its work.
    pub fn set_draining(&self) {
        self.inner.draining.store(true, Ordering::Relaxed);
    }

    /// Ready: every check up and not draining.
    pub fn is_ready(&self) -> bool {
        self.readiness().status == "ready"
    }

    /// What `/readyz` says.
    pub fn readiness(&self) -> Readiness {
        let checks = self.inner.checks.lock().clone();
        let failing: Vec<String> =
            checks.iter().filter(|(_, down)| down.is_some()).map(|(name, _)| name.clone()).collect();
        let status = if self.inner.draining.load(Ordering::Relaxed) {
            "draining"
        } else if failing.is_empty() {
            "ready"
        } else {
            "failing"
        };
        let checks =
            checks.into_iter().map(|(name, down)| (name, down.unwrap_or_else(|| "up".to_owned()))).collect();
        Readiness { service: self.inner.service.clone(), status, checks, failing }
    }

    /// The service's Prometheus registry; clones share it.
    pub fn registry(&self) -> Registry {
        self.inner.registry.clone()
    }

    /// Registers a counter without labels. Names are OpenTelemetry's with underscores and end in `_total`.
    ///
    /// # Errors
    /// When the name is malformed or taken; so for the other metrics.
    pub fn counter(&self, name: &str, help: &str) -> prometheus::Result<IntCounter> {
        self.register(IntCounter::new(name, help)?)
    }

    /// Registers a family of counters. Labels must have few values: never an id, a path or a text.
    pub fn counters(&self, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntCounterVec> {
        self.register(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    /// Registers a gauge without labels.
    pub fn gauge(&self, name: &str, help: &str) -> prometheus::Result<IntGauge> {
        self.register(IntGauge::new(name, help)?)
    }

    /// Registers a family of gauges; as for labels see [`Health::counters`].
    pub fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntGaugeVec> {
        self.register(IntGaugeVec::new(Opts::new(name, help), labels)?)
    }

    /// Registers a histogram; `buckets` are upper bounds, [`SECONDS`] for durations.
    pub fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> prometheus::Result<Histogram> {
        self.register(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))?)
    }

    /// Registers a family of histograms; as for labels see [`Health::counters`].
    pub fn histograms(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        buckets: &[f64],
    ) -> prometheus::Result<HistogramVec> {
        self.register(HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels)?)
    }

    /// The metrics that every HTTP request of the service is counted in.
    pub(crate) fn http(&self) -> Option<&HttpMetrics> {
        self.inner.http.as_ref()
    }

    fn register<C>(&self, collector: C) -> prometheus::Result<C>
    where
        C: prometheus::core::Collector + Clone + 'static,
    {
        self.inner.registry.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    /// The registry in Prometheus' text format.
    fn render(&self) -> prometheus::Result<Vec<u8>> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.inner.registry.gather(), &mut text)?;
        Ok(text)
    }

    fn set(&self, name: &str, down: Option<String>) {
        self.inner.checks.lock().insert(name.to_owned(), down);
    }
}

impl CheckHandle {
    /// The dependency works.
    pub fn up(&self) {
        self.health.set(&self.name, None);
    }

    /// The dependency does not work. `reason` is public: no passwords in it.
    pub fn down(&self, reason: impl Into<String>) {
        self.health.set(&self.name, Some(reason.into()));
    }
}

/// Adds `/livez` (the process answers), `/readyz` (its dependencies do: 200, else 503) and `/metrics`.
pub fn routes(health: Health) -> impl FnOnce(&mut ServiceConfig) {
    move |config| {
        config
            .app_data(web::Data::new(health))
            .route("/livez", web::get().to(livez))
            .route("/readyz", web::get().to(readyz))
            .route("/metrics", web::get().to(metrics));
    }
}

async fn livez(health: web::Data<Health>) -> HttpResponse {
    HttpResponse::Ok().json(serde_json::json!({ "service": health.service(), "status": "alive" }))
}

async fn readyz(health: web::Data<Health>) -> HttpResponse {
    let readiness = health.readiness();
    let status = if readiness.status == "ready" { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    HttpResponse::build(status).json(readiness)
}

async fn metrics(health: web::Data<Health>) -> HttpResponse {
    match health.render() {
        Ok(text) => HttpResponse::Ok().content_type(prometheus::TEXT_FORMAT).body(text),
        Err(error) => {
            tracing::error!(%error, "metrics cannot be written");
            HttpResponse::InternalServerError().finish()
        }
    }
}
