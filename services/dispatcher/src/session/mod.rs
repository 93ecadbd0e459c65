//! `NodeSession`: one actor per connected node, on the thread of its WebSocket.
//!
//! ```text
//!  Challenge -> Greeting -> Hello checked -> RangeChallenge -> proof checked -> Assignments: Join -> Welcome   Admitted
//!  frames of the node  -> Command -> Assignments (waits: a busy dispatcher slows its nodes down)
//!  frames for the node <- bounded queue <- Assignments (never waits: a node that falls behind is cut off)
//! ```

mod admission;
pub mod hello;

use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, ActorContext, ActorFutureExt, Addr, AsyncContext, Context, StreamHandler, WrapFuture};
use actix_ws::{AggregatedMessage, ProtocolError};
use bytes::Bytes;
use infera_protocol::bytes::NodeId;
use infera_protocol::identity::Domain;
use infera_protocol::slashing::SignedBinding;
use infera_runtime::kv::Kv;
use infera_runtime::network::Live;
use infera_runtime::{CancellationToken, clock};
use infera_wire::v1::{self, from_dispatcher, from_node};
use infera_wire::{MAX_FRAME_BYTES, Message, WireError, convert};
use sea_orm::DatabaseConnection;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use uuid::Uuid;

use crate::actor::{Assignments, Frame, FrameError, Join, Leave, Outgoing};
use crate::domain::nodes::Connected;
use crate::domain::{Command, Rejection, SignedScores, frames};
use crate::metrics::Metrics;
use admission::Challenge;
use hello::Refusal;

/// Pings without an answer after which a session ends.
const MAX_MISSED: u32 = 3;

/// What all sessions share.
pub struct Shared {
    pub assignments: Addr<Assignments>,
    pub domain: Domain,
    pub live: Live,
    pub db: DatabaseConnection,
    pub kv: Kv,
    pub metrics: Metrics,
    pub replica: String,
    pub heartbeat_secs: u32,
    pub hello_secs: u32,
    pub proof_secs: u32,
    pub recheck_secs: u32,
    pub session_queue: usize,
    pub shutdown: CancellationToken,
}

impl Shared {
    fn heartbeat(&self) -> Duration {
        Duration::from_secs(u64::from(self.heartbeat_secs))
    }
}

/// One connection of a node.
pub struct NodeSession {
    shared: Arc<Shared>,
    ws: actix_ws::Session,
    id: Uuid,
    nonce: [u8; 32],
    /// Who it says it is; `None` until the hello was checked.
    hello: Option<convert::Hello>,
    /// The ranges of its weights that it was asked for.
    challenge: Option<Challenge>,
    /// `None` until it has proved its weights.
    node: Option<NodeId>,
    /// Pings since the last sign of life.
    missed: u32,
    /// Ends the session although its socket is stuck.
    kill: CancellationToken,
    ending: bool,
    _permit: OwnedSemaphorePermit,
}

impl NodeSession {
    /// Starts the actor on the current thread.
    pub fn start(
        shared: Arc<Shared>,
        ws: actix_ws::Session,
        incoming: actix_ws::MessageStream,
        permit: OwnedSemaphorePermit,
    ) {
        let incoming = incoming
            .max_frame_size(MAX_FRAME_BYTES)
            .aggregate_continuations()
            .max_continuation_size(MAX_FRAME_BYTES);
        Self::create(|ctx| {
            ctx.add_stream(incoming);
            Self {
                kill: shared.shutdown.child_token(),
                shared,
                ws,
                id: Uuid::now_v7(),
                nonce: rand::random(),
                hello: None,
                challenge: None,
                node: None,
                missed: 0,
                ending: false,
                _permit: permit,
            }
        });
    }

