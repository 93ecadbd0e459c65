//! The gateway's figures. Durations carry OpenTelemetry's GenAI names.

use std::time::{Duration, Instant};

use infera_runtime::health::{Health, SECONDS};
use prometheus::{HistogramVec, IntCounterVec, IntGauge};

/// How a request ended, as the client saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    Verified,
    Failed,
    Rejected,
    /// No verdict before the deadline and its grace.
    Late,
    /// The service was stopped while the client waited.
    Draining,
    /// The verdict contradicted what was already emitted.
    Contradicted,
    /// Refused before it was submitted.
    Refused,
    /// The client went away.
    Left,
}

impl Ending {
    fn name(self) -> &'static str {
        match self {
            Self::Verified => "verified",
            Self::Failed => "failed",
            Self::Rejected => "rejected",
            Self::Late => "late",
            Self::Draining => "draining",
            Self::Contradicted => "contradicted",
            Self::Refused => "refused",
            Self::Left => "left",
        }
    }
}

/// Registered once per service; clones share the figures.
#[derive(Clone)]
pub struct Metrics {
    requests: IntCounterVec,
    duration: HistogramVec,
    first_token: HistogramVec,
    tokens: IntCounterVec,
    repeats: IntCounterVec,
    waiting: IntGauge,
    sign_ins: IntCounterVec,
    forwards: IntCounterVec,
}

impl Metrics {
    /// Adds them to the service's registry.
    ///
    /// # Errors
    /// When they are there already.
    pub fn register(health: &Health) -> prometheus::Result<Self> {
        Ok(Self {
            requests: health.counters(
                "infera_gateway_requests_total",
                "Chat requests that were accepted, by how they ended.",
                &["gen_ai_request_model", "outcome"],
            )?,
            duration: health.histograms(
                "gen_ai_server_request_duration_seconds",
                "Time from the request to the end of its answer.",
                &["gen_ai_operation_name", "gen_ai_request_model", "outcome"],
                SECONDS,
            )?,
            first_token: health.histograms(
                "gen_ai_server_time_to_first_token_seconds",
                "Time from the request to the first text in its stream.",
                &["gen_ai_operation_name", "gen_ai_request_model"],
                SECONDS,
            )?,
            tokens: health.counters(
                "infera_gateway_tokens_total",
                "Tokens of verified answers.",
                &["gen_ai_request_model", "gen_ai_token_type"],
            )?,
            repeats: health.counters(
                "infera_gateway_repeats_total",
                "Requests that an Idempotency-Key led to an earlier one.",
                &["gen_ai_request_model"],
            )?,
            waiting: health.gauge("infera_gateway_waiting", "Clients that wait for an answer.")?,
            sign_ins: health.counters(
                "infera_gateway_sign_ins_total",
                "Sign-ins with a wallet, by how they ended.",
                &["outcome"],
            )?,
            forwards: health.counters(
                "infera_gateway_forwards_total",
                "Requests that settlement answers, by route and by what became of the answer.",
                &["route", "outcome"],
            )?,
        })
    }

    /// Counts a client that begins to wait.
    pub fn start(&self, model: &str) -> Pending {
        self.waiting.inc();
        Pending {
            metrics: self.clone(),
            model: model.to_owned(),
            started: Instant::now(),
            first: true,
            ended: false,
        }
    }

    /// Counts a sign-in: signed_in, refused, limited or failed.
    pub fn sign_in(&self, outcome: &str) {
        self.sign_ins.with_label_values(&[outcome]).inc();
    }

    /// Counts a request to settlement: passed, busy, unavailable, too_large or cut.
    pub fn forward(&self, route: &str, outcome: &str) {
        self.forwards.with_label_values(&[route, outcome]).inc();
    }

    /// Counts a repeat.
    pub fn repeat(&self, model: &str) {
        self.repeats.with_label_values(&[model]).inc();
    }
}

/// One client that waits. Dropped without an ending it counts as one that left.
pub struct Pending {
    metrics: Metrics,
    model: String,
    started: Instant,
    first: bool,
    ended: bool,
}

impl Pending {
    /// The first text goes out.
    pub fn first_text(&mut self) {
        if std::mem::take(&mut self.first) {
            let labels = ["chat", self.model.as_str()];
            self.metrics.first_token.with_label_values(&labels).observe(self.elapsed().as_secs_f64());
        }
    }

    /// Counts the tokens of a verified answer.
    pub fn tokens(&self, input: u32, output: usize) {
        self.metrics.tokens.with_label_values(&[self.model.as_str(), "input"]).inc_by(input.into());
        self.metrics.tokens.with_label_values(&[self.model.as_str(), "output"]).inc_by(output as u64);
    }

    /// The client has its answer, or will not get one.
    pub fn end(&mut self, ending: Ending) {
        if !std::mem::replace(&mut self.ended, true) {
            let outcome = ending.name();
            self.metrics.requests.with_label_values(&[self.model.as_str(), outcome]).inc();
            let labels = ["chat", self.model.as_str(), outcome];
            self.metrics.duration.with_label_values(&labels).observe(self.elapsed().as_secs_f64());
        }
    }

    fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.end(Ending::Left);
        self.metrics.waiting.dec();
    }
}
