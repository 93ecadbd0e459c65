//! What this node has leased: from the lease to the reveal, over lost connections and crashes.

mod lease;
mod outgoing;
mod referee;

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use infera_protocol::{
    commitment::{Slot, decline_digest},
    request::Request,
};
use infera_runtime::{CancellationToken, clock};
use infera_wire::v1;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, mpsc};
use uuid::Uuid;

use crate::{
    engine::Engine,
    fault::Faults,
    grammar::Grammars,
    identity::Identity,
    journal::{Journal, Key, Promise},
    weights::Weights,
};
pub(crate) use lease::Work;
use outgoing::Outgoing;
use referee::Referees;

/// A promise that nobody asked for in this time is forgotten.
const KEEP_MS: i64 = 3_600 * 1_000;
/// Requests that are older are not begun: the gateway lets one live for a day at most.
const OLDEST_MS: i64 = 25 * KEEP_MS;
/// Closed slots are known for longer than they could be leased, by an hour for clocks that are set.
const KEEP_CLOSED_MS: i64 = OLDEST_MS + KEEP_MS;
/// How far this machine's clock may be behind the dispatcher's before a lease that runs is given up.
const CLOCK_SKEW_MS: i64 = 60_000;
/// Proofs of the weights that are made at once; further challenges are not answered.
const PROOFS: usize = 4;

/// What does not change while the node runs.
pub struct Setting {
    pub weights: Weights,
    pub end_tokens: Vec<u32>,
    /// Answers that the engine scores at once.
    pub scorers: usize,
    /// How it misbehaves.
    pub faults: Option<Faults>,
}

enum State {
    /// The engine's job, and the moment after which nobody wants it.
    Generating {
        job: Uuid,
        until_ms: i64,
        /// By the dispatcher or a newer attempt: its end needs no answer.
        cancelled: bool,
    },
    Promised {
        promise: Box<Promise>,
        until_ms: i64,
    },
}

/// All slots, and the way to the dispatcher while there is one.
pub struct Slots {
    pub(crate) engine: Engine,
    pub identity: Identity,
    journal: Journal,
    pub setting: Setting,
    states: Mutex<HashMap<Key, State>>,
    /// When closed slots are next forgotten, ms.
    forget_at_ms: AtomicI64,
    referees: Referees,
    proofs: Arc<Semaphore>,
    grammars: Arc<Grammars>,
    outgoing: Outgoing,
}

impl Slots {
    /// Takes up the promises of an earlier run.
    ///
    /// # Errors
    /// The journal can't be listed: without it, this node might answer a slot twice.
    pub fn new(engine: Engine, identity: Identity, journal: Journal, setting: Setting) -> io::Result<Self> {
        let until_ms = clock::now_ms() + KEEP_MS;
        let mut states = HashMap::new();
        for (key, promise) in journal.all()? {
            if promise.commit.statement.is_empty() {
                // Of a version whose promises no dispatcher takes any more: each would end the session.
                journal.close(key);
            } else {
                states.insert(key, State::Promised { promise: Box::new(promise), until_ms });
            }
        }
        let grammars = Grammars::new(engine.tokenizer().clone(), setting.end_tokens.clone());
        Ok(Self {
            engine,
            identity,
            journal,
            states: Mutex::new(states),
            forget_at_ms: AtomicI64::new(0),
            referees: Referees::new(setting.scorers),
            setting,
            proofs: Arc::new(Semaphore::new(PROOFS)),
            grammars,
            outgoing: Outgoing::default(),
        })
    }

    /// Cancelled once the engine has ended.
    pub fn engine_ended(&self) -> CancellationToken {
        self.engine.ended()
    }

    /// Ends all jobs, which are declined, and gives the engine's memory back.
    pub async fn pause(self: &Arc<Self>) {
        let slots = self.clone();
        // An engine that has ended is noticed elsewhere.
        let _ = tokio::task::spawn_blocking(move || slots.engine.pause()).await;
        tracing::info!("paused");
    }

    /// Loads the model again, if it is not there.
    pub async fn resume(self: &Arc<Self>) {
        let slots = self.clone();
        let _ = tokio::task::spawn_blocking(move || slots.engine.resume()).await;
    }

    /// A new connection: promises that are still open are sent again, byte for byte. Returns what is to be written, and
    /// what is cancelled when too much of it waits.
    pub fn connected(&self) -> (mpsc::Receiver<v1::FromNode>, CancellationToken) {
        let again: Vec<_> = {
            let states = self.states.lock();
            states
                .values()
                .filter_map(|state| match state {
                    State::Promised { promise, .. } => Some(promise.commit.clone()),
                    State::Generating { .. } => None,
                })
                .collect()
        };
        let opened = self.outgoing.open(again.len());
        for commit in again {
            self.outgoing.send(v1::from_node::Message::Commit(commit));
        }
        opened
    }

    pub fn disconnected(&self) {
        self.outgoing.close();
    }

    /// Slots whose request is not closed yet, and answers that are being checked.
    pub fn open(&self) -> usize {
        self.states.lock().len() + self.referees.running()
    }

