//! What this node has leased: from the lease to the reveal, over lost connections and crashes.

use std::{collections::HashMap, sync::Arc, time::Duration};

use infera_protocol::{
    bytes::Hash32,
    commitment::{Slot, commitment, decline_digest},
    request::{Output, Request},
};
use infera_runtime::{clock, trace};
use infera_wire::{convert, v1};
use parking_lot::Mutex;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};
use tracing::Instrument;
use uuid::Uuid;

use crate::{
    engine::{Busy, Engine, Event, Job},
    fault::{self, Fault},
    identity::Identity,
    journal::{Journal, Key, Promise},
};

/// Tokens of a stream go out this often; the first one at once.
const DELTA_EVERY: Duration = Duration::from_millis(50);
/// A promise that nobody asked for in this time is forgotten.
const KEEP_MS: i64 = 3_600 * 1_000;

/// What does not change while the node runs.
pub struct Setting {
    pub model_root: Hash32,
    pub end_tokens: Vec<u32>,
    pub fault: Option<Fault>,
}

enum State {
    /// The engine's job, and the moment after which nobody wants it.
    Generating {
        job: Uuid,
        until_ms: i64,
    },
    Promised {
        promise: Box<Promise>,
        until_ms: i64,
    },
}

/// All slots, and the way to the dispatcher while there is one.
pub struct Slots {
    engine: Engine,
    pub identity: Identity,
    journal: Journal,
    pub setting: Setting,
    states: Mutex<HashMap<Key, State>>,
    outgoing: Mutex<Option<mpsc::Sender<v1::FromNode>>>,
}

impl Slots {
    /// Takes up the promises of an earlier run.
    pub fn new(engine: Engine, identity: Identity, journal: Journal, setting: Setting) -> Self {
        let until_ms = clock::now_ms() + KEEP_MS;
        let states = journal
            .all()
            .unwrap_or_else(|error| {
                tracing::warn!(%error, "the journal can't be listed");
                Vec::new()
            })
            .into_iter()
            .map(|(key, promise)| (key, State::Promised { promise: Box::new(promise), until_ms }))
            .collect();
        Self { engine, identity, journal, setting, states: Mutex::new(states), outgoing: Mutex::new(None) }
    }

    /// A new connection: promises that are still open are sent again, byte for byte.
    pub fn connected(&self, outgoing: mpsc::Sender<v1::FromNode>) {
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
        *self.outgoing.lock() = Some(outgoing);
        for commit in again {
            self.send(v1::from_node::Message::Commit(commit));
        }
    }

    pub fn disconnected(&self) {
        *self.outgoing.lock() = None;
    }

    /// Slots whose request is not closed yet.
    pub fn open(&self) -> usize {
        self.states.lock().len()
    }

    /// Slots that the engine works on.
    pub fn generating(&self) -> usize {
        self.states.lock().values().filter(|state| matches!(state, State::Generating { .. })).count()
    }

    /// Frames that find no connection, or a full queue, are dropped: deltas are not durable, and promises are sent
    /// again with the next connection.
    fn send(&self, message: v1::from_node::Message) {
        let outgoing = self.outgoing.lock();
        if let Some(sender) = &*outgoing
            && sender.try_send(v1::FromNode { message: Some(message) }).is_err()
        {
            tracing::debug!("a frame found no room");
        }
    }

    fn place(&self, request: &Request, attempt: u32) -> Slot {
        Slot { request_hash: request.hash(&self.identity.domain), attempt, node: self.identity.node() }
    }

