//! Executing what the domain decided.

use std::sync::Arc;
use std::time::Duration;

use actix::fut::wrap_future;
use actix::{ActorFutureExt, AsyncContext, Context};
use infera_bus::{BusError, Delivery, Envelope};
use infera_protocol::bytes::{Address, NodeId};
use infera_protocol::ids::message_id;
use infera_protocol::slashing::Contradiction;
use infera_protocol::trust::Reason;
use infera_runtime::{clock, planned, trace};
use infera_wire::convert::CloseReason;
use infera_wire::topology::keys;
use infera_wire::v1::{self, from_dispatcher};
use infera_wire::{Message as _, v1::SlotOutcome};
use sea_orm::{DbErr, TransactionTrait};
use tokio::sync::mpsc::error::TrySendError;
use tracing::{Instrument, Span};
use uuid::Uuid;

use super::{Assignments, REPORT_DEBOUNCE, Tools};
use crate::domain::trials::Ended;
use crate::domain::{Command, Effect};
use crate::standing::{self, Deed};
use crate::store::{self, Begun};

/// Waits between tries at a database or broker that is away.
const RETRY: Duration = Duration::from_millis(500);

/// A collected message: (request, attempt, round) and how often it was said before.
struct Collected {
    request: Uuid,
    attempt: u32,
    round: u32,
    repeat: u32,
    message: Arc<v1::ResultsCollected>,
}

impl Assignments {
    /// Executes one effect. Returns the session of a node that can't be reached any more.
    pub(super) fn execute(&mut self, effect: Effect, ctx: &mut Context<Self>) -> Option<(NodeId, Uuid)> {
        match effect {
            Effect::Send { node, frame } => return self.send(node, frame),
            Effect::StoreAttempt { request } => self.store_attempt(request, ctx),
            Effect::Delta { reply_to, entry } => self.deltas.push(&self.tools.bus, &reply_to, entry),
            Effect::Publish { request, attempt, round, repeat, message } => {
                self.publish(Collected { request, attempt, round, repeat, message }, ctx);
            }
            Effect::AskClose { request, submitted, n } => self.ask_close(request, *submitted, n, ctx),
            Effect::Closed { request } => self.closed(request, ctx),
            Effect::HandBack { request } => self.hand_back(request, ctx),
            Effect::Contradicted { request, operator, evidence } => {
                self.contradicted(request, operator, evidence, ctx);
            }
            Effect::Tried(ended) => self.tried(*ended, ctx),
            Effect::SlotsChanged => {
                if !std::mem::replace(&mut self.report_due, true) {
                    ctx.run_later(REPORT_DEBOUNCE, |act, _| act.report());
                }
            }
        }
        None
    }

    /// Keeps what costs the operator its stake, in one task a slot: who contradicts itself again while the database is away
    /// adds nothing.
    fn contradicted(
        &mut self,
        request: Uuid,
        operator: Address,
        evidence: Box<Contradiction>,
        ctx: &mut Context<Self>,
    ) {
        let node = evidence.slot().node;
        tracing::warn!(%request, %node, %operator, kind = evidence.kind(), "a node has contradicted itself");
        self.tools.metrics.contradictions.with_label_values(&[evidence.kind()]).inc();
        let place = (*evidence.slot(), evidence.kind());
        if !self.keeping.insert(place) {
            return;
        }
        let tools = self.tools.clone();
        let kept = async move {
            persist(&tools, || keep(&tools, request, operator, &evidence)).await;
        };
        ctx.spawn(wrap_future(kept).map(move |(), act: &mut Self, _| {
            act.keeping.remove(&place);
        }));
    }

    fn tried(&mut self, ended: Ended, ctx: &mut Context<Self>) {
        let Ended { kind, request, node, outcome, conduct } = ended;
        self.tools.metrics.trials.with_label_values(&[kind.name(), outcome.name()]).inc();
        tracing::info!(%request, %node, kind = kind.name(), outcome = outcome.name(), "trial ended");
        if conduct.is_empty() {
            return;
        }
        let deeds: Vec<Deed> = conduct.into_iter().map(|conduct| Deed::of(conduct, request)).collect();
        let tools = self.tools.clone();
        let noted = async move {
            if let Err(error) =
                standing::note_now(&tools.db, &tools.live.now().registries.current().calibration, &deeds)
                    .await
            {
                tracing::error!(%error, %request, %node, "what a trial showed is not noted");
            }
        };
        ctx.spawn(wrap_future(noted));
    }

