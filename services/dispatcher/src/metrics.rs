//! What the dispatcher counts, on `/metrics`.

use infera_runtime::health::Health;
use prometheus::{IntCounter, IntCounterVec, IntGauge};

/// All series of the service.
#[derive(Clone)]
pub struct Metrics {
    pub nodes: IntGauge,
    pub requests: IntGauge,
    pub attempts: IntCounter,
    pub collected: IntCounter,
    /// By outcome.
    pub slots: IntCounterVec,
    /// Sessions that were refused or ended by us, by code.
    pub refused: IntCounterVec,
    /// Frames that changed nothing, by reason.
    pub rejected: IntCounterVec,
    pub contradictions: IntCounterVec,
    /// By kind and by what came of them.
    pub trials: IntCounterVec,
}

impl Metrics {
    /// Registers all of them.
    ///
    /// # Errors
    /// When a name is taken.
    pub fn register(health: &Health) -> prometheus::Result<Self> {
        Ok(Self {
            nodes: health.gauge("infera_dispatcher_nodes", "Nodes connected.")?,
            requests: health.gauge("infera_dispatcher_requests", "Requests held.")?,
            attempts: health.counter("infera_dispatcher_attempts_total", "Attempts begun.")?,
            collected: health
                .counter("infera_dispatcher_collected_total", "Results sent to the verifier, by round.")?,
            slots: health.counters("infera_dispatcher_slots_total", "Slots that ended.", &["outcome"])?,
            refused: health.counters(
                "infera_dispatcher_sessions_refused_total",
                "Node sessions that were refused or ended by the dispatcher.",
                &["code"],
            )?,
            rejected: health.counters(
                "infera_dispatcher_frames_rejected_total",
                "Frames of nodes that changed nothing.",
                &["reason"],
            )?,
            contradictions: health.counters(
                "infera_dispatcher_contradictions_total",
                "Statements of nodes that contradict themselves about one slot: they cost stake.",
                &["kind"],
            )?,
            trials: health.counters(
                "infera_dispatcher_trials_total",
                "Canaries and entry trials that ended: passed, failed, declined, or void (nothing follows).",
                &["kind", "outcome"],
            )?,
        })
    }
}