    /// Takes a lease, or declines it.
    pub fn lease(self: &Arc<Self>, lease: &v1::Lease, draining: bool) {
        let request = match convert::required("lease.request", &lease.request).and_then(convert::request) {
            Ok(request) => request,
            Err(error) => {
                tracing::warn!(%error, "a lease is malformed");
                return;
            }
        };
        let key = (request.id, lease.attempt);
        if self.known(key) {
            return;
        }
        let taken = if draining {
            Err("draining")
        } else if request.model_root != self.setting.model_root {
            Err("model")
        } else {
            self.start(&request)
        };
        match taken {
            Ok((job, events)) => {
                self.states.lock().insert(key, State::Generating { job, until_ms: lease.commit_deadline_ms });
                let span = tracing::info_span!(
                    "node generate",
                    "gen_ai.operation.name" = "chat",
                    request_id = %request.id,
                    attempt = lease.attempt,
                    node = %self.identity.node(),
                    "gen_ai.usage.output_tokens" = tracing::field::Empty,
                );
                trace::set_parent(&span, &lease.traceparent);
                let (slots, stream) = (self.clone(), lease.stream);
                tokio::spawn(
                    async move { slots.generate(request, key, events, stream).await }.instrument(span),
                );
            }
            Err(reason) => self.decline(&request, key, reason),
        }
    }

    /// A lease that was delivered twice, or that an earlier run had promised: the same answer again.
    fn known(&self, key: Key) -> bool {
        let commit = match self.states.lock().get(&key) {
            None => return false,
            Some(State::Generating { .. }) => return true,
            Some(State::Promised { promise, .. }) => promise.commit.clone(),
        };
        self.send(v1::from_node::Message::Commit(commit));
        true
    }

