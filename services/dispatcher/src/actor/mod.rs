//! `Assignments`: the one actor that holds leases, attempts and timers.
//!
//! Handlers are synchronous: they apply a command to [`State`] and execute the effects. What takes
//! time (database, bus) runs beside it and comes back as a command; as many of those run as
//! requests are held, which the prefetch of the offers bounds.

mod effects;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, ActorContext, AsyncContext, Context, Handler, Message, MessageResult};
use infera_bus::{Bus, Delivery, Envelope};
use infera_protocol::bytes::NodeId;
use infera_protocol::commitment::Slot;
use infera_runtime::network::Live;
use infera_runtime::{CancellationToken, clock, planned};
use infera_wire::topology::keys;
use infera_wire::{Message as _, v1};
use sea_orm::DatabaseConnection;
use tokio::sync::mpsc;
use tracing::Span;
use uuid::Uuid;

use crate::deltas::Deltas;
use crate::domain::nodes::{Connected, NodeView};
use crate::domain::{Command, Offer, Rejection, State, frames};
use crate::metrics::Metrics;

const TICK: Duration = Duration::from_millis(100);
const DELTA_TICK: Duration = Duration::from_millis(50);
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// Changes within this time share one report.
const REPORT_DEBOUNCE: Duration = Duration::from_millis(100);
/// How long an offer waits that came although everything is taken.
const FULL_RETRY: Duration = Duration::from_secs(1);

/// What the actor works with.
pub struct Tools {
    pub bus: Bus,
    pub db: DatabaseConnection,
    pub metrics: Metrics,
    pub replica: String,
    pub slots_ttl_ms: i64,
    pub shutdown: CancellationToken,
    pub live: Live,
}

/// The actor.
pub struct Assignments {
    state: State,
    tools: Arc<Tools>,
    sessions: HashMap<NodeId, Outgoing>,
    offers: HashMap<Uuid, HeldOffer>,
    deltas: Deltas,
    report_due: bool,
    /// Contradictions that are being written.
    keeping: HashSet<(Slot, &'static str)>,
}

/// The way to a session. Dropping it ends the session.
pub struct Outgoing {
    pub session: Uuid,
    pub frames: mpsc::Sender<v1::FromDispatcher>,
    pub kill: CancellationToken,
}

struct HeldOffer {
    /// Unacked until the closing verdict.
    delivery: Delivery,
    /// Of the live attempt.
    span: Span,
}

/// A node whose hello was checked; replaces an older session of the same key.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Join {
    pub info: Connected,
    pub outgoing: Outgoing,
}

#[derive(Message)]
#[rtype(result = "()")]
pub struct Leave {
    pub node: NodeId,
    pub session: Uuid,
}

/// A frame of an admitted node.
#[derive(Message)]
#[rtype(result = "Result<(), FrameError>")]
pub struct Frame {
    pub node: NodeId,
    pub session: Uuid,
    pub command: Command,
}

/// Why a frame changed nothing.
#[derive(Debug)]
pub enum FrameError {
    /// The node has a newer session.
    Superseded,
    Rejected(Rejection),
}

/// An offer that is well formed.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Offered {
    pub offer: Box<Offer>,
    pub delivery: Delivery,
}

/// A verdict or another replica's report, as a command.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Decided(pub Command);

#[derive(Message)]
#[rtype(result = "Vec<NodeView>")]
pub struct ListNodes;

impl Assignments {
    pub fn new(state: State, tools: Tools) -> Self {
        Self {
            state,
            tools: Arc::new(tools),
            sessions: HashMap::new(),
            offers: HashMap::new(),
            deltas: Deltas::default(),
            report_due: false,
            keeping: HashSet::new(),
        }
    }

    /// Applies a command and executes what follows from it.
    fn run(&mut self, command: Command, ctx: &mut Context<Self>) -> Result<(), Rejection> {
        let mut out = Vec::new();
        let result = self.state.apply(command, clock::now_ms(), &mut out);
        let mut queue = VecDeque::from(out);
        while let Some(effect) = queue.pop_front() {
            let Some((node, session)) = self.execute(effect, ctx) else { continue };
            // The node fell behind or is gone: what that changes comes on top.
            self.sessions.remove(&node);
            let mut more = Vec::new();
            let left = Command::NodeLeft { node, session };
            if let Err(error) = self.state.apply(left, clock::now_ms(), &mut more) {
                tracing::error!(%error, "a node could not be removed");
            }
            queue.extend(more);
        }
        self.tools.metrics.requests.set(i64::try_from(self.state.request_count()).unwrap_or(i64::MAX));
        self.tools.metrics.nodes.set(i64::try_from(self.state.node_count()).unwrap_or(i64::MAX));
        result
    }

