//! What the mempool counts, on `/metrics`.

use infera_runtime::health::Health;
use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

/// All series of the service.
#[derive(Clone)]
pub struct Metrics {
    /// By stage.
    pub requests: IntGaugeVec,
    pub offers: IntCounter,
    /// By reason.
    pub closes: IntCounterVec,
    /// Offers that no dispatcher reports although they are old.
    pub unheld: IntGauge,
}

impl Metrics {
    /// Registers all of them.
    ///
    /// # Errors
    /// When a name is taken.
    pub fn register(health: &Health) -> prometheus::Result<Self> {
        Ok(Self {
            requests: health.gauges("infera_mempool_requests", "Requests in the set.", &["stage"])?,
            offers: health.counter("infera_mempool_offers_total", "Requests offered to dispatchers.")?,
            closes: health.counters("infera_mempool_closes_total", "Closes asked for.", &["reason"])?,
            unheld: health.gauge(
                "infera_mempool_offers_unheld",
                "Offers that no dispatcher has reported for longer than unheld_secs.",
            )?,
        })
    }
}
