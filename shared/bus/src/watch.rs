//! What every service says of its bus, its outbox and its database on `/readyz` and `/metrics`.

use std::time::Duration;

use infera_runtime::CancellationToken;
use infera_runtime::health::{CheckHandle, Health};
use prometheus::{IntCounter, IntCounterVec, IntGauge, Opts};
use sea_orm::DatabaseConnection;

use crate::bus::Bus;
use crate::outbox;

/// How often bus and database are looked at.
const EVERY: Duration = Duration::from_secs(2);
/// Every so many looks, messages are counted, which asks the broker and reads tables.
const COUNT_EVERY: u32 = 5;

/// Deliveries by queue and outcome, of all consumers of one bus.
pub(crate) fn processed() -> Option<IntCounterVec> {
    let options = Opts::new(
        "infera_bus_deliveries_total",
        "Deliveries by queue and outcome: processed, retried, dead. In the embedded network: of all services.",
    );
    IntCounterVec::new(options, &["queue", "outcome"]).ok()
}

/// Watches on behalf of one service.
pub struct Watch {
    health: Health,
    bus: Bus,
    db: DatabaseConnection,
    has_outbox: bool,
    database: CheckHandle,
    broker: CheckHandle,
    dropped: IntCounter,
    dead: IntGauge,
    waiting: IntGauge,
}

impl Watch {
    /// Adds the checks `database` and `bus` and the metrics. `has_outbox`: the database has the outbox's tables.
    ///
    /// # Errors
    /// A metric's name that is taken.
    pub fn new(
        health: &Health,
        bus: Bus,
        db: DatabaseConnection,
        has_outbox: bool,
    ) -> prometheus::Result<Self> {
        if let Some(processed) = bus.processed() {
            health.registry().register(Box::new(processed.clone()))?;
        }
        Ok(Self {
            database: health.check("database"),
            broker: health.check("bus"),
            dropped: health.counter(
                "infera_bus_transient_dropped_total",
                "Transient messages that found no room or no broker. In the embedded network: of all services.",
            )?,
            dead: health.gauge(
                "infera_bus_dead_letters",
                "Dead letters of the whole network: see `infera dead list`.",
            )?,
            waiting: health.gauge("infera_outbox_waiting", "Messages in the outbox without their confirm.")?,
            health: health.clone(),
            bus,
            db,
            has_outbox,
        })
    }

    /// Watches until `stop`; from then on the service says that it drains.
    pub async fn run(self, stop: CancellationToken) {
        let mut every = tokio::time::interval(EVERY);
        let mut looks = 0_u32;
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                _ = every.tick() => {}
            }
            self.look().await;
            if looks.is_multiple_of(COUNT_EVERY) {
                tokio::select! {
                    () = stop.cancelled() => break,
                    // Without a broker this waits for one; the checks go on.
                    counted = tokio::time::timeout(EVERY, self.count()) => drop(counted),
                }
            }
            looks = looks.wrapping_add(1);
        }
        self.health.set_draining();
    }

    async fn look(&self) {
        match self.db.ping().await {
            Ok(()) => self.database.up(),
            Err(error) => {
                tracing::warn!(%error, "the database does not answer");
                self.database.down("the database does not answer");
            }
        }
        if self.bus.healthy() { self.broker.up() } else { self.broker.down("the broker is not connected") }
    }

    async fn count(&self) {
        let dropped = self.bus.dropped();
        self.dropped.inc_by(dropped.saturating_sub(self.dropped.get()));
        if self.has_outbox {
            match outbox::pending(&self.db).await {
                Ok(waiting) => self.waiting.set(i64::try_from(waiting).unwrap_or(i64::MAX)),
                Err(error) => tracing::debug!(%error, "the outbox is not counted"),
            }
        }
        if let Ok(dead) = self.bus.dead_letters().await {
            self.dead.set(i64::try_from(dead).unwrap_or(i64::MAX));
        }
    }
}