    fn start(&self, request: &Request) -> Result<(Uuid, mpsc::Receiver<Event>), &'static str> {
        let job = Job {
            id: Uuid::now_v7(),
            prompt: request.prompt.clone(),
            params: request.sampling,
            max_tokens: request.max_tokens,
            stop: request.stop.clone(),
            seed: request.seed,
            end_tokens: self.setting.end_tokens.clone(),
        };
        let id = job.id;
        self.engine.generate(job).map(|events| (id, events)).map_err(|busy| {
            tracing::info!(%busy, request_id = %request.id, "lease is declined");
            match busy {
                Busy::Full { .. } => "full",
                _ => "engine",
            }
        })
    }

    fn decline(&self, request: &Request, key: Key, reason: &str) {
        let digest = decline_digest(&self.identity.domain, &self.place(request, key.1), reason);
        self.send(v1::from_node::Message::Decline(v1::Decline {
            request_id: key.0.as_bytes().to_vec(),
            attempt: key.1,
            reason: reason.to_owned(),
            signature: self.identity.sign(&digest).to_vec(),
        }));
    }

    async fn generate(&self, request: Request, key: Key, events: mpsc::Receiver<Event>, stream: bool) {
        let began = Instant::now();
        match self.collect(&request, key, events, stream).await {
            Ok(Some(output)) => {
                tracing::Span::current().record("gen_ai.usage.output_tokens", output.tokens.len());
                let tokens = output.tokens.len();
                if let Err(error) = self.promise(&request, key, output) {
                    tracing::error!(%error, request_id = %key.0, "a commitment can't be written and is not sent");
                    self.states.lock().remove(&key);
                    self.decline(&request, key, "engine");
                    return;
                }
                let ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
                tracing::info!(request_id = %key.0, attempt = key.1, tokens, ms, "lease is committed");
            }
            Ok(None) => {
                self.states.lock().remove(&key);
            }
            Err(reason) => {
                tracing::error!(reason, request_id = %key.0, "the engine failed");
                self.states.lock().remove(&key);
                self.decline(&request, key, "engine");
            }
        }
    }

    /// All tokens; None if the job was cancelled.
    async fn collect(
        &self,
        request: &Request,
        key: Key,
        mut events: mpsc::Receiver<Event>,
        stream: bool,
    ) -> Result<Option<Output>, String> {
        if let Some(forged) = self.forged(request) {
            self.deltas(key, 0, &forged.tokens, stream);
            return Ok(Some(forged));
        }
        let (mut tokens, mut fingerprints, mut sent) = (Vec::new(), Vec::new(), 0);
        let mut last_sent: Option<Instant> = None;
        while let Some(event) = events.recv().await {
            match event {
                Event::Token { token, fingerprint } => {
                    tokens.push(token);
                    fingerprints.extend(fingerprint.encode());
                    self.misbehave(tokens.len()).await;
                    if last_sent.is_none_or(|last| last.elapsed() >= DELTA_EVERY) {
                        self.deltas(key, sent, &tokens[sent..], stream);
                        sent = tokens.len();
                        last_sent = Some(Instant::now());
                    }
                }
                Event::Finished { finish } => {
                    self.deltas(key, sent, &tokens[sent..], stream);
                    return Ok(Some(Output { tokens, fingerprints, finish }));
                }
                Event::Failed { reason } => return Err(reason),
            }
        }
        Ok(None)
    }

    fn forged(&self, request: &Request) -> Option<Output> {
        let vocabulary = u32::try_from(self.engine.vocabulary()).unwrap_or(u32::MAX);
        self.setting.fault.and_then(|fault| fault::forged(fault, request, vocabulary))
    }

    async fn misbehave(&self, tokens: usize) {
        match self.setting.fault {
            Some(Fault::Slow) => sleep(fault::SLOW).await,
            Some(Fault::Silent) => std::future::pending().await,
            Some(Fault::Crash) if tokens >= fault::CRASH_AFTER => std::process::abort(),
            _ => {}
        }
    }

    fn deltas(&self, key: Key, offset: usize, tokens: &[u32], stream: bool) {
        if stream && !tokens.is_empty() {
            self.send(v1::from_node::Message::Deltas(v1::Deltas {
                request_id: key.0.as_bytes().to_vec(),
                attempt: key.1,
                offset: u32::try_from(offset).unwrap_or(u32::MAX),
                tokens: tokens.to_vec(),
            }));
        }
    }

    /// Commits: journal first, then the wire.
    fn promise(&self, request: &Request, key: Key, output: Output) -> std::io::Result<()> {
        let salt = Hash32(rand::random());
        let digest = commitment(&self.identity.domain, &self.place(request, key.1), &output, &salt);
        let promise = Promise {
            commit: v1::Commit {
                request_id: key.0.as_bytes().to_vec(),
                attempt: key.1,
                commitment: digest.to_vec(),
                signature: self.identity.sign(&digest).to_vec(),
            },
            reveal: v1::Reveal {
                request_id: key.0.as_bytes().to_vec(),
                attempt: key.1,
                finish: convert::finish_to_wire(output.finish).into(),
                tokens: output.tokens,
                fingerprints: output.fingerprints,
                salt: salt.to_vec(),
            },
        };
        self.journal.write(key, &promise)?;
        infera_runtime::planned::hit("node.committed");
        let commit = promise.commit.clone();
        let until_ms = clock::now_ms() + KEEP_MS;
        self.states.lock().insert(key, State::Promised { promise: Box::new(promise), until_ms });
        self.send(v1::from_node::Message::Commit(commit));
        Ok(())
    }

    /// Opens a commitment.
    pub fn reveal(&self, key: Key) {
        let reveal = match self.states.lock().get(&key) {
            Some(State::Promised { promise, .. }) => Some(promise.reveal.clone()),
            _ => None,
        };
        match reveal {
            Some(reveal) => self.send(v1::from_node::Message::Reveal(reveal)),
            None => {
                tracing::warn!(request_id = %key.0, attempt = key.1, "asked to reveal what was not committed")
            }
        }
    }

    /// Stops computing a slot; a promise stays until it is released.
    pub fn cancel(&self, key: Key) {
        if let Some(State::Generating { job, .. }) = self.states.lock().get(&key) {
            self.engine.cancel(*job);
        }
    }

    /// The request is closed.
    pub fn release(&self, key: Key) {
        self.cancel(key);
        self.states.lock().remove(&key);
        self.journal.forget(key);
    }

    /// Ends what nobody waits for any more.
    pub fn expire(&self, now_ms: i64) {
        let late: Vec<Key> = {
            let states = self.states.lock();
            let until = |state: &State| match state {
                State::Generating { until_ms, .. } | State::Promised { until_ms, .. } => *until_ms,
            };
            states.iter().filter(|(_, state)| until(state) < now_ms).map(|(key, _)| *key).collect()
        };
        for key in late {
            self.release(key);
        }
    }
}
