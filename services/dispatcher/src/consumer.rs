//! What comes from the bus: offers, the verdicts on what this replica holds, and what other replicas have
//! room for.

use std::collections::BTreeMap;

use actix::Addr;
use infera_bus::{Bus, Delivery};
use infera_protocol::identity::Domain;
use infera_runtime::CancellationToken;
use infera_wire::topology::{keys, queues};
use infera_wire::v1::{self, verdict::Outcome};
use infera_wire::{WireError, convert};

use crate::actor::{Assignments, Decided, Offered};
use crate::domain::peers::PeerReport;
use crate::domain::{Command, Offer};
use crate::error::Error;

/// Verdicts that may wait to be read; they concern every request of the network.
const VERDICT_CAPACITY: usize = 4_096;
/// Reports of other replicas that may wait to be read.
const PEER_CAPACITY: usize = 256;

/// Takes offers until `shutdown`. An offer stays unacked until the closing verdict; what is no offer goes
/// to the dead letters.
///
/// # Errors
/// [`Error::Bus`], [`Error::ActorEnded`].
pub async fn offers(
    bus: Bus,
    prefetch: u16,
    domain: Domain,
    assignments: Addr<Assignments>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let mut subscription = bus.subscribe(queues::DISPATCHER_OFFERED, prefetch).await?;
    loop {
        let delivery = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            delivery = subscription.next() => delivery.ok_or(infera_bus::BusError::Closed)?,
        };
        match offer(&delivery, &domain) {
            Ok(offer) => {
                let offered = Offered { offer: Box::new(offer), delivery };
                if assignments.send(offered).await.is_err() {
                    return ended(&shutdown);
                }
            }
            Err(error) => {
                tracing::error!(%error, id = %delivery.envelope.id, "offer goes to the dead letters");
                if let Err(error) = delivery.dead_letter(&error.to_string()).await {
                    tracing::warn!(%error, "offer will be delivered again");
                }
            }
        }
    }
}

fn offer(delivery: &Delivery, domain: &Domain) -> Result<Offer, WireError> {
    let wire: v1::RequestOffered = infera_wire::decode("RequestOffered", &delivery.envelope.body)?;
    let wire = wire.funded.ok_or(WireError::Missing { field: "offered.funded" })?;
    let funded = convert::funded(&wire)?;
    Ok(Offer::new(funded, wire, domain))
}

/// Listens to verdicts until `shutdown`. Those that are missed are said again when results or the
/// close are repeated.
///
/// # Errors
/// [`Error::Bus`], [`Error::ActorEnded`].
pub async fn verdicts(
    bus: Bus,
    replica: String,
    assignments: Addr<Assignments>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let queue = queues::dispatcher_verdict(&replica);
    let mut subscription = bus.subscribe_transient(&queue, &[keys::ANY_VERDICT], VERDICT_CAPACITY).await?;
    loop {
        let delivery = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            delivery = subscription.next() => delivery.ok_or(infera_bus::BusError::Closed)?,
        };
        match verdict(&delivery.envelope.body) {
            Ok(command) => {
                if assignments.send(Decided(command)).await.is_err() {
                    return ended(&shutdown);
                }
            }
            Err(error) => tracing::error!(%error, "verdict can't be read"),
        }
    }
}

fn verdict(body: &[u8]) -> Result<Command, WireError> {
    let verdict: v1::Verdict = infera_wire::decode("Verdict", body)?;
    let request = convert::uuid("verdict.request_id", &verdict.request_id)?;
    match verdict.outcome.ok_or(WireError::Missing { field: "verdict.outcome" })? {
        Outcome::Verified(_) | Outcome::Failed(_) => Ok(Command::Closed { request }),
        Outcome::MoreNodes(more) => Ok(Command::MoreNodes {
            request,
            attempt: verdict.attempt,
            round: verdict.round,
            count: more.count,
        }),
        Outcome::MoreReferees(more) => Ok(Command::MoreReferees {
            request,
            attempt: verdict.attempt,
            round: verdict.round,
            count: more.count,
            answers: more
                .answers
                .iter()
                .map(|answer| convert::fixed("more_referees.answers", answer))
                .collect::<Result<_, _>>()?,
        }),
    }
}

/// Listens to the slot reports of other replicas, until `shutdown`.
///
/// # Errors
/// [`Error::Bus`], [`Error::ActorEnded`].
pub async fn peers(
    bus: Bus,
    replica: String,
    assignments: Addr<Assignments>,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    let queue = format!("dispatcher.slots.{replica}");
    let mut subscription = bus.subscribe_transient(&queue, &[keys::SLOTS], PEER_CAPACITY).await?;
    loop {
        let delivery = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            delivery = subscription.next() => delivery.ok_or(infera_bus::BusError::Closed)?,
        };
        match peer(&delivery.envelope.body) {
            Ok((other, _)) if other == replica => {}
            Ok((replica, report)) => {
                if assignments.send(Decided(Command::Peer { replica, report })).await.is_err() {
                    return ended(&shutdown);
                }
            }
            Err(error) => tracing::warn!(%error, "slot report can't be read"),
        }
    }
}

fn peer(body: &[u8]) -> Result<(String, PeerReport), WireError> {
    let wire: v1::SlotsReport = infera_wire::decode("SlotsReport", body)?;
    let mut models = BTreeMap::new();
    for model in &wire.models {
        let root = convert::fixed("slots.model_root", &model.model_root)?;
        models.insert(root, (model.operators, model.free));
    }
    let ttl_ms = wire.expires_at_ms.saturating_sub(wire.reported_at_ms);
    Ok((convert::name("slots.replica", &wire.replica)?, PeerReport { ttl_ms, models }))
}

fn ended(shutdown: &CancellationToken) -> Result<(), Error> {
    if shutdown.is_cancelled() { Ok(()) } else { Err(Error::ActorEnded) }
}
