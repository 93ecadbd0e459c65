//! Figures of this service.

use infera_runtime::health::Health;
use prometheus::{IntCounter, IntCounterVec, IntGauge};

use crate::store::escrows::Owing;

/// Counters and gauges; clones share them.
#[derive(Clone)]
pub struct Metrics {
    requests: IntCounterVec,
    charged: IntCounter,
    batches: IntCounterVec,
    waiting: IntGauge,
    exposure: IntGauge,
    exposure_reached: IntGauge,
    unqueued: IntGauge,
    overdue: IntGauge,
    overdue_micro: IntGauge,
    uncharged: IntGauge,
    short: IntGauge,
}

impl Metrics {
    /// Registers them.
    ///
    /// # Errors
    /// A name that is taken.
    pub fn register(health: &Health) -> prometheus::Result<Self> {
        Ok(Self {
            requests: health.counters(
                "infera_settlement_requests_total",
                "Requests by outcome: funded, rejected, settled, released.",
                &["outcome"],
            )?,
            charged: health.counter("infera_settlement_charged_micro_total", "Charged, 10^-6 INFER.")?,
            batches: health.counters(
                "infera_settlement_batches_total",
                "Batches by step: formed, sent, bumped, anchored, lost.",
                &["step"],
            )?,
            waiting: health.gauge("infera_settlement_receipts_waiting", "Receipts without a batch.")?,
            exposure: health.gauge(
                "infera_settlement_exposure_micro",
                "Charged and not final on the chain, 10^-6 INFER.",
            )?,
            exposure_reached: health.gauge(
                "infera_settlement_exposure_reached",
                "1 while the exposure cap keeps new paid requests out.",
            )?,
            unqueued: health.gauge(
                "infera_settlement_rewards_unqueued_micro",
                "Earned in posted batches and in no reward root of the chain, 10^-6 INFER.",
            )?,
            overdue: health.gauge(
                "infera_settlement_holds_overdue",
                "Holds without a verdict long after their deadline: see `infera holds list`.",
            )?,
            overdue_micro: health
                .gauge("infera_settlement_holds_overdue_micro", "What those hold together, 10^-6 INFER.")?,
            uncharged: health.gauge(
                "infera_settlement_escrow_uncharged_micro",
                "Charged to escrows by the books and by no final block, 10^-6 INFER.",
            )?,
            short: health.gauge(
                "infera_settlement_escrow_short_micro",
                "Spent of escrows that do not cover it any more, 10^-6 INFER.",
            )?,
        })
    }

    pub fn request(&self, outcome: &str) {
        self.requests.with_label_values(&[outcome]).inc();
    }

    pub fn charged(&self, micro: u64) {
        self.charged.inc_by(micro);
    }

    pub fn batches(&self, step: &str, count: u64) {
        self.batches.with_label_values(&[step]).inc_by(count);
    }

    pub fn exposure(&self, micro: i64, reached: bool) {
        self.exposure.set(micro);
        self.exposure_reached.set(i64::from(reached));
    }

    pub fn unqueued(&self, micro: u128) {
        self.unqueued.set(i64::try_from(micro).unwrap_or(i64::MAX));
    }

    pub fn overdue(&self, holds: i64, micro: i64) {
        self.overdue.set(holds);
        self.overdue_micro.set(micro);
    }

    pub fn owing(&self, owing: &Owing) {
        self.uncharged.set(owing.uncharged_micro);
        self.short.set(owing.short_micro);
    }

    pub fn waiting(&self, receipts: u64) {
        self.waiting.set(i64::try_from(receipts).unwrap_or(i64::MAX));
    }
}
