//! What was charged and is not finally on the chain: receipts whose batch is not final, or escrow that no final block has
//! charged, whichever is more. While the chain is away receipts wait and work goes on, up to a cap: then new paid requests
//! are rejected until it is less again. Nothing else stops.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use infera_runtime::{CancellationToken, health::CheckHandle};
use sea_orm::{DatabaseConnection, DbErr};

use crate::{
    domain::Rejection,
    metrics::Metrics,
    store::{batches, escrows},
};

/// The exposure as last counted, and the cap; clones share it.
#[derive(Debug, Clone)]
pub struct Exposure {
    micro: Arc<AtomicI64>,
    reached: Arc<AtomicBool>,
    /// 10^-6 INFER; 0 for none.
    cap_micro: i64,
}

impl Exposure {
    /// Nothing is exposed yet. A cap of 0 is none.
    pub fn new(cap_micro: i64) -> Self {
        Self { micro: Arc::default(), reached: Arc::default(), cap_micro }
    }

    /// Something was charged: counts at once, not only at the next look.
    pub fn charged(&self, micro: u64) {
        self.micro.fetch_add(i64::try_from(micro).unwrap_or(i64::MAX), Ordering::Relaxed);
    }

    /// Whether the cap is reached.
    pub fn is_reached(&self) -> bool {
        self.cap_micro > 0 && self.micro.load(Ordering::Relaxed) >= self.cap_micro
    }

    /// Why a paid request is not admitted now; `None` below the cap.
    pub fn rejection(&self) -> Option<Rejection> {
        let micro = self.micro.load(Ordering::Relaxed);
        (self.cap_micro > 0 && micro >= self.cap_micro).then(|| Rejection {
            // The gateway answers it with 503, which clients try again.
            code: "overloaded",
            message: format!(
                "the exposure cap is reached: {micro} of {} micro-INFER were charged and are not final on the chain \
                 yet; try again later",
                self.cap_micro
            ),
        })
    }

    /// Counts anew from the database, and says on `check`, in the metrics and in the log whether the cap is reached.
    ///
    /// # Errors
    /// The database's.
    pub async fn look(
        &self,
        db: &DatabaseConnection,
        check: &CheckHandle,
        metrics: &Metrics,
    ) -> Result<(), DbErr> {
        // Escrow counts after its batch is final too. What no escrow covers any more is lost, not exposed.
        let owing = escrows::owing(db).await?;
        let uncharged = owing.uncharged_micro.saturating_sub(owing.short_micro);
        let micro = batches::exposed(db).await?.max(uncharged);
        self.micro.store(micro, Ordering::Relaxed);
        let rejection = self.rejection();
        metrics.exposure(micro, rejection.is_some());
        let reached = self.reached.swap(rejection.is_some(), Ordering::Relaxed);
        match rejection {
            Some(rejection) => {
                if !reached {
                    tracing::error!(
                        micro,
                        cap_micro = self.cap_micro,
                        "the exposure cap is reached: new paid requests are rejected"
                    );
                }
                check.down(rejection.message);
            }
            None => {
                if reached {
                    tracing::info!(micro, cap_micro = self.cap_micro, "below the exposure cap again");
                }
                check.up();
            }
        }
        Ok(())
    }

    /// Looks every `check_ms` until `stop`.
    pub(crate) async fn watch(
        self,
        db: DatabaseConnection,
        check: CheckHandle,
        metrics: Metrics,
        check_ms: u64,
        stop: CancellationToken,
    ) {
        let mut every = tokio::time::interval(Duration::from_millis(check_ms));
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = every.tick() => {}
            }
            if let Err(error) = self.look(&db, &check, &metrics).await {
                tracing::warn!(%error, "the exposure is not counted");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cap_counts_when_it_is_reached_and_not_before() {
        let exposure = Exposure::new(100);
        exposure.charged(99);
        assert_eq!(exposure.rejection(), None);
        exposure.charged(1);
        let rejection = exposure.rejection().unwrap();
        assert_eq!(rejection.code, "overloaded");
        assert!(rejection.message.contains("exposure cap") && rejection.message.contains("100 of 100"));
        let none = Exposure::new(0);
        none.charged(u64::MAX);
        assert_eq!(none.rejection(), None);
    }
}