    /// As [`Assignments::run`], where a rejection is nothing to answer.
    fn note(&mut self, command: Command, ctx: &mut Context<Self>) {
        if let Err(rejection) = self.run(command, ctx) {
            tracing::debug!(%rejection, "nothing to do");
        }
    }

    fn report(&mut self) {
        self.report_due = false;
        let now = clock::now_ms();
        // Each is reported, with or without nodes.
        let registry = &self.state.rules().registry;
        let models = registry
            .roots()
            .map(|model| {
                let (slots, held) = self.state.model_slots(model);
                v1::ModelSlots {
                    model_root: model.to_vec(),
                    operators: slots.operators,
                    free: slots.free,
                    total: slots.total,
                    offers_held: held.iter().map(|id| id.as_bytes().to_vec()).collect(),
                }
            })
            .collect();
        let report = v1::SlotsReport {
            replica: self.tools.replica.clone(),
            reported_at_ms: now,
            expires_at_ms: now + self.tools.slots_ttl_ms,
            models,
        };
        let envelope = Envelope::new(Uuid::now_v7(), keys::SLOTS, report.encode_to_vec());
        self.tools.bus.publish_transient(keys::SLOTS, envelope);
    }
}

impl Actor for Assignments {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(1024);
        ctx.run_interval(TICK, |act, ctx| act.note(Command::Tick, ctx));
        ctx.run_interval(DELTA_TICK, |act, _| act.deltas.flush(&act.tools.bus));
        ctx.run_interval(REPORT_EVERY, |act, _| act.report());
        let shutdown = self.tools.shutdown.clone();
        let stop = actix::fut::wrap_future(async move { shutdown.cancelled().await });
        ctx.spawn(actix::ActorFutureExt::map(stop, |(), act: &mut Self, ctx: &mut Context<Self>| {
            // Offers are not acked: they are delivered again, here or elsewhere.
            act.sessions.clear();
            act.offers.clear();
            ctx.stop();
        }));
        self.report();
    }
}

impl Handler<Join> for Assignments {
    type Result = ();

    fn handle(&mut self, join: Join, ctx: &mut Self::Context) {
        let node = join.info.node;
        if let Some(old) = self.sessions.insert(node, join.outgoing) {
            let frame = frames::refused("replaced", "a newer session of this node began");
            self.tools.metrics.refused.with_label_values(&["replaced"]).inc();
            if old.frames.try_send(frame).is_err() {
                old.kill.cancel();
            }
        }
        self.note(Command::NodeJoined(join.info), ctx);
    }
}

impl Handler<Leave> for Assignments {
    type Result = ();

    fn handle(&mut self, leave: Leave, ctx: &mut Self::Context) {
        if self.sessions.get(&leave.node).is_some_and(|s| s.session == leave.session) {
            self.sessions.remove(&leave.node);
        }
        self.note(Command::NodeLeft { node: leave.node, session: leave.session }, ctx);
    }
}

impl Handler<Frame> for Assignments {
    type Result = Result<(), FrameError>;

    fn handle(&mut self, frame: Frame, ctx: &mut Self::Context) -> Self::Result {
        if !self.state.is_session(&frame.node, frame.session) {
            return Err(FrameError::Superseded);
        }
        let point = match &frame.command {
            Command::Committed { .. } => Some("dispatcher.committed"),
            Command::Revealed { .. } => Some("dispatcher.revealed"),
            _ => None,
        };
        self.run(frame.command, ctx).map_err(FrameError::Rejected)?;
        if let Some(point) = point {
            planned::hit(point);
        }
        Ok(())
    }
}

impl Handler<Offered> for Assignments {
    type Result = ();

    fn handle(&mut self, offered: Offered, ctx: &mut Self::Context) {
        let request = offered.offer.id();
        match self.run(Command::Offered(offered.offer), ctx) {
            Ok(()) => {
                let held = HeldOffer { delivery: offered.delivery, span: Span::none() };
                self.offers.insert(request, held);
            }
            Err(Rejection::AlreadyHeld) => self.again(request, offered.delivery, ctx),
            Err(rejection) => {
                tracing::warn!(%request, %rejection, "offer is delivered again later");
                offered.delivery.retry(FULL_RETRY);
            }
        }
    }
}

impl Handler<Decided> for Assignments {
    type Result = ();

    fn handle(&mut self, decided: Decided, ctx: &mut Self::Context) {
        self.note(decided.0, ctx);
    }
}

impl Handler<ListNodes> for Assignments {
    type Result = MessageResult<ListNodes>;

    fn handle(&mut self, _: ListNodes, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.state.nodes())
    }
}

#[cfg(test)]
mod tests;