    /// Writes one frame before anything else happens in this session. `last` ends it afterwards.
    fn write(&mut self, frame: &v1::FromDispatcher, last: bool, ctx: &mut Context<Self>) {
        let mut ws = self.ws.clone();
        let bytes = Bytes::from(frame.encode_to_vec());
        let kill = self.kill.clone();
        let patience = self.shared.heartbeat() * MAX_MISSED;
        let written = async move {
            tokio::select! {
                () = kill.cancelled() => false,
                result = tokio::time::timeout(patience, ws.binary(bytes)) => matches!(result, Ok(Ok(()))),
            }
        };
        ctx.wait(written.into_actor(self).map(move |written, _, ctx| {
            if last || !written {
                ctx.stop();
            }
        }));
    }

    fn refuse(&mut self, refusal: &Refusal, ctx: &mut Context<Self>) {
        if std::mem::replace(&mut self.ending, true) {
            return;
        }
        self.shared.metrics.refused.with_label_values(&[refusal.code]).inc();
        tracing::warn!(
            session = %self.id,
            node = ?self.node,
            code = refusal.code,
            reason = refusal.reason,
            "node session refused"
        );
        self.write(&frames::refused(refusal.code, &refusal.reason), true, ctx);
    }

    fn frame(&mut self, bytes: &Bytes, ctx: &mut Context<Self>) {
        let frame: v1::FromNode = match infera_wire::decode("FromNode", bytes) {
            Ok(frame) => frame,
            Err(error) => return self.refuse(&Refusal::new("bad_frame", error.to_string()), ctx),
        };
        match (self.node, frame.message) {
            (_, None) => self.refuse(&Refusal::new("bad_frame", "a frame without a known message"), ctx),
            (None, Some(from_node::Message::Hello(hello))) if self.hello.is_none() => self.hello(&hello, ctx),
            (_, Some(from_node::Message::RangeProof(proof))) if self.hello.is_some() => {
                self.proof(&proof, ctx)
            }
            (None, Some(_)) if self.hello.is_none() => {
                self.refuse(&Refusal::new("hello_expected", "the first frame must be a hello"), ctx);
            }
            (None, Some(message)) if !matches!(message, from_node::Message::Hello(_)) => {
                self.refuse(&Refusal::new("proof_expected", "the weights are not proved yet"), ctx);
            }
            (_, Some(from_node::Message::Hello(_))) => {
                self.refuse(&Refusal::new("hello_twice", "a session has one hello"), ctx);
            }
            (None, Some(_)) => {}
            (Some(node), Some(message)) => match command(node, self.id, message) {
                Ok(command) => self.hand_over(node, command, ctx),
                Err(error) => self.refuse(&Refusal::new("bad_frame", error.to_string()), ctx),
            },
        }
    }

    fn hello(&mut self, wire: &v1::Hello, ctx: &mut Context<Self>) {
        let now = clock::now_ms();
        let roots = self.shared.live.now();
        let (registry, stakes) = (roots.registries.current(), &roots.stakes);
        let checked = hello::check(wire, &self.nonce, &self.shared.domain, registry, stakes, now);
        let hello = match checked {
            Ok(hello) => hello,
            Err(refusal) => return self.refuse(&refusal, ctx),
        };
        self.hello = Some(hello);
        self.ask_for_ranges(ctx);
    }

    fn join(&mut self, ctx: &mut Context<Self>) {
        let Some(hello) = self.hello.clone() else { return };
        let now = clock::now_ms();
        let (sender, mut receiver) = mpsc::channel(self.shared.session_queue);
        let join = Join {
            info: Connected {
                node: hello.claims.node,
                operator: hello.claims.operator,
                session: self.id,
                model_root: hello.claims.weights_root,
                class: hello.claims.class.clone(),
                slots: hello.claims.slots,
                release_hash: hello.claims.release_hash,
                bound: SignedBinding { binding: hello.claims.binding, signature: hello.binding_signature },
                version: hello.version,
                connected_at_ms: now,
            },
            outgoing: Outgoing { session: self.id, frames: sender, kill: self.kill.clone() },
        };
        let node = hello.claims.node;
        let joined = self.shared.assignments.send(join);
        ctx.wait(joined.into_actor(self).map(move |joined, act, ctx| {
            if joined.is_err() {
                return ctx.stop();
            }
            act.node = Some(node);
            tracing::info!(session = %act.id, %node, "node connected");
            act.keep_presence(ctx);
            ctx.add_stream(futures::stream::poll_fn(move |cx| receiver.poll_recv(cx)));
            let welcome = frames::welcome(act.id, act.shared.heartbeat_secs);
            act.write(&welcome, false, ctx);
        }));
    }

