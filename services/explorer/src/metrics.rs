//! What the explorer counts.

use infera_runtime::health::{Health, SECONDS};
use prometheus::{Histogram, IntCounter};

#[derive(Clone)]
pub(crate) struct Metrics {
    pub receipts: IntCounter,
    pub batches: IntCounter,
    /// Messages that no honest service sent.
    pub rejected: IntCounter,
    pub search_seconds: Histogram,
    pub exported: IntCounter,
}

impl Metrics {
    pub fn new(health: &Health) -> prometheus::Result<Self> {
        Ok(Self {
            receipts: health.counter("infera_explorer_receipts_total", "Receipts stored.")?,
            batches: health.counter("infera_explorer_batches_total", "Anchored batches stored.")?,
            rejected: health.counter(
                "infera_explorer_rejected_total",
                "Messages refused because no honest service could have sent them.",
            )?,
            search_seconds: health.histogram(
                "infera_explorer_search_duration_seconds",
                "Time to embed a question and to search the index.",
                SECONDS,
            )?,
            exported: health.counter("infera_explorer_exported_total", "Receipts written into exports.")?,
        })
    }
}
