//! What comes from the bus. Everything durable is written first, in the transaction that notes the
//! message as processed; `Admission` learns of it after the commit.

use std::collections::{BTreeMap, BTreeSet};

use actix::Addr;
use infera_bus::{Bus, BusError, ConsumerSpec, Envelope, Reject, consume_then};
use infera_runtime::CancellationToken;
use infera_wire::topology::{keys, queues};
use infera_wire::v1::{self, verdict::Outcome};
use infera_wire::{WireError, convert};
use sea_orm::DatabaseConnection;
use uuid::Uuid;

use crate::actor::{Admission, Noted};
use crate::domain::window::{Report, Slots};
use crate::domain::{Command, Stage};
use crate::error::Error;
use crate::store::{self, Cancelled};

/// Reports that may wait to be read; each replaces the one before.
const REPORT_CAPACITY: usize = 1_024;

/// What every consumer of this service works with.
#[derive(Clone)]
pub struct Consumers {
    pub spec: ConsumerSpec,
    pub db: DatabaseConnection,
    pub admission: Addr<Admission>,
    pub shutdown: CancellationToken,
}

impl Consumers {
    fn spec(&self, queue: &'static str) -> ConsumerSpec {
        ConsumerSpec { queue, ..self.spec.clone() }
    }

    /// Reads the request's row and tells `Admission` what it says.
    async fn reread(&self, request: Uuid) {
        match store::find(&self.db, request).await {
            Ok(Some(entry)) => {
                let stage = entry.stage;
                // New, or known already: then only its stage is news.
                self.tell(Command::Admitted(Box::new(entry))).await;
                if let Stage::Closing { reason, .. } = stage {
                    self.tell(Command::CloseAsked { request, reason }).await;
                }
            }
            Ok(None) => {}
            Err(error) => {
                tracing::error!(%error, %request, "request is not read; it is found at the next start")
            }
        }
    }

    /// A dead `Admission` ends the service; the database has everything.
    async fn tell(&self, command: Command) {
        if self.admission.send(Noted(command)).await.is_err() && !self.shutdown.is_cancelled() {
            tracing::error!("admission ended unexpectedly");
            self.shutdown.cancel();
        }
    }

    /// `mempool.funded`: into the set.
    pub async fn funded(self) -> Result<(), Error> {
        let read = |envelope: &Envelope| -> Result<_, WireError> {
            let wire: v1::RequestFunded = infera_wire::decode("RequestFunded", &envelope.body)?;
            convert::funded(&wire)
        };
        let handler = async |tx: &sea_orm::DatabaseTransaction, envelope: &Envelope| {
            store::admit(tx, &read(envelope)?, &envelope.body).await.map_err(Reject::from)
        };
        let committed = async |envelope: &Envelope| {
            let Ok(funded) = read(envelope) else { return };
            let request = funded.submitted.request.id;
            self.reread(request).await;
        };
        let spec = self.spec(queues::MEMPOOL_FUNDED);
        Ok(consume_then(spec, self.shutdown.clone(), handler, committed).await?)
    }

    /// `mempool.cancel`: closes what belongs to the account that asks.
    pub async fn cancel(self) -> Result<(), Error> {
        let read = |envelope: &Envelope| -> Result<_, WireError> {
            let wire: v1::CancelRequested = infera_wire::decode("CancelRequested", &envelope.body)?;
            let request = convert::uuid("cancel.request_id", &wire.request_id)?;
            Ok((request, convert::name("cancel.account", &wire.account)?))
        };
        let handler = async |tx: &sea_orm::DatabaseTransaction, envelope: &Envelope| {
            let (request, account) = read(envelope)?;
            let cancelled = store::cancel(tx, request, &account).await?;
            match cancelled {
                Cancelled::NotTheirs => tracing::warn!(%request, "cancel by another account ignored"),
                Cancelled::Yes | Cancelled::Before | Cancelled::Waits => {
                    tracing::info!(%request, ?cancelled, "cancel");
                }
            }
            Ok(())
        };
        let committed = async |envelope: &Envelope| {
            let Ok((request, _)) = read(envelope) else { return };
            self.reread(request).await;
        };
        let spec = self.spec(queues::MEMPOOL_CANCEL);
        Ok(consume_then(spec, self.shutdown.clone(), handler, committed).await?)
    }

    /// `mempool.verdict`: a closing verdict takes the request out of the set.
    pub async fn verdicts(self) -> Result<(), Error> {
        let handler = async |tx: &sea_orm::DatabaseTransaction, envelope: &Envelope| {
            if let Some(request) = closed(envelope)? {
                store::remove(tx, request).await?;
            }
            Ok(())
        };
        let committed = async |envelope: &Envelope| {
            if let Ok(Some(request)) = closed(envelope) {
                self.tell(Command::Closed { request }).await;
            }
        };
        let spec = self.spec(queues::MEMPOOL_VERDICT);
        Ok(consume_then(spec, self.shutdown.clone(), handler, committed).await?)
    }
}

/// The request that a verdict closes.
fn closed(envelope: &Envelope) -> Result<Option<Uuid>, WireError> {
    let verdict: v1::Verdict = infera_wire::decode("Verdict", &envelope.body)?;
    let request = convert::uuid("verdict.request_id", &verdict.request_id)?;
    match verdict.outcome.ok_or(WireError::Missing { field: "verdict.outcome" })? {
        Outcome::Verified(_) | Outcome::Failed(_) => Ok(Some(request)),
        Outcome::MoreNodes(_) | Outcome::MoreReferees(_) => Ok(None),
    }
}

/// Slot reports, until `shutdown`. One that can't be read is skipped: the next comes within a second.
///
/// # Errors
/// [`Error::Bus`], [`Error::ActorEnded`].
pub async fn reports(
    bus: Bus,
    replica: String,
    admission: Addr<Admission>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let queue = queues::mempool_slots(&replica);
    let mut subscription = bus.subscribe_transient(&queue, &[keys::SLOTS], REPORT_CAPACITY).await?;
    loop {
        let delivery = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            delivery = subscription.next() => delivery.ok_or(BusError::Closed)?,
        };
        match report(&delivery.envelope) {
            Ok(report) => {
                let sent = admission.send(Noted(Command::Report(report))).await;
                if sent.is_err() {
                    return if shutdown.is_cancelled() { Ok(()) } else { Err(Error::ActorEnded) };
                }
            }
            Err(error) => tracing::warn!(%error, "slot report can't be read"),
        }
    }
}

fn report(envelope: &Envelope) -> Result<Report, WireError> {
    let wire: v1::SlotsReport = infera_wire::decode("SlotsReport", &envelope.body)?;
    let mut models = BTreeMap::new();
    for model in &wire.models {
        let held: Result<BTreeSet<Uuid>, WireError> =
            model.offers_held.iter().map(|id| convert::uuid("slots.offers_held", id)).collect();
        models.insert(
            convert::fixed("slots.model_root", &model.model_root)?,
            Slots { operators: model.operators, free: model.free, held: held? },
        );
    }
    Ok(Report {
        replica: convert::name("slots.replica", &wire.replica)?,
        reported_at_ms: wire.reported_at_ms,
        ttl_ms: wire.expires_at_ms.saturating_sub(wire.reported_at_ms),
        models,
    })
}