    /// What the engine works on.
    pub fn generating(&self) -> usize {
        let slots = self.states.lock();
        let generating = slots.values().filter(|state| matches!(state, State::Generating { .. })).count();
        generating + self.referees.running()
    }

    /// Frames that wait for the wire.
    pub fn queued(&self) -> usize {
        self.outgoing.queued()
    }

    pub fn say_draining(&self) {
        self.outgoing.send(v1::from_node::Message::Draining(v1::Draining {}));
    }

    fn place(&self, request: &Request, attempt: u32) -> Slot {
        Slot { request_hash: request.hash(&self.identity.domain), attempt, node: self.identity.node() }
    }

    fn decline(&self, request: &Request, key: Key, reason: &str) {
        let digest = decline_digest(&self.identity.domain, &self.place(request, key.1), reason);
        self.outgoing.send(v1::from_node::Message::Decline(v1::Decline {
            request_id: key.0.as_bytes().to_vec(),
            attempt: key.1,
            reason: reason.to_owned(),
            signature: self.identity.sign(&digest).to_vec(),
        }));
    }

    /// Proves that the weights are at hand, beside everything else. What can't be proved is not answered: the
    /// dispatcher ends the session, and the operator finds the reason in the log.
    pub fn prove(self: &Arc<Self>, challenge: v1::RangeChallenge) {
        let Ok(permit) = self.proofs.clone().try_acquire_owned() else {
            return tracing::warn!(most = PROOFS, "too many challenges at once");
        };
        if !self.outgoing.takes_large() {
            return tracing::warn!("challenged by a dispatcher that does not read");
        }
        let slots = self.clone();
        tokio::spawn(async move {
            if let Some(proof) = slots.proof(challenge).await {
                slots.outgoing.send(v1::from_node::Message::RangeProof(proof));
            }
            drop(permit);
        });
    }

    /// The answer to a challenge; None, with a line in the log, if there is none.
    pub async fn proof(self: &Arc<Self>, challenge: v1::RangeChallenge) -> Option<v1::RangeProof> {
        let slots = self.clone();
        let made = tokio::task::spawn_blocking(move || slots.setting.weights.prove(&challenge)).await;
        match made.map_err(io::Error::other).flatten() {
            Ok(proof) => Some(proof),
            Err(error) => {
                tracing::error!(%error, "the weights can't be proved: start the node again if the file was changed");
                None
            }
        }
    }

    /// Opens a commitment.
    pub fn reveal(self: &Arc<Self>, key: Key, deadline_ms: i64) {
        let reveal = match self.states.lock().get(&key) {
            Some(State::Promised { promise, .. }) => Some(promise.reveal.clone()),
            _ => None,
        };
        let Some(reveal) = reveal else {
            return tracing::warn!(request_id = %key.0, attempt = key.1, "asked to reveal what was not committed");
        };
        match self.setting.faults.as_ref().and_then(|faults| faults.reveals_after(deadline_ms)) {
            None => self.outgoing.send(v1::from_node::Message::Reveal(reveal)),
            Some(pause) => {
                let slots = self.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(pause).await;
                    slots.outgoing.send(v1::from_node::Message::Reveal(reveal));
                });
            }
        }
    }

    /// Stops computing a slot, and checking its answers; a promise stays until it is released.
    pub fn cancel(&self, key: Key) {
        if let Some(State::Generating { job, cancelled, .. }) = self.states.lock().get_mut(&key) {
            *cancelled = true;
            self.engine.cancel(*job);
        }
        self.referees.cancel(key);
    }

    /// The request is closed.
    pub fn release(&self, key: Key) {
        self.cancel(key);
        self.states.lock().remove(&key);
        self.journal.close(key);
    }

    /// Ends what nobody waits for any more.
    pub fn expire(self: &Arc<Self>, now_ms: i64) {
        let late: Vec<Key> = {
            let states = self.states.lock();
            let until = |state: &State| match state {
                State::Generating { until_ms, .. } => until_ms.saturating_add(CLOCK_SKEW_MS),
                State::Promised { until_ms, .. } => *until_ms,
            };
            states.iter().filter(|(_, state)| until(state) < now_ms).map(|(key, _)| *key).collect()
        };
        for key in late {
            self.release(key);
        }
        self.referees.expire(now_ms - CLOCK_SKEW_MS);
        if self.forget_at_ms.load(Ordering::Relaxed) <= now_ms {
            self.forget_at_ms.store(now_ms + KEEP_MS, Ordering::Relaxed);
            let before_ms = u64::try_from(now_ms - KEEP_CLOSED_MS).unwrap_or(0);
            let slots = self.clone();
            // A busy node closes a million slots a day.
            tokio::task::spawn_blocking(move || {
                if let Err(error) = slots.journal.forget(before_ms) {
                    tracing::warn!(%error, "closed slots stay in the journal");
                }
            });
        }
    }
}

/// How long until a moment of the clock, and 0 if it is over.
pub(crate) fn until(moment_ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(moment_ms.saturating_sub(clock::now_ms())).unwrap_or(0))
}