    fn hand_over(&mut self, node: NodeId, command: Command, ctx: &mut Context<Self>) {
        let slot = slot_of(&command);
        let answered = self.shared.assignments.send(Frame { node, session: self.id, command });
        ctx.wait(answered.into_actor(self).map(move |answer, act, ctx| match answer {
            Ok(Ok(())) => {}
            Ok(Err(FrameError::Superseded)) | Err(_) => ctx.stop(),
            Ok(Err(FrameError::Rejected(rejection))) => act.rejected(rejection, slot, ctx),
        }));
    }

    fn rejected(&mut self, rejection: Rejection, slot: Option<SlotFrame>, ctx: &mut Context<Self>) {
        let reason = rejection.to_string();
        self.shared.metrics.rejected.with_label_values(&[label(rejection)]).inc();
        tracing::debug!(session = %self.id, node = ?self.node, reason, "frame rejected");
        match (rejection, slot) {
            (Rejection::BadSignature, _) => self.refuse(&Refusal::new("bad_signature", reason), ctx),
            (Rejection::BadDeltas, _) => self.refuse(&Refusal::new("bad_deltas", reason), ctx),
            // The node works on something that nobody waits for.
            (Rejection::Stale | Rejection::NotLeased, Some(slot)) => {
                self.write(&frames::cancel(slot.request, slot.attempt, &reason), false, ctx);
            }
            (Rejection::Late, Some(slot)) if slot.is_commit => {
                self.write(&frames::cancel(slot.request, slot.attempt, &reason), false, ctx);
            }
            _ => {}
        }
    }

    fn beat(&mut self, ctx: &mut Context<Self>) {
        if self.missed >= MAX_MISSED {
            return self
                .refuse(&Refusal::new("silent", format!("{MAX_MISSED} pings without an answer")), ctx);
        }
        self.missed += 1;
        if let (Some(_), Some(hello)) = (self.node, &self.hello) {
            let roots = self.shared.live.now();
            if let Err(refusal) = hello::goes_on(&hello.claims, &roots.stakes, clock::now_ms()) {
                return self.refuse(&refusal, ctx);
            }
            self.keep_presence(ctx);
        }
        let mut ws = self.ws.clone();
        let kill = self.kill.clone();
        let patience = self.shared.heartbeat();
        let pinged = async move {
            tokio::select! {
                () = kill.cancelled() => false,
                result = tokio::time::timeout(patience, ws.ping(b"")) => matches!(result, Ok(Ok(()))),
            }
        };
        ctx.wait(pinged.into_actor(self).map(|pinged, _, ctx| {
            if !pinged {
                ctx.stop();
            }
        }));
    }

    /// Renews `presence`; a newer session of the same key at another replica ends this one. The
    /// key-value store is advisory: while it is away, sessions go on.
    fn keep_presence(&mut self, ctx: &mut Context<Self>) {
        let Some(node) = self.node else { return };
        let (kv, key) = (self.shared.kv.clone(), presence_key(&node));
        let mine = presence_value(&self.shared.replica, self.id);
        let first = self.missed == 0;
        let ttl = self.shared.heartbeat() * (MAX_MISSED + 1);
        let kept = async move {
            if !first {
                let there = kv.get(&key).await?;
                if there.is_some_and(|value| newer(&value, &mine)) {
                    return Ok(false);
                }
            }
            kv.set(&key, &mine, ttl).await.map(|()| true)
        };
        ctx.spawn(kept.into_actor(self).map(|kept, act, ctx| match kept {
            Ok(true) => {}
            Ok(false) => {
                act.refuse(
                    &Refusal::new("replaced", "a newer session of this node is at another replica"),
                    ctx,
                );
            }
            Err(error) => tracing::warn!(%error, "presence is not written"),
        }));
    }
}