    /// Never waits: a node whose queue is full is cut off.
    fn send(&mut self, node: NodeId, frame: v1::FromDispatcher) -> Option<(NodeId, Uuid)> {
        let outgoing = self.sessions.get(&node)?;
        let leased = matches!(frame.message, Some(from_dispatcher::Message::Lease(_)));
        match outgoing.frames.try_send(frame) {
            Ok(()) => {
                if leased {
                    planned::hit("dispatcher.leased");
                }
                None
            }
            Err(error) => {
                if matches!(error, TrySendError::Full(_)) {
                    tracing::warn!(%node, "node does not take its frames, disconnecting it");
                    self.tools.metrics.refused.with_label_values(&["slow"]).inc();
                }
                outgoing.kill.cancel();
                Some((node, outgoing.session))
            }
        }
    }

    /// The same offer, delivered again because the connection of the first delivery was lost, takes its
    /// place. Any other is superfluous: another offer of the request, or one message published twice.
    pub(super) fn again(&mut self, request: Uuid, delivery: Delivery, ctx: &mut Context<Self>) {
        match self.offers.get_mut(&request) {
            Some(held) if held.delivery.envelope.id == delivery.envelope.id && !held.delivery.is_usable() => {
                held.delivery = delivery;
            }
            _ => {
                ctx.spawn(wrap_future(ack(request, delivery)));
            }
        }
    }

    fn store_attempt(&mut self, request: Uuid, ctx: &mut Context<Self>) {
        let tools = self.tools.clone();
        let stored = async move {
            let begun =
                persist(&tools, || store::begin_attempt(&tools.db, request, &tools.replica, clock::now_ms()))
                    .await;
            planned::pause("dispatcher.attempt.stored").await;
            begun
        };
        ctx.spawn(wrap_future(stored).map(move |begun, act: &mut Self, ctx| match begun {
            Some(Begun::Attempt(attempt)) => act.attempt_stored(request, attempt, ctx),
            Some(Begun::Closed) => act.note(Command::Closed { request }, ctx),
            None => {}
        }));
    }

    fn attempt_stored(&mut self, request: Uuid, attempt: u32, ctx: &mut Context<Self>) {
        let Some(held) = self.offers.get_mut(&request) else { return };
        let offered = held.delivery.envelope.traceparent.clone();
        let span = tracing::info_span!(
            parent: None,
            "dispatcher attempt",
            infera.request.id = %request,
            infera.attempt = attempt,
        );
        if let Some(parent) = &offered {
            trace::set_parent(&span, parent);
        }
        let traceparent = trace::traceparent_of(&span).or(offered).unwrap_or_default();
        held.span = span;
        self.tools.metrics.attempts.inc();
        self.note(Command::AttemptStored { request, attempt, traceparent }, ctx);
    }

    fn span(&self, request: Uuid) -> Span {
        self.offers.get(&request).map_or_else(Span::none, |held| held.span.clone())
    }

    fn publish(&mut self, collected: Collected, ctx: &mut Context<Self>) {
        let Collected { request, attempt, round, repeat, message } = collected;
        if repeat == 0 {
            self.count(&message);
            tracing::info!(%request, attempt, round, slots = message.slots.len(), "results collected");
        } else {
            tracing::warn!(%request, attempt, round, repeat, "no verdict, results are sent again");
        }
        // A repeat has an id of its own: the verifier's inbox must let it through, for the answer.
        let n = u64::from(attempt) << 8 | u64::from(round);
        let id = match repeat {
            0 => message_id(keys::RESULTS_COLLECTED, request, n),
            _ => message_id("results.collected.again", request, n << 16 | u64::from(repeat)),
        };
        let span = self.span(request);
        let tools = self.tools.clone();
        let published = async move {
            let envelope = || Envelope::new(id, keys::RESULTS_COLLECTED, message.encode_to_vec());
            let done = publish(&tools, keys::RESULTS_COLLECTED, envelope).await;
            planned::pause("dispatcher.collected.published").await;
            done
        };
        ctx.spawn(wrap_future(published.instrument(span)).map(move |done, act: &mut Self, ctx| {
            if done {
                act.note(Command::Confirmed { request, attempt, round }, ctx);
            }
        }));
    }