impl Actor for NodeSession {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        let challenge = v1::Challenge {
            nonce: self.nonce.to_vec(),
            session: self.id.as_bytes().to_vec(),
            chain_id: self.shared.domain.chain_id,
            contract: self.shared.domain.contract.to_vec(),
        };
        self.write(&frames::challenge(challenge), false, ctx);
        ctx.run_interval(self.shared.heartbeat(), Self::beat);
        let hello = Duration::from_secs(u64::from(self.shared.hello_secs));
        ctx.run_later(hello, |act, ctx| {
            if act.hello.is_none() {
                act.refuse(&Refusal::new("hello_timeout", "no hello in time"), ctx);
            }
        });
        let kill = self.kill.clone();
        let killed = async move { kill.cancelled().await };
        ctx.spawn(killed.into_actor(self).map(|(), _, ctx| ctx.stop()));
    }

    fn stopped(&mut self, _: &mut Self::Context) {
        let (shared, ws, id, node) = (self.shared.clone(), self.ws.clone(), self.id, self.node);
        actix_rt::spawn(async move {
            if let Some(node) = node {
                tracing::info!(session = %id, %node, "node disconnected");
                // Fails only when the dispatcher itself has ended.
                let _ = shared.assignments.send(Leave { node, session: id }).await;
                forget_presence(&shared, &node, id).await;
            }
            // A socket that is stuck is simply dropped.
            let _ = tokio::time::timeout(Duration::from_secs(2), ws.close(None)).await;
        });
    }
}

impl StreamHandler<Result<AggregatedMessage, ProtocolError>> for NodeSession {
    fn handle(&mut self, message: Result<AggregatedMessage, ProtocolError>, ctx: &mut Self::Context) {
        if self.ending {
            return;
        }
        self.missed = 0;
        match message {
            Ok(AggregatedMessage::Binary(bytes)) => self.frame(&bytes, ctx),
            Ok(AggregatedMessage::Pong(_)) => {}
            Ok(AggregatedMessage::Ping(payload)) => {
                let mut ws = self.ws.clone();
                let patience = self.shared.heartbeat();
                let ponged = async move { tokio::time::timeout(patience, ws.pong(&payload)).await };
                ctx.wait(ponged.into_actor(self).map(|ponged, _, ctx| {
                    if !matches!(ponged, Ok(Ok(()))) {
                        ctx.stop();
                    }
                }));
            }
            Ok(AggregatedMessage::Close(_)) => ctx.stop(),
            Ok(AggregatedMessage::Text(_)) => {
                self.refuse(&Refusal::new("bad_frame", "frames are binary protobuf, not text"), ctx);
            }
            Err(error) => self.refuse(&Refusal::new("bad_frame", error.to_string()), ctx),
        }
    }
}

/// What `Assignments` says to the node. The stream ends when it drops its side: so does the session.
impl StreamHandler<v1::FromDispatcher> for NodeSession {
    fn handle(&mut self, frame: v1::FromDispatcher, ctx: &mut Self::Context) {
        if self.ending {
            return;
        }
        let last = matches!(frame.message, Some(from_dispatcher::Message::Refused(_)));
        self.ending = last;
        self.write(&frame, last, ctx);
    }
}

/// The slot that a frame is about.
#[derive(Clone, Copy)]
struct SlotFrame {
    request: Uuid,
    attempt: u32,
    is_commit: bool,
}