    fn count(&self, message: &v1::ResultsCollected) {
        self.tools.metrics.collected.inc();
        for slot in &message.slots {
            let outcome = SlotOutcome::try_from(slot.outcome).unwrap_or_default();
            let name = outcome.as_str_name().trim_start_matches("SLOT_OUTCOME_").to_ascii_lowercase();
            self.tools.metrics.slots.with_label_values(&[name.as_str()]).inc();
        }
    }

    fn ask_close(&mut self, request: Uuid, submitted: v1::RequestSubmitted, n: u32, ctx: &mut Context<Self>) {
        tracing::warn!(%request, n, "past its deadline without a verdict, asking for it");
        let close = v1::CloseRequested {
            submitted: Some(submitted),
            reason: CloseReason::Deadline.as_str().to_owned(),
        };
        // Every asking has an id of its own, across replicas too: it is the verdict that is wanted.
        let id = Uuid::now_v7();
        let tools = self.tools.clone();
        let asked = async move {
            let envelope = || Envelope::new(id, keys::CLOSE_REQUESTED, close.encode_to_vec());
            publish(&tools, keys::CLOSE_REQUESTED, envelope).await;
        };
        ctx.spawn(wrap_future(asked.instrument(self.span(request))));
    }

    /// Noted before the ack: an offer that comes again afterwards computes nothing.
    fn closed(&mut self, request: Uuid, ctx: &mut Context<Self>) {
        let Some(held) = self.offers.remove(&request) else { return };
        let tools = self.tools.clone();
        let acked = async move {
            let noted = persist(&tools, || store::close(&tools.db, request, clock::now_ms())).await;
            if noted.is_some() {
                ack(request, held.delivery).await;
            }
        };
        ctx.spawn(wrap_future(acked.instrument(held.span)));
    }

    /// Said again before it is acked: whatever dies in between, the bus has the offer.
    fn hand_back(&mut self, request: Uuid, ctx: &mut Context<Self>) {
        let Some(held) = self.offers.remove(&request) else { return };
        tracing::info!(%request, "too few operators here, another replica has them");
        let tools = self.tools.clone();
        let handed = async move {
            let envelope = || held.delivery.envelope.clone();
            if publish(&tools, keys::REQUEST_OFFERED, envelope).await {
                ack(request, held.delivery).await;
            }
        };
        ctx.spawn(wrap_future(handed));
    }
}

/// Writes a contradiction, once for its slot. A second answer is a fault too; what a reveal says that does not open its
/// commitment, the verdict's conduct does.
pub(super) async fn keep(
    tools: &Tools,
    request: Uuid,
    operator: Address,
    evidence: &Contradiction,
) -> Result<(), DbErr> {
    let now = clock::now_ms();
    let tx = tools.db.begin().await?;
    let is_new = store::keep_contradiction(&tx, request, operator, evidence, now).await?;
    if is_new && matches!(evidence, Contradiction::TwoCommitments { .. }) {
        let fault = Deed::fault(operator, evidence.slot().node, request, Reason::Equivocation);
        let roots = tools.live.now();
        standing::note_all(&tx, &roots.registries.current().calibration, &[fault], now).await?;
    }
    tx.commit().await
}

async fn ack(request: Uuid, delivery: Delivery) {
    if let Err(error) = delivery.ack().await {
        tracing::debug!(%error, %request, "offer is not acked, it comes again");
    }
}

/// Tries until the database answers; `None` once the service ends.
async fn persist<T, F>(tools: &Tools, write: impl Fn() -> F) -> Option<T>
where
    F: Future<Output = Result<T, DbErr>>,
{
    loop {
        match write().await {
            Ok(value) => return Some(value),
            Err(error) => tracing::warn!(%error, "database is not reachable, trying again"),
        }
        tokio::select! {
            () = tools.shutdown.cancelled() => return None,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

/// Publishes until the bus confirms. `false` once the service ends, or if it never can.
async fn publish(tools: &Tools, key: &str, envelope: impl Fn() -> Envelope) -> bool {
    loop {
        match tools.bus.publish(key, envelope()).await {
            Ok(()) => return true,
            Err(error @ (BusError::TooLarge { .. } | BusError::Closed)) => {
                tracing::error!(%error, key, "message is not published");
                return false;
            }
            Err(error) => tracing::warn!(%error, key, "message is not published yet, trying again"),
        }
        tokio::select! {
            () = tools.shutdown.cancelled() => return false,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}