fn slot_of(command: &Command) -> Option<SlotFrame> {
    let slot = |request: &Uuid, attempt: &u32, is_commit| {
        Some(SlotFrame { request: *request, attempt: *attempt, is_commit })
    };
    match command {
        Command::Committed { request, attempt, .. } => slot(request, attempt, true),
        Command::Revealed { request, attempt, .. }
        | Command::Refereed { request, attempt, .. }
        | Command::Deltas { request, attempt, .. } => slot(request, attempt, false),
        _ => None,
    }
}

fn command(node: NodeId, session: Uuid, message: from_node::Message) -> Result<Command, WireError> {
    Ok(match message {
        from_node::Message::Hello(_) | from_node::Message::RangeProof(_) => {
            return Err(WireError::Missing { field: "session" });
        }
        from_node::Message::RefereeReport(report) => Command::Refereed {
            node,
            request: convert::uuid("referee_report.request_id", &report.request_id)?,
            attempt: report.attempt,
            reports: report
                .reports
                .into_iter()
                .map(|report| {
                    Ok(SignedScores {
                        signature: convert::fixed("referee_report.signature", &report.signature)?,
                        scores: report.scores,
                    })
                })
                .collect::<Result<_, WireError>>()?,
        },
        from_node::Message::Draining(_) => Command::NodeDraining { node, session },
        from_node::Message::Deltas(deltas) => Command::Deltas {
            node,
            request: convert::uuid("deltas.request_id", &deltas.request_id)?,
            attempt: deltas.attempt,
            offset: deltas.offset,
            tokens: deltas.tokens,
        },
        from_node::Message::Commit(commit) => Command::Committed {
            node,
            request: convert::uuid("commit.request_id", &commit.request_id)?,
            attempt: commit.attempt,
            commit: convert::commitment(&commit)?,
            statement: convert::fixed("commit.statement", &commit.statement)?,
        },
        from_node::Message::Reveal(reveal) => Command::Revealed {
            node,
            request: convert::uuid("reveal.request_id", &reveal.request_id)?,
            attempt: reveal.attempt,
            statement: convert::fixed("reveal.statement", &reveal.statement)?,
            reveal: Box::new(convert::reveal(&reveal)?),
        },
        from_node::Message::Decline(decline) => Command::Declined {
            node,
            request: convert::uuid("decline.request_id", &decline.request_id)?,
            attempt: decline.attempt,
            decline: convert::decline(&decline)?,
        },
    })
}

fn label(rejection: Rejection) -> &'static str {
    match rejection {
        Rejection::AlreadyHeld => "already_held",
        Rejection::Full => "full",
        Rejection::Stale => "stale",
        Rejection::NotLeased => "not_leased",
        Rejection::Late => "late",
        Rejection::NotAsked => "not_asked",
        Rejection::BadSignature => "bad_signature",
        Rejection::Equivocation => "equivocation",
        Rejection::BadDeltas => "bad_deltas",
    }
}

fn presence_key(node: &NodeId) -> String {
    format!("infera:node:{}", hex::encode(node.0))
}

/// The session's UUIDv7, which orders sessions by their start, and the replica that has it.
fn presence_value(replica: &str, session: Uuid) -> Vec<u8> {
    format!("{} {replica}", session.simple()).into_bytes()
}

/// Whether the presence `there` is of a session that started after `mine`.
fn newer(there: &[u8], mine: &[u8]) -> bool {
    there > mine
}

async fn forget_presence(shared: &Shared, node: &NodeId, session: Uuid) {
    let key = presence_key(node);
    let mine = presence_value(&shared.replica, session);
    let forgotten = match shared.kv.get(&key).await {
        Ok(Some(value)) if value == mine => shared.kv.delete(&key).await,
        Ok(_) => Ok(()),
        Err(error) => Err(error),
    };
    if let Err(error) = forgotten {
        tracing::warn!(%error, "presence is not removed; it expires");
    }
}
